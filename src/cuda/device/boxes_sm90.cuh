/* What a launch of fwd_sm90 is told besides nbhd_params: the boxes of tokens that its tiles are made of.
 * Plain C, shared by the host half, which fills it, and the kernel. Extents are run-time values: one compiled kernel
 * serves every box of N keys. */
#ifndef NBHD_DEVICE_BOXES_SM90_CUH
#define NBHD_DEVICE_BOXES_SM90_CUH

#define NBHD_SM90_ROWS 192   /* most rows of a query tile: 3 consumer warpgroups */
#define NBHD_SM90_SHAPES 4   /* most shapes of key boxes */
#define NBHD_SM90_PREFIX 640 /* most words of the prefix tables of all shapes */

/* Bytes that the kernel's tables take beside their prefix table, at most. */
#define NBHD_SM90_TABLES(groups, stages) (256 + 48 * (stages) + 792 * (groups))

/* Flags of one key box: a nibble per consumer warpgroup from bit 0, the axes on which it needs a mask; and: */
#define NBHD_SM90_LAST (1 << 30)
#define NBHD_SM90_EXTRA (1 << 29)
#define NBHD_SM90_ALL_GROUPS 0x111 /* bit 0 of each nibble */
#define NBHD_SM90_MOVED(axis) (1 << (12 + (axis))) /* the origin on this axis is not that of the box before */

/* One shape of key boxes. Its prefix table has, for axis a, bound x and lane quarter q, at prefix_at[a] + 4 x + q, bit e
 * set for the columns 8 (e / 2) + 2 q + e % 2 whose coordinate on a is below x: prefix[end] & ~prefix[begin] is an interval
 * of the axis. Bits of columns past the box are 0. */
struct nbhd_key_box {
    int extent[3], tokens;        /* tokens: their product, at most N */
    int prefix_first, prefix_words, prefix_at[3]; /* at counts from first */
    int linear;                   /* 1: 1 x 1 x extent; axis 2 has no table, its bits are computed */
};

/* Row r of a query tile is token r / pack of the box (row-major), head r % pack of the packed heads. row[r]: coordinates in
 * the box and head, a byte each: axis 0 | axis 1 << 8 | axis 2 << 16 | head << 24. A tile takes the shape that needs the
 * fewest boxes for its union, the first of equals. */
struct nbhd_boxes {
    unsigned long long prefix[NBHD_SM90_PREFIX];
    unsigned row[NBHD_SM90_ROWS];
    struct nbhd_key_box shape[NBHD_SM90_SHAPES];
    int shapes;
    int q_box[3];
    int rows, pack;      /* rows in use: product of q_box x pack; heads in a tile, all of one key/value head */
    unsigned low[3], high[3]; /* per warpgroup: coordinates, packed as in row, of the corners around its rows */
    int tiles[3];        /* query tiles per axis; the grid's x runs over them */
    int slice_begin;     /* the grid's z runs over slices: batch x dilation groups, the last axis's fastest */
    int sliced;          /* 1: every slice has maps of its own; 0: coordinates select batch and group */
    int step[3];         /* coordinates in the maps per element of a group: the dilation, or 1 if sliced */
    int reverse;         /* 1: last tile first (causal: longest first) */
};

#endif
