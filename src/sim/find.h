/* What the two files of the search share: find.c combines what windows.c finds for each axis. */
#ifndef NBHD_SIM_FIND_H
#define NBHD_SIM_FIND_H

#include "sim/sim.h"

/* One window and stride of one axis under one pair of extents. */
struct nbhd_sim_entry {
    int window, stride;
    double waste; /* keys in visited tiles over keys seen, per query tile: 1 is perfect */
    double work;  /* the same with the queries past the axis' end: what the bound pays */
    double share; /* pairs seen of all pairs */
    int rimless;  /* no tile needs a mask */
};

struct nbhd_sim_list {
    int q_extent, kv_extent, dynamic, count, room;
    struct nbhd_sim_entry *entries;
};

/* A window and stride of all axes, with the best tiling seen for it. */
struct nbhd_sim_found {
    int window[3], stride[3], tiling, q_box, kv_box, rimless;
    double bound;
};

struct nbhd_sim_finder {
    const struct nbhd_sim_request *request;
    nbhd_sim_search search;
    int window_min[3], window_max[3]; /* by the problem's three axes */
    struct nbhd_sim_list *lists[3];
    int list_count[3];
    struct nbhd_sim_found *table; /* open addressing by window and stride; bound 0: free */
    size_t slots, used, room;
    double extra_share, extra_work; /* of extra keys, to the other pairs: pairs seen, and in visited tiles */
    bool extra_rimless;             /* their last tile is full */
    double floor; /* `room` settings have at least this bound: lesser ones cannot be among the results */
    double considered;
};

/* The windows and strides of an axis that waste little under these extents: made once. NULL: no memory. */
const struct nbhd_sim_list *nbhd_sim_list_for(struct nbhd_sim_finder *f, int axis, int q_extent, int kv_extent,
                                              int dynamic);

#endif
