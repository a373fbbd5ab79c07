/* What the host halves of the kernels of Hopper share: tensor maps over tokens, and a launch over query tiles. */
#ifndef NBHD_CUDA_SM90_H
#define NBHD_CUDA_SM90_H

#include "cuda/cuda.h"
#include "cuda/sm90_plan.h"

/* A dtype, head_dim, head_dim_v, scale, bias or edge that no kernel of Hopper takes, or another GPU: true, and why. */
bool nbhd_sm90_refuses(const struct nbhd_problem *problem, char why[NBHD_TEXT]);

/* Plans are asked for three times (refuse, configs, build) and take milliseconds, so a thread keeps those of its last
 * problem, and beside them what they are of. */
struct nbhd_sm90_asked {
    nbhd_desc desc;
    unsigned flags;
    struct nbhd_cuda_machine machine;
    int count; /* of plans kept */
};
/* True if the plans of `problem` on this thread's machine are not those that were kept, so must be found; `last` is of
 * them then. No machine: false, and none are kept. */
bool nbhd_sm90_asks_anew(struct nbhd_sm90_asked *last, const struct nbhd_problem *problem);

/* The copy engine takes addresses and strides in units of 16 bytes. kernel, name: for the sentence. */
nbhd_status nbhd_sm90_check_view(const char *kernel, const char *name, const struct nbhd_view *view);

/* Which tokens a map is over: `keys` 0: queries, 1: keys; slice: -1 for all of batch and dilation groups (by
 * coordinates and element strides), else the number of one, which then has a map of its own. */
struct nbhd_sm90_tokens {
    int keys, slice;
    int heads, dim; /* of the tensor; extent of its last dimension */
    int flat;       /* 1: heads and columns are one dimension, see struct nbhd_boxes */
};

/* Map of boxes of extent[0] x [1] x [2] tokens x heads_in_box heads x 128 bytes of columns; coordinates: struct
 * nbhd_boxes, struct nbhd_bwd_boxes. dtype: of 16 bits, or float32. */
nbhd_status nbhd_sm90_token_map(struct nbhd_tensor_map *map, const struct nbhd_params *p, int dtype,
                                const struct nbhd_view *view, const struct nbhd_sm90_tokens *tokens, int heads_in_box,
                                const int extent[3]);

/* ---- a launch over query tiles ---- */

enum { NBHD_SM90_MAPS = 32 }; /* most maps of a tensor in one launch: slices x shapes */

struct nbhd_sm90_launch {
    struct nbhd_cuda_module *module;
    struct CUfunc_st *function;
    struct nbhd_sm90_plan plan;
    struct nbhd_boxes boxes;
    struct nbhd_cuda_grid grid;
    int dtype, slices, maps; /* slices: batch x dilation groups; maps: NBHD_MAPS */
    int most_slices;         /* of one launch */
    int resident, most_tiles; /* CTAs that the chip holds at once, which share the tiles out (nbhd_sm90_share); 0: a CTA
                                for each tile */
};

/* What a kernel is told of a plan, but for the slices of a launch. */
void nbhd_sm90_boxes(struct nbhd_boxes *boxes, const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan);
/* Everything but module and function. */
void nbhd_sm90_set_launch(struct nbhd_sm90_launch *launch, const struct nbhd_sm90_kernel *kernel,
                          const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan);
/* The -D options that all kernels over query tiles ask for. */
void nbhd_sm90_options(struct nbhd_options *options, const struct nbhd_problem *problem,
                       const struct nbhd_sm90_launch *launch);
/* "queries 2x8x8, keys 6x6x4 of 144, 30% masked, 2 warpgroups"; returns its length, less than room. */
size_t nbhd_sm90_describe(char *text, size_t room, const struct nbhd_sm90_plan *plan);

/* Launches with the arguments params, struct nbhd_boxes, struct maps, and `more` more, at most 2. dout: NULL, or a
 * gradient of O whose maps follow. */
nbhd_status nbhd_sm90_run(const struct nbhd_sm90_launch *launch, const struct nbhd_params *params,
                          const struct nbhd_view *dout, void *const *more, int count, void *stream);

/* The same of a plan for many: these sequences in one launch, each of which must have a view of its own of Q, K, V,
 * O. */
nbhd_status nbhd_sm90_run_many(const struct nbhd_sm90_launch *launch, const struct nbhd_params *params,
                               const struct nbhd_parts *parts, void *stream);

#endif
