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
 * Box shapes: sm90_bwd_plan.c. The launches themselves: bwd_sm90_run.c. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/bwd_sm90.h"

enum { MOST_PLANS = 4 };

/* ---- plan ---- */

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
    if (!nbhd_bwd_sm90_dq_refuses(problem, why))
        count += nbhd_sm90_bwd_plans(problem, NBHD_DQ_APART, machine->multiprocessors, machine->shared_max,
                                     plans + count, MOST_PLANS / 2);
    for (int i = adding; i < count; i++)
        plans[i].ms += nbhd_bwd_sm90_dq_ms(problem);
    qsort(plans, (size_t)count, sizeof *plans, nbhd_sm90_bwd_by_ms);
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
    if (d->heads > NBHD_BWD_SM90_SLICES || d->batch > NBHD_BWD_SM90_SLICES)
        return nbhd_refuse(why, "heads=%d, batch=%d: a launch has %d of either at most", d->heads, d->batch,
                           NBHD_BWD_SM90_SLICES);
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

static nbhd_status build_keys(struct nbhd_bwd_sm90_keys *keys, const struct nbhd_problem *problem,
                              const struct nbhd_sm90_bwd_plan *p, int tends)
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
    while (p->sliced && keys->maps < keys->slices && keys->maps < NBHD_BWD_SM90_MAPS)
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

static nbhd_status build_extra(struct nbhd_bwd_sm90 *state, const struct nbhd_problem *problem)
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
static nbhd_status build_others(struct nbhd_bwd_sm90 *state, const struct nbhd_problem *problem, size_t *workspace)
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

static void describe(struct nbhd_plan *plan, const struct nbhd_bwd_sm90 *state)
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
    struct nbhd_bwd_sm90 *state = plan->state = calloc(1, sizeof *state);
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

static void drop(struct nbhd_plan *plan)
{
    struct nbhd_bwd_sm90 *state = plan->state;
    if (state) {
        nbhd_cuda_release(state->grid.module);
        nbhd_cuda_release(state->extra.module);
        nbhd_cuda_release(state->rows);
        nbhd_bwd_sm90_dq_drop(state->dq);
    }
    free(state);
}

const struct nbhd_kernel_ops nbhd_cuda_bwd_sm90 = {refuse, configs, build, nbhd_bwd_sm90_run, drop};
