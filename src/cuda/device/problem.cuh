/* The parameter block seen from a kernel: axes, addresses, elements. */
#ifndef NBHD_DEVICE_PROBLEM_CUH
#define NBHD_DEVICE_PROBLEM_CUH

#include "nbhd_params.h"
#include "device/ptx.cuh"

#define NBHD_F32 0
#define NBHD_F16 1
#define NBHD_BF16 2
#define NBHD_F64 3

NBHD_FN void nbhd_set_axis(struct nbhd_axis *a, int window, int stride, int dilation, int edge)
{
    a->keys = a->length;
    a->window = window;
    a->stride = stride;
    a->dilation = dilation;
    a->edge = edge;
}

/* Axis i; but for its length a constant where the plan gives NBHD_AXISi=window,stride,dilation,edge. i: a constant. */
NBHD_FN struct nbhd_axis nbhd_axis_of(const struct nbhd_params &p, int i)
{
    struct nbhd_axis a = p.axis[i];
#ifdef NBHD_AXIS0
    if (i == 0)
        nbhd_set_axis(&a, NBHD_AXIS0);
#endif
#ifdef NBHD_AXIS1
    if (i == 1)
        nbhd_set_axis(&a, NBHD_AXIS1);
#endif
#ifdef NBHD_AXIS2
    if (i == 2)
        nbhd_set_axis(&a, NBHD_AXIS2);
#endif
    return a;
}

/* Bytes from the view's data to the row of a token. */
NBHD_FN long long nbhd_offset(const struct nbhd_view &v, int batch, int x0, int x1, int x2, int head)
{
    return batch * v.batch + x0 * v.axis[0] + x1 * v.axis[1] + x2 * v.axis[2] + head * v.head;
}

#endif
