/* See fwd_plan.h. The cost model is in cycles of a core that starts one multiply-add vector a cycle; its constants were
 * fitted to measurements (docs/notes/cpu-forward.md) and need to be right only in ratio. */
#include <limits.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cpu/cpu.h"
#include "cpu/fwd_plan.h"
#include "cpu/threads.h"

bool nbhd_fwd_refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    const nbhd_desc *d = &problem->desc;
    if (d->dtype == NBHD_F64)
        return nbhd_refuse(why, "dtype is f64; it computes in float32");
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
    int alike; /* neighbouring tiles that visit the same keys, FWD_PAIR_TILES at most; asked of rows of pairs only */
};

/* Cycles to wait for a vector of a scattered key that is not asked for ahead of time. */
enum { FAR_CYCLES = 26 };

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
    while (end - first < FWD_PAIR_TILES && visit_same_keys(a, &grid, first - 1, middle))
        first--;
    while (end - first < FWD_PAIR_TILES && visit_same_keys(a, &grid, middle, end))
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
    return nbhd_min(n, FWD_PAIR_TILES);
}

/* Visited keys from a few tiles of a long group, its first and last among them. */
static struct axis_cost cost_of_extent(struct nbhd_axis a, int extent, bool pairs)
{
    const struct nbhd_grid grid = nbhd_grid_make(a, extent);
    const int tiles = grid.tiles_long, samples = nbhd_min(tiles, SAMPLES);
    double visited = 0;
    for (int i = 0; i < samples; i++) {
        const struct nbhd_cell cell = nbhd_grid_cell(&grid, samples > 1 ? (int)((long long)i * (tiles - 1) / (samples - 1)) : 0);
        const struct nbhd_range any = nbhd_tile_any(a, cell.size, cell.q);
        visited += any.end - any.begin;
    }
    return (struct axis_cost){extent, grid.count, visited / samples * grid.count, pairs ? tiles_alike(a, extent) : 1};
}

/* Extents worth trying on an axis: all small ones, then some, and the whole of a short axis. */
static int axis_costs(struct nbhd_axis a, struct axis_cost costs[MAX_EXTENTS], bool pairs)
{
    static const int extents[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 21, 24, 28, 32, 40, 48, 56, 64};
    const int size = nbhd_group_size(a, 0);
    int n = 0;
    for (size_t i = 0; i < sizeof extents / sizeof *extents && extents[i] < size; i++)
        costs[n++] = cost_of_extent(a, extents[i], pairs);
    if (size <= FWD_LANES)
        costs[n++] = cost_of_extent(a, size, pairs);
    return n;
}

struct broadcast_choice {
    int extent[3], heads;
    double cycles; /* a batch entry and kv head */
};

static struct nbhd_fwd_price price_of(const struct nbhd_fwd_machine *m)
{
    return m->price.product > 0 ? m->price : (struct nbhd_fwd_price){1.08, 14.0, 12.0, 0.25};
}

/* Cycles of `tiles` tiles of so many lanes that visit `keys` keys in all, `alike` tiles the same ones. */
static double broadcast_cycles(const nbhd_desc *d, double tiles, double keys, int lanes, int alike,
                               const struct nbhd_fwd_machine *m)
{
    const struct nbhd_fwd_price price = price_of(m);
    const double vectors = (lanes + m->vf - 1) / m->vf, width = d->head_dim + d->head_dim_v;
    const double per_vector = width * price.product + price.score + (d->bias ? 2.0 * m->vf : 0);
    const double per_key = (price.key + width * price.key_dim) / alike;
    return keys * (vectors * per_vector + per_key) + tiles * (vectors * width * 6.0 + 500.0);
}

static struct broadcast_choice choose_broadcast(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m)
{
    const nbhd_desc *d = &problem->desc;
    struct axis_cost costs[3][MAX_EXTENTS];
    int n[3];
    for (int a = 0; a < 3; a++)
        n[a] = axis_costs(problem->axis[a], costs[a], m->price.product > 0);
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
                    const double cycles = broadcast_cycles(d, tiles, keys, lanes, tiles_in_a_row(x, y, z), m);
                    if (cycles < best.cycles)
                        best = (struct broadcast_choice){{x->extent, y->extent, z->extent}, heads, cycles};
                }
    /* Each key comes from far away once, and a tile's first block of them is not asked for ahead of time. */
    double tokens = 1;
    for (int a = 0; a < 3; a++)
        tokens *= problem->axis[a].keys;
    best.cycles += (tokens + d->extra) * (d->head_dim + d->head_dim_v) / m->vf * FAR_CYCLES;
    return best;
}

/* ---- permute ---- */

struct permute_choice {
    int extent[3]; /* of a task, in query elements; axis 2: positions */
    int chunk, group; /* see struct nbhd_fwd */
    double cycles;    /* a batch entry and kv head; HUGE_VAL: impossible */
};

enum {
    MOST_COLUMNS = 64,         /* window on axis 2 */
    MOST_RUNS = 16384,         /* key rows of a tile */
    CACHED_BYTES = 5 << 19,    /* of lines and values in use, from where on they begin to fall out of near caches */
    RUN_CYCLES = 40,           /* to find the line of a key row, for each tile */
    PIECE_BYTES = 512,         /* of a token, at least, that a task should take: shorter pieces come as if not asked for */
    MOST_BYTES = 64 << 20,     /* of lines a thread */
    TASKS_PER_THREAD = 6,
    MOST_GROUP = 16,
    STREAM_BYTES = 8 << 20     /* of all tensors together */
};

/* Columns that a table of two vectors can serve: the lanes' first keys are up to vf - 1 + spread apart. */
static int permute_columns(struct nbhd_axis a, const struct nbhd_fwd_machine *m)
{
    const int spread = m->vf - 1 + a.stride - 1 + (a.dilation > 1 ? a.window - 1 : 0);
    return nbhd_min(m->columns, 2 * m->vf - spread);
}

/* Key elements that t neighbouring queries of one group see at most. */
static int most_keys(struct nbhd_axis a, int t) { return nbhd_min(nbhd_group_size(a, 0), t + a.window + a.stride - 2); }

/* Axis 2 of a permuted problem: positions instead of tokens. */
static struct nbhd_axis position_axis(struct nbhd_axis a)
{
    a.dilation = 1;
    return a;
}

static int most_positions(struct nbhd_axis a, int t) { return nbhd_min(a.length, t + 2 * (a.window + a.stride)); }

/* About what t positions of queries see: groups seldom end among them. */
static int mean_positions(struct nbhd_axis a, int t) { return nbhd_min(a.length, t + a.window + a.stride - 2); }

static int whole_vectors(int n, int vf) { return (n + vf - 1) / vf * vf; }

/* Lines of a multiple of 128 bytes fall into few cache sets; where a vector is a cache line of its own, of 512. */
static int line_step(int positions, int vf)
{
    const int step = whole_vectors(positions, vf);
    return step % (vf < 16 ? 32 : 128) ? step : step + vf;
}

static size_t line_bytes(const nbhd_desc *d, int positions, int vf)
{
    size_t floats = (size_t)d->head_dim * (size_t)line_step(positions, vf);
    if (d->head_dim_v % vf || d->dtype != NBHD_F32)
        floats += (size_t)positions * (size_t)whole_vectors(d->head_dim_v, vf);
    return floats * sizeof(float);
}

/* Cycles of all that does not depend on how tasks are cut. */
static double permute_work(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_axis *a = problem->axis;
    const double vectors = (a[2].length + m->vf - 1) / m->vf, rows = (double)a[0].length * a[1].length;
    const double width = d->head_dim + whole_vectors(d->head_dim_v, m->vf);
    const double keys = (double)a[0].window * a[1].window * a[2].window;
    const double shared = nbhd_min(nbhd_group_size(a[1], 0), FWD_ROWS);
    const double per_key = width * (1.15 + 0.5 / shared) + 14.0 + (d->bias ? 4.0 : 0.0);
    const double per_tile = 300.0 / shared + 8.0 * width;
    return d->heads / d->kv_heads * rows * vectors * (keys * per_key + d->extra * (width * 1.2 + 14.0) + per_tile);
}

/* Cuts axis 1, then axis 0, until every thread has some tasks to take. */
static void split_tasks(const struct nbhd_problem *problem, int threads, struct permute_choice *c)
{
    double tasks = problem->desc.batch * ceil((double)problem->desc.kv_heads / c->group);
    for (int i = 0; i < 3; i++)
        tasks *= nbhd_grid_make(i == 2 ? position_axis(problem->axis[2]) : problem->axis[i], c->extent[i]).count;
    const int wanted = threads > 1 ? threads * TASKS_PER_THREAD : 1;
    for (int i = 1; i >= 0 && tasks < wanted; i--) {
        const int unit = i == 1 ? c->chunk : 1, units = (c->extent[i] + unit - 1) / unit;
        const int parts = nbhd_min(units, (int)ceil(wanted / tasks));
        c->extent[i] = (units + parts - 1) / parts * unit;
        tasks *= parts;
    }
}

/* Cycles to pack a vector of keys, asked for ahead of time: best where memory is read in sequence, all heads of its tokens. */
static double pack_cycles(const nbhd_desc *d, int group)
{
    const int bytes = group * d->head_dim * (d->dtype == NBHD_F32 ? 4 : 2);
    return group == d->kv_heads ? 8.0 : bytes >= PIECE_BYTES ? 12.0 : 12.0 + FAR_CYCLES;
}

/* Cycles of one way to cut: the work, slower if the keys in use outgrow the cache, and packing lines. */
static double permute_cycles(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m, double work,
                             const struct permute_choice *c)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_axis *a = problem->axis;
    const int positions = mean_positions(a[2], c->extent[2]), most = most_positions(a[2], c->extent[2]);
    const double lines = (double)c->group * most_keys(a[0], 1) * most_keys(a[1], c->chunk);
    const double bytes = lines * positions * (d->head_dim + d->head_dim_v) * (double)sizeof(float);
    double tasks = nbhd_grid_make(position_axis(a[2]), c->extent[2]).count, packed;
    for (int i = 0; i < 2; i++)
        tasks *= nbhd_grid_make(a[i], c->extent[i]).count;
    if (nbhd_group_size(a[0], 0) == 1)
        packed = most_keys(a[1], c->extent[1]);
    else
        packed = ceil((double)c->extent[1] / c->chunk) * most_keys(a[0], c->extent[0]) * most_keys(a[1], c->chunk);
    if (lines * (double)line_bytes(d, most, m->vf) > MOST_BYTES)
        return HUGE_VAL;
    const double vectors = ((double)d->head_dim * whole_vectors(positions, m->vf) + (double)d->head_dim_v * positions) / m->vf;
    const double list = (double)a[0].length * a[1].length / FWD_ROWS * nbhd_grid_make(position_axis(a[2]), c->extent[2]).count;
    const double pack = tasks * packed * vectors * pack_cycles(d, c->group) +
                        list * a[0].window * most_keys(a[1], FWD_ROWS) * RUN_CYCLES;
    return work * (1.0 + 0.08 * fmax(0.0, bytes - CACHED_BYTES) / (1 << 20)) + pack;
}

static struct permute_choice choose_permute(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m, int threads)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_axis *a = problem->axis;
    struct permute_choice best = {{1, 1, 1}, FWD_ROWS, 1, HUGE_VAL};
    for (int i = 0; i < 3; i++)
        if (a[i].keys != a[i].length)
            return best;
    const double runs = (double)a[0].window * most_keys(a[1], FWD_ROWS) + d->extra;
    if (permute_columns(a[2], m) < 1 || a[2].window > MOST_COLUMNS || runs > MOST_RUNS)
        return best;
    const double work = permute_work(problem, m);
    const int size[2] = {nbhd_group_size(a[0], 0), nbhd_group_size(a[1], 0)};
    for (int group = 1;; group = nbhd_min(2 * group, d->kv_heads)) {
        int parts = (a[2].length + 1023) / 1024;
        for (int i = 0; i < 4; i++, parts *= 2)
            for (int chunk = FWD_ROWS;; chunk *= 2) {
                const int x = nbhd_min(a[2].length, whole_vectors((a[2].length + parts - 1) / parts, m->vf));
                struct permute_choice c = {{size[0], size[1], x}, chunk, group, 0};
                split_tasks(problem, threads, &c);
                c.cycles = permute_cycles(problem, m, work, &c);
                if (c.cycles < best.cycles)
                    best = c;
                if (chunk >= size[1] || size[0] == 1)
                    break;
            }
        if (group >= d->kv_heads || group >= MOST_GROUP)
            break;
    }
    return best;
}

/* ---- folding: see struct nbhd_fold ---- */

/* Part 0 or 1 of a problem, folded; false: there is no such part. */
static bool fold_problem(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m, int part, struct nbhd_problem *folded,
                         struct nbhd_fold *fold)
{
    const struct nbhd_axis a = problem->axis[2];
    const int size = nbhd_group_size(a, 0), longs = a.length - (size - 1) * a.dilation;
    *folded = *problem;
    *fold = (struct nbhd_fold){0};
    if (m->unfolded || a.dilation < m->vf || problem->axis[0].length > 1 || a.keys != a.length)
        return part == 0;
    *fold = part == 0 ? (struct nbhd_fold){a.dilation, 0, longs, size}
                      : (struct nbhd_fold){a.dilation, longs, a.dilation - longs, size - 1};
    folded->axis[0] = problem->axis[1];
    folded->axis[1] = (struct nbhd_axis){fold->members, fold->members, a.window, a.stride, 1, a.edge};
    folded->axis[2] = (struct nbhd_axis){fold->groups, fold->groups, 1, 1, 1, NBHD_EDGE_NEAREST};
    return fold->groups > 0;
}

static struct permute_choice choose_folded(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m, int threads)
{
    struct nbhd_problem folded;
    struct nbhd_fold fold;
    fold_problem(problem, m, 0, &folded, &fold);
    struct permute_choice c = choose_permute(&folded, m, threads);
    if (fold.dilation && fold_problem(problem, m, 1, &folded, &fold))
        c.cycles += choose_permute(&folded, m, threads).cycles;
    return c;
}

/* ---- the planner's questions ---- */

#define CYCLES_PER_MS 3.6e6

static struct nbhd_config config_of(const struct nbhd_problem *problem, int variant, const int extent[3], int heads,
                                    int chunk, double cycles)
{
    struct nbhd_config c = {.variant = variant, .stages = heads};
    for (int a = 0; a < 3; a++) {
        c.q_tile[a] = extent[a];
        c.k_tile[a] = variant == NBHD_FWD_BROADCAST && heads == 1; /* keys one by one, in any order */
    }
    if (variant == NBHD_FWD_PERMUTE)
        c.k_tile[1] = chunk;
    c.predicted_ms = cycles * problem->desc.batch * problem->desc.kv_heads / CYCLES_PER_MS;
    return c;
}

static atomic_int forced_variant = -1;

void nbhd_fwd_force(int variant) { atomic_store(&forced_variant, variant); }

int nbhd_fwd_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room,
                     const struct nbhd_fwd_machine *machine)
{
    const int threads = problem->desc.threads ? problem->desc.threads : nbhd_threads_available();
    const struct broadcast_choice b = choose_broadcast(problem, machine);
    struct permute_choice p = {.cycles = HUGE_VAL};
    if (machine->price.product == 0)
        p = choose_folded(problem, machine, threads);
    const int forced = atomic_load(&forced_variant);
    const bool permute_first = p.cycles < HUGE_VAL && (forced < 0 ? p.cycles < b.cycles : forced == NBHD_FWD_PERMUTE);
    int n = 0;
    if (permute_first)
        configs[n++] = config_of(problem, NBHD_FWD_PERMUTE, p.extent, p.group, p.chunk, p.cycles);
    if (n < room)
        configs[n++] = config_of(problem, NBHD_FWD_BROADCAST, b.extent, b.heads, 0, b.cycles);
    if (!permute_first && p.cycles < HUGE_VAL && n < room)
        configs[n++] = config_of(problem, NBHD_FWD_PERMUTE, p.extent, p.group, p.chunk, p.cycles);
    for (int i = 0; i < n; i++)
        configs[i].threads = threads;
    return n;
}

bool nbhd_fwd_refuse_pairs(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *machine, char why[NBHD_TEXT])
{
    const nbhd_desc *d = &problem->desc;
    if (d->dtype != NBHD_BF16)
        return nbhd_refuse(why, "dtype is %s; its products take bf16", nbhd_dtype_name(d->dtype));
    if (nbhd_fwd_refuse(problem, why))
        return true;
    const int forced = atomic_load(&forced_variant);
    if (forced == NBHD_FWD_BROADCAST)
        return false;
    const double pairs = choose_broadcast(problem, machine).cycles;
    const double permuted = choose_folded(problem, machine, 1).cycles;
    if (permuted < HUGE_VAL && (pairs > permuted || forced == NBHD_FWD_PERMUTE))
        return nbhd_refuse(why, "the windows are small: it would take %.2g times as long as fwd_avx512 with keys permuted in float32",
                           pairs / permuted);
    return false;
}

/* A task is worth handing out from some ten microseconds on. */
enum { TASK_CYCLES = 100000 };

static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Places the next part of the scratch at *end. */
static size_t place(size_t *end, size_t bytes)
{
    const size_t at = *end;
    *end += rounded(bytes);
    return at;
}

/* Where the parts of a thread's scratch lie; vectors of vf lanes, or, in pairs, of twice that many bfloat16. */
static void place_broadcast(const nbhd_desc *d, struct nbhd_fwd *f, const struct nbhd_fwd_machine *m)
{
    const bool pairs = m->price.product > 0;
    const int vf = m->vf;
    const size_t block = (size_t)(pairs ? m->block : FWD_BLOCK);
    const size_t row = FWD_LANES * sizeof(float);
    const size_t k = (size_t)whole_vectors(d->head_dim, pairs ? 2 * vf : vf);
    const size_t v = (size_t)whole_vectors(d->head_dim_v, pairs ? 2 * vf : vf);
    const size_t element = pairs ? sizeof(uint16_t) : d->dtype != NBHD_F32 ? sizeof(float) : 0; /* of copied keys, values */
    const size_t tiles = pairs ? FWD_PAIR_TILES : 1;
    f->q_size = pairs ? k / 2 * row : (size_t)d->head_dim * row;
    f->o_size = (pairs ? v : (size_t)d->head_dim_v) * row;
    f->at_q = place(&f->scratch, tiles * f->q_size);
    f->at_o = place(&f->scratch, tiles * f->o_size);
    f->at_s = place(&f->scratch, block * row);
    f->at_lanes = place(&f->scratch, tiles * 3 * row);
    f->at_block = place(&f->scratch, (pairs ? 3 : 2) * sizeof(struct key_block)); /* at hand, next; another tile's */
    f->at_zeros = place(&f->scratch, (size_t)d->head_dim_v * sizeof(float));
    f->at_keys = place(&f->scratch, block * (pairs ? k : k + v) * element);
    f->at_values = place(&f->scratch, pairs ? block * v * element : 0);
}

/* How many tiles of pairs go through the same keys together: fewer where threads would find too few tasks. */
static int run_together(const struct nbhd_problem *problem, const struct nbhd_config *config, long long tiles)
{
    enum { PAIR_TASKS_PER_THREAD = 4 };
    struct axis_cost c[3];
    for (int a = 0; a < 3; a++)
        c[a] = cost_of_extent(problem->axis[a], config->q_tile[a], true);
    int together = tiles_in_a_row(&c[0], &c[1], &c[2]);
    while (together > 1 && config->threads > 1 && tiles < (long long)together * PAIR_TASKS_PER_THREAD * config->threads)
        together /= 2;
    return together;
}

static void build_broadcast(const struct nbhd_problem *problem, const struct nbhd_config *config, struct nbhd_fwd *f,
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
    const double tile_cycles = config->predicted_ms * CYCLES_PER_MS / (double)f->tiles;
    f->run = nbhd_max(1, (int)(TASK_CYCLES / tile_cycles));
    if (m->price.product > 0) {
        const int together = run_together(problem, config, f->tiles);
        f->run = (f->run + together - 1) / together * together;
    }
    f->tasks = (f->tiles + f->run - 1) / f->run;
    place_broadcast(d, f, m);
}

/* Of q, k, v and o. */
static double tensor_bytes(const struct nbhd_problem *problem)
{
    const nbhd_desc *d = &problem->desc;
    double queries = d->batch, keys = d->batch;
    for (int a = 0; a < 3; a++) {
        queries *= problem->axis[a].length;
        keys *= problem->axis[a].keys;
    }
    return (queries * d->heads + keys * d->kv_heads) * (d->head_dim + d->head_dim_v) * (double)sizeof(float);
}

static void build_permute(const struct nbhd_problem *problem, const struct nbhd_config *config, struct nbhd_fwd *f,
                          const struct nbhd_fwd_machine *m)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_axis *a = problem->axis;
    const int *extent = config->q_tile, positions = most_positions(a[2], extent[2]);
    memcpy(f->axis, a, sizeof f->axis);
    f->group = config->stages;
    f->tiles = (long long)d->batch * ((d->kv_heads + f->group - 1) / f->group);
    for (int i = 0; i < 3; i++) {
        f->grid[i] = nbhd_grid_make(i == 2 ? position_axis(a[2]) : a[i], extent[i]);
        f->tiles *= f->grid[i].count;
    }
    f->run = config->threads == 1 ? (int)fmin((double)f->tiles, INT_MAX)
                                  : nbhd_max(1, (int)fmin(32, (double)f->tiles / (config->threads * TASKS_PER_THREAD)));
    f->tasks = (f->tiles + f->run - 1) / f->run;
    f->chunk = config->k_tile[1];
    f->ring[0] = most_keys(a[0], 1);
    f->ring[1] = most_keys(a[1], nbhd_min(f->chunk, nbhd_group_size(a[1], 0)));
    f->columns = permute_columns(a[2], m);
    f->stream = d->dtype == NBHD_F32 &&
                (tensor_bytes(problem) > STREAM_BYTES || atomic_load(&forced_variant) == NBHD_FWD_PERMUTE);
    f->entries = FWD_BLOCK;
    f->line_step = line_step(positions, m->vf);
    f->line_size = (size_t)d->head_dim * (size_t)f->line_step;
    f->value_width = whole_vectors(d->head_dim_v, m->vf);
    f->pack_values = f->value_width != d->head_dim_v || d->dtype != NBHD_F32;
    f->values_size = f->pack_values ? (size_t)positions * (size_t)f->value_width : 0;
    const size_t row = (size_t)(FWD_ROWS * m->vf) * sizeof(float);
    const size_t lines = (size_t)f->group * (size_t)f->ring[0] * (size_t)f->ring[1];
    const size_t runs = (size_t)a[0].window * (size_t)most_keys(a[1], FWD_ROWS) + (size_t)d->extra / FWD_BLOCK + 1;
    const size_t row_bytes = (size_t)f->value_width * sizeof(float);
    f->at_q = place(&f->scratch, (size_t)d->head_dim * row);
    f->at_o = place(&f->scratch, (size_t)f->value_width * row);
    f->at_s = place(&f->scratch, (size_t)f->entries * row);
    f->at_lanes = place(&f->scratch, 3 * row);
    f->at_block = place(&f->scratch, (size_t)((extent[2] + m->vf - 1) / m->vf) * m->lane_block);
    f->at_tags = place(&f->scratch, lines * sizeof(long long));
    f->at_token = place(&f->scratch, (size_t)positions * sizeof(int));
    f->at_runs = place(&f->scratch, runs * sizeof(struct key_run));
    f->at_ahead = place(&f->scratch, sizeof(struct look_ahead));
    f->at_values = place(&f->scratch, lines * f->values_size * sizeof(float));
    f->at_extra = place(&f->scratch, f->pack_values ? (size_t)(d->extra * f->group) * row_bytes : 0);
    f->at_keys = place(&f->scratch, d->extra && d->dtype != NBHD_F32
                                        ? (size_t)(FWD_BLOCK * whole_vectors(d->head_dim, m->vf)) * sizeof(float)
                                        : 0);
    /* Lanes look past the last line's end: by vectors, and where an edge cuts windows short by the columns that they lack. */
    f->at_lines = place(&f->scratch, (lines * f->line_size + (size_t)(3 * m->vf + a[2].window)) * sizeof(float));
}

/* The shorter groups of a folded problem, cut by themselves. */
static nbhd_status build_rest(const struct nbhd_problem *problem, const struct nbhd_config *config, struct nbhd_fwd *f,
                              const struct nbhd_fwd_machine *machine)
{
    struct nbhd_problem folded;
    struct nbhd_fold fold;
    if (!f->fold.dilation || !fold_problem(problem, machine, 1, &folded, &fold))
        return NBHD_OK;
    struct nbhd_fwd *rest = calloc(1, sizeof *rest);
    if (!rest)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's tiling of %zu bytes could not be allocated", sizeof *rest);
    const struct permute_choice choice = choose_permute(&folded, machine, config->threads);
    struct nbhd_config c = config_of(&folded, NBHD_FWD_PERMUTE, choice.extent, choice.group, choice.chunk, choice.cycles);
    c.threads = config->threads;
    *rest = (struct nbhd_fwd){.variant = f->variant, .dtype = f->dtype, .fold = fold};
    build_permute(&folded, &c, rest, machine);
    f->rest = rest;
    f->scratch = rest->scratch > f->scratch ? rest->scratch : f->scratch;
    rest->scratch = f->scratch;
    return NBHD_OK;
}

nbhd_status nbhd_fwd_build(struct nbhd_plan *plan, const struct nbhd_fwd_machine *machine)
{
    struct nbhd_config *c = &plan->config;
    struct nbhd_problem folded;
    struct nbhd_fwd *f = calloc(1, sizeof *f);
    if (!f)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's tiling of %zu bytes could not be allocated", sizeof *f);
    plan->state = f;
    f->variant = c->variant;
    f->dtype = plan->problem.desc.dtype;
    if (f->variant == NBHD_FWD_PERMUTE) {
        fold_problem(&plan->problem, machine, 0, &folded, &f->fold);
        build_permute(&folded, c, f, machine);
        const nbhd_status status = build_rest(&plan->problem, c, f, machine);
        if (status != NBHD_OK)
            return status;
    } else {
        build_broadcast(&plan->problem, c, f, machine);
    }
    f->threads = c->threads = nbhd_plan_threads(&plan->problem, f->tasks);
    if (f->rest)
        f->rest->threads = f->threads;
    c->predicted_ms /= f->threads;
    plan->workspace = f->scratch * (size_t)f->threads;
    if (f->variant == NBHD_FWD_PERMUTE)
        snprintf(plan->describe, sizeof plan->describe, "permute%s, parts %dx%dx%d by %d rows and %d heads, %lld tasks, %d threads",
                 f->fold.dilation ? " folded" : "", c->q_tile[0], c->q_tile[1], c->q_tile[2], f->chunk, f->group, f->tasks, f->threads);
    else
        snprintf(plan->describe, sizeof plan->describe, "%s, tiles %dx%dx%d of %d heads, %lld tasks, %d threads",
                 machine->price.product > 0 ? "pairs" : "broadcast", c->q_tile[0], c->q_tile[1], c->q_tile[2], f->head_tile, f->tasks, f->threads);
    return NBHD_OK;
}

void nbhd_fwd_drop(struct nbhd_plan *plan)
{
    struct nbhd_fwd *f = plan->state;
    if (f)
        free(f->rest);
    free(f);
    plan->state = NULL;
}
