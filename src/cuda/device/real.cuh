/* Elements in memory, of type NBHD_DTYPE, and what kernels without tensor cores compute in: float, for f64 double. */
#ifndef NBHD_DEVICE_REAL_CUH
#define NBHD_DEVICE_REAL_CUH

#include "device/problem.cuh"

#ifndef NBHD_DTYPE
#error "NBHD_DTYPE is missing"
#endif

#if NBHD_DTYPE == NBHD_F64
typedef double real;
#else
typedef float real;
#endif

NBHD_FN real simt_load(const char *row, int d)
{
#if NBHD_DTYPE == NBHD_F16
    return cvt_f32_f16(((const unsigned short *)row)[d]);
#elif NBHD_DTYPE == NBHD_BF16
    return cvt_f32_bf16(((const unsigned short *)row)[d]);
#else
    return ((const real *)row)[d];
#endif
}

NBHD_FN void simt_store(char *row, int d, real value)
{
#if NBHD_DTYPE == NBHD_F16
    ((unsigned short *)row)[d] = cvt_rn_f16_f32(value);
#elif NBHD_DTYPE == NBHD_BF16
    ((unsigned short *)row)[d] = cvt_rn_bf16_f32(value);
#else
    ((real *)row)[d] = value;
#endif
}

#endif
