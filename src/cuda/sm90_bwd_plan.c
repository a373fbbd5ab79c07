/* Box planning for bwd_sm90: every box of keys that nearly fills a tile with every box of queries that nearly fills a
 * step, counted exactly over the inverse windows (core/tiles.h), the times by a model. The best get more shapes of query
 * boxes, for tiles whose union the first fits badly (at clamped borders). */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "core/tiles.h"
#include "cuda/sm90_bwd_plan.h"

enum {
    MOST_ROWS = NBHD_BWD_SM90_ROWS,
    MOST_QUERIES = 128,
    MASK_COLUMNS = 32,
    MOST_MASKED = 32000, /* queries of an axis that mask columns can tell apart */
    LONG_AXIS = 512,     /* longer ones try fewer extents */
    MOST_CLASSES = 64,   /* of the tiles of an axis */
    MOST_COMBINATIONS = 2048
};

struct axis_count {
    struct nbhd_tile_count tiles;
    double seen; /* share of a tile's boxes that a half of it sees, in the mean */
};

/* What one axis has for each pair of extents, counted when asked for. */
struct axis_memo {
    struct nbhd_axis axis;
    int keys, queries; /* of the largest dilation group */
    struct axis_count *count[MOST_ROWS + 1][MOST_QUERIES + 1];
};

struct search {
    const struct nbhd_problem *problem;
    struct axis_memo memo[3];
    int multiprocessors, shared_max, one_axis;
};

static int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* Boxes of q queries from `begin` on that some query of seen lies in. */
static int boxes_seen(struct nbhd_range seen, int begin, int q)
{
    return seen.end > seen.begin ? (seen.end - 1 - begin) / q - (seen.begin - begin) / q + 1 : 0;
}

/* Of the first dilation group, and of 64 tiles where there are many. */
static double share_seen(const struct axis_memo *m, int k, int q)
{
    const int tiles = ceil_div(m->keys, k), step = nbhd_max(1, tiles / 64);
    double all = 0, halves = 0;
    for (int i = 0; i < tiles; i += step) {
        const int begin = i * k, middle = begin + k / 2, end = nbhd_min(begin + k, m->keys);
        const struct nbhd_range any = nbhd_tile_any_queries(m->axis, m->queries, nbhd_range_of(begin, end));
        all += 2 * boxes_seen(any, any.begin, q);
        halves += boxes_seen(nbhd_tile_any_queries(m->axis, m->queries, nbhd_range_of(begin, nbhd_min(middle, end))), any.begin, q);
        if (middle < end)
            halves += boxes_seen(nbhd_tile_any_queries(m->axis, m->queries, nbhd_range_of(middle, end)), any.begin, q);
    }
    return all > 0 ? halves / all : 1;
}

static const struct axis_count *count_of(struct axis_memo *memo, int k, int q)
{
    struct axis_count **at = &memo->count[k][q];
    if (!*at && (*at = malloc(sizeof **at))) {
        (*at)->tiles = nbhd_tiles_count_inverse(memo->axis, k, q, NBHD_TILING_DYNAMIC);
        (*at)->seen = k % 2 ? 1 : share_seen(memo, k, q);
    }
    return *at;
}

/* ---- the model, in clocks of one multiprocessor; fitted to docs/notes/hopper-backward.md ---- */

/* A step: five products (without dQ four); shared memory keeps them from the full rate. Tiles must come from the L2. */
static double step_clocks(const nbhd_desc *d, const struct nbhd_sm90_bwd_plan *p)
{
    const int k = (d->head_dim + 15) / 16 * 16, v = (d->head_dim_v + 15) / 16 * 16;
    if (p->adds_dq) /* the way of dS and dQ through shared memory is hidden in part */
        return 1.1 * 256 * p->n * (2 * k + 2 * v + (k + 63) / 64 * 64) / 4096 + 4.5 * p->n + 600;
    const double scores = p->blocks * (k + v) / 16 * fmax(p->n / 2, 16 + p->n / 4); /* A and B from shared memory */
    const double products = scores + p->blocks * p->n * (k + v) / 32;
    const double load = p->n * (double)(d->head_dim + d->head_dim_v) * 2 / 32;
    if (p->apart)
        return fmax(1.2 * products + 100, load);
    const double fixed = p->groups == 1 ? 80 + 1.5 * nbhd_max(0, 80 - p->n) : 60;
    return fmax(1.25 * products + 2.25 * p->groups * p->n + fixed, load);
}

static double mask_clocks(const struct nbhd_sm90_bwd_plan *p)
{
    return p->adds_dq ? 50 + 100 * p->mask_steps : (50 + 50 * p->mask_steps) * p->blocks;
}

/* Statistics, zeroing and conversion of dQ: bytes, at what the memory gives. */
static double rows_ms(const struct search *s, const struct nbhd_sm90_bwd_plan *p)
{
    const nbhd_desc *d = &s->problem->desc;
    double rows = (double)d->batch * d->heads;
    for (int a = 0; a < 3; a++)
        rows *= s->problem->axis[a].length;
    return rows * (4 * d->head_dim_v + (p->adds_dq ? 10 * d->head_dim : 0) + 16) / 3.4e9;
}

static double plan_ms(const struct search *s, const struct nbhd_sm90_bwd_plan *p)
{
    const nbhd_desc *d = &s->problem->desc;
    const double share = (double)d->heads / d->kv_heads, slices = (double)d->batch * d->kv_heads;
    const double masked = p->boxes - p->full_boxes, tile = 11000.0 / p->ctas;
    const double steps = (p->seen + p->boxes) / 2; /* a block that skips a box waits for the other now and then */
    const double clocks = share * (steps * step_clocks(d, p) + masked * mask_clocks(p)) + p->tiles * tile;
    const double waves = p->tiles * slices / (s->multiprocessors * p->ctas);
    const double uneven = waves > 8 ? 1 + 0.5 / waves : ceil(waves) / waves;
    return clocks * slices / s->multiprocessors * uneven / 1.755e6 + rows_ms(s, p);
}

/* ---- what fits ---- */

/* One warpgroup, several CTAs: their set-ups and steps overlap, so for small windows; without dQ, whose sum needs two.
 * Apart: a warpgroup for each of dK and dV, where a head_dim over 128 is too wide for one to hold both. */
enum { KINDS = 4 };
static const struct kind {
    int groups, blocks, ctas, registers, apart;
} kinds[KINDS] = {{2, 2, 1, 240, 0}, {1, 1, 2, 232, 0}, {1, 1, 3, 136, 0}, {2, 1, 1, 240, 1}};

int nbhd_sm90_bwd_registers(const struct nbhd_sm90_bwd_plan *plan)
{
    int kind = 0;
    while (kind < KINDS - 1 && kinds[kind].ctas != plan->ctas)
        kind++;
    return kinds[kind].registers;
}

int nbhd_sm90_bwd_shared(const struct nbhd_problem *problem, const struct nbhd_sm90_bwd_plan *plan)
{
    const int k = ceil_div(problem->desc.head_dim, 64), v = ceil_div(problem->desc.head_dim_v, 64), n = plan->n;
    const int tiles = (k + v) * 64 * plan->blocks + 2 * (k + v) * n;
    const int others = plan->adds_dq ? 4 * n + 2 * k * n : plan->apart ? 2 * plan->blocks * n + 1 : 0;
    return 128 * (tiles + others) + plan->mask_steps * (plan->blocks * 128 + n) * 32 + NBHD_BWD_SM90_TABLES(n);
}

/* Lays out the mask columns; false if they are too many. A problem of one axis compares coordinates instead. */
static bool lay_out_mask(const struct search *s, struct nbhd_sm90_bwd_plan *p)
{
    p->mask_bits = s->one_axis;
    p->mask_steps = 0;
    for (int i = 0; i < p->shapes; i++) {
        int columns = 0;
        for (int a = 0; a < 3; a++) {
            const struct axis_memo *m = &s->memo[a];
            const bool needed = !s->one_axis && (m->queries > 1 || m->keys > 1);
            if (needed && m->queries > MOST_MASKED)
                return false;
            p->mask_at[i][a] = needed ? columns : -1;
            columns += needed ? p->q_box[i][a] : 0;
        }
        p->mask_steps = nbhd_max(p->mask_steps, ceil_div(columns, 16));
    }
    return 16 * p->mask_steps <= MASK_COLUMNS;
}

/* Registers that dK, dV, S, dP, P and dS of a consumer thread take: more than this does not compile without spills or
 * serialized products. The A operand of a second mask step wants a few more. */
static bool has_registers(const nbhd_desc *d, const struct nbhd_sm90_bwd_plan *p)
{
    if (p->apart)
        return nbhd_max(d->head_dim, d->head_dim_v) / 2 + 3 * p->n / 4 <= nbhd_sm90_bwd_registers(p) - 16;
    return (d->head_dim + d->head_dim_v) / 2 + 3 * p->n / 2 <= nbhd_sm90_bwd_registers(p) - (p->mask_steps > 1 ? 28 : 16);
}

static bool fits(const struct search *s, struct nbhd_sm90_bwd_plan *p)
{
    return lay_out_mask(s, p) && has_registers(&s->problem->desc, p) &&
           nbhd_sm90_bwd_shared(s->problem, p) <= (s->shared_max + 1024) / p->ctas - 1024;
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

static void count_boxes(struct search *s, struct nbhd_sm90_bwd_plan *p)
{
    const int apart = axis_of_blocks(p);
    double seen = 1;
    p->tiles = p->boxes = p->full_boxes = 1;
    for (int a = 0; a < 3; a++) {
        const struct axis_count *c = count_of(&s->memo[a], p->k_box[a], p->q_box[0][a]);
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
    p->ms = plan_ms(s, p);
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
static bool is_tried(const struct search *s, int size, int extent, int most)
{
    if (s->one_axis)
        return extent == nbhd_min(size, most);
    return extent <= size && (size <= LONG_AXIS || extent <= 8 || extent % 4 == 0);
}

/* Boxes of nearly `most` of the sizes' tokens. Returns their number; boxes may be NULL. */
static int list_boxes(const struct search *s, const int size[3], int most, int (*boxes)[3])
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

static int search_boxes(struct search *s, struct nbhd_sm90_bwd_plan *plan, struct nbhd_sm90_bwd_plan *list, int count,
                        int room)
{
    int keys[3], queries[3];
    for (int a = 0; a < 3; a++) {
        keys[a] = s->memo[a].keys;
        queries[a] = s->memo[a].queries;
    }
    const int k_count = list_boxes(s, keys, 64 * plan->blocks, NULL), q_count = list_boxes(s, queries, plan->n, NULL);
    int(*k)[3] = malloc((size_t)k_count * sizeof *k + 1), (*q)[3] = malloc((size_t)q_count * sizeof *q + 1);
    if (k && q) {
        list_boxes(s, keys, 64 * plan->blocks, k);
        list_boxes(s, queries, plan->n, q);
        for (int i = 0; i < k_count; i++)
            for (int j = 0; j < q_count; j++) {
                memcpy(plan->k_box, k[i], sizeof *k);
                memcpy(plan->q_box[0], q[j], sizeof *q);
                if (!fits(s, plan))
                    continue;
                count_boxes(s, plan);
                count = keep(list, count, room, plan);
            }
    }
    free(k);
    free(q);
    return count;
}

/* ---- more shapes of query boxes ---- */

/* Tiles of an axis whose unions are alike: union's length, intersection from the union's begin. */
struct tile_class {
    int length, begin, end;
    double count;
};

/* Every combination of the axes' classes, and the boxes that it needs with the shapes so far. */
struct combinations {
    int count;
    struct {
        struct tile_class axis[3];
        double tiles, boxes;
    } list[MOST_COMBINATIONS];
};

/* Their number; 0: too many. */
static int find_classes(const struct axis_memo *m, int k_box, struct tile_class *list)
{
    int count = 0;
    for (int k = 0; k < m->keys; k += k_box) {
        const struct nbhd_tile t = nbhd_tile_at_inverse(m->axis, m->queries, k, k_box, 1, NBHD_TILING_DYNAMIC);
        const struct tile_class c = {t.any.end - t.any.begin, t.all.begin - t.any.begin, t.all.end - t.any.begin, 0};
        int i = 0;
        while (i < count && (list[i].length != c.length || list[i].begin != c.begin || list[i].end != c.end))
            i++;
        if (i == MOST_CLASSES)
            return 0;
        if (i == count)
            list[count++] = c;
        list[i].count++;
    }
    return count;
}

static bool find_combinations(const struct search *s, const struct nbhd_sm90_bwd_plan *p, struct combinations *c)
{
    struct tile_class class[3][MOST_CLASSES];
    int classes[3];
    for (int a = 0; a < 3; a++)
        classes[a] = find_classes(&s->memo[a], p->k_box[a], class[a]);
    c->count = classes[0] * classes[1] * classes[2];
    if (c->count > MOST_COMBINATIONS)
        return false;
    for (int i = 0; i < c->count; i++) {
        const int at[3] = {i % classes[0], i / classes[0] % classes[1], i / classes[0] / classes[1]};
        c->list[i].tiles = 1;
        c->list[i].boxes = INFINITY;
        for (int a = 0; a < 3; a++) {
            c->list[i].axis[a] = class[a][at[a]];
            c->list[i].tiles *= class[a][at[a]].count;
        }
    }
    return c->count > 0;
}

static double boxes_of(const struct tile_class axis[3], const int q_box[3])
{
    return (double)ceil_div(axis[0].length, q_box[0]) * ceil_div(axis[1].length, q_box[1]) *
           ceil_div(axis[2].length, q_box[2]);
}

/* Of these, need no mask. */
static double full_of(const struct tile_class axis[3], const int q_box[3])
{
    double full = 1;
    for (int a = 0; a < 3; a++)
        full *= nbhd_max(0, axis[a].end / q_box[a] - ceil_div(nbhd_max(0, axis[a].begin), q_box[a]));
    return full;
}

/* Lets tiles take the plan's last shape where it is better. Returns the boxes of all tiles. */
static double take_shape(struct combinations *c, const int q_box[3])
{
    double sum = 0;
    for (int i = 0; i < c->count; i++) {
        c->list[i].boxes = fmin(c->list[i].boxes, boxes_of(c->list[i].axis, q_box));
        sum += c->list[i].tiles * c->list[i].boxes;
    }
    return sum;
}

/* Counts of a plan with several shapes: a tile takes the first of those with the fewest boxes. */
static void count_shapes(const struct search *s, struct nbhd_sm90_bwd_plan *p, const struct combinations *c)
{
    p->boxes = p->full_boxes = 0;
    for (int i = 0; i < c->count; i++) {
        int best = 0;
        for (int k = 1; k < p->shapes; k++)
            if (boxes_of(c->list[i].axis, p->q_box[k]) < boxes_of(c->list[i].axis, p->q_box[best]))
                best = k;
        p->boxes += c->list[i].tiles * boxes_of(c->list[i].axis, p->q_box[best]);
        p->full_boxes += c->list[i].tiles * full_of(c->list[i].axis, p->q_box[best]);
    }
    if (p->k_box[0] * p->k_box[1] * p->k_box[2] < 64 * p->blocks)
        p->full_boxes *= (p->blocks - 1) / (double)p->blocks;
    p->seen = p->boxes;
    p->ms = plan_ms(s, p);
}

/* The box that saves most beside the plan's shapes, and needs no more mask columns; false if none has so few. */
static bool find_next_shape(const struct nbhd_sm90_bwd_plan *p, const struct combinations *c, int (*boxes)[3], int count,
                            int best[3])
{
    double least = INFINITY;
    for (int j = 0; j < count; j++) {
        double sum = 0;
        if (boxes[j][0] + boxes[j][1] + boxes[j][2] > 16 * p->mask_steps)
            continue;
        for (int i = 0; i < c->count && sum < least; i++)
            sum += c->list[i].tiles * fmin(c->list[i].boxes, boxes_of(c->list[i].axis, boxes[j]));
        if (sum < least) {
            least = sum;
            memcpy(best, boxes[j], sizeof *boxes);
        }
    }
    return isfinite(least);
}

/* Up to NBHD_BWD_SM90_SHAPES, while they gain; for less than 3 % in all, the choice costs more. Slices have a map each, of one
 * shape; keys alone were not tried with more. */
static void add_shapes(const struct search *s, struct nbhd_sm90_bwd_plan *p)
{
    int queries[3];
    for (int a = 0; a < 3; a++)
        queries[a] = s->memo[a].queries;
    const int count = list_boxes(s, queries, p->n, NULL);
    int(*boxes)[3] = malloc((size_t)count * sizeof *boxes + 1);
    struct combinations *c = malloc(sizeof *c);
    if (boxes && c && p->adds_dq && !p->sliced && !s->one_axis && find_combinations(s, p, c)) {
        const struct nbhd_sm90_bwd_plan one = *p;
        list_boxes(s, queries, p->n, boxes);
        take_shape(c, p->q_box[0]);
        while (p->shapes < NBHD_BWD_SM90_SHAPES) {
            struct nbhd_sm90_bwd_plan more = *p;
            if (!find_next_shape(p, c, boxes, count, more.q_box[more.shapes++]) || !fits(s, &more))
                break;
            count_shapes(s, &more, c);
            if (more.ms > 0.995 * p->ms)
                break;
            take_shape(c, more.q_box[more.shapes - 1]);
            *p = more;
        }
        if (p->ms > 0.97 * one.ms)
            *p = one;
    }
    free(boxes);
    free(c);
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
    struct search *s = calloc(1, sizeof *s);
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
    for (int kind = 0; kind < KINDS; kind++)
        if (kinds[kind].apart == wide && (!adds_dq || kind == 0))
            for (int n = kind ? 32 : 64; n <= MOST_QUERIES; n += 16) {
                struct nbhd_sm90_bwd_plan plan = {.groups = kinds[kind].groups,
                                                  .blocks = kinds[kind].blocks,
                                                  .ctas = kinds[kind].ctas,
                                                  .apart = kinds[kind].apart,
                                                  .n = n,
                                                  .shapes = 1,
                                                  .adds_dq = adds_dq,
                                                  .sliced = is_sliced(problem)};
                count = search_boxes(s, &plan, plans, count, room);
            }
    for (int i = 0; i < count; i++)
        add_shapes(s, &plans[i]);
    qsort(plans, (size_t)count, sizeof *plans, by_ms);
    for (int a = 0; a < 3; a++)
        for (int k = 0; k <= MOST_ROWS; k++)
            for (int q = 0; q <= MOST_QUERIES; q++)
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
    for (int r = 0; r < MOST_ROWS; r++) { /* rows past the last repeat it */
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
