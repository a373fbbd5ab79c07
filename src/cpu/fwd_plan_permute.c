/* Tasks of queries that take their own keys out of vectors: how to cut them, where a thread's parts lie, and the
 * folding of much dilated axes. */
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "cpu/fwd_choice.h"
#include "cpu/place.h"

enum {
    MOST_COLUMNS = 64,      /* window on axis 2 */
    MOST_RUNS = 16384,      /* key rows of a tile */
    CACHED_BYTES = 5 << 19, /* of lines and values in use, from where on they begin to fall out of near caches */
    RUN_CYCLES = 40,        /* to find the line of a key row, for each tile */
    PIECE_BYTES = 512,      /* of a token, at least, that a task should take: shorter pieces come as if not asked for */
    MOST_BYTES = 64 << 20,  /* of lines a thread */
    TASKS_PER_THREAD = 6,
    MOST_GROUP = 16,
    STREAM_BYTES = 8 << 20 /* of all tensors together */
};

/* Axis 2 of a permuted problem: positions instead of tokens. */
static struct nbhd_axis position_axis(struct nbhd_axis a)
{
    a.dilation = 1;
    return a;
}

/* About what t positions of queries see: groups seldom end among them. */
static int mean_positions(struct nbhd_axis a, int t)
{
    const int mean = t + a.window + a.stride - 2;
    return a.edge == NBHD_EDGE_PERIODIC ? mean : nbhd_min(a.length, mean);
}

/* Multiples of 512 bytes are bad; of 128 too, but where a vector is a cache line of its own. */
static int line_step(int positions, int vf) { return nbhd_line_step(positions, vf, vf < 16 ? 32 : 128); }

/* Values are read in place where all of a window's lie one after the other, as vectors, and do not crowd. */
static bool packs_values(const struct nbhd_problem *problem, int vf)
{
    const nbhd_desc *d = &problem->desc;
    return d->head_dim_v % vf || d->dtype != NBHD_F32 || problem->axis[2].edge == NBHD_EDGE_PERIODIC ||
           nbhd_rows_crowd(problem->axis, d->kv_heads, d->head_dim_v);
}

static size_t line_bytes(const struct nbhd_problem *problem, int positions, int vf)
{
    const nbhd_desc *d = &problem->desc;
    size_t floats = (size_t)d->head_dim * (size_t)line_step(positions, vf);
    if (packs_values(problem, vf))
        floats += (size_t)positions * (size_t)nbhd_whole(d->head_dim_v, vf);
    return floats * sizeof(float);
}

/* Cycles of all that does not depend on how tasks are cut. */
static double permute_work(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_axis *a = problem->axis;
    const double vectors = (a[2].length + m->vf - 1) / m->vf, rows = (double)a[0].length * a[1].length;
    const double width = d->head_dim + nbhd_whole(d->head_dim_v, m->vf);
    const double keys = (double)a[0].window * a[1].window * a[2].window;
    const double shared = nbhd_min(nbhd_group_size(a[1], 0), FWD_ROWS);
    const double per_key = width * (1.15 + 0.5 / shared) + 14.0 + (d->bias ? 4.0 : 0.0);
    const double per_tile = 300.0 / shared + 8.0 * width;
    return d->heads / d->kv_heads * rows * vectors * (keys * per_key + d->extra * (width * 1.2 + 14.0) + per_tile);
}

/* Cuts axis 1, then axis 0, until every thread has some tasks to take. */
static void split_tasks(const struct nbhd_problem *problem, int threads, struct nbhd_fwd_choice *c)
{
    double tasks = problem->desc.batch * ceil((double)problem->desc.kv_heads / c->heads);
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

/* Cycles to pack a vector of keys, asked for ahead of time: best where memory is read in sequence, all heads of its
 * tokens. */
static double pack_cycles(const nbhd_desc *d, int group)
{
    const int bytes = group * d->head_dim * (d->dtype == NBHD_F32 ? 4 : 2);
    return group == d->kv_heads ? 8.0 : bytes >= PIECE_BYTES ? 12.0 : 12.0 + FAR_CYCLES;
}

/* Cycles of one way to cut: the work, slower if the keys in use outgrow the cache, and packing lines. */
static double permute_cycles(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m, double work,
                             const struct nbhd_fwd_choice *c)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_axis *a = problem->axis;
    const int positions = mean_positions(a[2], c->extent[2]), most = nbhd_most_positions(a[2], c->extent[2]);
    const double lines = (double)c->heads * nbhd_most_keys(a[0], 1) * nbhd_most_keys(a[1], c->chunk);
    const double bytes = lines * positions * (d->head_dim + d->head_dim_v) * (double)sizeof(float);
    double tasks = nbhd_grid_make(position_axis(a[2]), c->extent[2]).count, packed;
    for (int i = 0; i < 2; i++)
        tasks *= nbhd_grid_make(a[i], c->extent[i]).count;
    if (nbhd_group_size(a[0], 0) == 1)
        packed = nbhd_most_keys(a[1], c->extent[1]);
    else
        packed =
            ceil((double)c->extent[1] / c->chunk) * nbhd_most_keys(a[0], c->extent[0]) * nbhd_most_keys(a[1], c->chunk);
    if (lines * (double)line_bytes(problem, most, m->vf) > MOST_BYTES)
        return HUGE_VAL;
    const double vectors =
        ((double)d->head_dim * nbhd_whole(positions, m->vf) + (double)d->head_dim_v * positions) / m->vf;
    const double list =
        (double)a[0].length * a[1].length / FWD_ROWS * nbhd_grid_make(position_axis(a[2]), c->extent[2]).count;
    const double pack = tasks * packed * vectors * pack_cycles(d, c->heads) +
                        list * a[0].window * nbhd_most_keys(a[1], FWD_ROWS) * RUN_CYCLES;
    return work * (1.0 + 0.08 * fmax(0.0, bytes - CACHED_BYTES) / (1 << 20)) + pack;
}

static struct nbhd_fwd_choice choose_permute(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m,
                                             int threads)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_axis *a = problem->axis;
    struct nbhd_fwd_choice best = {{1, 1, 1}, 1, FWD_ROWS, HUGE_VAL};
    for (int i = 0; i < 3; i++)
        if (a[i].keys != a[i].length)
            return best;
    const double runs = (double)a[0].window * nbhd_most_keys(a[1], FWD_ROWS) + d->extra;
    if (nbhd_permute_columns(a[2], m->vf, m->columns) < 1 || a[2].window > MOST_COLUMNS || runs > MOST_RUNS)
        return best;
    const double work = permute_work(problem, m);
    const int size[2] = {nbhd_group_size(a[0], 0), nbhd_group_size(a[1], 0)};
    for (int group = 1;; group = nbhd_min(2 * group, d->kv_heads)) {
        int parts = (a[2].length + 1023) / 1024;
        for (int i = 0; i < 4; i++, parts *= 2)
            for (int chunk = FWD_ROWS;; chunk *= 2) {
                const int x = nbhd_min(a[2].length, nbhd_whole((a[2].length + parts - 1) / parts, m->vf));
                struct nbhd_fwd_choice c = {{size[0], size[1], x}, group, chunk, 0};
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
static bool fold_problem(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m, int part,
                         struct nbhd_problem *folded, struct nbhd_fold *fold)
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

struct nbhd_fwd_choice nbhd_fwd_choose_permute(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m,
                                               int threads)
{
    struct nbhd_problem folded;
    struct nbhd_fold fold;
    fold_problem(problem, m, 0, &folded, &fold);
    struct nbhd_fwd_choice c = choose_permute(&folded, m, threads);
    if (fold.dilation && fold_problem(problem, m, 1, &folded, &fold))
        c.cycles += choose_permute(&folded, m, threads).cycles;
    return c;
}

/* ---- the plan ---- */

bool nbhd_tensors_stream(const struct nbhd_problem *problem, int sets)
{
    const nbhd_desc *d = &problem->desc;
    double queries = d->batch, keys = d->batch;
    for (int a = 0; a < 3; a++) {
        queries *= problem->axis[a].length;
        keys *= problem->axis[a].keys;
    }
    const double floats = (queries * d->heads + keys * d->kv_heads) * (d->head_dim + d->head_dim_v);
    return sets * floats * (double)sizeof(float) > STREAM_BYTES || nbhd_fwd_forced() == NBHD_FWD_PERMUTE;
}

static void build_part(const struct nbhd_problem *problem, const struct nbhd_config *config, struct nbhd_fwd *f,
                       const struct nbhd_fwd_machine *m)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_axis *a = problem->axis;
    const int *extent = config->q_tile, positions = nbhd_most_positions(a[2], extent[2]);
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
    f->ring[0] = nbhd_most_keys(a[0], 1);
    f->ring[1] = nbhd_most_keys(a[1], nbhd_min(f->chunk, nbhd_group_size(a[1], 0)));
    f->columns = nbhd_permute_columns(a[2], m->vf, m->columns);
    f->stream = d->dtype != NBHD_F16 && nbhd_tensors_stream(problem, 1);
    f->entries = FWD_BLOCK;
    f->line_step = line_step(positions, m->vf);
    f->line_size = (size_t)d->head_dim * (size_t)f->line_step;
    f->value_width = nbhd_whole(d->head_dim_v, m->vf);
    f->pack_values = packs_values(problem, m->vf);
    f->values_size = f->pack_values ? (size_t)positions * (size_t)f->value_width : 0;
    const size_t row = (size_t)(FWD_ROWS * m->vf) * sizeof(float);
    const size_t lines = (size_t)f->group * (size_t)f->ring[0] * (size_t)f->ring[1];
    const size_t runs = (size_t)a[0].window * (size_t)nbhd_most_keys(a[1], FWD_ROWS) + (size_t)d->extra / FWD_BLOCK + 1;
    const size_t row_bytes = (size_t)f->value_width * sizeof(float);
    f->at_q = nbhd_place(&f->scratch, (size_t)d->head_dim * row);
    f->at_o = nbhd_place(&f->scratch, (size_t)f->value_width * row);
    f->at_s = nbhd_place(&f->scratch, (size_t)f->entries * row);
    f->at_lanes = nbhd_place(&f->scratch, 3 * row);
    f->at_block = nbhd_place(&f->scratch, (size_t)((extent[2] + m->vf - 1) / m->vf) * m->lane_block);
    f->at_tags = nbhd_place(&f->scratch, lines * sizeof(long long));
    f->at_token = nbhd_place(&f->scratch, (size_t)positions * sizeof(int));
    f->at_runs = nbhd_place(&f->scratch, runs * sizeof(struct key_run));
    f->at_ahead = nbhd_place(&f->scratch, sizeof(struct look_ahead));
    f->at_values = nbhd_place(&f->scratch, lines * f->values_size * sizeof(float));
    f->at_extra = nbhd_place(&f->scratch, f->pack_values ? (size_t)(d->extra * f->group) * row_bytes : 0);
    f->at_keys = nbhd_place(&f->scratch, d->extra && d->dtype != NBHD_F32
                                             ? (size_t)(FWD_BLOCK * nbhd_whole(d->head_dim, m->vf)) * sizeof(float)
                                             : 0);
    /* Lanes look past the last line's end: by vectors, and where an edge cuts windows short by the columns that they
     * lack. */
    f->at_lines = nbhd_place(&f->scratch, (lines * f->line_size + (size_t)(3 * m->vf + a[2].window)) * sizeof(float));
}

/* The shorter groups of a folded problem, cut by themselves. */
static nbhd_status build_rest(const struct nbhd_problem *problem, const struct nbhd_config *config, struct nbhd_fwd *f,
                              const struct nbhd_fwd_machine *m)
{
    struct nbhd_problem folded;
    struct nbhd_fold fold;
    if (!f->fold.dilation || !fold_problem(problem, m, 1, &folded, &fold))
        return NBHD_OK;
    struct nbhd_fwd *rest = calloc(1, sizeof *rest);
    if (!rest)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's tiling of %zu bytes could not be allocated", sizeof *rest);
    const struct nbhd_fwd_choice choice = choose_permute(&folded, m, config->threads);
    const struct nbhd_config c = nbhd_fwd_config_of(&folded, NBHD_FWD_PERMUTE, &choice, config->threads);
    *rest = (struct nbhd_fwd){.variant = f->variant, .dtype = f->dtype, .fold = fold};
    build_part(&folded, &c, rest, m);
    f->rest = rest;
    f->scratch = rest->scratch > f->scratch ? rest->scratch : f->scratch;
    rest->scratch = f->scratch;
    return NBHD_OK;
}

nbhd_status nbhd_fwd_build_permute(const struct nbhd_problem *problem, const struct nbhd_config *config,
                                   struct nbhd_fwd *f, const struct nbhd_fwd_machine *m)
{
    struct nbhd_problem folded;
    fold_problem(problem, m, 0, &folded, &f->fold);
    build_part(&folded, config, f, m);
    return build_rest(problem, config, f, m);
}
