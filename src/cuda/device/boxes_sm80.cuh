/* What a launch of an sm80 kernel is told besides nbhd_params: the boxes of tokens that its tiles are made of. Plain C,
 * shared by the host half and the kernels. Run-time values: one compiled kernel serves every shape of box. */
#ifndef NBHD_DEVICE_BOXES_SM80_CUH
#define NBHD_DEVICE_BOXES_SM80_CUH

struct nbhd_boxes_sm80 {
    int row_box[3];    /* tokens of a CTA: the product times pack is at most NBHD_ROWS */
    int column_box[3]; /* tokens of a step: at most NBHD_N, each extent at most 127 or the box 1 x 1 x 128 */
    int tiles[3];      /* row boxes on each axis, in the largest dilation group */
    int pack;          /* query heads that a CTA computes together: they share a key/value head */
    int group;         /* query heads of a key/value head */
    int wide;          /* 1: all rows of all tensors are aligned to 16 bytes and may be moved in such pieces */
    float scale_log2;  /* what takes raw scores to powers of 2 */
    int reverse;       /* 1: last tile first, where later tiles have more to do (causal) */
};

#endif
