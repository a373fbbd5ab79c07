/* What a kernel of unfused_simt.cu is told: one product of rows of queries, rows of keys and rows of scores. Plain C,
 * shared by the host half, which fills it. */
#ifndef NBHD_DEVICE_UNFUSED_CUH
#define NBHD_DEVICE_UNFUSED_CUH

#include "nbhd_params.h"

struct nbhd_unfused {
    struct nbhd_view query, key, scores;
    const float *bias;
    float *dbias;
    struct nbhd_axis axis[3];
    int batch, heads, kv_heads, width; /* width: of a row of queries or keys */
    float scale, fill;                 /* fill: the score where a window has no key */
    int flags;
};

#endif
