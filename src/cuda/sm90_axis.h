/* One axis in the search for boxes (sm90_plan.c): its query tiles, in classes that need the same of key boxes. */
#ifndef NBHD_CUDA_SM90_AXIS_H
#define NBHD_CUDA_SM90_AXIS_H

#include "nbhd_geom.h"

enum {
    NBHD_SM90_CLASSES = 64, /* most kinds of query tiles on an axis */
    NBHD_SM90_EXTENT = 192, /* most of a query box */
    NBHD_SM90_KEYS = 256    /* and of a key box */
};

/* Query tiles of one extent, by the lengths of their union and of the part that needs no mask. */
struct tile_class {
    int length, inner_begin, inner_end; /* the latter two relative to the union's begin */
    double count;
};

/* Key boxes of one extent that the tiles of an axis visit. */
struct axis_visits {
    double boxes, full; /* full: of these need no mask on this axis */
    int longest;        /* of the tile that visits most */
    int masked;         /* 1: some tile's boxes need a mask on this axis */
};

struct axis_tiles {
    int extent, classes, step; /* step: classes were made of every step-th tile */
    int longest;               /* union */
    double keys, inner, tiles; /* sums of unions, and of the parts that need no mask; query tiles */
    struct tile_class class[NBHD_SM90_CLASSES];
    struct axis_visits *visits; /* by extent of the key box, counted when asked for: longest 0, not yet */
};

struct axis_memo {
    struct nbhd_axis axis;
    int n;    /* elements of the largest dilation group */
    int most; /* extent that a box may have */
    struct axis_tiles *tiles[NBHD_SM90_EXTENT + 1]; /* by extent, made when asked for */
};

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* Boxes of extent k that a class's tile visits, and how many of them need no mask on this axis. */
static inline int visited(const struct tile_class *c, int k) { return ceil_div(c->length, k); }
static inline int full(const struct tile_class *c, int k)
{
    const int first = ceil_div(c->inner_begin, k), last = c->inner_end / k;
    return last > first ? last - first : 0;
}

/* NULL: no memory. */
struct axis_tiles *nbhd_sm90_tiles(struct axis_memo *memo, int extent);
struct axis_visits nbhd_sm90_count_visits(struct axis_tiles *tiles, int k);
/* For key boxes of extent k, 1 to NBHD_SM90_KEYS. */
static inline struct axis_visits nbhd_sm90_visits(struct axis_tiles *tiles, int k)
{
    return tiles->visits && tiles->visits[k].longest ? tiles->visits[k] : nbhd_sm90_count_visits(tiles, k);
}
void nbhd_sm90_drop_tiles(struct axis_memo *memo);

#endif
