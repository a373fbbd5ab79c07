/* How an axis is cut into tiles of queries: each dilation group by itself, so that a tile has one group.
 * Groups come in two sizes that differ by one; the longer ones are first. */
#ifndef NBHD_CPU_GRID_H
#define NBHD_CPU_GRID_H

#include "nbhd_geom.h"

struct nbhd_grid {
    int tile;        /* queries in a tile, but for a group's last */
    int size;        /* elements of a long group */
    int longs;       /* long groups */
    int tiles_long;  /* tiles in one of them */
    int tiles_short; /* tiles in one of the others */
    int count;       /* tiles on the axis */
};

struct nbhd_cell {
    int group, size; /* dilation group and its elements */
    struct nbhd_range q;
};

static inline struct nbhd_grid nbhd_grid_make(struct nbhd_axis a, int tile)
{
    struct nbhd_grid g;
    g.tile = tile;
    g.size = nbhd_group_size(a, 0);
    g.longs = a.length - (g.size - 1) * a.dilation;
    g.tiles_long = (g.size - 1) / tile + 1;
    g.tiles_short = (g.size - 1 + tile - 1) / tile;
    g.count = g.longs * g.tiles_long + (a.dilation - g.longs) * g.tiles_short;
    return g;
}

static inline struct nbhd_cell nbhd_grid_cell(const struct nbhd_grid *g, int i)
{
    struct nbhd_cell c;
    int longs = g->longs * g->tiles_long;
    int tile;
    if (i < longs) {
        c.group = i / g->tiles_long;
        c.size = g->size;
        tile = i % g->tiles_long;
    } else {
        c.group = g->longs + (i - longs) / g->tiles_short;
        c.size = g->size - 1;
        tile = (i - longs) % g->tiles_short;
    }
    c.q = nbhd_range_of(tile * g->tile, nbhd_min((tile + 1) * g->tile, c.size));
    return c;
}

#endif
