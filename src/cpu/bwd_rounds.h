/* Who may add to a key's gradient, and when: how the backward is cut into tasks so that its sums have one order for any
 * number of threads, without a second copy of dk and dv.
 *
 * Each axis of queries is cut into regions. A task is one region (of all three axes, of one kv head of a batch entry);
 * it adds to dk and dv of the keys that its queries see. Tasks have rounds: within a round no two touch the same key or
 * query, and of two that do, that of the earlier round comes first (bwd_order.h). An axis is divided in one of two ways:
 *
 *   coloured: region i runs in round i mod c, with all its keys; c is the least for which regions i and i + c have no
 *             key in common. Two or three rounds where windows are small beside the axis. Around a periodic axis the
 *             last regions meet the first: those past a multiple of c have rounds of their own.
 *   paired:   keys are cut into as many regions as queries, n; in round r query region i meets key region
 *             (i + r) mod n. For windows about as long as the axis, where all regions share keys. dq then is summed
 *             over rounds too. Not for periodic axes.
 *
 * Dilation groups share nothing and are regions apart. The cut depends on the problem alone, never on threads. */
#ifndef NBHD_CPU_BWD_ROUNDS_H
#define NBHD_CPU_BWD_ROUNDS_H

#include <stdbool.h>
#include "cpu/grid.h"

struct nbhd_rounds {
    struct nbhd_grid regions;
    int groups;
    bool paired;
    int colours;
    int rounds, slots; /* on this axis; slots: tasks of a round, a few of which may be void */
};

struct nbhd_region {
    int group, size; /* dilation group and its elements */
    struct nbhd_range q, keys; /* keys: the task's, of those that q sees */
};

/* Cuts an axis into about so many regions for each dilation group, of a multiple of `tile` queries. */
struct nbhd_rounds nbhd_rounds_make(struct nbhd_axis a, int tile, int regions, bool paired);
/* Tasks that a tile of queries takes part in, on average: 1 where coloured. */
double nbhd_rounds_visits(const struct nbhd_rounds *r, struct nbhd_axis a, int tile);
/* The region of a round and slot; false: there is none. Its keys may be an empty range. */
bool nbhd_rounds_at(const struct nbhd_rounds *r, struct nbhd_axis a, int round, int slot, struct nbhd_region *region);

/* A region's task on one axis. */
struct nbhd_turn {
    int round, slot;
};

enum { NBHD_MOST_REGIONS = 64 }; /* of a dilation group */

/* The tasks of the axis that may touch a key (or with `queries` a query) that this one touches, in any round, and it
 * among them. Returns how many; 0 if there is no such task. */
int nbhd_rounds_rivals(const struct nbhd_rounds *r, struct nbhd_axis a, struct nbhd_turn turn, bool queries,
                       struct nbhd_turn rivals[NBHD_MOST_REGIONS]);

#endif
