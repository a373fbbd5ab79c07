/* See bwd_plan.h. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "cpu/bwd_plan.h"
#include "cpu/cpu.h"
#include "cpu/fwd_choice.h"
#include "cpu/isa.h"
#include "cpu/place.h"

/* Work is cut for so many threads, whatever there are: the order of sums depends on it. */
enum { DESIGN_THREADS = 16 };

/* The algorithm that is best for the forward is so here; not by the number of threads, on which no bit may depend. */
int nbhd_bwd_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room,
                     const struct nbhd_bwd_machine *machine)
{
    struct nbhd_problem design = *problem;
    struct nbhd_config both[2];
    design.desc.threads = DESIGN_THREADS;
    const int n = nbhd_fwd_configs(&design, both, 2, &machine->fwd);
    for (int i = 0; i < n && i < room; i++) {
        configs[i] = both[i];
        configs[i].predicted_ms *= 2.5;
    }
    return n < room ? n : room;
}

/* ---- rounds ---- */

enum { MOST_CUTS = 24 };

/* Cycles that a round costs each thread beyond its tasks. */
#define ROUND_CYCLES 3e4

struct cut {
    struct nbhd_rounds rounds;
    double visits;
};

/* Regions are of whole tiles, or where permuted of whole vectors and steps of rows. There, rows of keys are packed by
 * each region that sees them, and pairing would cut windows up. */
static int list_cuts(const struct nbhd_bwd *b, int axis, int vf, struct cut cuts[MOST_CUTS])
{
    static const int regions[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64};
    const bool permute = b->variant == NBHD_FWD_PERMUTE;
    const int grain[3] = {1, FWD_ROWS, vf}, tile = permute ? grain[axis] : b->tile[axis];
    const struct nbhd_axis a = b->cut[axis];
    const int tiles = (nbhd_group_size(a, 0) + tile - 1) / tile;
    int n = 0;
    const bool pairs = !permute && a.edge != NBHD_EDGE_PERIODIC;
    for (int paired = 0; paired <= pairs; paired++)
        for (size_t i = 0; i < sizeof regions / sizeof *regions && (!i || regions[i] <= tiles); i++) {
            if (paired && regions[i] == 1)
                continue;
            struct cut *cut = &cuts[n++];
            cut->rounds = nbhd_rounds_make(a, tile, regions[i], paired);
            cut->visits = nbhd_rounds_visits(&cut->rounds, a, tile);
            if (permute)
                cut->visits += (double)(a.window - 1) / cut->rounds.regions.tile;
        }
    return n;
}

/* Time of the whole on DESIGN_THREADS threads, relative to that of its products there. */
static double cost_of_cuts(const struct nbhd_problem *problem, double pairs, const struct cut *cuts[3], int group,
                           const struct nbhd_bwd_machine *m)
{
    const nbhd_desc *d = &problem->desc;
    double rounds = 1, visits = 1;
    double tasks = (double)d->batch * (d->kv_heads / group), queries = (double)d->batch * d->heads;
    for (int a = 0; a < 3; a++) {
        rounds *= cuts[a]->rounds.rounds;
        tasks *= cuts[a]->rounds.slots;
        visits *= cuts[a]->visits;
        queries *= problem->axis[a].length;
    }
    const double products = pairs * (3.0 * d->head_dim + 2.0 * d->head_dim_v) / m->fwd.vf * m->product;
    const double loads = queries * visits * m->load * (d->head_dim + d->head_dim_v);
    const double turns = ceil(tasks / DESIGN_THREADS) * DESIGN_THREADS / tasks;
    return (1 + loads / products) * turns + rounds * ROUND_CYCLES * DESIGN_THREADS / products;
}

static void cut_into_rounds(const struct nbhd_problem *problem, struct nbhd_bwd *b, const struct nbhd_bwd_machine *m)
{
    struct cut cuts[3][MOST_CUTS];
    int n[3];
    for (int a = 0; a < 3; a++)
        n[a] = list_cuts(b, a, m->fwd.vf, cuts[a]);
    const double pairs = nbhd_desc_pairs(&problem->desc);
    double best = HUGE_VAL;
    for (int i = 0; i < n[0]; i++)
        for (int j = 0; j < n[1]; j++)
            for (int k = 0; k < n[2]; k++) {
                const struct cut *chosen[3] = {&cuts[0][i], &cuts[1][j], &cuts[2][k]};
                const double cost = cost_of_cuts(problem, pairs, chosen, b->group, m);
                if (cost >= best)
                    continue;
                best = cost;
                for (int a = 0; a < 3; a++)
                    b->axis[a] = chosen[a]->rounds;
            }
    b->rounds = b->slots = 1;
    for (int a = 0; a < 3; a++) {
        b->rounds *= b->axis[a].rounds;
        b->slots *= b->axis[a].slots;
        b->sum_dq |= b->axis[a].paired;
    }
    b->tasks = (long long)problem->desc.batch * (problem->desc.kv_heads / b->group) * b->slots;
}

/* ---- the workspace ---- */

static void place_shared(const struct nbhd_problem *problem, struct nbhd_bwd *b, size_t *end)
{
    const nbhd_desc *d = &problem->desc;
    size_t queries = (size_t)d->batch * (size_t)d->heads, keys = (size_t)d->batch * (size_t)d->kv_heads;
    const size_t width = (size_t)d->head_dim, width_v = (size_t)d->head_dim_v;
    const size_t slots = (size_t)b->slots, extra = keys * slots * (size_t)d->extra;
    for (int i = 0; i < 3; i++) {
        queries *= (size_t)problem->axis[i].length;
        keys *= (size_t)problem->axis[i].keys;
    }
    const bool half = d->dtype != NBHD_F32;
    b->at_dq = nbhd_place(end, half && b->sum_dq ? queries * width * sizeof(float) : 0);
    b->at_delta = nbhd_place(end, b->sum_dq ? queries * sizeof(float) : 0);
    b->at_dk = nbhd_place(end, half ? keys * width * sizeof(float) : 0);
    b->at_dv = nbhd_place(end, half ? keys * width_v * sizeof(float) : 0);
    b->at_extra = nbhd_place(end, extra * (width + width_v) * sizeof(float));
    b->at_bias = nbhd_place(end, (size_t)d->batch * slots * (size_t)d->heads * (size_t)b->table * sizeof(float));
    b->at_done = nbhd_place(end, (size_t)b->rounds * (size_t)b->tasks);
}

static void place_broadcast(const struct nbhd_problem *problem, struct nbhd_bwd *b, const struct nbhd_bwd_machine *m)
{
    const nbhd_desc *d = &problem->desc;
    const size_t row = FWD_LANES * sizeof(float), both = (size_t)(b->width + b->width_v) * sizeof(float);
    size_t *end = &b->scratch;
    b->at_qt = nbhd_place(end, (size_t)d->head_dim * row);
    b->at_dt = nbhd_place(end, (size_t)d->head_dim_v * row);
    b->at_dqt = nbhd_place(end, (size_t)d->head_dim * row);
    b->at_q = nbhd_place(end, (size_t)nbhd_whole(b->width, b->strip) * row);
    b->at_d = nbhd_place(end, (size_t)nbhd_whole(b->width_v, b->strip) * row);
    b->at_s = nbhd_place(end, FWD_BLOCK * row);
    b->at_ds = nbhd_place(end, FWD_BLOCK * row);
    b->at_lanes = nbhd_place(end, 3 * row);
    b->at_block = nbhd_place(end, 2 * m->block); /* at hand, next */
    b->at_zeros = nbhd_place(end, (size_t)d->head_dim * sizeof(float));
    b->at_keys = nbhd_place(end, d->dtype != NBHD_F32 ? FWD_BLOCK * both : 0);
}

/* Pairs: units are 32 keys, queries or columns long; tiles take a good half of the second-level cache at most. */
static void place_pairs(const struct nbhd_problem *problem, struct nbhd_bwd *b, const struct nbhd_bwd_machine *m)
{
    enum { UNIT = 32 };
    const nbhd_desc *d = &problem->desc;
    const size_t k = (size_t)nbhd_whole(d->head_dim, UNIT), v = (size_t)nbhd_whole(d->head_dim_v, UNIT);
    const size_t keys = (size_t)m->fwd.block, pair = sizeof(uint16_t);
    struct nbhd_bwd_slot *s = &b->slot;
    s->qt = nbhd_place(&s->size, FWD_LANES * k * pair);
    s->dt = nbhd_place(&s->size, FWD_LANES * v * pair);
    s->q = nbhd_place(&s->size, FWD_LANES * k * pair);
    s->d = nbhd_place(&s->size, FWD_LANES * v * pair);
    s->p = nbhd_place(&s->size, FWD_LANES * keys * pair);
    s->ds = nbhd_place(&s->size, FWD_LANES * keys * pair);
    s->dqt = nbhd_place(&s->size, FWD_LANES * k * sizeof(float));
    s->lanes = nbhd_place(&s->size, 2 * FWD_LANES * sizeof(float));
    s->own = nbhd_place(&s->size, sizeof(struct key_block));
    b->together = nbhd_max(1, nbhd_min(BWD_TILES, (int)(nbhd_l2_bytes() / 8 * 5 / s->size)));
    size_t *end = &b->scratch;
    b->at_slots = nbhd_place(end, (size_t)b->together * s->size);
    b->at_keys = nbhd_place(end, keys * k * pair);
    b->at_values = nbhd_place(end, keys * v * pair);
    b->at_columns = nbhd_place(end, keys * k * pair);
    b->at_pairs = nbhd_place(end, UNIT * keys * pair);
    b->at_s = nbhd_place(end, 4 * UNIT * UNIT * sizeof(float));
    b->at_block = nbhd_place(end, m->block);
}

/* ---- permute ---- */

/* Of lines, that stay in a second-level cache beside what streams through: of a kv head, and of a group. */
enum { RING_BYTES = 384 << 10, GROUP_BYTES = 640 << 10 };

static size_t line_bytes(const nbhd_desc *d, const struct nbhd_bwd *b)
{
    return ((size_t)(d->head_dim + d->head_dim_v) * (size_t)b->line_step +
            (b->unpack ? (size_t)b->positions * (size_t)b->width : 0)) *
           sizeof(float);
}

/* Boxes go along axis 0 with as many rows of axis 1 as the ring allows; where there is no axis 0, along axis 1. Those
 * along axis 0 are narrow, so that the pages of their keys are at hand when the next heads come to them. */
static void choose_box(const struct nbhd_problem *problem, struct nbhd_bwd *b, const struct nbhd_bwd_machine *m)
{
    const struct nbhd_axis *a = problem->axis;
    const int rows = nbhd_group_size(a[1], 0);
    b->tile[0] = nbhd_group_size(a[0], 0);
    b->tile[2] = a[2].dilation > 1 ? a[2].length : nbhd_min(a[2].length, b->tile[0] > 1 ? 2 * m->fwd.vf : 256);
    b->positions = nbhd_most_positions(a[2], b->tile[2]);
    b->line_step = nbhd_line_step(b->positions, m->fwd.vf, 8 * m->fwd.vf);
    b->ring[0] = nbhd_most_keys(a[0], 1);
    const double fit = RING_BYTES / ((double)line_bytes(&problem->desc, b) * b->ring[0]);
    int chunk = FWD_ROWS;
    while (chunk < rows && nbhd_most_keys(a[1], chunk + FWD_ROWS) <= fit)
        chunk += FWD_ROWS;
    b->tile[1] = b->tile[0] == 1 ? rows : chunk;
    b->ring[1] = nbhd_most_keys(a[1], b->tile[0] == 1 ? FWD_ROWS : chunk);
}

static void place_permute(const struct nbhd_problem *problem, struct nbhd_bwd *b, const struct nbhd_bwd_machine *m)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_axis *a = problem->axis;
    const size_t row = FWD_ROWS * (size_t)m->fwd.vf * sizeof(float);
    /* Lanes look past the last line's end: by vectors, and by the columns that windows lack where an edge cuts them. */
    const size_t pad = (size_t)(3 * m->fwd.vf + a[2].window) * sizeof(float);
    const size_t lines = (size_t)b->group * (size_t)b->ring[0] * (size_t)b->ring[1];
    const size_t runs = (size_t)a[0].window * (size_t)nbhd_most_keys(a[1], FWD_ROWS) + (size_t)d->extra / FWD_BLOCK + 1;
    const size_t blocks = (size_t)(b->tile[2] + m->fwd.vf - 1) / (size_t)m->fwd.vf;
    const size_t line = lines * (size_t)b->line_step * sizeof(float);
    size_t *end = &b->scratch;
    b->at_qt = nbhd_place(end, (size_t)d->head_dim * row);
    b->at_dt = nbhd_place(end, (size_t)d->head_dim_v * row);
    b->at_q = nbhd_place(end, (size_t)b->width * row);
    b->at_d = nbhd_place(end, (size_t)b->width_v * row);
    b->at_dqt = nbhd_place(end, (size_t)b->width * row);
    b->at_s = nbhd_place(end, FWD_BLOCK * row);
    b->at_ds = nbhd_place(end, FWD_BLOCK * row);
    b->at_lanes = nbhd_place(end, 2 * row);
    b->at_block = nbhd_place(end, blocks * m->fwd.lane_block);
    b->at_token = nbhd_place(end, (size_t)b->positions * sizeof(int));
    b->at_tags = nbhd_place(end, lines * sizeof(long long));
    b->at_runs = nbhd_place(end, runs * m->run);
    b->at_ahead = nbhd_place(end, sizeof(struct look_ahead));
    b->at_keys = nbhd_place(end, b->unpack ? lines * (size_t)b->positions * (size_t)b->width * sizeof(float) : 0);
    b->at_extra_keys = nbhd_place(end, (size_t)(b->group * d->extra) * (size_t)(b->width + b->width_v) * sizeof(float));
    b->at_k_lines = nbhd_place(end, (size_t)d->head_dim * line + pad);
    b->at_v_lines = nbhd_place(end, (size_t)d->head_dim_v * line + pad);
}

/* Neighbouring kv heads whose tokens fit a quarter of a page and whose lines fit the cache, where windows are so small
 * that fetching counts for more than products. */
static int choose_group(const nbhd_desc *d, const struct nbhd_axis axis[3], const struct nbhd_bwd *b)
{
    enum { FEW_KEYS = 32 };
    if ((double)axis[0].window * axis[1].window * axis[2].window > FEW_KEYS)
        return 1;
    const double ring = (double)line_bytes(d, b) * b->ring[0] * b->ring[1];
    int group = 1;
    for (int i = 2; i <= d->kv_heads; i++)
        if (d->kv_heads % i == 0 && i * d->head_dim * (int)sizeof(float) <= 1024 && i * ring <= GROUP_BYTES)
            group = i;
    return group;
}

static void build_permute(const struct nbhd_problem *problem, struct nbhd_bwd *b, const struct nbhd_bwd_machine *m)
{
    const struct nbhd_axis a = problem->axis[2];
    b->columns = nbhd_permute_columns(a, m->fwd.vf, m->fwd.columns);
    /* 16-bit, not whole vectors, not in one piece, or too many in few sets of the caches. */
    b->unpack = problem->desc.dtype != NBHD_F32 || b->width != problem->desc.head_dim || a.edge == NBHD_EDGE_PERIODIC ||
                nbhd_rows_crowd(problem->axis, problem->desc.kv_heads, problem->desc.head_dim);
    b->stream = problem->desc.dtype == NBHD_F32 && b->width == problem->desc.head_dim &&
                nbhd_tensors_stream(problem, 2);
    b->head_tile = 1;
    choose_box(problem, b, m);
    b->group = choose_group(&problem->desc, problem->axis, b);
    if (a.dilation > 1) /* groups lie end to end: one region of all positions */
        b->cut[2] = (struct nbhd_axis){a.length, a.length, a.length, 1, 1, NBHD_EDGE_NEAREST};
}

/* Heads of a box share its pages: so many to a task that each thread still has two. */
static void bundle_heads(const nbhd_desc *d, struct nbhd_bwd *b)
{
    const long long tasks = b->tasks * b->group;
    b->heads = b->group;
    for (int i = b->group; i <= d->kv_heads && b->variant == NBHD_FWD_PERMUTE; i += b->group)
        if (d->kv_heads % i == 0 && (b->threads == 1 || tasks / i >= 2 * b->threads))
            b->heads = i;
    b->tasks = tasks / b->heads;
    b->parts = d->kv_heads / b->heads;
}

/* Two thirds of a first-level cache of 48 KiB, half of one of 32. Sums are the same. */
static int choose_panel(void)
{
    enum { LARGE = 48 << 10 };
    return nbhd_l1_bytes() >= LARGE ? 8192 : 4096;
}

/* ---- the plan ---- */

nbhd_status nbhd_bwd_build(struct nbhd_plan *plan, const struct nbhd_bwd_machine *machine)
{
    const struct nbhd_problem *problem = &plan->problem;
    const nbhd_desc *d = &problem->desc;
    struct nbhd_config *c = &plan->config;
    struct nbhd_bwd *b = calloc(1, sizeof *b);
    if (!b)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's tiling of %zu bytes could not be allocated", sizeof *b);
    plan->state = b;
    b->variant = c->variant;
    b->strip = machine->strip;
    b->panel = choose_panel();
    b->head_tile = c->stages;
    b->head_tiles = (d->heads / d->kv_heads + b->head_tile - 1) / b->head_tile;
    b->group = 1;
    b->width = nbhd_whole(d->head_dim, machine->fwd.vf);
    b->width_v = nbhd_whole(d->head_dim_v, machine->fwd.vf);
    b->table = d->bias;
    for (int i = 0; i < 3; i++) {
        b->cut[i] = problem->axis[i];
        b->tile[i] = c->q_tile[i];
        b->table *= 2 * problem->axis[i].window - 1;
    }
    b->slot_sums = d->bias || d->extra;
    const bool permute = b->variant == NBHD_FWD_PERMUTE;
    if (permute)
        build_permute(problem, b, machine);
    cut_into_rounds(problem, b, machine);
    b->threads = c->threads = nbhd_plan_threads(problem, b->tasks);
    bundle_heads(d, b);
    place_shared(problem, b, &b->at_scratch);
    if (permute)
        place_permute(problem, b, machine);
    else if (machine->fwd.price.product > 0)
        place_pairs(problem, b, machine);
    else
        place_broadcast(problem, b, machine);
    plan->workspace = b->at_scratch + b->scratch * (size_t)b->threads;
    snprintf(plan->describe, sizeof plan->describe, "%s %dx%dx%d, %d rounds of %lld tasks, %d threads",
             permute                          ? "permute"
             : machine->fwd.price.product > 0 ? "pairs"
                                              : "broadcast",
             b->tile[0], b->tile[1], b->tile[2], b->rounds, b->tasks, b->threads);
    return NBHD_OK;
}

void nbhd_bwd_drop(struct nbhd_plan *plan)
{
    free(plan->state);
    plan->state = NULL;
}
