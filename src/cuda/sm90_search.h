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
/* Counts of a plan whose shapes are set: each combination of tile classes takes the shape of fewest boxes. */
void nbhd_sm90_count(struct nbhd_sm90_search *s, struct nbhd_sm90_plan *p);
/* The fewest tokens of a key box for n, and the most of its extents. */
int nbhd_sm90_least_keys(struct nbhd_sm90_search *s, const int q_box[3], int n, int most[3]);
/* Calls visit for every row of key boxes of nearly n tokens whose extents do not exceed the unions' (but for the last
 * axis's need to fill n): k_box's first two extents, with any last one from `least` to `most`. */
typedef void nbhd_sm90_row_visitor(struct nbhd_sm90_search *s, void *closure, int k_box[3], int least, int most);
void nbhd_sm90_each_row(struct nbhd_sm90_search *s, const int q_box[3], int n, nbhd_sm90_row_visitor *visit,
                        void *closure);
/* Gives plans of one shape more of them, while they gain; none without memory. */
void nbhd_sm90_add_shapes(struct nbhd_sm90_search *s, struct nbhd_sm90_plan *plans, int count);

#endif
