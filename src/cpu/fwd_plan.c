/* See fwd_plan.h. The cost model is in cycles of a core that starts one multiply-add vector a cycle; its constants were
 * fitted to measurements (docs/notes/cpu-forward.md) and need to be right only in ratio. */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "cpu/cpu.h"
#include "cpu/fwd_plan.h"

bool nbhd_fwd_refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    const nbhd_desc *d = &problem->desc;
    if (d->dtype != NBHD_F32)
        return nbhd_refuse(why, "dtype is %s; it computes f32 only", nbhd_dtype_name(d->dtype));
    double table = 1;
    for (int i = 0; i < 3 && d->bias; i++)
        table *= 2.0 * problem->axis[i].window - 1;
    if (table * FWD_LANES > INT_MAX)
        return nbhd_refuse(why, "the bias table has %g entries a head; at most %d fit its 32-bit indices", table,
                           INT_MAX / FWD_LANES);
    return false;
}

/* ---- broadcast ---- */

/* One axis cut into tiles of some extent: the tiles, and the keys that they visit in sum. */
struct axis_cost {
    int extent;
    double tiles, visited;
};

enum { MAX_EXTENTS = 32, SAMPLES = 6 };

/* Visited keys from a few tiles of a long group, its first and last among them. */
static struct axis_cost cost_of_extent(struct nbhd_axis a, int extent)
{
    const struct nbhd_grid grid = nbhd_grid_make(a, extent);
    const int tiles = grid.tiles_long, samples = nbhd_min(tiles, SAMPLES);
    double visited = 0;
    for (int i = 0; i < samples; i++) {
        const struct nbhd_cell cell = nbhd_grid_cell(&grid, samples > 1 ? (int)((long long)i * (tiles - 1) / (samples - 1)) : 0);
        const struct nbhd_range any = nbhd_tile_any(a, cell.size, cell.q);
        visited += any.end - any.begin;
    }
    return (struct axis_cost){extent, grid.count, visited / samples * grid.count};
}

/* Extents worth trying on an axis: all small ones, then some, and the whole of a short axis. */
static int axis_costs(struct nbhd_axis a, struct axis_cost costs[MAX_EXTENTS])
{
    static const int extents[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 21, 24, 28, 32, 40, 48, 56, 64};
    const int size = nbhd_group_size(a, 0);
    int n = 0;
    for (size_t i = 0; i < sizeof extents / sizeof *extents && extents[i] < size; i++)
        costs[n++] = cost_of_extent(a, extents[i]);
    if (size <= FWD_LANES)
        costs[n++] = cost_of_extent(a, size);
    return n;
}

struct broadcast_choice {
    int extent[3], heads;
    double cycles; /* a batch entry and kv head */
};

/* Cycles of `tiles` tiles of so many lanes that visit `keys` keys in all. */
static double broadcast_cycles(const nbhd_desc *d, double tiles, double keys, int lanes, int vf)
{
    const double vectors = (lanes + vf - 1) / vf, width = d->head_dim + d->head_dim_v;
    const double per_vector = width * 1.08 + 14.0 + (d->bias ? 2.0 * vf : 0), per_key = 12.0 + width * 0.25;
    return keys * (vectors * per_vector + per_key) + tiles * (vectors * width * 6.0 + 500.0);
}

static struct broadcast_choice choose_broadcast(const struct nbhd_problem *problem, int vf)
{
    const nbhd_desc *d = &problem->desc;
    struct axis_cost costs[3][MAX_EXTENTS];
    int n[3];
    for (int a = 0; a < 3; a++)
        n[a] = axis_costs(problem->axis[a], costs[a]);
    const int share = d->heads / d->kv_heads;
    struct broadcast_choice best = {{1, 1, 1}, 1, HUGE_VAL};
    for (int heads = 1; heads <= share && heads <= FWD_LANES; heads *= 2)
        for (int i = 0; i < n[0]; i++)
            for (int j = 0; j < n[1]; j++)
                for (int k = 0; k < n[2]; k++) {
                    const struct axis_cost *x = &costs[0][i], *y = &costs[1][j], *z = &costs[2][k];
                    const int lanes = heads * x->extent * y->extent * z->extent;
                    if (lanes > FWD_LANES)
                        break;
                    const double head_tiles = (share + heads - 1) / heads;
                    const double tiles = head_tiles * x->tiles * y->tiles * z->tiles;
                    const double keys = head_tiles * x->visited * y->visited * z->visited + tiles * d->extra;
                    const double cycles = broadcast_cycles(d, tiles, keys, lanes, vf);
                    if (cycles < best.cycles)
                        best = (struct broadcast_choice){{x->extent, y->extent, z->extent}, heads, cycles};
                }
    return best;
}

/* ---- the planner's three questions ---- */

int nbhd_fwd_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room, int vf)
{
    (void)room;
    const struct broadcast_choice b = choose_broadcast(problem, vf);
    configs[0] = (struct nbhd_config){.variant = NBHD_FWD_BROADCAST};
    for (int a = 0; a < 3; a++)
        configs[0].q_tile[a] = b.extent[a];
    configs[0].stages = b.heads;
    const double cycles = b.cycles * problem->desc.batch * problem->desc.kv_heads;
    configs[0].predicted_ms = cycles / 3.5e6;
    configs[0].threads = nbhd_plan_threads(problem, (long long)(cycles / 20e3) + 1);
    return 1;
}

/* A task is worth handing out from some ten microseconds on. */
enum { TASK_CYCLES = 100000 };

static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

static void build_broadcast(const struct nbhd_problem *problem, const struct nbhd_config *config, struct nbhd_fwd *f)
{
    const nbhd_desc *d = &problem->desc;
    const int share = d->heads / d->kv_heads;
    f->head_tile = config->stages;
    f->head_tiles = (share + f->head_tile - 1) / f->head_tile;
    f->tiles = (long long)d->batch * d->kv_heads * f->head_tiles;
    for (int a = 0; a < 3; a++) {
        f->grid[a] = nbhd_grid_make(problem->axis[a], config->q_tile[a]);
        f->tiles *= f->grid[a].count;
    }
    const double tile_cycles = config->predicted_ms * 3.5e6 / (double)f->tiles;
    f->run = nbhd_max(1, (int)(TASK_CYCLES / tile_cycles));
    f->tasks = (f->tiles + f->run - 1) / f->run;
    const size_t row = FWD_LANES * sizeof(float);
    f->at_q = 0;
    f->at_o = f->at_q + (size_t)d->head_dim * row;
    f->at_s = f->at_o + (size_t)d->head_dim_v * row;
    f->at_lanes = f->at_s + FWD_BLOCK * row;
    f->at_block = f->at_lanes + 3 * row;
    f->at_zeros = f->at_block + rounded(sizeof(struct key_block));
    f->scratch = f->at_zeros + rounded((size_t)d->head_dim_v * sizeof(float));
}

nbhd_status nbhd_fwd_build(struct nbhd_plan *plan, int vf)
{
    const struct nbhd_config *c = &plan->config;
    struct nbhd_fwd *f = calloc(1, sizeof *f);
    if (!f)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's tiling of %zu bytes could not be allocated", sizeof *f);
    (void)vf;
    plan->state = f;
    f->variant = c->variant;
    f->threads = c->threads;
    build_broadcast(&plan->problem, c, f);
    plan->workspace = f->scratch * (size_t)f->threads;
    snprintf(plan->describe, sizeof plan->describe, "broadcast, tile %dx%dx%d x %d heads, %d threads", c->q_tile[0],
             c->q_tile[1], c->q_tile[2], f->head_tile, f->threads);
    return NBHD_OK;
}

void nbhd_fwd_drop(struct nbhd_plan *plan)
{
    free(plan->state);
    plan->state = NULL;
}
