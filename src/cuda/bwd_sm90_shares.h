/* What tiles of bwd_sm90 do besides their products where they add dQ up: who clears and converts sums, which tiles are
 * shared out, and the counters by which they tell each other. */
#ifndef NBHD_CUDA_BWD_SM90_SHARES_H
#define NBHD_CUDA_BWD_SM90_SHARES_H

#include "cuda/sm90_bwd_plan.h"

struct nbhd_bwd_sm90_shares {
    int lag, part, whole, last, parts, part_axis, part_queries; /* as in struct nbhd_bwd_boxes; parts 0: none shared */
    unsigned count;                                             /* of counters */
};

/* Of this thread's machine. */
struct nbhd_bwd_sm90_shares nbhd_bwd_sm90_share(const struct nbhd_problem *problem,
                                                const struct nbhd_sm90_bwd_plan *plan);
/* What the kernel is told of them; counts: the counters, zero when it begins. */
void nbhd_bwd_sm90_tell_shares(struct nbhd_bwd_boxes *boxes, const struct nbhd_bwd_sm90_shares *shares,
                               unsigned *counts);

#endif
