/* Box planning for fwd_sm90 and, with the costs of bwd_sm90_dq.c, for that. The search: all query boxes that nearly fill a
 * tile's rows, ranked by the keys that their unions hold; for the best of them all key boxes of each N; for the best of
 * those a second to fourth shape of key box, for tiles whose union the first fits badly (at clamped borders). Counts are
 * exact; time is a model. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "core/model.h"
#include "cuda/sm90_plan.h"

enum {
    MOST_CLASSES = 64,  /* kinds of query tiles on an axis */
    MOST_EXTENT = 192,  /* of a query box */
    MOST_KEYS = 256,    /* of a key box */
    Q_BOXES = 16,       /* query boxes that are looked at closely */
    FINALISTS = 16,     /* (query box, variant) pairs that get more shapes */
    MOST_COMBINATIONS = 1024,
    MOST_MASKED = 32000 /* keys of an axis that mask columns can tell apart: 15 bits */
};

/* Query tiles of one extent on one axis, by the lengths of their union and of the part that needs no mask. */
struct tile_class {
    int length, inner_begin, inner_end; /* the latter two relative to the union's begin */
    double count;
};

struct axis_tiles {
    int extent, classes, step; /* step: classes were made of every step-th tile */
    double keys, tiles; /* sum of unions; query tiles */
    struct tile_class class[MOST_CLASSES];
};

struct axis_memo {
    struct nbhd_axis axis;
    int n; /* elements of the largest dilation group */
    int most; /* extent that a box may have */
    struct axis_tiles *tiles[MOST_EXTENT + 1]; /* by extent, made when asked for */
};

struct search {
    const struct nbhd_sm90_kernel *kernel;
    const struct nbhd_problem *problem;
    struct axis_memo memo[3];
    int multiprocessors, shared_max;
};

static int ceil_div(int a, int b) { return (a + b - 1) / b; }

int nbhd_sm90_sliced(const struct nbhd_problem *problem)
{
    for (int a = 0; a < 3; a++)
        if (problem->axis[a].dilation > 8)
            return 1;
    return problem->axis[0].length > 1 && problem->desc.batch > 1;
}

/* Adds `weight` tiles to their class; 0 if there are too many classes. */
static int add_tiles(struct axis_tiles *t, struct tile_class c)
{
    for (int i = 0; i < t->classes; i++)
        if (t->class[i].length == c.length && t->class[i].inner_begin == c.inner_begin &&
            t->class[i].inner_end == c.inner_end) {
            t->class[i].count += c.count;
            return 1;
        }
    if (t->classes == MOST_CLASSES)
        return 0;
    t->class[t->classes++] = c;
    return 1;
}

/* Classes of every step-th tile, each counted step times. */
static int classify(struct axis_tiles *t, const struct axis_memo *memo, int step)
{
    t->keys = t->tiles = t->classes = 0;
    t->step = step;
    int tiles = ceil_div(memo->n, t->extent);
    for (int i = 0; i < tiles; i += step) {
        int q = nbhd_min(i + step / 2, tiles - 1) * t->extent, count = nbhd_min(step, tiles - i);
        struct nbhd_range tile = nbhd_range_of(q, nbhd_min(q + t->extent, memo->n));
        struct nbhd_range any = nbhd_tile_any(memo->axis, memo->n, tile);
        struct nbhd_range all = nbhd_tile_all(memo->axis, memo->n, tile);
        if (!add_tiles(t, (struct tile_class){any.end - any.begin, all.begin - any.begin, all.end - any.begin, count}))
            return 0;
        t->keys += (double)count * (any.end - any.begin);
        t->tiles += count;
    }
    return 1;
}

static const struct axis_tiles *tiles_of(struct axis_memo *memo, int extent)
{
    if (memo->tiles[extent])
        return memo->tiles[extent];
    struct axis_tiles *t = memo->tiles[extent] = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->extent = extent;
    for (int step = 1; !classify(t, memo, step);) /* causal windows, a long axis: nearly every tile is its own class */
        step *= 2;
    return t;
}

/* Boxes of extent k that a class's tile visits, and how many of them need no mask on this axis. */
static int visited(const struct tile_class *c, int k) { return ceil_div(c->length, k); }
static int full(const struct tile_class *c, int k)
{
    int first = ceil_div(c->inner_begin, k), last = c->inner_end / k;
    return last > first ? last - first : 0;
}

/* ---- time ---- */

double nbhd_sm90_slices(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan)
{
    double slices = (double)problem->desc.batch * (problem->desc.heads / plan->pack);
    for (int a = 0; a < 3; a++)
        slices *= problem->axis[a].dilation;
    return slices;
}

/* Of fwd_sm90, by the simulator's model. Masks are counted in steps of columns: a mask by bits is dear, but few boxes of a
 * problem with one axis need it; a block of padding is cheap, but all boxes have it. */
static double plan_ms(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *p, int multiprocessors)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_sm90_variant *v = &p->variant;
    const double extra = ceil_div(d->extra, v->n), dims = (d->head_dim + 15) / 16 * 16 + d->head_dim_v;
    nbhd_sim_device device = *nbhd_model_device("h200");
    device.processors = multiprocessors;
    device.l2 *= multiprocessors / 132.0;
    const struct nbhd_model_call call = {
        .tiles = p->tiles * nbhd_sm90_slices(problem, p),
        .visited = p->boxes / p->tiles + extra,
        .longest = p->longest + extra,
        .masked = 1,
        .pairs = 64.0 * v->groups * v->n,
        .flops = 2 * dims,
        .mask = (p->boxes - p->full_boxes) / (p->boxes + extra * p->tiles) * (p->mask_steps ? p->mask_steps : 3) +
                0.1 * p->pad,
        .bytes = (double)v->n * dims * 2,
        .tile = v->ctas == 1 && p->q_stages == 1 ? 1.5 : 1, /* waits for Q */
        .resident = v->ctas,
    };
    /* Measured against the model: two warpgroups whose registers are full overlap less, and more columns cost a little. */
    const double full = v->groups == 2 ? nbhd_max(0, v->n * 3 / 4 + d->head_dim_v / 2 - 160) : 0;
    return (nbhd_model_us(&device, &call) + device.launch) * 1e-3 * (1 + full / 1200) * (1 + 0.004 * p->mask_steps);
}

/* ---- shared memory ---- */

int nbhd_sm90_shared(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan)
{
    const struct nbhd_sm90_variant *v = &plan->variant;
    int qk = ceil_div(problem->desc.head_dim, 64), pv = ceil_div(problem->desc.head_dim_v, 64), rows = 64 * v->groups;
    int windows = plan->q_box[0] + plan->q_box[1] + plan->q_box[2];
    return 128 * (plan->q_stages * qk * rows + v->stages * (qk + pv) * v->n) +
           NBHD_FWD_SM90_TABLES(v->groups, v->stages, windows, plan->mask_steps) +
           (plan->shapes > 1 ? 2 : 1) * plan->mask_steps * v->n * 32;
}

/* Whether any query tile's boxes need a mask on an axis. */
static int is_masked(const struct axis_tiles *t, int k)
{
    for (int i = 0; i < t->classes; i++)
        if (t->step > 1 || visited(&t->class[i], k) != full(&t->class[i], k))
            return 1;
    return 0;
}

/* Lays out the mask columns of a plan's shapes; 0 if they are too many. A problem of one axis is masked by bits: it has
 * too many coordinates, and few boxes that need a mask. */
static int lay_out_masks(struct search *s, struct nbhd_sm90_plan *p)
{
    int one_axis = 1;
    for (int a = 0; a < 2; a++)
        one_axis &= s->problem->axis[a].length == 1 && s->problem->axis[a].keys == 1;
    p->mask_bits = s->problem->desc.extra % p->variant.n != 0;
    p->mask_steps = p->pad = 0;
    for (int i = 0; i < p->shapes; i++) {
        const int *k = p->k_box[i];
        int columns = 0, past = p->variant.n - k[0] * k[1] * k[2];
        p->mask_bits |= one_axis && (is_masked(tiles_of(&s->memo[2], p->q_box[2]), k[2]) ||
                                     (past && s->kernel->pad_columns));
        p->pad = nbhd_max(p->pad, ceil_div(past, 8));
        for (int a = 0; a < 4; a++) {
            int needed = !one_axis && (a < 3 ? is_masked(tiles_of(&s->memo[a], p->q_box[a]), k[a])
                                             : past && s->kernel->pad_columns);
            if (needed && a < 3 && s->problem->axis[a].keys > MOST_MASKED)
                return 0;
            p->mask_at[i][a] = needed ? columns : -1;
            columns += needed ? a < 3 ? k[a] : 1 : 0;
        }
        if (columns > NBHD_SM90_MASK)
            return 0;
        p->mask_steps = nbhd_max(p->mask_steps, ceil_div(columns, 16));
    }
    return 1;
}

/* Registers that S, P and O of a consumer thread may take, by its mask's steps: what compiles without spills. */
static int register_room(const struct nbhd_sm90_plan *p)
{
    static const struct {
        int groups, ctas, room[3];
    } kinds[] = {{2, 1, {188, 188, 172}}, {3, 1, {120, 100, 92}}, {1, 2, {176, 176, 160}}, {1, 3, {92, 80, 0}}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (kinds[i].groups == p->variant.groups && kinds[i].ctas == p->variant.ctas)
            return kinds[i].room[p->mask_steps];
    return 0;
}

static int has_registers(const nbhd_desc *d, const struct nbhd_sm90_plan *p)
{
    const int n = p->variant.n, tight = p->variant.ctas == 3 && n > 64; /* there a mask takes more than its columns */
    if (p->variant.groups == 1 && d->head_dim_v > 192) /* ptxas does not take so wide a product among 128 registers at launch */
        return 0;
    if (d->head_dim_v > 192 && p->mask_steps && p->mask_bits) /* columns, and bits for extra keys: 16 bytes spilled */
        return 0;
    return (!tight || n == 80) && n * 3 / 4 + (d->head_dim_v + 1) / 2 + 8 * tight * p->mask_steps <= register_room(p);
}

int nbhd_sm90_early(const nbhd_desc *d, const struct nbhd_sm90_plan *p)
{
    static const int room[2][3] = {{192, 178, 168}, {204, 196, 180}}; /* as above, for one warpgroup and for two */
    const struct nbhd_sm90_variant *v = &p->variant;
    const int more = p->mask_steps && (p->mask_bits || p->pad) ? 16 : 0; /* two ways of masking */
    const int left = room[(v->groups - 1) & 1][p->mask_steps] - v->n * 3 / 4 - (d->head_dim_v + 1) / 2 - more;
    if (v->groups == 3 || v->ctas == 3 || (d->head_dim_v > 128 && p->mask_steps))
        return 0;
    return nbhd_max(0, nbhd_min(left / 4, v->n / 16));
}

/* Whether a plan fits the machine; sets its masks, and Q's stages. */
static int fits(struct search *s, struct nbhd_sm90_plan *p)
{
    if (!lay_out_masks(s, p) || !s->kernel->has_registers(&s->problem->desc, p))
        return 0;
    for (p->q_stages = 2; p->q_stages > 0; p->q_stages--) /* the system keeps 1 KB of each CTA's share */
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
    const struct axis_tiles *t[3];
    p->boxes = p->full_boxes = p->longest = 0;
    p->tiles = 1;
    for (int a = 0; a < 3; a++) {
        t[a] = tiles_of(&s->memo[a], p->q_box[a]);
        p->tiles *= t[a]->tiles;
    }
    if (p->shapes == 1) { /* separable */
        double boxes = 1, unmasked = 1;
        p->longest = 1;
        for (int a = 0; a < 3; a++) {
            double sum = 0, sum_full = 0;
            int longest = 0;
            for (int i = 0; i < t[a]->classes; i++) {
                longest = nbhd_max(longest, visited(&t[a]->class[i], p->k_box[0][a]));
                sum += t[a]->class[i].count * visited(&t[a]->class[i], p->k_box[0][a]);
                sum_full += t[a]->class[i].count * full(&t[a]->class[i], p->k_box[0][a]);
            }
            boxes *= sum;
            unmasked *= sum_full;
            p->longest *= longest;
        }
        p->boxes = boxes;
        p->full_boxes = needs_pad(s, p, p->k_box[0]) ? 0 : unmasked;
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

/* Calls visit for every key box of `least` to n tokens whose extents do not exceed the unions' (but for the last axis's
 * need to fill n). */
typedef void key_box_visitor(struct search *s, void *closure, const int k_box[3]);

static void each_key_box(struct search *s, const int q_box[3], int n, key_box_visitor *visit, void *closure)
{
    int longest[3], total = 1;
    for (int a = 0; a < 3; a++) {
        const struct axis_tiles *t = tiles_of(&s->memo[a], q_box[a]);
        longest[a] = 1;
        for (int i = 0; i < t->classes; i++)
            longest[a] = nbhd_max(longest[a], t->class[i].length);
        longest[a] = nbhd_min(longest[a], s->memo[a].most);
        total = nbhd_min(total * nbhd_min(longest[a], MOST_KEYS), MOST_KEYS);
    }
    int least = nbhd_min(total, n * 7 / 8);
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
    memcpy(b->trial.k_box[0], k_box, sizeof b->trial.k_box[0]);
    if (!fits(s, &b->trial))
        return;
    count_boxes(s, &b->trial);
    if (!b->found || b->trial.ms < b->best.ms)
        b->best = b->trial;
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
    const struct axis_tiles *t[3];
    for (int a = 0; a < 3; a++)
        t[a] = tiles_of(&s->memo[a], p->q_box[a]);
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

static int variants_of(const nbhd_desc *d, struct nbhd_sm90_variant list[NBHD_SM90_VARIANTS])
{
    static const int sizes[] = {64, 80, 96, 112, 128, 144, 160, 176, 192};
    static const int kinds[][2] = {{1, 2}, {2, 1}, {3, 1}, {1, 3}}; /* warpgroups, CTAs; of equals the first is taken */
    int count = 0;
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            list[count++] = (struct nbhd_sm90_variant){kinds[kind][0], sizes[i], kinds[kind][1], 2, 2};
    (void)d;
    return count;
}

const struct nbhd_sm90_kernel nbhd_sm90_forward = {
    .variants = variants_of, .shared = nbhd_sm90_shared, .has_registers = has_registers, .ms = plan_ms};

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
                    const struct axis_tiles *t = tiles_of(&s->memo[a], q[a]);
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

static int search_pack(struct search *s, int pack, struct nbhd_sm90_plan *list, int count, int room)
{
    struct nbhd_sm90_variant variants[NBHD_SM90_VARIANTS];
    int boxes[Q_BOXES][3], many = s->kernel->variants(&s->problem->desc, variants), found = 0, rows = 0;
    for (int v = 0; v < many; v++) {
        if (rows != 64 * variants[v].groups) {
            rows = 64 * variants[v].groups;
            found = rows >= pack ? query_boxes(s, rows / pack, boxes) : 0;
        }
        for (int i = 0; i < found; i++) {
            struct best_box b = {.found = 0};
            b.trial.variant = variants[v];
            b.trial.pack = pack;
            b.trial.shapes = 1;
            b.trial.sliced = nbhd_sm90_sliced(s->problem);
            memcpy(b.trial.q_box, boxes[i], sizeof b.trial.q_box);
            each_key_box(s, boxes[i], variants[v].n, try_first_shape, &b);
            if (b.found)
                count = keep(list, count, room, &b.best);
        }
    }
    return count;
}

int nbhd_sm90_plans(const struct nbhd_sm90_kernel *kernel, const struct nbhd_problem *problem, int multiprocessors,
                    int shared_max, struct nbhd_sm90_plan *plans, int room)
{
    struct search s = {
        .kernel = kernel, .problem = problem, .multiprocessors = multiprocessors, .shared_max = shared_max};
    int sliced = nbhd_sm90_sliced(problem), count = 0, share = problem->desc.heads / problem->desc.kv_heads;
    for (int a = 0; a < 3; a++) {
        s.memo[a].axis = problem->axis[a];
        s.memo[a].n = nbhd_group_size(problem->axis[a], 0);
        /* A box spans extent x dilation coordinates of its map, at most 256 unless the map skips them by itself. */
        s.memo[a].most = nbhd_min(MOST_EXTENT, sliced ? 256 : 256 / problem->axis[a].dilation);
    }
    struct nbhd_sm90_plan list[FINALISTS];
    for (int pack = 1; pack <= share && pack <= 128; pack++)
        if (share % pack == 0)
            count = search_pack(&s, pack, list, count, FINALISTS);
    struct combinations *c = malloc(sizeof *c);
    int kept = 0;
    for (int i = 0; i < count; i++) {
        if (c && !sliced)
            add_shapes(&s, &list[i], c);
        kept = keep(plans, kept, room, &list[i]);
    }
    free(c);
    for (int a = 0; a < 3; a++)
        for (int e = 0; e <= MOST_EXTENT; e++)
            free(s.memo[a].tiles[e]);
    return kept;
}

/* ---- what the kernel is told ---- */

void nbhd_sm90_boxes(struct nbhd_boxes *boxes, const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan)
{
    memset(boxes, 0, sizeof *boxes);
    const int *q = plan->q_box;
    int tokens = q[0] * q[1] * q[2], rows = 64 * plan->variant.groups;
    boxes->shapes = plan->shapes;
    boxes->rows = tokens * plan->pack;
    boxes->pack = plan->pack;
    boxes->sliced = plan->sliced;
    for (int r = 0; r < rows; r++) { /* rows past the last repeat it */
        int token = nbhd_min(r, boxes->rows - 1) / plan->pack, head = nbhd_min(r, boxes->rows - 1) % plan->pack;
        boxes->row[r] = (unsigned)(token / (q[1] * q[2]) | token / q[2] % q[1] << 8 | token % q[2] << 16) |
                        (unsigned)head << 24;
    }
    for (int g = 0; g < plan->variant.groups; g++) {
        boxes->low[g] = 0xffffff;
        for (int r = 64 * g; r < 64 * g + 64; r++)
            for (int a = 0; a < 3; a++) {
                unsigned at = boxes->row[r] & 0xffu << 8 * a, mask = 0xffu << 8 * a;
                if (at < (boxes->low[g] & mask))
                    boxes->low[g] = (boxes->low[g] & ~mask) | at;
                if (at > (boxes->high[g] & mask))
                    boxes->high[g] = (boxes->high[g] & ~mask) | at;
            }
    }
    for (int a = 0; a < 3; a++) {
        boxes->q_box[a] = q[a];
        boxes->tiles[a] = ceil_div(nbhd_group_size(problem->axis[a], 0), q[a]);
        boxes->step[a] = plan->sliced ? 1 : problem->axis[a].dilation;
        boxes->uneven |= problem->axis[a].length % problem->axis[a].dilation != 0;
        boxes->reverse |= problem->axis[a].edge == NBHD_EDGE_CAUSAL;
    }
    for (int i = 0; i < plan->shapes; i++) {
        struct nbhd_key_box *k = &boxes->shape[i];
        memcpy(k->extent, plan->k_box[i], sizeof k->extent);
        k->tokens = k->extent[0] * k->extent[1] * k->extent[2];
        memcpy(k->mask_at, plan->mask_at[i], sizeof k->mask_at);
    }
    boxes->head_blocks = problem->desc.heads / plan->pack;
}

/* ---- who computes which tile ---- */

static int is_uneven(const struct nbhd_sm90_plan *p) { return p->longest * p->tiles > 1.15 * p->boxes; }

/* CTAs that take several tiles drift apart where tiles differ in length. They then keep more keys in the L2, which costs
 * more than their starts if it does not even hold one head's. */
int nbhd_sm90_most_tiles(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *p, int l2_bytes)
{
    double bytes = 2.0 * (problem->desc.head_dim + problem->desc.head_dim_v);
    for (int a = 0; a < 3; a++)
        bytes *= problem->axis[a].keys;
    return is_uneven(p) && bytes > 0.75 * l2_bytes ? 2 : NBHD_SM90_MOST;
}

int nbhd_sm90_share(struct nbhd_boxes *boxes, const struct nbhd_sm90_plan *plan, int most_tiles, int begin, int count,
                    int resident)
{
    const int work = boxes->tiles[0] * boxes->tiles[1] * boxes->tiles[2] * boxes->head_blocks * count;
    int left = work, blocks = 0;
    boxes->slice_begin = begin;
    boxes->resident = resident;
    for (int kind = 0; kind < NBHD_SM90_RUNS - 1; kind++) {
        const int most = NBHD_SM90_MOST >> kind, rest = is_uneven(plan) ? most : 2; /* what later rounds need to even out */
        boxes->rounds[kind] = most > most_tiles ? 0 : nbhd_max(0, (left / resident - rest) / most);
        blocks += boxes->rounds[kind] * resident;
        left -= boxes->rounds[kind] * resident * most;
    }
    boxes->rounds[NBHD_SM90_RUNS - 1] = ceil_div(left, resident);
    return blocks + left;
}
