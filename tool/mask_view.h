/* What one query and its tile see, token by token and tile by tile, for drawings: from nbhd_sim.h, no rule of its own.
 * On a backward line: the queries that see one key and its tile; read "key" for query below, and "query" for key. */
#ifndef NBHD_TOOL_MASK_VIEW_H
#define NBHD_TOOL_MASK_VIEW_H

#include <stdbool.h>

#include "nbhd_sim.h"

/* What a key is to the query, most special first. */
enum view_class {
    VIEW_QUERY,   /* the query's own token */
    VIEW_SEEN,    /* in its window */
    VIEW_UNION,   /* not in its window, but in the union of its tile's */
    VIEW_LOADED,  /* in no window of the tile, but in a visited key tile */
    VIEW_SKIPPED, /* in none */
    VIEW_CLASSES
};

enum view_tile { VIEW_FULL, VIEW_MASKED }; /* of a visited key tile: every pair visible, or not */

/* One axis of the view; the flags are bits by token. Axes are three, leading ones of length 1. */
struct view_axis {
    int keys, query, period; /* period: of a periodic axis, else 0 */
    nbhd_sim_tile tile;
    unsigned char *flags; /* [keys] */
};

struct view {
    nbhd_desc desc;
    nbhd_sim_tiles tiles;
    int rank;
    bool inverse; /* a backward line */
    struct view_axis axis[3];
    double seen, visited, full; /* keys of the query; key tiles of its tile; of these, without a mask */
    double queries, united;     /* queries of the tile; keys of their union */
};

/* query: rank coordinates. Exit status; the sentence of a failure has been told. Afterwards view_end. */
int view_begin(struct view *v, const nbhd_desc *desc, const nbhd_sim_tiles *tiles, const int *query);
void view_end(struct view *v);
enum view_class view_class(const struct view *v, const int key[3]);
/* Of visited key tile number i on axis `axis`: where it begins and ends as tokens (end cut to the axis, also where that
 * wraps around); only without
 * dilation, where a tile is one piece. */
void view_tile_span(const struct view *v, int axis, int i, int *begin, int *end);
/* Key tile i of an axis lies inside all windows of the query tile, on this axis. */
bool view_tile_inside(const struct view *v, int axis, int i);

#endif
