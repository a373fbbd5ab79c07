/* Host half of fwd_simt.cu: refuses nothing legal. */
#include <stdio.h>
#include <stdlib.h>
#include "cuda/simt.h"

struct state {
    struct nbhd_cuda_module *module;
    struct CUfunc_st *function;
    struct nbhd_cuda_grid grid;
};

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    for (int i = 0; i < 3; i++)
        if (problem->axis[i].edge == NBHD_EDGE_PERIODIC)
            return nbhd_refuse(why, "edge of axis %d is periodic, which no kernel computes yet", i);
    return false;
}

static int configs(const struct nbhd_problem *problem, struct nbhd_config *config, int room)
{
    (void)room;
    *config = (struct nbhd_config){.variant = nbhd_simt_rows(problem, problem->desc.head_dim_v), .threads = 256};
    nbhd_simt_box(problem, 16 * config->variant, config->q_tile);
    return 1;
}

static nbhd_status build(struct nbhd_plan *plan)
{
    const struct nbhd_config *c = &plan->config;
    struct nbhd_options options = {.used = 0};
    struct state *state = plan->state = calloc(1, sizeof *state);
    if (!state)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's state could not be allocated");
    nbhd_simt_options(&options, &plan->problem, c->variant, c->q_tile);
    state->grid = nbhd_simt_grid(&plan->problem, c->q_tile, false);
    snprintf(plan->describe, sizeof plan->describe, "tile %dx%dx%d", c->q_tile[0], c->q_tile[1], c->q_tile[2]);
    nbhd_status status = nbhd_cuda_acquire(&state->module, "fwd_simt.cu", &options, plan->problem.flags);
    return status ? status : nbhd_cuda_function(&state->function, state->module, "nbhd_fwd_simt");
}

static nbhd_status run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const struct state *state = plan->state;
    (void)workspace;
    return nbhd_cuda_launch(state->module, state->function, &state->grid, stream, (void *[]){(void *)params});
}

static void drop(struct nbhd_plan *plan)
{
    struct state *state = plan->state;
    if (state)
        nbhd_cuda_release(state->module);
    free(state);
}

const struct nbhd_kernel_ops nbhd_cuda_fwd_simt = {refuse, configs, build, run, drop};
