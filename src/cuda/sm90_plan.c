/* The search for boxes: for fwd_sm90 with the costs of fwd_sm90_plan.c, for bwd_sm90_dq with those of bwd_sm90_dq.c.
 * All query boxes that nearly fill a tile's rows, ranked by the keys that their unions hold; for the best of them all
 * key boxes of each N; for the best of those a second to fourth shape of key box, for tiles whose union the first fits
 * badly (at clamped borders). Counts are exact; time is a model. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/sm90_search.h"

enum {
    GROUPS = NBHD_SM90_ROWS / 64,
    Q_BOXES = 16,   /* query boxes that are looked at closely */
    FINALISTS = 16  /* pairs of query box and variant that get more shapes */
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

/* ---- the search ---- */

static const double equal = 1e-6; /* of ms, relatively */

/* Of equals the first stays ahead, but for one whose queries lie closer in memory. */
static int is_better(const struct nbhd_sm90_plan *p, const struct nbhd_sm90_plan *than)
{
    if (fabs(than->ms - p->ms) > equal * p->ms)
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

/* The best key box for a variant and a query box. */
struct best_box {
    struct nbhd_sm90_plan best, trial;
    int found;
    struct axis_tiles *tiles[3];
    double most_full; /* boxes that need no mask */
    double enough;    /* a plan that takes so long is of no use */
    double hopeless;  /* so many boxes take so long, however few of them need a mask */
};

static struct best_box begin_best(struct nbhd_sm90_search *s, const struct nbhd_sm90_plan *trial, double enough)
{
    struct best_box b = {.trial = *trial, .enough = enough, .hopeless = INFINITY};
    int longest[3];
    b.most_full = 1.0 / nbhd_sm90_least_keys(s, trial->q_box, trial->variant.n, longest);
    for (int a = 0; a < 3; a++) {
        b.tiles[a] = nbhd_sm90_tiles(&s->memo[a], trial->q_box[a]);
        b.most_full *= b.tiles[a]->inner;
    }
    return b;
}

/* The trial takes too long; perhaps so does all that has as many boxes. */
static void learn_hopeless(struct nbhd_sm90_search *s, struct best_box *b)
{
    struct nbhd_sm90_plan least = b->trial;
    least.full_boxes = fmin(least.boxes, b->most_full);
    least.longest = least.boxes / least.tiles;
    if (least.boxes < b->hopeless && s->kernel->ms(s->problem, &least, s->multiprocessors) > b->enough * (1 + 1e-9))
        b->hopeless = least.boxes;
}

static void try_first_shape(struct nbhd_sm90_search *s, struct best_box *b)
{
    struct nbhd_sm90_plan *p = &b->trial;
    nbhd_sm90_count(s, p);
    p->mask_steps = 1;
    p->mask_bits = p->pad = 0;
    p->ms = s->kernel->ms(s->problem, p, s->multiprocessors);
    if (p->ms >= b->enough) { /* even with the cheapest masks */
        learn_hopeless(s, b);
        return;
    }
    if (!nbhd_sm90_fits(s, p))
        return;
    p->ms = s->kernel->ms(s->problem, p, s->multiprocessors);
    if (!b->found || p->ms < b->best.ms)
        b->best = *p;
    b->found = 1;
    b->enough = fmin(b->enough, b->best.ms);
}

/* Models go by the mean tile unless the longest has twice as many boxes: then more of them may take less time. */
static void try_first_shapes(struct nbhd_sm90_search *s, void *closure, int k_box[3], int least, int most)
{
    struct best_box *b = closure;
    const struct axis_visits x = nbhd_sm90_visits(b->tiles[0], k_box[0]), y = nbhd_sm90_visits(b->tiles[1], k_box[1]);
    for (k_box[2] = least; k_box[2] <= most; k_box[2]++) {
        const struct axis_visits z = nbhd_sm90_visits(b->tiles[2], k_box[2]);
        const double boxes = x.boxes * y.boxes * z.boxes, longest = (double)x.longest * y.longest * z.longest;
        if (boxes >= b->hopeless && longest * b->trial.tiles < 1.9 * boxes)
            continue;
        memcpy(b->trial.k_box[0], k_box, sizeof b->trial.k_box[0]);
        try_first_shape(s, b);
    }
}

/* Query boxes of nearly `tokens` tokens, those with the smallest unions first. */
static int query_boxes(struct nbhd_sm90_search *s, int tokens, int boxes[Q_BOXES][3])
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
static double least_ms(struct nbhd_sm90_search *s, struct nbhd_sm90_plan *p)
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

static struct nbhd_sm90_plan begin_plan(const struct nbhd_sm90_search *s, const struct nbhd_sm90_variant *variant,
                                        int pack, const int q_box[3])
{
    struct nbhd_sm90_plan p = {.variant = *variant, .pack = pack, .shapes = 1, .sliced = s->sliced, .many = s->many};
    p.q_stages = 2;
    memcpy(p.q_box, q_box, sizeof p.q_box);
    return p;
}

/* The best key box for each variant and query box, the most promising pairs first, while they can be among the best. */
static int search_pack(struct nbhd_sm90_search *s, int pack, struct nbhd_sm90_plan *list, int count, int room)
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
        const struct nbhd_sm90_plan trial = begin_plan(s, variant, pack, q_box);
        struct best_box b = begin_best(s, &trial, count < room ? INFINITY : list[count - 1].ms * (1 + 2 * equal));
        nbhd_sm90_each_row(s, q_box, variant->n, try_first_shapes, &b);
        if (b.found)
            count = keep(list, count, room, &b.best);
    }
    return count;
}

/* The best plans with maps for each slice, or with one for all. */
static int search_maps(struct nbhd_sm90_search *s, int sliced, struct nbhd_sm90_plan *plans, int kept, int room)
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
    if (!sliced && !s->many)
        nbhd_sm90_add_shapes(s, list, count);
    for (int i = 0; i < count; i++)
        kept = keep(plans, kept, room, &list[i]);
    return kept;
}

int nbhd_sm90_plans(const struct nbhd_sm90_kernel *kernel, const struct nbhd_problem *problem, int multiprocessors,
                    int shared_max, struct nbhd_sm90_plan *plans, int room)
{
    struct nbhd_sm90_search s = {.kernel = kernel,
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

