/* The parameter block seen from a kernel: types of elements, addresses. */
#ifndef NBHD_DEVICE_PROBLEM_CUH
#define NBHD_DEVICE_PROBLEM_CUH

#include "nbhd_params.h"
#include "device/ptx.cuh"

#define NBHD_F32 0
#define NBHD_F16 1
#define NBHD_BF16 2
#define NBHD_F64 3

/* Bytes from the view's data to the row of a token. */
NBHD_FN long long nbhd_offset(const struct nbhd_view &v, int batch, int x0, int x1, int x2, int head)
{
    return batch * v.batch + x0 * v.axis[0] + x1 * v.axis[1] + x2 * v.axis[2] + head * v.head;
}

#endif
