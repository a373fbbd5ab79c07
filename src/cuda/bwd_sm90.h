/* A plan's state of bwd_sm90: made by bwd_sm90.c, launched by bwd_sm90_run.c. */
#ifndef NBHD_CUDA_BWD_SM90_H
#define NBHD_CUDA_BWD_SM90_H

#include "cuda/bwd_sm90_dq.h"
#include "cuda/bwd_sm90_shares.h"
#include "cuda/sm90.h"

enum { NBHD_BWD_SM90_MAPS = 32, NBHD_BWD_SM90_SLICES = 65535 }; /* most of one launch */

/* A launch of the products: over the grid's keys, or over the extra keys. */
struct nbhd_bwd_sm90_keys {
    struct nbhd_cuda_module *module;
    struct CUfunc_st *function;
    struct nbhd_sm90_bwd_plan plan;
    struct nbhd_bwd_boxes boxes;
    struct nbhd_cuda_grid grid;
    struct nbhd_axis axis[3];
    int slices, maps; /* slices: batch x dilation groups; maps: NBHD_MAPS, one for each slice or shape of query boxes */
};

struct nbhd_bwd_sm90 {
    struct nbhd_bwd_sm90_keys grid, extra;
    struct nbhd_bwd_sm90_dq *dq; /* NULL: added up beside dK and dV */
    struct nbhd_cuda_module *rows;
    struct CUfunc_st *bounds_of, *pre, *post; /* bounds_of: where dQ is added up in integers */
    struct nbhd_cuda_grid rows_grid;
    size_t lse, delta, fineness, bounds, counts; /* bytes from the workspace's begin, where dQ stands */
    struct nbhd_bwd_sm90_shares shares;
    int dtype;
};

/* As struct nbhd_kernel_ops has it. */
nbhd_status nbhd_bwd_sm90_run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace,
                              void *stream);

#endif
