/* Box planning for bwd_sm90: every box of keys that nearly fills a tile with every box of queries that nearly fills a
 * step, counted exactly over the inverse windows (core/tiles.h), the times by a model. The best get more shapes of
 * query boxes, for tiles whose union the first fits badly (at clamped borders). */
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/sm90_bwd_search.h"

enum { LONG_AXIS = 512 }; /* longer ones try fewer extents */

static int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* ---- the search ---- */

/* The axis on which a tile's two blocks of 64 keys are apart, each a half of it; -1 where they are not. */
static int axis_of_blocks(const struct nbhd_sm90_bwd_plan *p)
{
    int axis = 0;
    while (axis < 2 && p->k_box[axis] == 1)
        axis++;
    const bool halves = p->k_box[0] * p->k_box[1] * p->k_box[2] == 128 && p->k_box[axis] % 2 == 0;
    return halves && p->blocks == 2 && !p->adds_dq ? axis : -1;
}

/* Of equals that one is better which the search would come to first, did it not begin with the most promising. */
static bool is_better(const struct nbhd_sm90_bwd_plan *p, const struct nbhd_sm90_bwd_plan *than)
{
    if (p->ms != than->ms)
        return p->ms < than->ms;
    if (p->ctas != than->ctas || p->n != than->n)
        return p->ctas != than->ctas ? p->ctas < than->ctas : p->n < than->n;
    for (int a = 0; a < 3; a++)
        if (p->k_box[a] != than->k_box[a])
            return p->k_box[a] < than->k_box[a];
    for (int a = 0; a < 3; a++)
        if (p->q_box[0][a] != than->q_box[0][a])
            return p->q_box[0][a] < than->q_box[0][a];
    return false;
}

/* The best plans so far. */
struct best {
    struct nbhd_sm90_bwd_plan *plans;
    int count, room;
};

/* A plan that takes longer is not kept. */
static double enough(const struct best *best)
{
    return best->count < best->room ? INFINITY : best->plans[best->count - 1].ms;
}

static void keep(struct best *best, const struct nbhd_sm90_bwd_plan *p)
{
    int at = best->count;
    while (at > 0 && is_better(p, &best->plans[at - 1]))
        at--;
    if (at == best->room || !isfinite(p->ms))
        return;
    if (best->count < best->room)
        best->count++;
    memmove(best->plans + at + 1, best->plans + at, (size_t)(best->count - at - 1) * sizeof *best->plans);
    best->plans[at] = *p;
}

/* A long axis is not tried with every extent, an axis alone with the largest only. */
static bool is_tried(const struct nbhd_bwd_search *s, int size, int extent, int most)
{
    if (s->one_axis)
        return extent == nbhd_min(size, most);
    return extent <= size && (size <= LONG_AXIS || extent <= 8 || extent % 4 == 0);
}

int nbhd_sm90_bwd_list(const struct nbhd_bwd_search *s, const int size[3], int most, int (*boxes)[3])
{
    double all = 1;
    int count = 0;
    for (int a = 0; a < 3; a++)
        all *= size[a];
    const int least = (int)fmin(all, most * 0.85);
    for (int x = 1; x <= nbhd_min(size[0], most); x++)
        for (int y = 1; y <= nbhd_min(size[1], most / x); y++)
            for (int z = ceil_div(least, x * y); z <= nbhd_min(size[2], most / (x * y)); z++) {
                const int box[3] = {x, y, z};
                bool tried = true;
                for (int a = 0; a < 3; a++)
                    tried &= (s->one_axis && a < 2) || is_tried(s, size[a], box[a], most);
                if (tried && boxes)
                    memcpy(boxes[count], box, sizeof box);
                count += tried;
            }
    return count;
}

/* Boxes of queries that fit, whatever the keys are: the fewest queries and steps of mask columns that one has. */
struct query_boxes {
    int (*box)[3];
    int count, queries, mask_steps;
};

/* The time of a plan that visits and sees so many boxes at least, of which no more than most_full need no mask. */
static double least_ms(const struct nbhd_bwd_search *s, const struct nbhd_sm90_bwd_plan *plan,
                       const struct query_boxes *q, double boxes, double seen, double most_full)
{
    struct nbhd_sm90_bwd_plan p = *plan;
    p.mask_steps = q->mask_steps;
    p.boxes = boxes;
    p.seen = seen;
    p.full_boxes = fmin(boxes, most_full);
    return nbhd_sm90_bwd_ms(s, &p) * (1 - 1e-9); /* rounding must not make it more than any plan's */
}

/* Every box of queries with the plan's keys. A block skips boxes that it does not see; so many as are computed and
 * waited for in the mean decide the time, but for masks: from `hopeless` on it is too long. */
static void try_queries(struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *p,
                        const struct query_boxes *queries, double most_full, struct best *best)
{
    const int apart = axis_of_blocks(p);
    struct nbhd_bwd_tiles *t[3];
    double hopeless = INFINITY;
    for (int a = 0; a < 3; a++)
        t[a] = nbhd_sm90_bwd_tiles(&s->memo[a], p->k_box[a]);
    for (int j = 0; j < queries->count; j++) {
        const int *q = queries->box[j];
        const struct nbhd_bwd_count *x = nbhd_sm90_bwd_count(t[0], q[0]), *y = nbhd_sm90_bwd_count(t[1], q[1]),
                                    *z = nbhd_sm90_bwd_count(t[2], q[2]);
        p->seen = p->boxes = x->boxes * y->boxes * z->boxes;
        if (apart >= 0 && p->boxes < 2 * hopeless)
            p->seen *= nbhd_sm90_bwd_seen(&s->memo[apart], p->k_box[apart], q[apart]);
        const double computed = (p->seen + p->boxes) / 2;
        if (computed >= hopeless)
            continue;
        p->full_boxes = x->full * y->full * z->full;
        if (p->k_box[0] * p->k_box[1] * p->k_box[2] < 64 * p->blocks)
            p->full_boxes *= (p->blocks - 1) / (double)p->blocks; /* one of the blocks masks all */
        memcpy(p->q_box[0], q, sizeof p->q_box[0]);
        nbhd_sm90_bwd_fits(s, p);
        p->ms = nbhd_sm90_bwd_ms(s, p);
        keep(best, p);
        if (p->ms > enough(best) && least_ms(s, p, queries, computed, computed, most_full) > enough(best))
            hopeless = computed;
    }
}

/* A box of keys, and what a plan takes with it at least. */
struct key_box {
    int extent[3];
    double tiles, most_full, ms; /* most_full: of the boxes of queries, need no mask */
    int at; /* in the order of the search */
};

static int by_least_ms(const void *a, const void *b)
{
    const struct key_box *x = a, *y = b;
    return x->ms != y->ms ? (x->ms > y->ms ? 1 : -1) : x->at - y->at;
}

/* The boxes of keys that can be among the best, the most promising first. Returns their number. */
static int rank_keys(struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *p, int (*k)[3], int count,
                     const struct query_boxes *q, const struct best *best, struct key_box *ranked)
{
    int kept = 0;
    for (int i = 0; i < count; i++) {
        struct key_box *box = &ranked[kept];
        double boxes = 1.0 / p->n;
        memcpy(p->k_box, k[i], sizeof *k);
        memcpy(box->extent, k[i], sizeof *k);
        p->tiles = 1;
        box->most_full = 1.0 / q->queries;
        for (int a = 0; a < 3; a++) {
            const struct nbhd_bwd_tiles *t = nbhd_sm90_bwd_tiles(&s->memo[a], k[i][a]);
            if (!t)
                return 0;
            p->tiles *= t->tiles;
            boxes *= t->queries;
            box->most_full *= t->inner;
        }
        box->tiles = p->tiles;
        box->at = i;
        box->ms = least_ms(s, p, q, boxes, axis_of_blocks(p) < 0 ? boxes : 0, box->most_full);
        kept += box->ms <= enough(best);
    }
    qsort(ranked, (size_t)kept, sizeof *ranked, by_least_ms);
    return kept;
}

/* Leaves only what fits of boxes that are set. */
static void drop_unfit(const struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *p, struct query_boxes *q)
{
    const int count = q->count;
    q->count = 0;
    q->queries = q->mask_steps = INT_MAX;
    for (int j = 0; j < count; j++) {
        memcpy(p->q_box[0], q->box[j], sizeof p->q_box[0]);
        if (!nbhd_sm90_bwd_fits(s, p))
            continue;
        memcpy(q->box[q->count++], p->q_box[0], sizeof p->q_box[0]);
        q->queries = nbhd_min(q->queries, p->q_box[0][0] * p->q_box[0][1] * p->q_box[0][2]);
        q->mask_steps = nbhd_min(q->mask_steps, p->mask_steps);
    }
}

/* Every pair of boxes for the plan's kind and n that can be among the best. */
static void search_boxes(struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *plan, struct best *best)
{
    int keys[3], queries[3];
    for (int a = 0; a < 3; a++) {
        keys[a] = s->memo[a].keys;
        queries[a] = s->memo[a].queries;
    }
    const int k_count = nbhd_sm90_bwd_list(s, keys, 64 * plan->blocks, NULL);
    struct query_boxes q = {.count = nbhd_sm90_bwd_list(s, queries, plan->n, NULL)};
    int(*k)[3] = malloc((size_t)k_count * sizeof *k + 1);
    struct key_box *ranked = malloc((size_t)k_count * sizeof *ranked + 1);
    q.box = malloc((size_t)q.count * sizeof *q.box + 1);
    if (k && q.box && ranked) {
        nbhd_sm90_bwd_list(s, keys, 64 * plan->blocks, k);
        nbhd_sm90_bwd_list(s, queries, plan->n, q.box);
        drop_unfit(s, plan, &q);
        const int found = q.count ? rank_keys(s, plan, k, k_count, &q, best, ranked) : 0;
        for (int i = 0; i < found && ranked[i].ms <= enough(best); i++) {
            memcpy(plan->k_box, ranked[i].extent, sizeof plan->k_box);
            plan->tiles = ranked[i].tiles;
            try_queries(s, plan, &q, ranked[i].most_full, best);
        }
    }
    free(k);
    free(q.box);
    free(ranked);
}

int nbhd_sm90_bwd_by_ms(const void *a, const void *b)
{
    const double x = ((const struct nbhd_sm90_bwd_plan *)a)->ms, y = ((const struct nbhd_sm90_bwd_plan *)b)->ms;
    return (x > y) - (x < y);
}

static int is_sliced(const struct nbhd_problem *problem)
{
    const struct nbhd_axis *axis = problem->axis;
    for (int a = 0; a < 3; a++)
        if (axis[a].dilation > 1)
            return 1;
    return problem->desc.batch > 1 && (axis[0].length > 1 || axis[0].keys > 1);
}

int nbhd_sm90_bwd_plans(const struct nbhd_problem *problem, int adds_dq, int multiprocessors, int shared_max,
                        struct nbhd_sm90_bwd_plan *plans, int room)
{
    struct nbhd_bwd_search *s = calloc(1, sizeof *s);
    struct best best = {.plans = plans, .room = room};
    if (!s)
        return 0;
    s->problem = problem;
    s->multiprocessors = multiprocessors;
    s->shared_max = shared_max;
    s->one_axis = 1;
    for (int a = 0; a < 3; a++) {
        const struct nbhd_axis axis = problem->axis[a];
        s->memo[a].axis = axis;
        s->memo[a].queries = nbhd_group_size(axis, 0);
        s->memo[a].keys = axis.keys == axis.length ? s->memo[a].queries : axis.keys;
        s->one_axis &= a == 2 || (axis.length == 1 && axis.keys == 1);
    }
    const bool wide = nbhd_max(problem->desc.head_dim, problem->desc.head_dim_v) > 128;
    for (int i = 0; i < NBHD_SM90_BWD_KINDS; i++) {
        const struct nbhd_sm90_bwd_kind *kind = &nbhd_sm90_bwd_kinds[i];
        for (int n = i ? 32 : 64; n <= NBHD_SM90_BWD_QUERIES && kind->apart == wide && (!adds_dq || i == 0); n += 16) {
            struct nbhd_sm90_bwd_plan plan = {.groups = kind->groups,
                                              .blocks = kind->blocks,
                                              .ctas = kind->ctas,
                                              .apart = kind->apart,
                                              .n = n,
                                              .shapes = 1,
                                              .adds_dq = adds_dq,
                                              .sliced = is_sliced(problem)};
            search_boxes(s, &plan, &best);
        }
    }
    for (int i = 0; i < best.count; i++)
        nbhd_sm90_bwd_add_shapes(s, &plans[i]);
    qsort(plans, (size_t)best.count, sizeof *plans, nbhd_sm90_bwd_by_ms);
    for (int a = 0; a < 3; a++)
        nbhd_sm90_bwd_drop_tiles(&s->memo[a]);
    free(s);
    return best.count;
}

/* ---- what the kernel is told ---- */

void nbhd_sm90_bwd_boxes(struct nbhd_bwd_boxes *boxes, const struct nbhd_problem *problem,
                         const struct nbhd_sm90_bwd_plan *plan)
{
    memset(boxes, 0, sizeof *boxes);
    const int *k = plan->k_box;
    boxes->rows = k[0] * k[1] * k[2];
    boxes->sliced = plan->sliced;
    boxes->shapes = plan->shapes;
    for (int i = 0; i < plan->shapes; i++) {
        const int *q = plan->q_box[i];
        boxes->shape[i].queries = q[0] * q[1] * q[2];
        memcpy(boxes->shape[i].extent, q, sizeof boxes->shape[i].extent);
        memcpy(boxes->shape[i].mask_at, plan->mask_at[i], sizeof boxes->shape[i].mask_at);
    }
    boxes->scale_log2 = 1.44269504f * problem->desc.scale;
    for (int r = 0; r < NBHD_BWD_SM90_ROWS; r++) { /* rows past the last repeat it */
        const int token = nbhd_min(r, boxes->rows - 1);
        boxes->row[r] = (unsigned)(token / (k[1] * k[2]) | token / k[2] % k[1] << 8 | token % k[2] << 16);
    }
    for (int g = 0; g < 2; g++) {
        boxes->low[g] = 0xffffff;
        for (int r = 64 * g; r < 64 * g + 64; r++)
            for (int a = 0; a < 3; a++) {
                const unsigned mask = 0xffu << 8 * a, at = boxes->row[r] & mask;
                if (at < (boxes->low[g] & mask))
                    boxes->low[g] = (boxes->low[g] & ~mask) | at;
                if (at > (boxes->high[g] & mask))
                    boxes->high[g] = (boxes->high[g] & ~mask) | at;
            }
    }
    for (int a = 0; a < 3; a++) {
        const struct nbhd_axis axis = problem->axis[a];
        const int keys = axis.keys == axis.length ? nbhd_group_size(axis, 0) : axis.keys;
        boxes->k_box[a] = k[a];
        boxes->tiles[a] = ceil_div(keys, k[a]);
    }
}
