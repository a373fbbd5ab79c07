/* What the parts of the box search for bwd_sm90 share: the search itself (sm90_bwd_plan.c), the tiles of an
 * axis (sm90_bwd_axis.c), what a plan costs and whether it fits (sm90_bwd_costs.c), more shapes of query boxes
 * (sm90_bwd_shapes.c). */
#ifndef NBHD_CUDA_SM90_BWD_SEARCH_H
#define NBHD_CUDA_SM90_BWD_SEARCH_H

#include "cuda/sm90_bwd_plan.h"

enum {
    NBHD_SM90_BWD_QUERIES = 128, /* most of a query box */
    NBHD_SM90_BWD_KINDS = 4,
    NBHD_SM90_BWD_CLASSES = 64 /* most of an axis's tiles, for more shapes */
};

/* One warpgroup, several CTAs: their set-ups and steps overlap, so for small windows; without dQ, whose sum needs two.
 * Apart: a warpgroup for each of dK and dV, where a head_dim over 128 is too wide for one to hold both. */
struct nbhd_sm90_bwd_kind {
    int groups, blocks, ctas, registers, apart; /* as in struct nbhd_sm90_bwd_plan; registers of a consumer thread */
};
extern const struct nbhd_sm90_bwd_kind nbhd_sm90_bwd_kinds[NBHD_SM90_BWD_KINDS];

/* Tiles of keys of an axis whose unions of queries are alike: their length, and where in it the intersection lies. */
struct nbhd_bwd_class {
    int length, begin, end;
    double tiles;
};

/* Query boxes of an extent that a class's tile visits, and how many of them need no mask on this axis. */
static inline int nbhd_sm90_bwd_visited(const struct nbhd_bwd_class *c, int q) { return (c->length + q - 1) / q; }
static inline int nbhd_sm90_bwd_full(const struct nbhd_bwd_class *c, int q)
{
    return nbhd_max(0, c->end / q - (c->begin + q - 1) / q);
}

struct nbhd_bwd_count {
    double boxes, full; /* visited by all tiles; of these, need no mask on this axis */
};

/* Tiles of one extent. By extent of the query box, when asked for: counts, and the share of a tile's boxes that a half
 * of it sees. */
struct nbhd_bwd_tiles {
    const struct nbhd_bwd_axis *of;
    int extent;
    double tiles, queries, inner; /* in all dilation groups: their number; sums of unions, and of intersections */
    bool is_counted[NBHD_SM90_BWD_QUERIES + 1];
    struct nbhd_bwd_count count[NBHD_SM90_BWD_QUERIES + 1];
    double seen[NBHD_SM90_BWD_QUERIES + 1];
    int classes;
    struct nbhd_bwd_class class[];
};

struct nbhd_bwd_axis {
    struct nbhd_axis axis;
    int keys, queries; /* of the largest dilation group */
    struct nbhd_bwd_tiles *tiles[NBHD_BWD_SM90_ROWS + 1]; /* by extent, made when asked for */
};

/* sm90_bwd_axis.c. NULL: no memory. */
struct nbhd_bwd_tiles *nbhd_sm90_bwd_tiles(struct nbhd_bwd_axis *axis, int k);
void nbhd_sm90_bwd_count_boxes(struct nbhd_bwd_tiles *tiles, int q);
static inline const struct nbhd_bwd_count *nbhd_sm90_bwd_count(struct nbhd_bwd_tiles *tiles, int q)
{
    if (!tiles->is_counted[q])
        nbhd_sm90_bwd_count_boxes(tiles, q);
    return &tiles->count[q];
}
/* Of tiles that were made. */
double nbhd_sm90_bwd_seen(struct nbhd_bwd_axis *axis, int k, int q);
void nbhd_sm90_bwd_drop_tiles(struct nbhd_bwd_axis *axis);

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
