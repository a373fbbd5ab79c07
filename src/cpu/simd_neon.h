/* The SIMD vocabulary on aarch64: 4 floats to a vector, 32 registers. The same names as simd_avx512.h, which says what
 * they mean where it is not said here. */
#ifndef NBHD_CPU_SIMD_NEON_H
#define NBHD_CPU_SIMD_NEON_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>
#include "cpu/cpu.h"

#define VF        4
#define V_STRIP   4 /* 6 x 4 accumulators of 32 registers */
#define V_ROWS    6
#define V_COLUMNS 6
#define V_DIMS    4
#define V_KEYS     7
#define V_KEY_DIMS 2
#define V_OUT_ROWS 4
#define V_OUT_DIMS 4
#define V_LANE_ROWS 0
#define V_FAST_LOOKUP 0
#define V_FN      static inline __attribute__((always_inline, unused))

typedef float32x4_t vf;
typedef int32x4_t vi;

/* ---- moving ---- */
V_FN vf v_zero(void) { return vdupq_n_f32(0.0f); }
V_FN vf v_set1(float x) { return vdupq_n_f32(x); }
V_FN vf v_load(const float *p) { return vld1q_f32(p); }
V_FN void v_store(float *p, vf x) { vst1q_f32(p, x); }
V_FN vf v_load_part(const float *p, int n)
{
    vf r = v_zero();
    if (n == VF)
        return v_load(p);
    if (n > 0)
        r = vld1q_lane_f32(p, r, 0);
    if (n > 1)
        r = vld1q_lane_f32(p + 1, r, 1);
    if (n > 2)
        r = vld1q_lane_f32(p + 2, r, 2);
    return r;
}
V_FN void v_store_part(float *p, vf x, int n)
{
    if (n == VF) {
        v_store(p, x);
        return;
    }
    if (n > 0)
        vst1q_lane_f32(p, x, 0);
    if (n > 1)
        vst1q_lane_f32(p + 1, x, 1);
    if (n > 2)
        vst1q_lane_f32(p + 2, x, 2);
}
V_FN uint32x4_t v_mask(unsigned bits)
{
    static const uint32_t one[VF] = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(bits), vld1q_u32(one));
}
V_FN unsigned v_bits(uint32x4_t mask)
{
    static const uint32_t one[VF] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(mask, vld1q_u32(one)));
}
V_FN void v_stream(float *p, vf x) { v_store(p, x); }
V_FN void v_stream_end(void) {}
V_FN vf v_select(unsigned bits, vf yes, vf no) { return vbslq_f32(v_mask(bits), yes, no); }
V_FN vf v_keep(vf x)
{
    __asm__("" : "+w"(x));
    return x;
}
V_FN vi v_iload(const int *p) { return vld1q_s32(p); }
V_FN vi v_iset1(int x) { return vdupq_n_s32(x); }
V_FN vi v_iadd(vi a, vi b) { return vaddq_s32(a, b); }
V_FN vi v_imin(vi a, vi b) { return vminq_s32(a, b); }
V_FN vf v_gather(const float *p, vi index, unsigned bits)
{
    int at[VF];
    float r[VF];
    vst1q_s32(at, index);
    for (int i = 0; i < VF; i++)
        r[i] = bits >> i & 1 ? p[at[i]] : 0.0f;
    return vld1q_f32(r);
}
/* A table of 16 bytes: each lane's four are 4 * index + 0 .. 3. */
V_FN vf v_permute(vf x, vi index)
{
    const uint32x4_t first = vmulq_n_u32(vreinterpretq_u32_s32(index), 0x04040404u);
    const uint8x16_t bytes = vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x03020100u)));
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x), bytes));
}
/* Likewise of 32 bytes. */
V_FN vf v_lookup(vf low, vf high, vi index)
{
    const uint8x16x2_t table = {{vreinterpretq_u8_f32(low), vreinterpretq_u8_f32(high)}};
    const uint32x4_t first = vmulq_n_u32(vreinterpretq_u32_s32(index), 0x04040404u);
    return vreinterpretq_f32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x03020100u)))));
}

/* ---- arithmetic ---- */
V_FN vf v_add(vf a, vf b) { return vaddq_f32(a, b); }
V_FN vf v_sub(vf a, vf b) { return vsubq_f32(a, b); }
V_FN vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
V_FN vf v_div(vf a, vf b) { return vdivq_f32(a, b); }
V_FN vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
V_FN vf v_fms(vf a, vf b, vf c) { return vfmaq_f32(vnegq_f32(c), a, b); }
V_FN vf v_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
V_FN float v_sum(vf a) { return vaddvq_f32(a); }
V_FN unsigned v_less(vf a, vf b) { return v_bits(vcltq_f32(a, b)); }
V_FN unsigned v_is_nan(vf a) { return v_bits(vmvnq_u32(vceqq_f32(a, a))); }

V_FN vf v_exp2(vf x)
{
    const uint32x4_t keep = vmvnq_u32(vcltq_f32(x, v_set1(-126.0f)));
    const vf n = vrndnq_f32(x), f = vsubq_f32(x, n);
    vf y = v_set1(0.0013264727f);
    y = v_fma(y, f, v_set1(0.009671513f));
    y = v_fma(y, f, v_set1(0.055507336f));
    y = v_fma(y, f, v_set1(0.24022242f));
    y = v_fma(y, f, v_set1(0.693147f));
    y = v_fma(y, f, v_set1(1.0f));
    const vi power = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    return vreinterpretq_f32_u32(vandq_u32(keep, vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(y), power))));
}

V_FN vf v_log2(vf x)
{
    const uint32x4_t tiny = vcltq_f32(x, v_set1(0x1p-126f)); /* subnormals: through 2^24 x */
    const vi u = vreinterpretq_s32_f32(vbslq_f32(tiny, vmulq_n_f32(x, 0x1p24f), x));
    const vi k = vshrq_n_s32(vsubq_s32(u, v_iset1(0x3f400000)), 23); /* exponent of x / 0.75 */
    const vf m = vreinterpretq_f32_s32(vsubq_s32(u, vshlq_n_s32(k, 23)));
    const vf less = vreinterpretq_f32_u32(vandq_u32(tiny, vreinterpretq_u32_f32(v_set1(24.0f))));
    const vf e = vsubq_f32(vcvtq_f32_s32(k), less);
    const vf s = vdivq_f32(vsubq_f32(m, v_set1(1.0f)), vaddq_f32(m, v_set1(1.0f))), z = vmulq_f32(s, s);
    vf y = v_set1(0.32059889f);
    y = v_fma(y, z, v_set1(0.41219859f));
    y = v_fma(y, z, v_set1(0.57707802f));
    y = v_fma(y, z, v_set1(0.96179669f));
    y = v_fma(y, z, v_set1(2.88539008f));
    y = v_fma(y, s, e);
    y = vbslq_f32(vceqq_f32(x, v_zero()), v_set1(-__builtin_inff()), y);
    return vbslq_f32(vcltq_f32(x, v_set1(__builtin_inff())), y, x); /* inf, NaN */
}

/* ---- transposing ---- */
V_FN void v_transpose(vf x[VF])
{
    const float32x4x2_t a = vtrnq_f32(x[0], x[1]), b = vtrnq_f32(x[2], x[3]);
    x[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    x[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    x[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    x[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

/* ---- 16-bit floats ---- */
V_FN uint16x4_t v_load_16(const uint16_t *p, int n)
{
    uint16_t part[VF] = {0};
    if (n == VF)
        return vld1_u16(p);
    memcpy(part, p, (size_t)n * 2);
    return vld1_u16(part);
}
V_FN void v_store_16(uint16_t *p, uint16x4_t x, int n)
{
    uint16_t part[VF];
    vst1_u16(part, x);
    memcpy(p, part, (size_t)n * 2);
}
V_FN vf v_load_f16(const uint16_t *p, int n) { return vcvt_f32_f16(vreinterpret_f16_u16(v_load_16(p, n))); }
V_FN vf v_load_bf16(const uint16_t *p, int n) { return vreinterpretq_f32_u32(vshll_n_u16(v_load_16(p, n), 16)); }
V_FN void v_store_f16(uint16_t *p, vf x, int n) { v_store_16(p, vreinterpret_u16_f16(vcvt_f16_f32(x)), n); }
/* Rounded bits of a bf16 in the upper half of each lane. */
V_FN uint32x4_t v_round_bf16(vf x)
{
    const uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t r = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vbslq_u32(vceqq_f32(x, x), r, vdupq_n_u32(0x7fc00000));
}
V_FN void v_store_bf16(uint16_t *p, vf x, int n) { v_store_16(p, vshrn_n_u32(v_round_bf16(x), 16), n); }

/* Two vectors of bf16 in one, which a lane holds side by side: those at even places, at odd ones; and back, rounded. */
V_FN vf v_even_bf16(vf x) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 16)); }
V_FN vf v_odd_bf16(vf x)
{
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0xffff0000u)));
}
V_FN vf v_join_bf16(vf even, vf odd)
{
    return vreinterpretq_f32_u32(vsriq_n_u32(v_round_bf16(odd), v_round_bf16(even), 16));
}

#endif
