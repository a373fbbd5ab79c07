/* What the host halves of the sm80 kernels share: the choice of boxes, and what a launch needs of the arguments. */
#ifndef NBHD_CUDA_SM80_H
#define NBHD_CUDA_SM80_H

#include "cuda/cuda.h"
#include "cuda/device/boxes_sm80.cuh"

/* The shape of a kernel's work: what stays in a CTA and what is streamed past it. */
struct nbhd_sm80_shape {
    int rows, warps; /* rows of a CTA */
    int n;           /* columns of a step */
    bool inverse;    /* rows are keys, columns the queries that see them */
    bool packs;      /* a CTA may compute several query heads of a key/value head */
};

/* Fills row_box, column_box, tiles and pack with the boxes of least cost, counted exactly. Returns the cost: steps of a warp
 * (its rows against n columns), over the whole problem; *ctas: how many there are. */
double nbhd_sm80_boxes(const struct nbhd_problem *problem, const struct nbhd_sm80_shape *shape,
                       struct nbhd_boxes_sm80 *boxes, double *ctas);

/* Whether rows of this many elements in all these views can be moved in pieces of 16 bytes. Absent views pass. */
bool nbhd_sm80_wide(const struct nbhd_view *const *views, int count, int head_dim, int head_dim_v);

/* What every sm80 kernel refuses. */
bool nbhd_sm80_refuses(const struct nbhd_problem *problem, char why[NBHD_TEXT]);

#endif
