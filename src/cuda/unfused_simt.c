/* Host half of unfused_simt.cu: the rows qk_simt, av_simt, qk_bwd_simt and av_bwd_simt, which refuse nothing legal. */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "cuda/simt.h"
#include "device/unfused.cuh"

enum { THREADS = 256, WARPS = THREADS / 32 };

struct state {
    struct nbhd_cuda_module *module[2]; /* for rows of head_dim, and of head_dim_v */
    struct CUfunc_st *scores[2], *queries[2], *keys[2], *table; /* by of_values */
    struct nbhd_cuda_grid by_query, by_key, by_entry;
};

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    return nbhd_simt_refuses(problem, why);
}

static int configs(const struct nbhd_problem *problem, struct nbhd_config *config, int room)
{
    (void)problem;
    (void)room;
    *config = (struct nbhd_config){.variant = 0};
    return 1;
}

static struct nbhd_cuda_grid grid_of(double blocks)
{
    return (struct nbhd_cuda_grid){.blocks = {blocks < INT_MAX ? (unsigned)blocks : INT_MAX, 1, 1},
                                   .threads = {THREADS, 1, 1}};
}

static void set_grids(struct state *s, const struct nbhd_problem *p)
{
    double queries = (double)p->desc.batch * p->desc.heads, keys = (double)p->desc.batch * p->desc.kv_heads;
    double entries = p->desc.heads;
    for (int i = 0; i < 3; i++) {
        queries *= p->axis[i].length;
        keys *= p->axis[i].keys;
        entries *= 2.0 * p->axis[i].window - 1;
    }
    s->by_query = grid_of(ceil(queries / WARPS));
    s->by_key = grid_of(ceil(keys / WARPS));
    s->by_entry = grid_of(entries);
}

/* Columns of a lane, as a power of two: five kernel files at most for each type, and as many that wrap. */
static nbhd_status load(struct state *s, const struct nbhd_problem *p, int of_values)
{
    const int width = of_values ? p->desc.head_dim_v : p->desc.head_dim;
    int columns = 1;
    while (32 * columns < width)
        columns *= 2;
    struct nbhd_options options = {.used = 0};
    nbhd_option(&options, "-DNBHD_DTYPE=%d -DNBHD_COLUMNS=%d", p->desc.dtype, columns);
    nbhd_options_wraps(&options, &p->desc);
    nbhd_status status = nbhd_cuda_acquire(&s->module[of_values], "unfused_simt.cu", &options, p->flags);
    if (!status)
        status = nbhd_cuda_function(&s->scores[of_values], s->module[of_values], "nbhd_unfused_scores");
    if (!status)
        status = nbhd_cuda_function(&s->queries[of_values], s->module[of_values], "nbhd_unfused_queries");
    if (!status)
        status = nbhd_cuda_function(&s->keys[of_values], s->module[of_values], "nbhd_unfused_keys");
    if (!status && !of_values)
        status = nbhd_cuda_function(&s->table, s->module[0], "nbhd_unfused_table");
    return status;
}

static nbhd_status build(struct nbhd_plan *plan)
{
    const struct nbhd_problem *p = &plan->problem;
    struct state *s = plan->state = calloc(1, sizeof *s);
    if (!s)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's state could not be allocated");
    set_grids(s, p);
    snprintf(plan->describe, sizeof plan->describe, "a warp for each row");
    return load(s, p, p->desc.pass == NBHD_AV || p->desc.pass == NBHD_AV_BACKWARD);
}

static struct nbhd_unfused product(const struct nbhd_params *p, const struct nbhd_view *query,
                                   const struct nbhd_view *key, const struct nbhd_view *scores, bool of_values)
{
    return (struct nbhd_unfused){.query = *query,
                                 .key = *key,
                                 .scores = *scores,
                                 .dbias = p->dbias,
                                 .axis = {p->axis[0], p->axis[1], p->axis[2]},
                                 .batch = p->batch,
                                 .heads = p->heads,
                                 .kv_heads = p->kv_heads,
                                 .width = of_values ? p->head_dim_v : p->head_dim,
                                 .scale = of_values ? 1.0f : p->scale,
                                 .flags = p->flags};
}

static nbhd_status launch(const struct state *s, int of_values, struct CUfunc_st *const function[2],
                          const struct nbhd_cuda_grid *grid, struct nbhd_unfused product, void *stream)
{
    return nbhd_cuda_launch(s->module[of_values], function[of_values], grid, stream, (void *[]){&product});
}

static nbhd_status run_qk(const struct nbhd_plan *plan, const struct nbhd_params *p, void *workspace, void *stream)
{
    const struct state *s = plan->state;
    struct nbhd_unfused scores = product(p, &p->q, &p->k, &p->scores, false);
    (void)workspace;
    scores.bias = p->bias;
    scores.fill = -INFINITY;
    return launch(s, 0, s->scores, &s->by_query, scores, stream);
}

static nbhd_status run_av(const struct nbhd_plan *plan, const struct nbhd_params *p, void *workspace, void *stream)
{
    const struct state *s = plan->state;
    (void)workspace;
    return launch(s, 1, s->queries, &s->by_query, product(p, &p->o, &p->v, &p->scores, true), stream);
}

static nbhd_status run_qk_bwd(const struct nbhd_plan *plan, const struct nbhd_params *p, void *workspace, void *stream)
{
    const struct state *s = plan->state;
    const struct nbhd_unfused dq = product(p, &p->dq, &p->k, &p->dscores, false);
    (void)workspace;
    nbhd_status status = launch(s, 0, s->queries, &s->by_query, dq, stream);
    if (!status)
        status = launch(s, 0, s->keys, &s->by_key, product(p, &p->q, &p->dk, &p->dscores, false), stream);
    if (!status && p->dbias)
        status = nbhd_cuda_launch(s->module[0], s->table, &s->by_entry, stream, (void *[]){(void *)&dq});
    return status;
}

static nbhd_status run_av_bwd(const struct nbhd_plan *plan, const struct nbhd_params *p, void *workspace, void *stream)
{
    const struct state *s = plan->state;
    (void)workspace;
    nbhd_status status = launch(s, 1, s->scores, &s->by_query, product(p, &p->dout, &p->v, &p->dscores, true), stream);
    if (!status)
        status = launch(s, 1, s->keys, &s->by_key, product(p, &p->dout, &p->dv, &p->scores, true), stream);
    return status;
}

static void drop(struct nbhd_plan *plan)
{
    struct state *s = plan->state;
    for (int i = 0; s && i < 2; i++)
        nbhd_cuda_release(s->module[i]);
    free(s);
}

const struct nbhd_kernel_ops nbhd_cuda_qk_simt = {refuse, configs, build, run_qk, drop};
const struct nbhd_kernel_ops nbhd_cuda_av_simt = {refuse, configs, build, run_av, drop};
const struct nbhd_kernel_ops nbhd_cuda_qk_bwd_simt = {refuse, configs, build, run_qk_bwd, drop};
const struct nbhd_kernel_ops nbhd_cuda_av_bwd_simt = {refuse, configs, build, run_av_bwd, drop};
