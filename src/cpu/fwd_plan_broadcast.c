/* Tiles of queries that see every key broadcast: which extents cost least, and where a thread's parts lie. */
#include <math.h>
#include "cpu/fwd_choice.h"
#include "cpu/isa.h"
#include "cpu/place.h"

/* One axis cut into tiles of some extent: the tiles, and the keys that they visit in sum. */
struct axis_cost {
    int extent;
    double tiles, visited;
    int alike; /* neighbouring tiles that visit the same keys, FWD_TILES at most */
};

enum { MAX_EXTENTS = 32, SAMPLES = 6 };

static bool visit_same_keys(struct nbhd_axis a, const struct nbhd_grid *grid, int i, int j)
{
    if (nbhd_min(i, j) < 0 || nbhd_max(i, j) >= grid->tiles_long)
        return false;
    const struct nbhd_cell x = nbhd_grid_cell(grid, i), y = nbhd_grid_cell(grid, j);
    const struct nbhd_range keys = nbhd_tile_any(a, x.size, x.q), others = nbhd_tile_any(a, y.size, y.q);
    return keys.begin == others.begin && keys.end == others.end;
}

/* Counted around the middle of a long group, away from the borders. */
static int tiles_alike(struct nbhd_axis a, int extent)
{
    const struct nbhd_grid grid = nbhd_grid_make(a, extent);
    const int middle = grid.tiles_long / 2;
    int first = middle, end = middle + 1;
    while (end - first < FWD_TILES && visit_same_keys(a, &grid, first - 1, middle))
        first--;
    while (end - first < FWD_TILES && visit_same_keys(a, &grid, middle, end))
        end++;
    return end - first;
}

/* Of a problem's tiles in their order, the last axis fastest: how many follow each other that visit the same keys. */
static int tiles_in_a_row(const struct axis_cost *x, const struct axis_cost *y, const struct axis_cost *z)
{
    int n = z->alike;
    if (n >= z->tiles)
        n *= y->alike;
    if (n >= y->tiles * z->tiles)
        n *= x->alike;
    return nbhd_min(n, FWD_TILES);
}

/* Visited keys from a few tiles of a long group, its first and last among them. */
static struct axis_cost cost_of_extent(struct nbhd_axis a, int extent)
{
    const struct nbhd_grid grid = nbhd_grid_make(a, extent);
    const int tiles = grid.tiles_long, samples = nbhd_min(tiles, SAMPLES);
    double visited = 0;
    for (int i = 0; i < samples; i++) {
        const struct nbhd_cell cell =
            nbhd_grid_cell(&grid, samples > 1 ? (int)((long long)i * (tiles - 1) / (samples - 1)) : 0);
        const struct nbhd_range any = nbhd_tile_any(a, cell.size, cell.q);
        visited += any.end - any.begin;
    }
    return (struct axis_cost){extent, grid.count, visited / samples * grid.count, tiles_alike(a, extent)};
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

static struct nbhd_fwd_price price_of(const struct nbhd_fwd_machine *m)
{
    const struct nbhd_fwd_price floats = {1.08, 14.0, 12.0, 0.25, 0.0};
    return m->price.product > 0 ? m->price : floats;
}

/* Cycles that a key takes: of the products and softmax of a tile's lanes, a vector of them; and apart from these. */
struct key_cycles {
    double per_vector, per_key;
};

static struct key_cycles cycles_of_key(const nbhd_desc *d, const struct nbhd_fwd_machine *m)
{
    const struct nbhd_fwd_price price = price_of(m);
    const double width = d->head_dim + d->head_dim_v;
    return (struct key_cycles){width * price.product + price.score, price.key + width * price.key_dim};
}

static double vectors_of(int lanes, const struct nbhd_fwd_machine *m) { return (lanes + m->vf - 1) / m->vf; }

/* Cycles of `tiles` tiles of so many lanes that visit `keys` keys in all, `alike` tiles the same ones. */
static double broadcast_cycles(const nbhd_desc *d, double tiles, double keys, int lanes, int alike,
                               const struct nbhd_fwd_machine *m)
{
    const struct key_cycles key = cycles_of_key(d, m);
    const double vectors = vectors_of(lanes, m), width = d->head_dim + d->head_dim_v;
    const double per_vector = key.per_vector + (d->bias ? 2.0 * m->vf : 0);
    return keys * (vectors * per_vector + key.per_key / alike) + tiles * (vectors * width * 6.0 + 500.0 + price_of(m).tile);
}

struct nbhd_fwd_choice nbhd_fwd_choose_broadcast(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m)
{
    const nbhd_desc *d = &problem->desc;
    struct axis_cost costs[3][MAX_EXTENTS];
    int n[3];
    for (int a = 0; a < 3; a++)
        n[a] = axis_costs(problem->axis[a], costs[a]);
    const int share = d->heads / d->kv_heads;
    struct nbhd_fwd_choice best = {{1, 1, 1}, 1, 0, HUGE_VAL};
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
                    const double cycles = broadcast_cycles(d, tiles, keys, lanes, tiles_in_a_row(x, y, z), m);
                    if (cycles < best.cycles)
                        best = (struct nbhd_fwd_choice){{x->extent, y->extent, z->extent}, heads, 0, cycles};
                }
    /* Each key comes from far away once, and a tile's first block of them is not asked for ahead of time. */
    double tokens = 1;
    for (int a = 0; a < 3; a++)
        tokens *= problem->axis[a].keys;
    best.cycles += (tokens + d->extra) * (d->head_dim + d->head_dim_v) / m->vf * FAR_CYCLES;
    return best;
}

/* A task is worth handing out from some ten microseconds on. */
enum { TASK_CYCLES = 100000 };

/* Their Q and O take a quarter of the second-level cache: blocks of keys pass through it, too. */
static int most_together(const struct nbhd_fwd *f, bool pairs)
{
    return pairs ? FWD_TILES : nbhd_max(1, nbhd_min(FWD_TILES, (int)(nbhd_l2_bytes() / 4 / (f->q_size + f->o_size))));
}

/* Where the parts of a thread's scratch lie; vectors of vf lanes, or, in pairs, of twice that many bfloat16. */
static void place_broadcast(const nbhd_desc *d, struct nbhd_fwd *f, const struct nbhd_fwd_machine *m)
{
    const bool pairs = m->price.product > 0;
    const int vf = m->vf;
    const size_t block = (size_t)(pairs ? m->block : FWD_BLOCK);
    const size_t row = FWD_LANES * sizeof(float);
    const size_t k = (size_t)nbhd_whole(d->head_dim, pairs ? 2 * vf : vf);
    const size_t v = (size_t)nbhd_whole(d->head_dim_v, pairs ? 2 * vf : vf);
    f->q_size = pairs ? k / 2 * row : (size_t)d->head_dim * row;
    f->o_size = (pairs ? v : (size_t)d->head_dim_v) * row + m->sums;
    const size_t tiles = (size_t)(f->together = most_together(f, pairs));
    f->at_q = nbhd_place(&f->scratch, tiles * f->q_size);
    f->at_o = nbhd_place(&f->scratch, tiles * f->o_size);
    f->at_s = nbhd_place(&f->scratch, m->scores ? m->scores : block * row);
    f->at_lanes = nbhd_place(&f->scratch, tiles * 3 * row);
    const size_t blocks = pairs ? FWD_TILES + 1 : 3; /* at hand, next; other tiles', or one of them at a time */
    f->at_block = nbhd_place(&f->scratch, blocks * sizeof(struct key_block));
    f->at_zeros = nbhd_place(&f->scratch, (size_t)d->head_dim_v * sizeof(float));
    f->key_step = (int)(k + v) + 16; /* a cache line more: rows 1 KiB apart fall into few sets */
    const bool copies = d->dtype != NBHD_F32 || f->together >= FWD_COPY_TILES;
    f->at_keys = nbhd_place(&f->scratch, pairs ? block * k * sizeof(uint16_t)
                                         : copies ? block * (size_t)f->key_step * sizeof(float)
                                                  : 0);
    f->at_values = nbhd_place(&f->scratch, pairs ? block * v * sizeof(uint16_t) : 0);
}

/* Tiles in a row that visit the same keys. */
static int plan_alike(const struct nbhd_problem *problem, const struct nbhd_config *config)
{
    struct axis_cost c[3];
    for (int a = 0; a < 3; a++)
        c[a] = cost_of_extent(problem->axis[a], config->q_tile[a]);
    return tiles_in_a_row(&c[0], &c[1], &c[2]);
}

/* How many tiles, `most` at most, go through the same keys together: fewer where threads would find too few tasks. */
static int run_together(const struct nbhd_config *config, long long tiles, int most)
{
    enum { TASKS_PER_THREAD = 4 };
    int together = most;
    while (together > 1 && config->threads > 1 && tiles < (long long)together * TASKS_PER_THREAD * config->threads)
        together /= 2;
    return together;
}

/* How many neighbouring tiles along the last axis go through the box around their keys together, though each sees
 * others: more of them ask for and copy each key more rarely; kernels of pairs multiply what a tile does not see, too.
 * Not by threads, as the blocks that sums are made in depend on it: so there must be enough tiles for many of them. */
static void choose_band(const struct nbhd_problem *problem, const struct nbhd_config *config, struct nbhd_fwd *f,
                        const struct nbhd_fwd_machine *m)
{
    enum { BANDS = 32 };
    const struct nbhd_axis a = problem->axis[2];
    const struct nbhd_grid grid = nbhd_grid_make(a, config->q_tile[2]);
    const bool pairs = m->price.product > 0;
    const int lanes = f->head_tile * config->q_tile[0] * config->q_tile[1] * config->q_tile[2];
    const struct key_cycles key = cycles_of_key(&problem->desc, m);
    const double products = vectors_of(lanes, m) * key.per_vector;
    if (a.edge == NBHD_EDGE_PERIODIC)
        return;
    double least = pairs ? products + key.per_key : HUGE_VAL;
    const long long most = nbhd_min(f->together, grid.tiles_long);
    for (int band = 2; band <= most && f->tiles >= (long long)band * BANDS; band *= 2) {
        const int first = (grid.tiles_long - band) / 2;
        const struct nbhd_cell x = nbhd_grid_cell(&grid, first), y = nbhd_grid_cell(&grid, first + band - 1);
        const struct nbhd_range begin = nbhd_tile_any(a, x.size, x.q), end = nbhd_tile_any(a, y.size, y.q);
        const double stretch = (double)(end.end - begin.begin) / (begin.end - begin.begin);
        const double cycles = stretch * (pairs * products + key.per_key / band);
        if (cycles >= least || stretch * 100 > FWD_STRETCH)
            continue;
        least = cycles;
        f->band = band;
    }
}

/* Tiles of a task: a multiple of those that visit the same keys together. A thread that keeps units of keys finds the
 * more of them the longer its tasks are: more than one such multiple, if that leaves tasks to share out. */
static int tiles_of_task(const struct nbhd_problem *problem, const struct nbhd_config *config, const struct nbhd_fwd *f,
                         int together)
{
    enum { TASKS = 4 }; /* for a thread */
    const double tile_cycles = config->predicted_ms * NBHD_CYCLES_PER_MS / (double)f->tiles;
    long long run = nbhd_max(1, (int)(TASK_CYCLES / tile_cycles));
    if (f->units.slots) {
        const long long sequence = f->tiles / problem->desc.batch / problem->desc.kv_heads;
        long long share = config->threads > 1 ? f->tiles / config->threads / TASKS : sequence;
        if (share < 2LL * together && 2 * share >= together)
            share = 2LL * together;
        share = share < sequence ? share : sequence;
        run = run > share ? run : share;
    }
    return (int)((run + together - 1) / together * together);
}

/* Threads differ in speed, where others use their cores: the last tasks are a half and a quarter as long, a few for
 * each thread, lest all wait for one. More of those would cost more copies of keys than they save waiting. */
static void cut_tasks(struct nbhd_fwd *f, int threads)
{
    long long tail[3] = {0};
    for (int i = 2; i > 0; i--) {
        const long long tasks = nbhd_whole(threads, 1 << i), tiles = tasks * (f->run >> i);
        const bool even = f->run % (f->band << i) == 0 && f->run >> i > 1;
        if (threads > 1 && even && f->tiles / 4 >= tail[2] + tiles)
            tail[i] = tiles;
    }
    const long long whole = (f->tiles - tail[1] - tail[2]) / f->run * f->run;
    const long long ends[3] = {tail[1] + tail[2] ? whole : f->tiles, tail[2] ? whole + tail[1] : f->tiles, f->tiles};
    f->tasks = 0;
    for (int i = 0; i < 3; i++) {
        const long long begin = i ? ends[i - 1] : 0;
        struct nbhd_fwd_part *part = &f->part[i];
        *part = (struct nbhd_fwd_part){begin, ends[i], 0, nbhd_max(1, f->run >> i)};
        part->tasks = (part->end - begin + part->run - 1) / part->run;
        f->tasks += part->tasks;
    }
}

void nbhd_fwd_build_broadcast(const struct nbhd_problem *problem, const struct nbhd_config *config, struct nbhd_fwd *f,
                              const struct nbhd_fwd_machine *m)
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
    place_broadcast(d, f, m);
    nbhd_fwd_choose_units(problem, f, m);
    const int alike = nbhd_min(f->together, plan_alike(problem, config));
    f->band = 1;
    if (alike == 1)
        choose_band(problem, config, f, m);
    const int together = f->band > 1 ? f->band : run_together(config, f->tiles, alike);
    f->run = tiles_of_task(problem, config, f, together);
    f->tasks = (f->tiles + f->run - 1) / f->run;
    if (m->price.product > 0)
        cut_tasks(f, config->threads);
}
