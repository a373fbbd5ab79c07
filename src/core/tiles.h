/* Tiles: how many key tiles a tiling visits, and which of them need a mask. One counting for the planner, the CPU
 * scheduler, the simulator and the choice of GPU boxes. Counts are exact, per axis, so cheap: O(length) each. */
#ifndef NBHD_CORE_TILES_H
#define NBHD_CORE_TILES_H

#include "nbhd_geom.h"

/* How key tiles lie: on a fixed grid (static), or starting at each query tile's union (dynamic). */
enum nbhd_tiling { NBHD_TILING_STATIC = 0, NBHD_TILING_DYNAMIC = 1 };

/* One query tile on one axis of one dilation group. */
struct nbhd_tile {
    struct nbhd_range q, any, all;
    int visited; /* key tiles of extent k_tile that cover any */
    int full;    /* of these, how many lie wholly inside all */
};

/* The query tile that begins at element q of a group of n. */
struct nbhd_tile nbhd_tile_at(struct nbhd_axis a, int n, int q, int q_tile, int k_tile, enum nbhd_tiling tiling);

/* Over all groups and query tiles of an axis. */
struct nbhd_tile_count {
    double q_tiles; /* query tiles */
    double visited; /* sum over query tiles of key tiles visited */
    double full;    /* of these, need no mask on this axis */
    double visited_max;
    double pairs;   /* visible (query, key) pairs */
};
struct nbhd_tile_count nbhd_tiles_count(struct nbhd_axis a, int q_tile, int k_tile, enum nbhd_tiling tiling);

/* The same with the roles changed, as where dK and dV are summed: q is a tile of keys, and any, all, visited and full
 * are of the queries that see them. k: its first element; n: the group's queries. */
struct nbhd_tile nbhd_tile_at_inverse(struct nbhd_axis a, int n, int k, int k_tile, int q_tile,
                                      enum nbhd_tiling tiling);
struct nbhd_tile_count nbhd_tiles_count_inverse(struct nbhd_axis a, int k_tile, int q_tile, enum nbhd_tiling tiling);

/* Each tile that stays is cut into `parts` equal parts (of a tile that the axis cuts short, some may be missing), and
 * each part skips the visited tiles that it does not touch itself: the sum over parts of what is left. parts divides
 * the tile. */
double nbhd_tiles_split(struct nbhd_axis a, int q_tile, int k_tile, enum nbhd_tiling tiling, int parts);
double nbhd_tiles_split_inverse(struct nbhd_axis a, int k_tile, int q_tile, enum nbhd_tiling tiling, int parts);

/* Tiles of an axis over all its groups. */
double nbhd_axis_tiles(struct nbhd_axis a, int tile);

/* Visible pairs of one axis. */
double nbhd_axis_pairs(struct nbhd_axis a);

#endif
