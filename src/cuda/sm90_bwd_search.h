/* What the parts of the box search for bwd_sm90 share: the search itself (sm90_bwd_plan.c), what a plan costs and
 * whether it fits (sm90_bwd_costs.c), more shapes of query boxes (sm90_bwd_shapes.c). */
#ifndef NBHD_CUDA_SM90_BWD_SEARCH_H
#define NBHD_CUDA_SM90_BWD_SEARCH_H

#include "core/tiles.h"
#include "cuda/sm90_bwd_plan.h"

enum {
    NBHD_SM90_BWD_QUERIES = 128, /* most of a query box */
    NBHD_SM90_BWD_KINDS = 4
};

/* One warpgroup, several CTAs: their set-ups and steps overlap, so for small windows; without dQ, whose sum needs two.
 * Apart: a warpgroup for each of dK and dV, where a head_dim over 128 is too wide for one to hold both. */
struct nbhd_sm90_bwd_kind {
    int groups, blocks, ctas, registers, apart; /* as in struct nbhd_sm90_bwd_plan; registers of a consumer thread */
};
extern const struct nbhd_sm90_bwd_kind nbhd_sm90_bwd_kinds[NBHD_SM90_BWD_KINDS];

struct nbhd_bwd_count {
    struct nbhd_tile_count tiles;
    double seen; /* share of a tile's boxes that a half of it sees, in the mean */
};

/* What one axis has for each pair of extents, counted when asked for. */
struct nbhd_bwd_axis {
    struct nbhd_axis axis;
    int keys, queries; /* of the largest dilation group */
    struct nbhd_bwd_count *count[NBHD_BWD_SM90_ROWS + 1][NBHD_SM90_BWD_QUERIES + 1];
};

struct nbhd_bwd_search {
    const struct nbhd_problem *problem;
    struct nbhd_bwd_axis memo[3];
    int multiprocessors, shared_max, one_axis;
};

/* Lays out the plan's mask columns. False if it needs more of them, of registers or of shared memory than there is. */
bool nbhd_sm90_bwd_fits(const struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *p);
/* Predicted time of a plan whose boxes are counted. */
double nbhd_sm90_bwd_ms(const struct nbhd_bwd_search *s, const struct nbhd_sm90_bwd_plan *p);
/* Boxes of nearly `most` of the sizes' tokens. Returns their number; boxes may be NULL. */
int nbhd_sm90_bwd_list(const struct nbhd_bwd_search *s, const int size[3], int most, int (*boxes)[3]);
/* Gives the plan up to NBHD_BWD_SM90_SHAPES of query boxes, while they gain; for less than 3 % in all, the choice costs
 * more. Slices have a map each, of one shape; keys alone were not tried with more. */
void nbhd_sm90_bwd_add_shapes(const struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *p);

#endif
