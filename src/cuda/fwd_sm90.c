/* Host half of fwd_sm90.cu: what it takes, its plans (sm90_plan.c, fwd_sm90_plan.c) and its launches (sm90.c). */
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/sm90.h"

enum { MOST_PLANS = 4 };

struct state {
    struct nbhd_sm90_launch launch;
};

static int plans_here(const struct nbhd_problem *problem, struct nbhd_sm90_plan *plans, int room)
{
    static _Thread_local struct nbhd_sm90_asked last;
    static _Thread_local struct nbhd_sm90_plan found[MOST_PLANS];
    if (nbhd_sm90_asks_anew(&last, problem))
        last.count = nbhd_sm90_plans(&nbhd_sm90_forward, problem, last.machine.multiprocessors,
                                     last.machine.shared_max, found, MOST_PLANS);
    const int count = nbhd_min(last.count, room);
    memcpy(plans, found, (size_t)count * sizeof *plans);
    return count;
}

/* What one launch for many sequences does not take; not asked: whether there is a plan. */
static bool refuses_many(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    const nbhd_desc *d = &problem->desc;
    if (d->extra)
        return nbhd_refuse(why, "extra=%d: sequences with extra keys are computed one by one", d->extra);
    if (d->head_dim_v > 224)
        return nbhd_refuse(why, "head_dim_v=%d: its sums leave no registers for more than one sequence", d->head_dim_v);
    for (int a = 3 - d->rank; a < 3; a++) {
        if (problem->axis[a].dilation > 8)
            return nbhd_refuse(why, "a dilation of %d: sequences share maps up to 8", problem->axis[a].dilation);
        if (d->rank > 1 && problem->axis[a].keys > NBHD_SM90_MASKED)
            return nbhd_refuse(why, "an axis of %d keys: masks tell %d apart", problem->axis[a].keys, NBHD_SM90_MASKED);
    }
    return false;
}

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    struct nbhd_sm90_plan plan;
    if (nbhd_sm90_refuses(problem, why))
        return true;
    if (problem->flags & NBHD_PROBLEM_MANY)
        return refuses_many(problem, why);
    if (!plans_here(problem, &plan, 1))
        return nbhd_refuse(why,
                           "head_dim=%d with head_dim_v=%d: no tile and its masks fit into shared memory and registers",
                           problem->desc.head_dim, problem->desc.head_dim_v);
    return false;
}

/* Longer sequences fill the chip, and each has boxes of its own. */
static const double most_ms_of_many = 0.06;

/* config->variant is the plan's rank. */
static int configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room)
{
    struct nbhd_sm90_plan plans[MOST_PLANS];
    char why[NBHD_TEXT];
    const bool many = problem->flags & NBHD_PROBLEM_MANY && !refuses_many(problem, why);
    int count = plans_here(problem, plans, nbhd_min(room, MOST_PLANS));
    for (int i = 0; i < count; i++) {
        configs[i] = (struct nbhd_config){.variant = i,
                                          .stages = plans[i].variant.stages,
                                          .threads = 128 * (plans[i].variant.groups + 1),
                                          .predicted_ms = plans[i].ms,
                                          .many = many && plans[i].ms < most_ms_of_many * problem->desc.batch};
        memcpy(configs[i].q_tile, plans[i].q_box, sizeof configs[i].q_tile);
        if (plans[i].shapes == 1 && plans[i].pack == 1) /* else none that nbhd_sim_plan_tiles could tell */
            memcpy(configs[i].k_tile, plans[i].k_box[0], sizeof configs[i].k_tile);
    }
    return count;
}

/* Tiles are shared out among as many CTAs as the chip holds; those of one launch are counted in an int. */
static nbhd_status share_out(struct nbhd_sm90_launch *launch, const struct nbhd_problem *problem)
{
    struct nbhd_cuda_machine machine;
    nbhd_status status = nbhd_cuda_machine(&machine);
    if (status)
        return status;
    const int *tiles = launch->boxes.tiles;
    const double work = (double)tiles[0] * tiles[1] * tiles[2] * launch->boxes.head_blocks;
    if (work >= INT_MAX / 2)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "%.0f query tiles of one batch element: fwd_sm90 counts to %d", work,
                         INT_MAX / 2);
    launch->most_slices = launch->plan.sliced ? launch->maps : (int)(INT_MAX / 2 / work);
    launch->resident = machine.multiprocessors * launch->plan.variant.ctas;
    launch->most_tiles = nbhd_sm90_most_tiles(problem, &launch->plan, machine.l2_bytes);
    launch->boxes.strip = nbhd_sm90_strip(problem, &launch->boxes, launch->resident);
    launch->grid.blocks[1] = 1;
    return NBHD_OK;
}

static nbhd_status check_views(const struct nbhd_params *p)
{
    const struct nbhd_view *const views[] = {&p->q, &p->k, &p->v, &p->o, &p->extra_k, &p->extra_v};
    static const char *const names[] = {"q", "k", "v", "o", "extra_k", "extra_v"};
    nbhd_status status = NBHD_OK;
    for (int i = 0; i < (p->extra ? 6 : 4) && !status; i++)
        status = nbhd_sm90_check_view("fwd_sm90", names[i], views[i]);
    return status;
}

static nbhd_status run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const struct state *state = plan->state;
    (void)workspace;
    nbhd_status status = check_views(params);
    return status ? status : nbhd_sm90_run(&state->launch, params, NULL, NULL, 0, stream);
}

static nbhd_status run_many(const struct nbhd_plan *plan, const struct nbhd_params *params, struct nbhd_parts *parts,
                            void *workspace, void *stream)
{
    const struct state *state = plan->state;
    (void)workspace;
    nbhd_status status = check_views(params);
    return status ? status : nbhd_sm90_run_many(&state->launch, params, parts, stream);
}

static bool is_dilated(const struct nbhd_problem *problem)
{
    const struct nbhd_axis *axis = problem->axis;
    return axis[0].dilation > 1 || axis[1].dilation > 1 || axis[2].dilation > 1;
}

static nbhd_status build_launch(struct nbhd_plan *plan, const struct nbhd_sm90_plan *choice)
{
    const struct nbhd_problem *problem = &plan->problem;
    struct state *state = plan->state = calloc(1, sizeof *state);
    if (!state)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's state could not be allocated");
    struct nbhd_sm90_launch *launch = &state->launch;
    nbhd_sm90_set_launch(launch, &nbhd_sm90_forward, problem, choice);
    nbhd_status status = share_out(launch, problem);
    if (status)
        return status;
    nbhd_sm90_describe(plan->describe, sizeof plan->describe, choice);
    plan->picky = true;
    plan->run_many = choice->many ? run_many : NULL;
    struct nbhd_options options = {.used = 0};
    nbhd_sm90_options(&options, problem, launch);
    nbhd_option(&options, "-DNBHD_PV=wgmma_rs_bt_n%d -DNBHD_Q_STAGES=%d -DNBHD_TILES=%d -DNBHD_PAD=%d",
                problem->desc.head_dim_v, choice->q_stages, choice->slots, choice->pad);
    nbhd_option(&options, "-DNBHD_SHAPES=%d -DNBHD_EXTRA=%d -DNBHD_DILATED=%d", choice->shapes, problem->desc.extra > 0,
                is_dilated(problem));
    if (choice->many)
        nbhd_option(&options, "-DNBHD_MANY=1");
    status = nbhd_cuda_acquire(&launch->module, "fwd_sm90.cu", &options, problem->flags);
    return status ? status : nbhd_cuda_function(&launch->function, launch->module, "nbhd_fwd_sm90");
}

static nbhd_status build(struct nbhd_plan *plan)
{
    struct nbhd_sm90_plan plans[MOST_PLANS];
    const int count = plans_here(&plan->problem, plans, MOST_PLANS), choice = plan->config.variant;
    if (choice >= count)
        return nbhd_fail(NBHD_ERROR_INVALID, "configuration %d of fwd_sm90: there are %d", choice, count);
    return build_launch(plan, &plans[choice]);
}

static void drop(struct nbhd_plan *plan)
{
    struct state *state = plan->state;
    if (state)
        nbhd_cuda_release(state->launch.module);
    free(state);
}

const struct nbhd_kernel_ops nbhd_cuda_fwd_sm90 = {refuse, configs, build, run, drop};
