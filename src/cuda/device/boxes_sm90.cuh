/* What a launch of fwd_sm90 is told besides nbhd_params: the boxes of tokens that its tiles are made of.
 * Plain C, shared by the host half, which fills it, and the kernel. Extents are run-time values: one compiled kernel
 * serves every box of N keys. */
#ifndef NBHD_DEVICE_BOXES_SM90_CUH
#define NBHD_DEVICE_BOXES_SM90_CUH

#include "nbhd_params.h"

#define NBHD_SM90_ROWS 192   /* most rows of a query tile: 3 consumer warpgroups */
#define NBHD_SM90_SHAPES 4   /* most shapes of key boxes */
#define NBHD_SM90_MASK 32    /* most columns that a mask adds to the product of Q and K */

#define NBHD_SM90_RUNS 6     /* kinds of rounds, see struct nbhd_boxes */
#define NBHD_SM90_MOST 32    /* query tiles that a CTA of the first kind takes */
#define NBHD_SM90_STEP 53    /* how far its place in a row of tiles moves from one to the next */

/* Bytes that the tables of device/queries_sm90.cuh take, at most. */
#define NBHD_SM90_TABLES(groups, stages) (256 + 64 * (stages) + 792 * (groups))
/* And those of fwd_sm90.cu; windows: sum of the query box's extents. */
#define NBHD_FWD_SM90_TABLES(groups, stages, tiles, windows, mask_steps)                                               \
    (2240 + 64 * (stages) + 768 * (groups) + (tiles) * (144 + 24 * (groups) + 8 * (windows)) +                         \
     (128 * (tiles) + 64 * (stages)) * (mask_steps))

#define NBHD_SM90_TABLES_MANY(tiles) (96 * (tiles)) /* and more, with NBHD_MANY */

/* Flags of one key box: a nibble per consumer warpgroup from bit 0, the axes on which it needs a mask (fwd_sm90: the
 * steps of mask columns that it needs); and: */
#define NBHD_SM90_FINAL (1 << 28)  /* fwd_sm90: the last of the CTA's last tile */
#define NBHD_SM90_EXTRA (1 << 29)  /* of extra keys */
#define NBHD_SM90_LAST (1 << 30)   /* of its tile */
#define NBHD_SM90_ALL_GROUPS 0x111 /* bit 0 of each nibble */

/* One shape of key boxes. Its mask is part of the product Q K^T: to each key belong 16 or 32 more columns, a 1 at the
 * key's coordinate on each axis, and to each query a large negative number at every coordinate that it does not see.
 * mask_at[a]: the first column of axis a; -1 where no query of the problem needs a mask on that axis. mask_at[3]: a
 * column for the keys past `tokens`; -1 if there are none, or if the kernel masks them otherwise. */
struct nbhd_key_box {
    int extent[3], tokens; /* tokens: the product, at most N */
    int mask_at[4];
};

/* Row r of a query tile is token r / pack of the box (row-major), head r % pack of the packed heads. row[r]: place
 * in the box and head, a byte each: axis 0 | axis 1 << 8 | axis 2 << 16 | head << 24. A tile takes the shape that needs
 * the fewest boxes for its union, the first of equals.
 *
 * fwd_sm90's work: query tiles x head blocks x slices, tiles fastest. A row is `resident` tiles, a round as many CTAs,
 * as the chip holds at once; in a round of kind i each takes MOST >> i tiles, one of each row, at places STEP apart, so
 * that none has the long tiles of all rows. So those that run at once work on neighbours; a CTA overlaps a tile's end
 * with the next one's begin; and the last rounds are of single tiles, which the hardware hands out to
 * whoever is free. */
struct nbhd_boxes {
    unsigned row[NBHD_SM90_ROWS];
    struct nbhd_key_box shape[NBHD_SM90_SHAPES];
    int shapes;
    int q_box[3];
    int rows, pack;      /* rows in use: product of q_box x pack; heads in a tile, all of one key/value head */
    unsigned low[3], high[3]; /* per warpgroup: coordinates, packed as in row, of the corners around its rows */
    int tiles[3];        /* query tiles per axis; bwd_sm90_dq: the grid's x runs over them */
    int head_blocks, resident, rounds[NBHD_SM90_RUNS]; /* the last kind: as many as are left */
    int slice_begin;     /* the launch's first slice (bwd_sm90_dq: the grid's z counts from it): batch x dilation
                            groups, the last axis's fastest */
    int sliced;          /* 1: every slice has maps of its own; 0: coordinates select batch and group */
    int flat[3];         /* fwd_sm90, of q, k, v: 0, or head_dim: heads and columns are one dimension of the map. Else
                            the copies' zeros past a head's columns take as long again; what is beside them is not
                            read */
    int step[3];         /* coordinates in the maps per element of a group: the dilation, or 1 if sliced */
    int uneven;          /* 1: dilation groups differ in size, so some tiles may be empty */
    int reverse;         /* 1: last tile first (causal: longest first) */
    int strip;           /* fwd_sm90 walks axis 0 fastest, then so many tiles of axis 1, then axis 2, then the rest of
                            axis 1 */
};

/* The same for a ragged batch's sequences in one launch (NBHD_MANY): each is a slice with maps of its own, whose axes
 * and tiles follow from its part; part[].block is its first tile x head block x dilation group. tiles is not used. */
struct nbhd_boxes_many {
    struct nbhd_boxes boxes;
    struct nbhd_parts parts;
};

#endif
