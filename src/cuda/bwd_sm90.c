/* Host half of bwd_sm90.cu, bwd_sm90_keys.cu and bwd_sm90_rows.cu: the launches that make up a backward.
 *
 *     pre      statistics of every query, into the workspace
 *     keys     dK and dV; the same for extra keys, as an axis of their own that every query sees whole
 *     dq       dQ, by bwd_sm90_dq.c, which has one order of adding
 *
 * or, where that is faster and the plan need not be deterministic, dQ beside dK and dV, in float32 in the workspace:
 *
 *     pre      also zeros there
 *     keys     also add dQ up; beside it zeros and dQ from there, of all but the first and the last heads
 *     post     dQ from there
 *
 * A deterministic plan adds so, too, where that is faster, but in integers (device/sums_sm90.cuh), for which
 *
 *     bounds   the largest keys and values, into the workspace
 *
 * comes first.
 *
 * Box shapes: sm90_bwd_plan.c. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/bwd_sm90_dq.h"
#include "cuda/bwd_sm90_shares.h"
#include "cuda/sm90.h"
#include "cuda/sm90_bwd_plan.h"

enum { MOST_MAPS = 32, MAPS_OF_SLICE = 5, MOST_PLANS = 4, MOST_SLICES = 65535 };
#define SPLIT_BY_DEFAULT 1 /* 0: only deterministic plans compute dQ by a kernel of its own */

/* A launch of the products: over the grid's keys, or over the extra keys. */
struct keys {
    struct nbhd_cuda_module *module;
    struct CUfunc_st *function;
    struct nbhd_sm90_bwd_plan plan;
    struct nbhd_bwd_boxes boxes;
    struct nbhd_cuda_grid grid;
    struct nbhd_axis axis[3];
    int slices, maps; /* slices: batch x dilation groups; maps: NBHD_MAPS, one for each slice or shape of query boxes */
};

struct state {
    struct keys grid, extra;
    struct nbhd_bwd_sm90_dq *dq; /* NULL: added up beside dK and dV */
    struct nbhd_cuda_module *rows;
    struct CUfunc_st *bounds_of, *pre, *post; /* bounds_of: where dQ is added up in integers */
    struct nbhd_cuda_grid rows_grid;
    size_t lse, delta, fineness, bounds, counts; /* bytes from the workspace's begin, where dQ stands */
    struct nbhd_bwd_sm90_shares shares;
    int dtype;
};

/* ---- plan ---- */

static int by_ms(const void *a, const void *b)
{
    const double x = ((const struct nbhd_sm90_bwd_plan *)a)->ms, y = ((const struct nbhd_sm90_bwd_plan *)b)->ms;
    return (x > y) - (x < y);
}

/* Both ways to dQ: added up beside dK and dV, in integers where the plan is deterministic, or by a kernel of its
 * own; the best first. The integers' bounds do not know extra keys. */
static int find_plans(const struct nbhd_problem *problem, const struct nbhd_cuda_machine *machine,
                      struct nbhd_sm90_bwd_plan *plans)
{
    char why[NBHD_TEXT];
    int count = 0;
    const bool integers = problem->flags & NBHD_PLAN_DETERMINISTIC;
    if (!integers || !problem->desc.extra)
        count = nbhd_sm90_bwd_plans(problem, integers ? NBHD_DQ_INTEGERS : NBHD_DQ_ADDED, machine->multiprocessors,
                                    machine->shared_max, plans, MOST_PLANS / 2);
    const int adding = count;
    if ((!adding || SPLIT_BY_DEFAULT) && !nbhd_bwd_sm90_dq_refuses(problem, why))
        count += nbhd_sm90_bwd_plans(problem, NBHD_DQ_APART, machine->multiprocessors, machine->shared_max,
                                     plans + count, MOST_PLANS / 2);
    for (int i = adding; i < count; i++)
        plans[i].ms += nbhd_bwd_sm90_dq_ms(problem);
    qsort(plans, (size_t)count, sizeof *plans, by_ms);
    return count;
}

static int plans_here(const struct nbhd_problem *problem, struct nbhd_sm90_bwd_plan *plans, int room)
{
    static _Thread_local struct nbhd_sm90_asked last;
    static _Thread_local struct nbhd_sm90_bwd_plan found[MOST_PLANS];
    if (nbhd_sm90_asks_anew(&last, problem))
        last.count = find_plans(problem, &last.machine, found);
    const int count = nbhd_min(last.count, room);
    memcpy(plans, found, (size_t)count * sizeof *plans);
    return count;
}

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    const nbhd_desc *d = &problem->desc;
    struct nbhd_sm90_bwd_plan plan;
    double queries = 1;
    if (nbhd_sm90_refuses(problem, why))
        return true;
    for (int a = 0; a < 3; a++)
        queries *= problem->axis[a].length;
    if (queries * d->heads * d->batch > INT_MAX)
        return nbhd_refuse(why, "%.0f queries x heads: it numbers them with 31 bits", queries * d->heads * d->batch);
    if (d->heads > MOST_SLICES || d->batch > MOST_SLICES)
        return nbhd_refuse(why, "heads=%d, batch=%d: a launch has %d of either at most", d->heads, d->batch,
                           MOST_SLICES);
    if (!plans_here(problem, &plan, 1))
        return nbhd_refuse(why, "head_dim=%d with head_dim_v=%d: no tile fits into shared memory", d->head_dim,
                           d->head_dim_v);
    return false;
}

/* config->variant is the plan's rank. */
static int configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room)
{
    struct nbhd_sm90_bwd_plan plans[MOST_PLANS];
    const int count = plans_here(problem, plans, nbhd_min(room, MOST_PLANS));
    for (int i = 0; i < count; i++)
        configs[i] = (struct nbhd_config){
            .variant = i, .stages = 2, .threads = 128 * (plans[i].groups + 1), .predicted_ms = plans[i].ms};
    return count;
}

/* ---- build ---- */

static nbhd_status build_keys(struct keys *keys, const struct nbhd_problem *problem, const struct nbhd_sm90_bwd_plan *p,
                              int tends)
{
    const nbhd_desc *d = &problem->desc;
    struct nbhd_options o = {.used = 0};
    keys->plan = *p;
    nbhd_sm90_bwd_boxes(&keys->boxes, problem, p);
    keys->slices = d->batch;
    for (int a = 0; a < 3; a++) {
        keys->slices *= problem->axis[a].dilation;
        keys->axis[a] = problem->axis[a];
    }
    keys->maps = p->shapes > 1 ? NBHD_BWD_SM90_SHAPES : 1;
    while (p->sliced && keys->maps < keys->slices && keys->maps < MOST_MAPS)
        keys->maps *= 2; /* few numbers: few kernels to compile */
    const int *tiles = keys->boxes.tiles;
    if ((double)tiles[0] * tiles[1] * tiles[2] > INT_MAX)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED,
                         "the problem has %d x %d x %d tiles; cuda.bwd_sm90 launches %d at most", tiles[0], tiles[1],
                         tiles[2], INT_MAX);
    keys->grid = (struct nbhd_cuda_grid){
        .blocks = {(unsigned)(tiles[0] * tiles[1] * tiles[2]), (unsigned)d->kv_heads, 1},
        .threads = {128 * ((unsigned)p->groups + 1), 1, 1},
        .shared = (unsigned)(nbhd_sm90_bwd_shared(problem, p) + (tends ? NBHD_BWD_SM90_TENDING(d->head_dim) : 0))};
    nbhd_options_problem(&o, &problem->desc);
    nbhd_option(&o, "-DNBHD_MMA_TYPE=\"%s\" -DNBHD_N=%d", d->dtype == NBHD_BF16 ? "bf16" : "f16", p->n);
    nbhd_option(&o, "-DNBHD_SCORES=wgmma_ss_n%d -DNBHD_SCORES_FIRST=wgmma_ss_first_n%d -DNBHD_MASK=wgmma_rs_n%d", p->n,
                p->n, p->n);
    nbhd_option(&o, "-DNBHD_DV_PRODUCT=wgmma_rs_bt_n%d -DNBHD_DK_PRODUCT=wgmma_rs_bt_n%d", d->head_dim_v, d->head_dim);
    if (p->adds_dq)
        nbhd_option(&o,
                    "-DNBHD_DQ_PRODUCT=wgmma_ss_at_n%d -DNBHD_DQ_FIRST=wgmma_ss_at_first_n%d "
                    "-DNBHD_MASK_IF=wgmma_rs_if_n%d -DNBHD_TENDS=%d%s",
                    p->n, p->n, p->n, tends, p->adds_dq == NBHD_DQ_INTEGERS ? " -DNBHD_INTEGERS=1" : "");
    nbhd_option(&o, "-DNBHD_MASK_STEPS=%d -DNBHD_MASK_BITS=%d -DNBHD_MAPS=%d", p->mask_steps, p->mask_bits, keys->maps);
    nbhd_option(&o, "-DNBHD_GROUPS=%d -DNBHD_CTAS=%d -DNBHD_REGISTERS=%d", p->groups, p->ctas,
                nbhd_sm90_bwd_registers(p));
    const char *file = p->adds_dq ? "bwd_sm90.cu" : p->apart ? "bwd_sm90_apart.cu" : "bwd_sm90_keys.cu";
    const char *name = p->adds_dq ? "nbhd_bwd_sm90" : p->apart ? "nbhd_bwd_sm90_apart" : "nbhd_bwd_sm90_keys";
    const nbhd_status status = nbhd_cuda_acquire(&keys->module, file, &o, problem->flags);
    return status ? status : nbhd_cuda_function(&keys->function, keys->module, name);
}

static nbhd_status build_extra(struct state *state, const struct nbhd_problem *problem)
{
    struct nbhd_cuda_machine machine;
    struct nbhd_sm90_bwd_plan plan;
    const struct nbhd_problem extra = nbhd_cuda_extra_problem(problem);
    const nbhd_status status = nbhd_cuda_machine(&machine);
    if (status)
        return status;
    if (!nbhd_sm90_bwd_plans(&extra, state->grid.plan.adds_dq, machine.multiprocessors, machine.shared_max, &plan, 1))
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "extra=%d: no tile of cuda.bwd_sm90 fits", problem->desc.extra);
    return build_keys(&state->extra, &extra, &plan, 0);
}

static size_t rounded(double bytes) { return ((size_t)bytes + 255) / 256 * 256; }

/* What comes before and after the launches over the keys, and the workspace. */
static nbhd_status build_others(struct state *state, const struct nbhd_problem *problem, size_t *workspace)
{
    const nbhd_desc *d = &problem->desc;
    struct nbhd_options o = {.used = 0};
    const int widest = nbhd_max(d->head_dim, d->head_dim_v);
    int lanes = 1;
    double queries = 1;
    while (8 * lanes < widest)
        lanes *= 2;
    for (int a = 0; a < 3; a++)
        queries *= problem->axis[a].length;
    const double rows = queries * d->heads * d->batch, units = (double)d->kv_heads * d->batch;
    const bool integers = state->grid.plan.adds_dq == NBHD_DQ_INTEGERS;
    state->lse = state->grid.plan.adds_dq ? rounded(rows * d->head_dim * 4) : 0;
    state->delta = state->lse + rounded(rows * 4);
    state->fineness = state->delta + rounded(rows * 4);
    state->bounds = state->fineness + (integers ? rounded(rows * 4) : 0);
    state->counts = state->bounds + (integers ? rounded(units * NBHD_BWD_SM90_BOUNDS * 8) : 0);
    *workspace = state->counts + rounded(4.0 * state->shares.count);
    state->rows_grid = (struct nbhd_cuda_grid){
        .blocks = {(unsigned)((queries * lanes + 255) / 256), (unsigned)d->heads, (unsigned)d->batch},
        .threads = {256, 1, 1}};
    nbhd_options_problem(&o, &problem->desc);
    nbhd_option(&o, "-DNBHD_LANES=%d -DNBHD_INTEGERS=%d", lanes, integers);
    nbhd_status status = nbhd_cuda_acquire(&state->rows, "bwd_sm90_rows.cu", &o, problem->flags);
    if (!status)
        status = nbhd_cuda_function(&state->pre, state->rows, "nbhd_bwd_sm90_pre");
    if (!status && integers)
        status = nbhd_cuda_function(&state->bounds_of, state->rows, "nbhd_bwd_sm90_bounds");
    if (!status && !state->grid.plan.adds_dq)
        return nbhd_bwd_sm90_dq_build(&state->dq, problem);
    return status ? status : nbhd_cuda_function(&state->post, state->rows, "nbhd_bwd_sm90_post");
}

static void describe(struct nbhd_plan *plan, const struct state *state)
{
    const struct nbhd_sm90_bwd_plan *p = &state->grid.plan;
    char *text = plan->describe;
    const size_t room = sizeof plan->describe;
    static const char *const how[] = {": ", " added up in float32", " added up in integers"};
    size_t used = (size_t)snprintf(text, room, "keys %dx%dx%d, queries", p->k_box[0], p->k_box[1], p->k_box[2]);
    for (int i = 0; i < p->shapes && used < room; i++)
        used += (size_t)snprintf(text + used, room - used, "%s %dx%dx%d", i ? " or" : "", p->q_box[i][0],
                                 p->q_box[i][1], p->q_box[i][2]);
    if (used < room)
        used += (size_t)snprintf(text + used, room - used, " of %d, %.0f%% masked; dQ%s", p->n,
                                 100 * (1 - p->full_boxes / p->boxes), how[p->adds_dq]);
    if (state->dq && used < room)
        nbhd_bwd_sm90_dq_describe(state->dq, text + used, room - used);
}

static nbhd_status build(struct nbhd_plan *plan)
{
    const struct nbhd_problem *problem = &plan->problem;
    struct nbhd_sm90_bwd_plan plans[MOST_PLANS];
    const int count = plans_here(problem, plans, MOST_PLANS);
    if (plan->config.variant >= count)
        return nbhd_fail(NBHD_ERROR_INVALID, "configuration %d of bwd_sm90: there are %d", plan->config.variant, count);
    struct state *state = plan->state = calloc(1, sizeof *state);
    if (!state)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's state could not be allocated");
    const struct nbhd_sm90_bwd_plan *p = &plans[plan->config.variant];
    state->dtype = problem->desc.dtype;
    plan->picky = true;
    state->grid.plan = *p;
    state->shares = nbhd_bwd_sm90_share(problem, p);
    nbhd_status status = build_others(state, problem, &plan->workspace);
    if (!status && problem->desc.extra)
        status = build_extra(state, problem);
    if (!status)
        status = build_keys(&state->grid, problem, p, state->shares.lag > 0);
    if (state->shares.parts > 1) {
        state->grid.grid.blocks[0] = (unsigned)(state->shares.whole + state->shares.last * state->shares.parts);
        state->grid.grid.blocks[1] = 1;
    }
    if (!status)
        describe(plan, state);
    return status;
}

/* ---- run ---- */

/* Rows that the copy engine does not move are moved in pieces of 16 bytes. */
static nbhd_status check_views(const struct nbhd_params *p)
{
    const struct {
        const char *name;
        const struct nbhd_view *view;
    } views[] = {{"q", &p->q},   {"k", &p->k},   {"v", &p->v},   {"o", &p->o}, {"dout", &p->dout}, {"dq", &p->dq},
                 {"dk", &p->dk}, {"dv", &p->dv}, {"extra_k", &p->extra_k}, {"extra_v", &p->extra_v},
                 {"dextra_k", &p->dextra_k}, {"dextra_v", &p->dextra_v}};
    nbhd_status status = NBHD_OK;
    for (size_t i = 0; i < sizeof views / sizeof *views && !status; i++)
        if (i < 8 || p->extra)
            status = nbhd_sm90_check_view("bwd_sm90", views[i].name, views[i].view);
    return status;
}

/* dQ in the workspace: float32 or integers, [batch][queries][heads][head_dim]. */
static struct nbhd_view sum_view(const struct nbhd_params *p, void *workspace)
{
    struct nbhd_view view = {.data = workspace, .head = 4ll * p->head_dim};
    view.axis[2] = view.head * p->heads;
    view.axis[1] = view.axis[2] * p->axis[2].length;
    view.axis[0] = view.axis[1] * p->axis[1].length;
    view.batch = view.axis[0] * p->axis[0].length;
    return view;
}

/* maps: struct maps of bwd_sm90.cu: q[maps], dout[maps], dq[maps], k[maps], v[maps]. */
static nbhd_status make_maps(struct nbhd_tensor_map *maps, const struct keys *keys, const struct nbhd_params *p,
                             int dtype, void *workspace, int first, int slices)
{
    const struct nbhd_sm90_bwd_plan *plan = &keys->plan;
    const struct nbhd_view dq = sum_view(p, workspace);
    const int sums = plan->adds_dq == NBHD_DQ_INTEGERS ? NBHD_CUDA_INT32 : NBHD_F32;
    const int n = keys->maps;
    nbhd_status status = NBHD_OK;
    for (int i = 0; i < nbhd_max(slices, plan->shapes) && !status; i++) {
        struct nbhd_tensor_map *map = maps + i;
        const int slice = plan->sliced ? first + i : -1, *box = plan->q_box[plan->sliced ? 0 : i];
        const struct nbhd_sm90_tokens q = {0, slice, p->heads, p->head_dim, 0};
        const struct nbhd_sm90_tokens dout = {0, slice, p->heads, p->head_dim_v, 0};
        const struct nbhd_sm90_tokens k = {1, slice, p->kv_heads, p->head_dim, 0};
        const struct nbhd_sm90_tokens v = {1, slice, p->kv_heads, p->head_dim_v, 0};
        status = nbhd_sm90_token_map(map, p, dtype, &p->q, &q, 1, box);
        if (!status)
            status = nbhd_sm90_token_map(map + n, p, dtype, &p->dout, &dout, 1, box);
        if (!status && plan->adds_dq)
            status = nbhd_sm90_token_map(map + 2 * n, p, sums, &dq, &q, 1, box);
        if (!status)
            status = nbhd_sm90_token_map(map + 3 * n, p, dtype, &p->k, &k, 1, plan->k_box);
        if (!status)
            status = nbhd_sm90_token_map(map + 4 * n, p, dtype, &p->v, &v, 1, plan->k_box);
    }
    return status;
}

static nbhd_status run_keys(const struct keys *keys, const struct nbhd_params *params, const struct state *state,
                            char *workspace, void *stream)
{
    struct nbhd_tensor_map maps[MAPS_OF_SLICE * MOST_MAPS];
    struct nbhd_bwd_boxes boxes = keys->boxes;
    struct nbhd_cuda_grid grid = keys->grid;
    const int most = keys->plan.sliced ? keys->maps : MOST_SLICES; /* of one launch */
    nbhd_status status = NBHD_OK;
    void *arguments[] = {(void *)params, &boxes, maps};
    boxes.lse = (const float *)(workspace + state->lse);
    boxes.delta = (const float *)(workspace + state->delta);
    boxes.fineness = (const float *)(workspace + state->fineness);
    boxes.sums = (float *)workspace;
    boxes.units = params->kv_heads * params->batch;
    boxes.unit_tiles = boxes.tiles[0] * boxes.tiles[1] * boxes.tiles[2];
    nbhd_bwd_sm90_tell_shares(&boxes, &state->shares, (unsigned *)(workspace + state->counts));
    for (int first = 0; first < keys->slices && !status; first += most) {
        const int slices = nbhd_min(most, keys->slices - first);
        boxes.slice_begin = first;
        grid.blocks[2] = state->shares.parts > 1 ? 1 : (unsigned)slices;
        status = make_maps(maps, keys, params, state->dtype, workspace, first, keys->plan.sliced ? slices : 1);
        if (!status)
            status = nbhd_cuda_launch(keys->module, keys->function, &grid, stream, arguments);
    }
    return status;
}

/* dQ from its sums, of the units that nobody has converted: heads of one batch element, then whole ones. */
static nbhd_status convert(const struct state *state, const struct nbhd_params *params, struct nbhd_bwd_rows *rows,
                           void *stream)
{
    const int units = params->kv_heads * params->batch, first = state->shares.lag ? units - state->shares.lag : 0;
    nbhd_status status = NBHD_OK;
    rows->batch = first / params->kv_heads;
    rows->head = first % params->kv_heads * (params->heads / params->kv_heads);
    while (rows->batch < params->batch && !status) {
        struct nbhd_cuda_grid grid = state->rows_grid;
        const int all = rows->head ? 1 : params->batch - rows->batch;
        grid.blocks[1] = (unsigned)(params->heads - rows->head);
        grid.blocks[2] = (unsigned)all;
        status = nbhd_cuda_launch(state->rows, state->post, &grid, stream, (void *[]){(void *)params, rows});
        rows->batch += all;
        rows->head = 0;
    }
    return status;
}

static nbhd_status run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const struct state *state = plan->state;
    char *at = workspace;
    const int units = params->kv_heads * params->batch;
    struct nbhd_bwd_rows rows = {.lse = (float *)(at + state->lse),
                                 .delta = (float *)(at + state->delta),
                                 .fineness = (float *)(at + state->fineness),
                                 .bounds = (float *)(at + state->bounds),
                                 .sums = (float *)at,
                                 .counts = (unsigned *)(at + state->counts),
                                 .count = state->shares.count,
                                 .units = state->dq ? 0 : state->shares.lag ? state->shares.lag : units};
    nbhd_status status = check_views(params);
    if (!status && state->bounds_of) {
        struct nbhd_cuda_grid grid = state->rows_grid;
        grid.blocks[0] = NBHD_BWD_SM90_BOUNDS;
        grid.blocks[1] = (unsigned)params->kv_heads;
        status = nbhd_cuda_launch(state->rows, state->bounds_of, &grid, stream, (void *[]){(void *)params, &rows});
    }
    if (!status)
        status = nbhd_cuda_launch(state->rows, state->pre, &state->rows_grid, stream,
                                  (void *[]){(void *)params, &rows});
    if (!status)
        status = run_keys(&state->grid, params, state, at, stream);
    if (!status && params->extra) {
        struct nbhd_params extra = *params;
        extra.k = params->extra_k;
        extra.v = params->extra_v;
        extra.dk = params->dextra_k;
        extra.dv = params->dextra_v;
        memcpy(extra.axis, state->extra.axis, sizeof extra.axis);
        status = run_keys(&state->extra, &extra, state, at, stream);
    }
    if (status)
        return status;
    if (state->dq)
        return nbhd_bwd_sm90_dq_run(state->dq, params, rows.lse, rows.delta, stream);
    return convert(state, params, &rows, stream);
}

static void drop(struct nbhd_plan *plan)
{
    struct state *state = plan->state;
    if (state) {
        nbhd_cuda_release(state->grid.module);
        nbhd_cuda_release(state->extra.module);
        nbhd_cuda_release(state->rows);
        nbhd_bwd_sm90_dq_drop(state->dq);
    }
    free(state);
}

const struct nbhd_kernel_ops nbhd_cuda_bwd_sm90 = {refuse, configs, build, run, drop};
