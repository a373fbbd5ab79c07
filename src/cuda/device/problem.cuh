/* The parameter block seen from a kernel: types of elements, addresses. Parameter: NBHD_WRAPS (1: some axis is
 * periodic; 0 if it is not given). */
#ifndef NBHD_DEVICE_PROBLEM_CUH
#define NBHD_DEVICE_PROBLEM_CUH

#include "nbhd_params.h"
#include "device/ptx.cuh"

#define NBHD_F32 0
#define NBHD_F16 1
#define NBHD_BF16 2
#define NBHD_F64 3

#ifndef NBHD_WRAPS
#define NBHD_WRAPS 0
#endif

/* The token on an axis that element at is, of the dilation group with n elements. Only kernels of periodic problems
 * wrap: it takes registers (32 of fwd_simt's at head_dim 128, and with them its second CTA). */
NBHD_FN int nbhd_place(struct nbhd_axis a, int n, int group, int at)
{
#if NBHD_WRAPS
    at = nbhd_wrap(a, n, at);
#endif
    return at * a.dilation + group;
}

/* Bytes from the view's data to the row of a token. */
NBHD_FN long long nbhd_offset(const struct nbhd_view &v, int batch, int x0, int x1, int x2, int head)
{
    return batch * v.batch + x0 * v.axis[0] + x1 * v.axis[1] + x2 * v.axis[2] + head * v.head;
}

#endif
