/* What the parts of the box search for fwd_sm90 and bwd_sm90_dq share: the search itself (sm90_plan.c), and what
 * becomes of a plan by its key boxes (sm90_shapes.c). */
#ifndef NBHD_CUDA_SM90_SEARCH_H
#define NBHD_CUDA_SM90_SEARCH_H

#include "cuda/sm90_axis.h"
#include "cuda/sm90_plan.h"

struct nbhd_sm90_search {
    const struct nbhd_sm90_kernel *kernel;
    const struct nbhd_problem *problem;
    struct axis_memo memo[3];
    int multiprocessors, shared_max;
    int sliced, many; /* as in struct nbhd_sm90_plan */
    int eighths;      /* of N that a key box fills at least */
};

/* Whether a plan fits the machine; sets its masks, and Q's stages. */
int nbhd_sm90_fits(struct nbhd_sm90_search *s, struct nbhd_sm90_plan *p);
/* Counts and time of a plan whose shapes are set: each combination of tile classes takes the shape of fewest boxes. */
void nbhd_sm90_count(struct nbhd_sm90_search *s, struct nbhd_sm90_plan *p);
/* Calls visit for every key box of nearly n tokens whose extents do not exceed the unions' (but for the last axis's
 * need to fill n). */
typedef void nbhd_sm90_key_box_visitor(struct nbhd_sm90_search *s, void *closure, const int k_box[3]);
void nbhd_sm90_each_key_box(struct nbhd_sm90_search *s, const int q_box[3], int n, nbhd_sm90_key_box_visitor *visit,
                            void *closure);
/* Gives plans of one shape more of them, while they gain; none without memory. */
void nbhd_sm90_add_shapes(struct nbhd_sm90_search *s, struct nbhd_sm90_plan *plans, int count);

#endif
