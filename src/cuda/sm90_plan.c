/* The search for boxes: for fwd_sm90 with the costs of fwd_sm90_plan.c, for bwd_sm90_dq with those of bwd_sm90_dq.c.
 * All query boxes that nearly fill a tile's rows, ranked by the keys that their unions hold; for the best of them all
 * key boxes of each N; for the best of those a second to fourth shape of key box, for tiles whose union the first fits
 * badly (at clamped borders). Counts are exact; time is a model. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/sm90_axis.h"
#include "cuda/sm90_plan.h"

enum {
    GROUPS = NBHD_SM90_ROWS / 64,
    Q_BOXES = 16,   /* query boxes that are looked at closely */
    FINALISTS = 16, /* pairs of query box and variant that get more shapes */
    MOST_COMBINATIONS = 1024
};

struct search {
    const struct nbhd_sm90_kernel *kernel;
    const struct nbhd_problem *problem;
    struct axis_memo memo[3];
    int multiprocessors, shared_max;
    int sliced, many; /* as in struct nbhd_sm90_plan */
    int eighths;      /* of N that a key box fills at least */
};

/* Whether every slice (batch element, dilation group) needs maps of its own: there are no coordinates for it. */
static int is_sliced(const struct nbhd_problem *problem)
{
    for (int a = 0; a < 3; a++)
        if (problem->axis[a].dilation > 8)
            return 1;
    return problem->axis[0].length > 1 && problem->desc.batch > 1;
}

double nbhd_sm90_slices(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan)
{
    double slices = (double)problem->desc.batch * (problem->desc.heads / plan->pack);
    for (int a = 0; a < 3; a++)
        slices *= problem->axis[a].dilation;
    return slices;
}

/* ---- what fits ---- */

/* Of many sequences other lengths come than the problem's. */
static int has_axis(const struct search *s, int a)
{
    const struct nbhd_axis axis = s->problem->axis[a];
    return s->many ? a >= 3 - s->problem->desc.rank : axis.length > 1 || axis.keys > 1;
}

/* Whether some tile's boxes of extent k need a mask on the axis. */
static int needs_mask(struct search *s, int a, int q, int k)
{
    return s->many ? has_axis(s, a) : nbhd_sm90_visits(nbhd_sm90_tiles(&s->memo[a], q), k).masked;
}

/* Moves the columns of a shape with two steps of them so that each axis's are in one, if they can be: fwd_sm90 masks a
 * box only in the steps of axes on which it needs a mask. */
static void keep_in_steps(int at[4], const int extent[3])
{
    int used[2] = {0, 0}, moved[3];
    for (int a = 0; a < 3; a++) {
        if ((moved[a] = at[a]) < 0)
            continue;
        const int step = used[0] + extent[a] > 16;
        if (used[step] + extent[a] > 16)
            return;
        moved[a] = 16 * step + used[step];
        used[step] += extent[a];
    }
    memcpy(at, moved, sizeof moved);
}

/* Lays out the mask columns of a plan's shapes; 0 if they are too many. A problem of one axis is masked by bits: it has
 * too many coordinates, and few boxes that need a mask. */
static int lay_out_masks(struct search *s, struct nbhd_sm90_plan *p)
{
    const int one_axis = !has_axis(s, 0) && !has_axis(s, 1);
    p->mask_bits = s->problem->desc.extra % p->variant.n != 0;
    p->mask_steps = p->pad = 0;
    for (int i = 0; i < p->shapes; i++) {
        const int *k = p->k_box[i];
        int columns = 0, past = p->variant.n - k[0] * k[1] * k[2];
        p->mask_bits |= one_axis && (needs_mask(s, 2, p->q_box[2], k[2]) || (past && s->kernel->pad_columns));
        p->pad = nbhd_max(p->pad, ceil_div(past, 8));
        for (int a = 0; a < 4; a++) {
            int needed =
                !one_axis && (a < 3 ? needs_mask(s, a, p->q_box[a], k[a]) : past && s->kernel->pad_columns);
            if (needed && a < 3 && s->problem->axis[a].keys > NBHD_SM90_MASKED)
                return 0;
            p->mask_at[i][a] = needed ? columns : -1;
            columns += needed ? a < 3 ? k[a] : 1 : 0;
        }
        if (columns > NBHD_SM90_MASK)
            return 0;
        if (columns > 16 && !s->kernel->pad_columns)
            keep_in_steps(p->mask_at[i], k);
        p->mask_steps = nbhd_max(p->mask_steps, ceil_div(columns, 16));
    }
    return 1;
}

/* Whether a plan fits the machine; sets its masks, and Q's stages. */
static int fits(struct search *s, struct nbhd_sm90_plan *p)
{
    if (!lay_out_masks(s, p) || !s->kernel->has_registers(&s->problem->desc, p))
        return 0;
    const int slots = s->problem->desc.head_dim_v > 128 ? 2 : 4; /* more would take registers that are not there */
    for (p->q_stages = 2; p->q_stages > 0; p->q_stages--)
        for (p->slots = slots; p->slots > 0; p->slots -= 2) /* the system keeps 1 KB of each CTA's share */
            if (s->kernel->shared(s->problem, p) <= (s->shared_max + 1024) / p->variant.ctas - 1024)
                return 1;
    return 0;
}

/* ---- the search ---- */

/* Of equals the first stays ahead, but for one whose queries lie closer in memory. */
static int is_better(const struct nbhd_sm90_plan *p, const struct nbhd_sm90_plan *than)
{
    if (fabs(than->ms - p->ms) > 1e-6 * p->ms)
        return than->ms > p->ms;
    return memcmp(&than->variant, &p->variant, sizeof p->variant) == 0 && than->q_box[2] < p->q_box[2];
}

/* Keeps the best `room` of a list sorted by ms; returns the new count. */
static int keep(struct nbhd_sm90_plan *list, int count, int room, const struct nbhd_sm90_plan *p)
{
    int at = count;
    while (at > 0 && is_better(p, &list[at - 1]))
        at--;
    if (at == room)
        return count;
    if (count < room)
        count++;
    memmove(list + at + 1, list + at, (size_t)(count - at - 1) * sizeof *list);
    list[at] = *p;
    return count;
}

/* Whether every box of the shape needs a mask, for the keys past it. */
static int needs_pad(const struct search *s, const struct nbhd_sm90_plan *p, const int *k)
{
    return s->kernel->pad_columns && k[0] * k[1] * k[2] < p->variant.n;
}

/* Counts and time of a plan whose shapes are set: each combination of tile classes takes the shape of fewest boxes. */
static void count_boxes(struct search *s, struct nbhd_sm90_plan *p)
{
    struct axis_tiles *t[3];
    p->boxes = p->full_boxes = p->longest = 0;
    p->tiles = 1;
    for (int a = 0; a < 3; a++) {
        t[a] = nbhd_sm90_tiles(&s->memo[a], p->q_box[a]);
        p->tiles *= t[a]->tiles;
    }
    if (p->shapes == 1) { /* separable */
        p->boxes = p->full_boxes = p->longest = 1;
        for (int a = 0; a < 3; a++) {
            const struct axis_visits v = nbhd_sm90_visits(t[a], p->k_box[0][a]);
            p->boxes *= v.boxes;
            p->full_boxes *= v.full;
            p->longest *= v.longest;
        }
        if (needs_pad(s, p, p->k_box[0]))
            p->full_boxes = 0;
        p->ms = s->kernel->ms(s->problem, p, s->multiprocessors);
        return;
    }
    for (int i = 0; i < t[0]->classes; i++)
        for (int j = 0; j < t[1]->classes; j++)
            for (int l = 0; l < t[2]->classes; l++) {
                const struct tile_class *c[3] = {&t[0]->class[i], &t[1]->class[j], &t[2]->class[l]};
                double weight = c[0]->count * c[1]->count * c[2]->count, best = 0, best_full = 0;
                for (int k = 0; k < p->shapes; k++) {
                    const int *e = p->k_box[k];
                    double boxes = (double)visited(c[0], e[0]) * visited(c[1], e[1]) * visited(c[2], e[2]);
                    if (k && boxes >= best)
                        continue;
                    best = boxes;
                    best_full =
                        needs_pad(s, p, e) ? 0 : (double)full(c[0], e[0]) * full(c[1], e[1]) * full(c[2], e[2]);
                }
                p->longest = fmax(p->longest, best);
                p->boxes += weight * best;
                p->full_boxes += weight * best_full;
            }
    p->ms = s->kernel->ms(s->problem, p, s->multiprocessors);
}

/* Calls visit for every key box of nearly n tokens whose extents do not exceed the unions' (but for the last axis's
 * need to fill n). */
typedef void key_box_visitor(struct search *s, void *closure, const int k_box[3]);

static void each_key_box(struct search *s, const int q_box[3], int n, key_box_visitor *visit, void *closure)
{
    int longest[3], total = 1;
    for (int a = 0; a < 3; a++) {
        struct axis_tiles *t = nbhd_sm90_tiles(&s->memo[a], q_box[a]);
        longest[a] = nbhd_min(nbhd_max(t->longest, 1), s->memo[a].most);
        total = nbhd_min(total * nbhd_min(longest[a], NBHD_SM90_KEYS), NBHD_SM90_KEYS);
    }
    int least = nbhd_min(total, n * s->eighths / 8);
    for (int k0 = 1; k0 <= nbhd_min(longest[0], n); k0++)
        for (int k1 = 1; k1 <= nbhd_min(longest[1], n / k0); k1++) {
            int most = nbhd_min(longest[2], n / (k0 * k1));
            for (int k2 = nbhd_max(1, ceil_div(least, k0 * k1)); k2 <= most; k2++)
                visit(s, closure, (const int[3]){k0, k1, k2});
        }
}

struct best_box {
    struct nbhd_sm90_plan best, trial;
    int found;
};

static void try_first_shape(struct search *s, void *closure, const int k_box[3])
{
    struct best_box *b = closure;
    struct nbhd_sm90_plan *p = &b->trial;
    memcpy(p->k_box[0], k_box, sizeof p->k_box[0]);
    p->mask_steps = 1;
    p->mask_bits = p->pad = 0;
    count_boxes(s, p);
    if (b->found && p->ms >= b->best.ms) /* even with the cheapest masks */
        return;
    if (!fits(s, p))
        return;
    p->ms = s->kernel->ms(s->problem, p, s->multiprocessors);
    if (!b->found || p->ms < b->best.ms)
        b->best = *p;
    b->found = 1;
}

/* One more shape: which saves most? current: boxes that a combination of classes needs with the shapes so far. */
struct combinations {
    int count, n, length[MOST_COMBINATIONS][3];
    double weight[MOST_COMBINATIONS], current[MOST_COMBINATIONS], best;
    int k_box[3];
};

static double boxes_of(const int length[3], const int k_box[3])
{
    return (double)ceil_div(length[0], k_box[0]) * ceil_div(length[1], k_box[1]) * ceil_div(length[2], k_box[2]);
}

static void try_next_shape(struct search *s, void *closure, const int k_box[3])
{
    (void)s;
    struct combinations *c = closure;
    double sum = 0;
    for (int i = 0; i < c->count; i++)
        sum += c->weight[i] * fmin(c->current[i], boxes_of(c->length[i], k_box));
    if (sum < c->best) {
        c->best = sum;
        memcpy(c->k_box, k_box, sizeof c->k_box);
    }
}

static void add_shapes(struct search *s, struct nbhd_sm90_plan *p, struct combinations *c)
{
    struct axis_tiles *t[3];
    for (int a = 0; a < 3; a++)
        t[a] = nbhd_sm90_tiles(&s->memo[a], p->q_box[a]);
    if (t[0]->classes * t[1]->classes * t[2]->classes > MOST_COMBINATIONS)
        return;
    c->count = 0;
    for (int i = 0; i < t[0]->classes; i++)
        for (int j = 0; j < t[1]->classes; j++)
            for (int k = 0; k < t[2]->classes; k++, c->count++) {
                c->length[c->count][0] = t[0]->class[i].length;
                c->length[c->count][1] = t[1]->class[j].length;
                c->length[c->count][2] = t[2]->class[k].length;
                c->weight[c->count] = t[0]->class[i].count * t[1]->class[j].count * t[2]->class[k].count;
            }
    while (p->shapes < NBHD_SM90_SHAPES) {
        double before = 0;
        for (int i = 0; i < c->count; i++) {
            c->current[i] = boxes_of(c->length[i], p->k_box[0]);
            for (int k = 1; k < p->shapes; k++)
                c->current[i] = fmin(c->current[i], boxes_of(c->length[i], p->k_box[k]));
            before += c->weight[i] * c->current[i];
        }
        c->best = before;
        each_key_box(s, p->q_box, p->variant.n, try_next_shape, c);
        struct nbhd_sm90_plan more = *p;
        memcpy(more.k_box[more.shapes++], c->k_box, sizeof c->k_box);
        if (c->best > 0.995 * before || !fits(s, &more))
            return;
        count_boxes(s, &more);
        if (more.ms >= p->ms)
            return;
        *p = more;
    }
}

/* Query boxes of nearly `tokens` tokens, those with the smallest unions first. */
static int query_boxes(struct search *s, int tokens, int boxes[Q_BOXES][3])
{
    double keys[Q_BOXES];
    int count = 0, n[3];
    double all = 1;
    for (int a = 0; a < 3; a++) {
        n[a] = nbhd_min(s->memo[a].n, s->memo[a].most);
        all *= n[a];
    }
    int least = (int)fmin(all, tokens * 0.86);
    for (int q0 = 1; q0 <= nbhd_min(n[0], tokens); q0++)
        for (int q1 = 1; q1 <= nbhd_min(n[1], tokens / q0); q1++)
            for (int q2 = nbhd_max(1, ceil_div(least, q0 * q1)); q2 <= nbhd_min(n[2], tokens / (q0 * q1)); q2++) {
                const int q[3] = {q0, q1, q2};
                double sum = 1;
                for (int a = 0; a < 3; a++) {
                    struct axis_tiles *t = nbhd_sm90_tiles(&s->memo[a], q[a]);
                    if (!t)
                        return 0;
                    sum *= t->keys;
                }
                int at = count;
                while (at > 0 && keys[at - 1] > sum)
                    at--;
                if (at == Q_BOXES)
                    continue;
                if (count < Q_BOXES)
                    count++;
                memmove(keys + at + 1, keys + at, (size_t)(count - at - 1) * sizeof *keys);
                memmove(boxes + at + 1, boxes + at, (size_t)(count - at - 1) * sizeof *boxes);
                keys[at] = sum;
                memcpy(boxes[at], q, sizeof q);
            }
    return count;
}

/* A variant with one of the query boxes for its rows. */
struct pair {
    double ms; /* it takes at least */
    int variant, box;
};

static int by_ms(const void *a, const void *b)
{
    const struct pair *x = a, *y = b;
    if (x->ms != y->ms)
        return x->ms > y->ms ? 1 : -1;
    return x->variant != y->variant ? x->variant - y->variant : x->box - y->box;
}

/* What a plan takes if its key boxes fit the unions, and what is inside of their masks. */
static double least_ms(struct search *s, struct nbhd_sm90_plan *p)
{
    double keys = 1, inner = 1;
    p->tiles = 1;
    for (int a = 0; a < 3; a++) {
        const struct axis_tiles *t = nbhd_sm90_tiles(&s->memo[a], p->q_box[a]);
        p->tiles *= t->tiles;
        keys *= t->keys;
        inner *= t->inner;
    }
    p->boxes = fmax(p->tiles, keys / p->variant.n);
    p->full_boxes = inner / keys * p->boxes;
    p->longest = p->boxes / p->tiles;
    return s->kernel->has_registers(&s->problem->desc, p) ? s->kernel->ms(s->problem, p, s->multiprocessors) : INFINITY;
}

static struct nbhd_sm90_plan begin_plan(const struct search *s, const struct nbhd_sm90_variant *variant, int pack,
                                        const int q_box[3])
{
    struct nbhd_sm90_plan p = {.variant = *variant, .pack = pack, .shapes = 1, .sliced = s->sliced, .many = s->many};
    p.q_stages = 2;
    memcpy(p.q_box, q_box, sizeof p.q_box);
    return p;
}

/* The best key box for each variant and query box, the most promising pairs first, while they can be among the best. */
static int search_pack(struct search *s, int pack, struct nbhd_sm90_plan *list, int count, int room)
{
    struct nbhd_sm90_variant variants[NBHD_SM90_VARIANTS];
    struct pair pairs[NBHD_SM90_VARIANTS * Q_BOXES];
    int boxes[GROUPS + 1][Q_BOXES][3], found[GROUPS + 1], many, n = 0;
    for (int groups = 1; groups <= GROUPS; groups++)
        found[groups] = 64 * groups >= pack ? query_boxes(s, 64 * groups / pack, boxes[groups]) : 0;
    many = s->kernel->variants(&s->problem->desc, variants);
    for (int v = 0; v < many; v++)
        for (int i = 0; i < found[variants[v].groups]; i++, n++) {
            struct nbhd_sm90_plan p = begin_plan(s, &variants[v], pack, boxes[variants[v].groups][i]);
            pairs[n] = (struct pair){least_ms(s, &p), v, i};
        }
    qsort(pairs, (size_t)n, sizeof *pairs, by_ms);
    for (int i = 0; i < n && pairs[i].ms < (count < room ? INFINITY : list[count - 1].ms); i++) {
        const struct nbhd_sm90_variant *variant = &variants[pairs[i].variant];
        const int *q_box = boxes[variant->groups][pairs[i].box];
        struct best_box b = {.trial = begin_plan(s, variant, pack, q_box)};
        each_key_box(s, q_box, variant->n, try_first_shape, &b);
        if (b.found)
            count = keep(list, count, room, &b.best);
    }
    return count;
}

/* The best plans with maps for each slice, or with one for all. */
static int search_maps(struct search *s, int sliced, struct nbhd_sm90_plan *plans, int kept, int room)
{
    const int share = s->problem->desc.heads / s->problem->desc.kv_heads;
    int count = 0;
    s->sliced = sliced;
    for (int a = 0; a < 3; a++) /* a box spans extent x dilation coordinates, unless the map skips them by itself */
        s->memo[a].most = nbhd_min(NBHD_SM90_EXTENT, NBHD_SM90_KEYS / (sliced ? 1 : s->problem->axis[a].dilation));
    struct nbhd_sm90_plan list[FINALISTS];
    for (int pack = 1; pack <= share && pack <= 128; pack++)
        if (share % pack == 0)
            count = search_pack(s, pack, list, count, FINALISTS);
    struct combinations *c = malloc(sizeof *c);
    for (int i = 0; i < count; i++) {
        if (c && !sliced && !s->many)
            add_shapes(s, &list[i], c);
        kept = keep(plans, kept, room, &list[i]);
    }
    free(c);
    return kept;
}

int nbhd_sm90_plans(const struct nbhd_sm90_kernel *kernel, const struct nbhd_problem *problem, int multiprocessors,
                    int shared_max, struct nbhd_sm90_plan *plans, int room)
{
    struct search s = {.kernel = kernel,
                       .problem = problem,
                       .multiprocessors = multiprocessors,
                       .shared_max = shared_max,
                       .many = kernel->takes_many && problem->flags & NBHD_PROBLEM_MANY};
    int kept = 0, narrow = 0; /* narrow: dilation leaves a box less than it could hold */
    for (int a = 0; a < 3; a++) {
        const struct nbhd_axis axis = problem->axis[a];
        s.memo[a].axis = axis;
        s.memo[a].n = nbhd_group_size(axis, 0);
        narrow |= axis.dilation > 1 && NBHD_SM90_KEYS / axis.dilation < nbhd_min(s.memo[a].n, NBHD_SM90_EXTENT);
    }
    for (s.eighths = 7; s.eighths > 0 && !kept; s.eighths -= 3) {
        if (s.many || !is_sliced(problem))
            kept = search_maps(&s, 0, plans, kept, room);
        if (!s.many && (narrow || is_sliced(problem)))
            kept = search_maps(&s, 1, plans, kept, room);
    }
    for (int a = 0; a < 3; a++)
        nbhd_sm90_drop_tiles(&s.memo[a]);
    return kept;
}
