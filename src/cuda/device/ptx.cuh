/* Instructions that CUDA C has no name for without the toolkit's headers: one function each, named after it.
 * Portable ones stand here; those of one generation in mma_sm80.cuh, wgmma_sm90.cuh and tma_sm90.cuh. */
#ifndef NBHD_DEVICE_PTX_CUH
#define NBHD_DEVICE_PTX_CUH

NBHD_FN float cvt_f32_f16(unsigned short x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

NBHD_FN unsigned short cvt_rn_f16_f32(float x)
{
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

/* A bfloat16 is the upper half of a float32. */
NBHD_FN float cvt_f32_bf16(unsigned short x) { return __uint_as_float((unsigned)x << 16); }

/* To nearest even, by arithmetic: the instruction needs sm_80. NaN stays NaN. */
NBHD_FN unsigned short cvt_rn_bf16_f32(float x)
{
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return 0x7fff;
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* 2^x to about 2 ulp, denormals to 0. */
NBHD_FN float ex2_approx_ftz_f32(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
