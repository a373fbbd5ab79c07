/* Host half of bwd_simt.cu: refuses nothing legal. */
#include <stdio.h>
#include <stdlib.h>
#include "cuda/simt.h"

struct state {
    struct nbhd_cuda_module *module;
    struct CUfunc_st *dq, *dkv, *dbias;
    struct nbhd_cuda_grid dq_grid, dkv_grid, dbias_grid;
    struct nbhd_simt_box dq_box, dkv_box;
    int rows; /* of a tile */
};

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    return nbhd_simt_refuses(problem, why);
}

static int configs(const struct nbhd_problem *problem, struct nbhd_config *config, int room)
{
    (void)room;
    *config = (struct nbhd_config){.many = problem->flags & NBHD_PROBLEM_MANY && !problem->desc.bias};
    return 1;
}

/* lse and delta of each query and head, for dkv and dbias. */
static size_t stats_bytes(const struct nbhd_problem *p)
{
    const size_t real = p->desc.dtype == NBHD_F64 ? sizeof(double) : sizeof(float);
    return 2 * real * (size_t)p->desc.batch * (size_t)p->desc.heads * (size_t)p->axis[0].length *
           (size_t)p->axis[1].length * (size_t)p->axis[2].length;
}

static void lay_out(struct state *state, const struct nbhd_problem *p, struct nbhd_simt_registers r)
{
    state->dq_box = state->dkv_box = nbhd_simt_box(p, 16 * r.rows);
    state->dq_grid = nbhd_simt_grid(p, &state->dq_box, false);
    state->dkv_grid = nbhd_simt_grid(p, &state->dkv_box, true);
    const unsigned extra =
        (unsigned)((p->desc.extra + 16 * r.rows - 1) / (16 * r.rows) * p->desc.kv_heads * p->desc.batch);
    if (state->dkv_grid.blocks[0] < 0x40000000)
        state->dkv_grid.blocks[0] += extra < 0x3fffffff ? extra : 0x3fffffff;
    double entries = p->desc.heads;
    for (int i = 0; i < 3; i++)
        entries *= 2 * p->axis[i].window - 1;
    state->dbias_grid = state->dq_grid;
    state->dbias_grid.blocks[0] = entries < 0x7fffffff ? (unsigned)entries : 0x7fffffff;
}

static nbhd_status run_many(const struct nbhd_plan *plan, const struct nbhd_params *params, struct nbhd_parts *parts,
                            void *workspace, void *stream)
{
    const struct state *s = plan->state;
    void *dq[] = {(void *)params, parts, (void *)&s->dq_box, &workspace};
    void *dkv[] = {(void *)params, parts, (void *)&s->dkv_box, &workspace};
    struct nbhd_cuda_grid grid = nbhd_simt_many(&plan->problem, &s->dq_box, false, 0, parts);
    nbhd_status status = nbhd_cuda_launch(s->module, s->dq, &grid, stream, dq);
    grid = nbhd_simt_many(&plan->problem, &s->dkv_box, true, s->rows, parts);
    return status ? status : nbhd_cuda_launch(s->module, s->dkv, &grid, stream, dkv);
}

static nbhd_status build(struct nbhd_plan *plan)
{
    const struct nbhd_problem *p = &plan->problem;
    struct nbhd_options options = {.used = 0};
    struct state *state = plan->state = calloc(1, sizeof *state);
    if (!state)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's state could not be allocated");
    const int d = p->desc.head_dim, dv = p->desc.head_dim_v;
    const struct nbhd_simt_registers r = nbhd_simt_registers(p, 2, d > dv ? d : dv);
    nbhd_simt_options(&options, p, r);
    nbhd_option(&options, "--split-compile=4"); /* its kernels side by side: two thirds of the time */
    lay_out(state, p, r);
    state->rows = 16 * r.rows;
    plan->run_many = plan->config.many ? run_many : NULL;
    plan->workspace = stats_bytes(p);
    const int *e = state->dq_box.extent;
    snprintf(plan->describe, sizeof plan->describe, "tile %dx%dx%d", e[0], e[1], e[2]);
    nbhd_status status = nbhd_cuda_acquire(&state->module, "bwd_simt.cu", &options, p->flags);
    if (!status)
        status = nbhd_cuda_function(&state->dq, state->module, "nbhd_bwd_simt_dq");
    if (!status)
        status = nbhd_cuda_function(&state->dkv, state->module, "nbhd_bwd_simt_dkv");
    if (!status && p->desc.bias)
        status = nbhd_cuda_function(&state->dbias, state->module, "nbhd_bwd_simt_dbias");
    return status;
}

static nbhd_status run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const struct state *s = plan->state;
    void *dq[] = {(void *)params, (void *)&s->dq_box, &workspace};
    void *dkv[] = {(void *)params, (void *)&s->dkv_box, &workspace};
    nbhd_status status = nbhd_cuda_launch(s->module, s->dq, &s->dq_grid, stream, dq);
    if (!status)
        status = nbhd_cuda_launch(s->module, s->dkv, &s->dkv_grid, stream, dkv);
    if (!status && params->dbias)
        status = nbhd_cuda_launch(s->module, s->dbias, &s->dbias_grid, stream, dq);
    return status;
}

static void drop(struct nbhd_plan *plan)
{
    struct state *state = plan->state;
    if (state)
        nbhd_cuda_release(state->module);
    free(state);
}

const struct nbhd_kernel_ops nbhd_cuda_bwd_simt = {refuse, configs, build, run, drop};
