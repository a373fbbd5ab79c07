/* What the host halves of the simt kernels share: the box of stationary tokens, the options, the grid. */
#ifndef NBHD_CUDA_SIMT_H
#define NBHD_CUDA_SIMT_H

#include "cuda/cuda.h"

/* The kernels' second argument; the same in device/simt.cuh. */
struct nbhd_simt_box {
    int extent[3];
};

/* What no simt kernel takes. */
bool nbhd_simt_refuses(const struct nbhd_problem *problem, char why[NBHD_TEXT]);
/* A box of at most `tokens` tokens whose union of windows is small, for tiles of queries or of keys. */
struct nbhd_simt_box nbhd_simt_box(const struct nbhd_problem *problem, int tokens);
/* A thread's accumulators: rows of so many slices of columns. */
struct nbhd_simt_registers {
    int rows, slices;
};
/* For a kernel that accumulates so many tensors, of `widest` columns at most. */
struct nbhd_simt_registers nbhd_simt_registers(const struct nbhd_problem *problem, int tensors, int widest);
void nbhd_simt_options(struct nbhd_options *options, const struct nbhd_problem *problem, struct nbhd_simt_registers r);
/* One block per tile, as far as a grid allows; kernels loop over the rest. */
struct nbhd_cuda_grid nbhd_simt_grid(const struct nbhd_problem *problem, const struct nbhd_simt_box *box, bool of_keys);
/* The same for many sequences, whose first blocks it sets; rows: of the tiles of extra keys, 0 where they are no
 * tiles. */
struct nbhd_cuda_grid nbhd_simt_many(const struct nbhd_problem *problem, const struct nbhd_simt_box *box, bool of_keys,
                                     int rows, struct nbhd_parts *parts);

#endif
