/* Box planning for bwd_sm90: every box of keys that nearly fills a tile with every box of queries that nearly fills a
 * step, counted exactly over the inverse windows (core/tiles.h), the times by a model. The best get more shapes of
 * query boxes, for tiles whose union the first fits badly (at clamped borders). */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/sm90_bwd_search.h"

enum { LONG_AXIS = 512 }; /* longer ones try fewer extents */

static int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* Boxes of q queries from `begin` on that some query of seen lies in. */
static int boxes_seen(struct nbhd_range seen, int begin, int q)
{
    return seen.end > seen.begin ? (seen.end - 1 - begin) / q - (seen.begin - begin) / q + 1 : 0;
}

/* Of the first dilation group, and of 64 tiles where there are many. */
static double share_seen(const struct nbhd_bwd_axis *m, int k, int q)
{
    const int tiles = ceil_div(m->keys, k), step = nbhd_max(1, tiles / 64);
    double all = 0, halves = 0;
    for (int i = 0; i < tiles; i += step) {
        const int begin = i * k, middle = begin + k / 2, end = nbhd_min(begin + k, m->keys);
        const struct nbhd_range tile = nbhd_range_of(begin, end), low = nbhd_range_of(begin, nbhd_min(middle, end));
        const struct nbhd_range any = nbhd_tile_any_queries(m->axis, m->queries, tile);
        all += 2 * boxes_seen(any, any.begin, q);
        halves += boxes_seen(nbhd_tile_any_queries(m->axis, m->queries, low), any.begin, q);
        if (middle < end)
            halves += boxes_seen(nbhd_tile_any_queries(m->axis, m->queries, nbhd_range_of(middle, end)), any.begin, q);
    }
    return all > 0 ? halves / all : 1;
}

static const struct nbhd_bwd_count *count_of(struct nbhd_bwd_axis *memo, int k, int q)
{
    struct nbhd_bwd_count **at = &memo->count[k][q];
    if (!*at && (*at = malloc(sizeof **at))) {
        (*at)->tiles = nbhd_tiles_count_inverse(memo->axis, k, q, NBHD_TILING_DYNAMIC);
        (*at)->seen = k % 2 ? 1 : share_seen(memo, k, q);
    }
    return *at;
}

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

static void count_boxes(struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *p)
{
    const int apart = axis_of_blocks(p);
    double seen = 1;
    p->tiles = p->boxes = p->full_boxes = 1;
    for (int a = 0; a < 3; a++) {
        const struct nbhd_bwd_count *c = count_of(&s->memo[a], p->k_box[a], p->q_box[0][a]);
        if (!c) {
            p->ms = INFINITY;
            return;
        }
        p->tiles *= c->tiles.q_tiles;
        p->boxes *= c->tiles.visited;
        p->full_boxes *= c->tiles.full;
        seen *= a == apart ? c->seen : 1;
    }
    p->seen = seen * p->boxes;
    if (p->k_box[0] * p->k_box[1] * p->k_box[2] < 64 * p->blocks)
        p->full_boxes *= (p->blocks - 1) / (double)p->blocks; /* one of the blocks masks all */
    p->ms = nbhd_sm90_bwd_ms(s, p);
}

/* Keeps the best `room` of a list sorted by ms; returns the new count. */
static int keep(struct nbhd_sm90_bwd_plan *list, int count, int room, const struct nbhd_sm90_bwd_plan *p)
{
    int at = count;
    while (at > 0 && list[at - 1].ms > p->ms)
        at--;
    if (at == room || !isfinite(p->ms))
        return count;
    if (count < room)
        count++;
    memmove(list + at + 1, list + at, (size_t)(count - at - 1) * sizeof *list);
    list[at] = *p;
    return count;
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

/* Every pair of boxes for the plan's kind and n: the best into list, of `count` so far. Returns their number. */
static int search_boxes(struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *plan, struct nbhd_sm90_bwd_plan *list,
                        int count, int room)
{
    int keys[3], queries[3];
    for (int a = 0; a < 3; a++) {
        keys[a] = s->memo[a].keys;
        queries[a] = s->memo[a].queries;
    }
    const int k_count = nbhd_sm90_bwd_list(s, keys, 64 * plan->blocks, NULL);
    const int q_count = nbhd_sm90_bwd_list(s, queries, plan->n, NULL);
    int(*k)[3] = malloc((size_t)k_count * sizeof *k + 1), (*q)[3] = malloc((size_t)q_count * sizeof *q + 1);
    if (k && q) {
        nbhd_sm90_bwd_list(s, keys, 64 * plan->blocks, k);
        nbhd_sm90_bwd_list(s, queries, plan->n, q);
        for (int i = 0; i < k_count; i++)
            for (int j = 0; j < q_count; j++) {
                memcpy(plan->k_box, k[i], sizeof *k);
                memcpy(plan->q_box[0], q[j], sizeof *q);
                if (!nbhd_sm90_bwd_fits(s, plan))
                    continue;
                count_boxes(s, plan);
                count = keep(list, count, room, plan);
            }
    }
    free(k);
    free(q);
    return count;
}

static int by_ms(const void *a, const void *b)
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
    int count = 0;
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
            count = search_boxes(s, &plan, plans, count, room);
        }
    }
    for (int i = 0; i < count; i++)
        nbhd_sm90_bwd_add_shapes(s, &plans[i]);
    qsort(plans, (size_t)count, sizeof *plans, by_ms);
    for (int a = 0; a < 3; a++)
        for (int k = 0; k <= NBHD_BWD_SM90_ROWS; k++)
            for (int q = 0; q <= NBHD_SM90_BWD_QUERIES; q++)
                free(s->memo[a].count[k][q]);
    free(s);
    return count;
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
