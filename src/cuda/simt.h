/* What the host halves of the simt kernels share: the box of stationary tokens, the options, the grid. */
#ifndef NBHD_CUDA_SIMT_H
#define NBHD_CUDA_SIMT_H

#include "cuda/cuda.h"

/* A box of about `tokens` tokens whose union of windows is small, for tiles of queries or of keys. */
void nbhd_simt_box(const struct nbhd_problem *problem, int tokens, int box[3]);
/* rows: a thread's stationary rows, 4 or less where the accumulators of `width` columns would not fit in registers. */
int nbhd_simt_rows(const struct nbhd_problem *problem, int width);
void nbhd_simt_options(struct nbhd_options *options, const struct nbhd_problem *problem, int rows, const int box[3]);
/* One block per tile, as far as a grid allows; kernels loop over the rest. */
struct nbhd_cuda_grid nbhd_simt_grid(const struct nbhd_problem *problem, const int box[3], bool of_keys);

#endif
