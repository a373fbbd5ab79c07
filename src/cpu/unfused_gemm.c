/* Tiles for the GEMM-based unfused passes: see unfused_gemm.h. The cost model is in cycles of a core that starts one
 * multiply-add vector a cycle, for a tile away from the borders; it needs to be right only in ratio. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "cpu/cpu.h"
#include "cpu/unfused_gemm.h"

static int product_kinds(int pass, enum nbhd_product_kind kinds[2])
{
    kinds[0] = pass == NBHD_QK || pass == NBHD_AV_BACKWARD ? WRITES_SCORES : WRITES_QUERIES;
    kinds[1] = WRITES_KEYS;
    return pass == NBHD_QK || pass == NBHD_AV ? 1 : 2;
}

static int product_width(const nbhd_desc *d)
{
    return d->pass == NBHD_AV || d->pass == NBHD_AV_BACKWARD ? d->head_dim_v : d->head_dim;
}

/* The rows that stay on an axis, as an axis of their own. */
static struct nbhd_axis rows_axis(struct nbhd_axis a, enum nbhd_product_kind kind)
{
    if (kind == WRITES_KEYS)
        a.length = a.keys;
    return a;
}

/* One axis in tiles of some extent: of a tile in the middle, what it visits, and what each of its rows sees. */
struct extent {
    int rows;
    double visits, sees;
};

static struct extent extent_of(struct nbhd_axis a, enum nbhd_product_kind kind, int rows)
{
    const int n = nbhd_group_size(a, 0), end = kind == WRITES_KEYS && a.keys != a.length ? a.keys : n;
    const int begin = nbhd_max(0, nbhd_min((end - rows) / 2, end - rows));
    struct extent e = {rows, 0, 0};
    struct nbhd_range any = {0, 0};
    for (int i = begin; i < begin + rows && i < end; i++) {
        const struct nbhd_range sees = kind == WRITES_KEYS ? nbhd_queries(a, n, i) : nbhd_keys(a, n, i);
        any = nbhd_range_of(i == begin ? sees.begin : any.begin, sees.end);
        e.sees += sees.end - sees.begin;
    }
    e.sees /= rows;
    e.visits = any.end - any.begin;
    return e;
}

/* Cycles of a tile, for each of its rows. */
static double cost_of(enum nbhd_product_kind kind, const struct extent e[3], int width, int vf)
{
    const double rows = (double)e[0].rows * e[1].rows * e[2].rows, runs = e[0].visits * e[1].visits;
    const double together = rows * (e[0].sees / e[0].visits) * (e[1].sees / e[1].visits); /* rows that see a run */
    const double vectors = ceil(width / (double)vf), segments = ceil(e[2].sees / vf);
    const double few = together < 4 ? 4 / together : 1; /* too few accumulators to hide the latency */
    double run;
    if (kind == WRITES_SCORES) {
        const double run_vectors = ceil(e[2].visits / vf);
        run = run_vectors * width * (together * few + 4) + together * segments * 10;
    } else {
        const double gather = kind == WRITES_QUERIES
                                  ? together * segments * 8
                                  : e[2].visits * (12 + together / e[2].rows * (e[2].rows == 1 ? 2 : 6));
        run = vectors * (together * few * (e[2].visits + 2) + e[2].visits) + gather;
    }
    return (runs * (run + 20) + rows * width * 0.5) / rows;
}

struct tile_choice {
    int tile[3];
    double cost;
};

/* Keeps the list sorted by cost; the dearest falls out of a full one. */
static int insert(struct tile_choice *best, int count, int room, const struct tile_choice *c)
{
    int at = count;
    if (count == room && c->cost >= best[count - 1].cost)
        return count;
    if (count < room)
        count++;
    else
        at--;
    for (; at > 0 && best[at - 1].cost > c->cost; at--)
        best[at] = best[at - 1];
    best[at] = *c;
    return count;
}

/* The cheapest tiles, by the model; returns how many. */
static int choose_tiles(const struct nbhd_problem *problem, enum nbhd_product_kind kind, int vf,
                        struct tile_choice *best, int room)
{
    static const int extents[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64};
    enum { EXTENTS = sizeof extents / sizeof *extents };
    struct extent list[3][EXTENTS];
    int counts[3], found = 0;
    for (int i = 0; i < 3; i++) {
        const int size = nbhd_group_size(rows_axis(problem->axis[i], kind), 0);
        for (counts[i] = 0; counts[i] < EXTENTS && (!counts[i] || extents[counts[i]] <= size); counts[i]++)
            list[i][counts[i]] = extent_of(problem->axis[i], kind, extents[counts[i]]);
    }
    for (int i = 0; i < counts[0]; i++)
        for (int j = 0; j < counts[1]; j++)
            for (int k = 0; k < counts[2]; k++) {
                const struct extent e[3] = {list[0][i], list[1][j], list[2][k]};
                if (e[0].rows * e[1].rows * e[2].rows > GEMM_LANES)
                    break;
                const struct tile_choice c = {{e[0].rows, e[1].rows, e[2].rows},
                                              cost_of(kind, e, product_width(&problem->desc), vf)};
                found = insert(best, found, room, &c);
            }
    return found;
}

static long long tasks_of(const struct nbhd_problem *problem, enum nbhd_product_kind kind, const int tile[3],
                          struct nbhd_grid grid[3])
{
    const nbhd_desc *d = &problem->desc;
    long long tasks = (long long)d->batch * (kind == WRITES_KEYS ? d->kv_heads : d->heads);
    for (int i = 0; i < 3; i++) {
        grid[i] = nbhd_grid_make(rows_axis(problem->axis[i], kind), tile[i]);
        tasks *= grid[i].count;
    }
    return tasks;
}

bool nbhd_gemm_refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    for (int i = 0; i < problem->desc.rank; i++)
        if (problem->desc.edge[i] == NBHD_PERIODIC)
            return nbhd_refuse(why, "edge[%d] is periodic; its runs of keys do not wrap around", i);
    return nbhd_unfused_refuse(problem, why);
}

/* q_tile is the first product's tile, k_tile the second's. The i-th best of each go together. */
int nbhd_gemm_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room, int vf)
{
    enum { MOST = 5 };
    enum nbhd_product_kind kinds[2];
    const int products = product_kinds(problem->desc.pass, kinds);
    struct tile_choice first[MOST], second[MOST] = {{{1, 1, 1}, 0}};
    struct nbhd_grid grid[3];
    const int count = choose_tiles(problem, kinds[0], vf, first, room < MOST ? room : MOST);
    const int others = products > 1 ? choose_tiles(problem, kinds[1], vf, second, count) : 1;
    for (int i = 0; i < count; i++) {
        configs[i] = (struct nbhd_config){.variant = 0};
        for (int a = 0; a < 3; a++) {
            configs[i].q_tile[a] = first[i].tile[a];
            configs[i].k_tile[a] = second[i < others ? i : others - 1].tile[a];
        }
        configs[i].threads = nbhd_plan_threads(problem, tasks_of(problem, kinds[0], configs[i].q_tile, grid));
    }
    return count;
}

static size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* A and C: at most GEMM_LANES rows of a run or a row's width. B: a run of rows. */
static void lay_out_scratch(struct nbhd_gemm *g)
{
    const size_t pad = (size_t)g->pad, most = pad > GEMM_RUN ? pad : GEMM_RUN;
    g->at_b = lines((GEMM_LANES * most + 16) * sizeof(float)); /* and a vector that is written past the last row */
    g->at_c = g->at_b + lines(GEMM_RUN * pad * sizeof(float));
    g->scratch = g->at_c + lines(GEMM_LANES * most * sizeof(float));
}

nbhd_status nbhd_gemm_build(struct nbhd_plan *plan)
{
    const struct nbhd_problem *p = &plan->problem;
    const struct nbhd_config *c = &plan->config;
    enum nbhd_product_kind kinds[2];
    struct nbhd_gemm *g = calloc(1, sizeof *g);
    if (!g)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's tiling of %zu bytes could not be allocated", sizeof *g);
    plan->state = g;
    g->threads = c->threads;
    g->products = product_kinds(p->desc.pass, kinds);
    for (int i = 0; i < g->products; i++)
        g->tiling[i].tasks = tasks_of(p, kinds[i], i ? c->k_tile : c->q_tile, g->tiling[i].grid);
    g->pad = (product_width(&p->desc) + 15) / 16 * 16;
    lay_out_scratch(g);
    const nbhd_status status = nbhd_unfused_build(plan, sizeof(float), "");
    g->table = g->scratch * (size_t)g->threads;
    plan->workspace += g->table;
    int used = snprintf(plan->describe, sizeof plan->describe, "tiles of %dx%dx%d", c->q_tile[0], c->q_tile[1],
                        c->q_tile[2]);
    if (g->products > 1)
        used += snprintf(plan->describe + used, sizeof plan->describe - (size_t)used, " queries, %dx%dx%d keys",
                         c->k_tile[0], c->k_tile[1], c->k_tile[2]);
    snprintf(plan->describe + used, sizeof plan->describe - (size_t)used, ", %d threads", g->threads);
    return status;
}

void nbhd_gemm_drop(struct nbhd_plan *plan)
{
    free(plan->state);
    plan->state = NULL;
}
