/* What every kernel is told: one block, the same bytes on host and device, passed by value.
 * Compiled by the C compiler and by NVRTC; see nbhd_geom.h for what that allows. */
#ifndef NBHD_PARAMS_H
#define NBHD_PARAMS_H

#include "nbhd_geom.h"

/* A tensor as a kernel sees it. Strides are in bytes and may be negative or 0; the last extent is unit stride. data is
 * 0 where the caller gave no such tensor. Offsets are 64-bit throughout: 16 M tokens x 4 heads x 64 exceeds 2^31. */
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

#define NBHD_PARAMS_ADD 0x20000 /* the gradient of the biases is added to dbias: a ragged batch's later sequences */

/* One sequence of a ragged batch. */
struct nbhd_part {
    int index;           /* its number, of extra keys and of padded tensors */
    int token, kv_token; /* its first ones in packed tensors */
    int before;          /* tokens of other sequences ahead of it in a workspace */
    int block;           /* its first block of a launch for many */
    int length[3], keys[3], window[3];
};

/* Sequences of one launch: with nbhd_params at most 4 KB, what every GPU takes. */
enum { NBHD_PARTS = 52 };
struct nbhd_parts {
    int count, padded;
    struct nbhd_part part[NBHD_PARTS];
};

/* The i-th view of a block of a whole ragged batch becomes that of one sequence. */
NBHD_FN void nbhd_part_view(const struct nbhd_part *s, int padded, int i, struct nbhd_view *view)
{
    const int keys = i == 1 || i == 2 || i == 8 || i == 9; /* k, v, dk, dv */
    const int extra = i >= 10 && i < 14;                   /* extra_k to dextra_v */
    const int *length = keys ? s->keys : s->length;
    if (padded || extra) {
        view->data += s->index * view->batch;
        return;
    }
    view->data += (keys ? s->kv_token : s->token) * view->axis[2];
    view->axis[1] = view->axis[2] * length[2];
    view->axis[0] = view->axis[1] * length[1];
    view->batch = view->axis[0] * length[0];
}

NBHD_STATIC_ASSERT(sizeof(struct nbhd_view) == 48, "the view's layout is shared with the device");
NBHD_STATIC_ASSERT(sizeof(struct nbhd_parts) == 8 + 52 * 56, "and the sequences'");
NBHD_STATIC_ASSERT(sizeof(struct nbhd_params) == 16 * 48 + 2 * 8 + 18 * 4 + 8 * 4, "so is the block's");

#endif
