/* What a launch of bwd_sm90 is told besides nbhd_params: the boxes of keys that stay and of queries that pass by.
 * Plain C, shared by the host half, which fills it, and the kernel. Extents are run-time values: one compiled kernel
 * serves every box of at most N queries. */
#ifndef NBHD_DEVICE_BWD_BOXES_SM90_CUH
#define NBHD_DEVICE_BWD_BOXES_SM90_CUH

#include "nbhd_geom.h"

#define NBHD_BWD_SM90_ROWS 128 /* most keys of a tile: two consumer warpgroups */
#define NBHD_BWD_SM90_SHAPES 4 /* most shapes of query boxes */
#define NBHD_BWD_SM90_BOUNDS 64 /* blocks that look for the largest keys and values of a head */

/* Bytes that the kernel's tables take, at most; n: queries of a box. */
#define NBHD_BWD_SM90_TABLES(n) (2976 + 40 * (n))
/* And where dQ is added up in integers. */
#define NBHD_BWD_SM90_FINENESS(n) (16 * (n))
/* And tending sums of other heads: nine rows of dQ, float32. */
#define NBHD_BWD_SM90_TENDING(head_dim) ((36 * (head_dim) + 1023) / 1024 * 1024)

/* One shape of query boxes. */
struct nbhd_query_box {
    int extent[3], queries; /* the product of extent, at most N */
    int mask_at[3];         /* the first mask column of each axis; -1 where the axis needs none */
};

/* Row r of a key tile is token r of the box, row-major. row[r]: place in the box, a byte each: axis 0 | axis 1 << 8 |
 * axis 2 << 16. A tile takes the shape that covers the queries which see its keys with the fewest boxes. */
struct nbhd_bwd_boxes {
    unsigned row[NBHD_BWD_SM90_ROWS];
    int k_box[3], rows; /* rows in use: the product of k_box */
    struct nbhd_query_box shape[NBHD_BWD_SM90_SHAPES];
    int shapes;
    unsigned low[2], high[2]; /* per warpgroup: the corners around its rows, packed as in row */
    int tiles[3];       /* key tiles per axis; the grid's x runs over them */
    int slice_begin;    /* the grid's z runs over slices: batch x dilation groups, the last axis's fastest */
    int sliced;         /* 1: every slice has maps of its own; 0: coordinate 0 selects the batch element */
    float scale_log2;   /* scale x log2(e) */
    const float *lse;   /* log2(e) x logsumexp, [batch][heads][queries] */
    const float *delta; /* rowsum(O dO) - dlse, the same */
    const float *fineness; /* the same, where dQ is added up in integers (device/sums_sm90.cuh) */
    float *sums;        /* dQ that is added up: [batch][queries][heads][head_dim] */
    /* A unit is all tiles of a key/value head of a batch element. While one runs, the sums of unit + lag become zeros,
     * and those of unit - lag, whose tiles are done, are converted: `part` queries of one head by each tile. lag 0:
     * bwd_sm90_rows.cu does all. */
    int lag, units, part;
    int unit_tiles;   /* of a unit */
    unsigned *counts; /* [2][units]: tiles that have cleared their part for the unit; its own that have added all */
    unsigned *next;   /* the number of the next tile */
    /* The last tiles, from number `whole` on, have `parts` numbers each: first all their first parts, then all second
     * ones, and so on. A part has so many queries of one axis (device/split_sm90.cuh). */
    unsigned whole, last;
    int parts, part_axis, part_queries;
    unsigned *converted; /* tiles that have converted their part of unit 0 */
    unsigned *joined;    /* parts of each of the last tiles that are in its sums */
};

/* What bwd_sm90_rows.cu is told. */
struct nbhd_bwd_rows {
    float *lse, *delta, *fineness, *sums; /* as in struct nbhd_bwd_boxes, to be written */
    float *bounds;             /* [batch][kv_heads][NBHD_BWD_SM90_BOUNDS][2]: largest |k|, |row of v|^2 of a block */
    unsigned *counts;          /* `count` of them, to become zero */
    unsigned count;
    int units;                 /* whose sums become zeros: the first */
    int batch, head;           /* of which on sums are converted */
};

#endif
