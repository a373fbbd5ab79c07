/* Host half of fwd_simt.cu: refuses nothing legal. */
#include <stdio.h>
#include <stdlib.h>
#include "cuda/simt.h"

struct state {
    struct nbhd_cuda_module *module;
    struct CUfunc_st *function;
    struct nbhd_cuda_grid grid;
    struct nbhd_simt_box box;
};

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    return nbhd_simt_refuses(problem, why);
}

static int configs(const struct nbhd_problem *problem, struct nbhd_config *config, int room)
{
    (void)room;
    *config = (struct nbhd_config){.many = problem->flags & NBHD_PROBLEM_MANY};
    return 1;
}

static nbhd_status run_many(const struct nbhd_plan *plan, const struct nbhd_params *params, struct nbhd_parts *parts,
                            void *workspace, void *stream)
{
    const struct state *state = plan->state;
    const struct nbhd_cuda_grid grid = nbhd_simt_many(&plan->problem, &state->box, false, 0, parts);
    (void)workspace;
    return nbhd_cuda_launch(state->module, state->function, &grid, stream,
                            (void *[]){(void *)params, parts, (void *)&state->box});
}

static nbhd_status build(struct nbhd_plan *plan)
{
    const struct nbhd_problem *p = &plan->problem;
    struct nbhd_options options = {.used = 0};
    struct state *state = plan->state = calloc(1, sizeof *state);
    if (!state)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's state could not be allocated");
    const struct nbhd_simt_registers r = nbhd_simt_registers(p, 1, p->desc.head_dim_v);
    nbhd_simt_options(&options, p, r);
    state->box = nbhd_simt_box(p, 16 * r.rows);
    state->grid = nbhd_simt_grid(p, &state->box, false);
    plan->run_many = plan->config.many ? run_many : NULL;
    const int *e = state->box.extent;
    snprintf(plan->describe, sizeof plan->describe, "tile %dx%dx%d", e[0], e[1], e[2]);
    nbhd_status status = nbhd_cuda_acquire(&state->module, "fwd_simt.cu", &options, p->flags);
    return status ? status : nbhd_cuda_function(&state->function, state->module, "nbhd_fwd_simt");
}

static nbhd_status run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const struct state *state = plan->state;
    (void)workspace;
    return nbhd_cuda_launch(state->module, state->function, &state->grid, stream,
                            (void *[]){(void *)params, (void *)&state->box});
}

static void drop(struct nbhd_plan *plan)
{
    struct state *state = plan->state;
    if (state)
        nbhd_cuda_release(state->module);
    free(state);
}

const struct nbhd_kernel_ops nbhd_cuda_fwd_simt = {refuse, configs, build, run, drop};
