/* What both kernels of the sm80 backward do with a box: from raw scores to the gradients of the scores.
 * The logsumexp (times log2 e) and delta = rowsum(O dO) - dlse of every query stand in the workspace, as float2
 * [batch][heads][query tokens]; nbhd_bwd_sm80_delta writes them. */
#ifndef NBHD_DEVICE_GRAD_SM80_CUH
#define NBHD_DEVICE_GRAD_SM80_CUH

#include "device/stream_sm80.cuh"

/* Bytes from the first query of a head to that at x, in the workspace. */
NBHD_FN long long stats_offset(const struct nbhd_params *p, int batch, int head, const int *x)
{
    long long row = (long long)batch * p->heads + head;
#pragma unroll
    for (int a = 0; a < 3; a++)
        row = row * p->axis[a].length + x[a];
    return 8 * row;
}

/* Raw score to probability. */
NBHD_FN float probability(float score, float scale_log2, float lse)
{
    return ex2_approx_ftz_f32(fmaf(score, scale_log2, -lse));
}

#endif
