/* What every kernel is told: one block, the same bytes on host and device, passed by value.
 * Compiled by the C compiler and by NVRTC; see nbhd_geom.h for what that allows. */
#ifndef NBHD_PARAMS_H
#define NBHD_PARAMS_H

#include "nbhd_geom.h"

/* A tensor as a kernel sees it. Strides are in bytes and may be negative or 0; the last extent is unit stride.
 * data is 0 where the caller gave no such tensor. Offsets are 64-bit throughout: 16 M tokens x 4 heads x 64 exceeds 2^31. */
struct nbhd_view {
    char *data;
    long long batch, axis[3], head;
};

/* Problems of rank 1 and 2 have leading axes of length 1 and window 1, so that axis[2] is always the fastest.
 * Extra keys and values use axis[2] as the stride from token to token. */
struct nbhd_params {
    struct nbhd_view q, k, v, o, lse;
    struct nbhd_view dout, dlse, dq, dk, dv;
    struct nbhd_view extra_k, extra_v, dextra_k, dextra_v;
    struct nbhd_view scores, dscores;
    float *bias, *dbias; /* [heads][2 w0 - 1][2 w1 - 1][2 w2 - 1] */
    struct nbhd_axis axis[3];
    int batch, heads, kv_heads, head_dim, head_dim_v, extra;
    float scale;
    int flags; /* the plan's, and NBHD_PARAMS_ADD */
};

#define NBHD_PARAMS_ADD 0x10000 /* the gradient of the biases is added to dbias: a ragged batch's later sequences */

NBHD_STATIC_ASSERT(sizeof(struct nbhd_view) == 48, "the view's layout is shared with the device");
NBHD_STATIC_ASSERT(sizeof(struct nbhd_params) == 16 * 48 + 2 * 8 + 18 * 4 + 8 * 4, "so is the block's");

#endif
