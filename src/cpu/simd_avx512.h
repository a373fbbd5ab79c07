/* The SIMD vocabulary on AVX-512 (F, BW, DQ, VL): 16 floats to a vector. The algorithms in *.inc.h are written over
 * these names alone; simd_avx2.h defines the same ones. "bits" is one bit a lane, lane 0 lowest. Tested by
 * tests/test_simd.c. */
#ifndef NBHD_CPU_SIMD_AVX512_H
#define NBHD_CPU_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#define VF         16 /* floats in a vector */
#define V_STRIP    4  /* vectors of queries that a microkernel holds at once: 6 x 4 accumulators of 32 registers */
#define V_ROWS     6
#define V_COLUMNS  8  /* most columns of a permuted product: with 3 rows 3 x 8 accumulators, with 4 4 x 6 */
#define V_DIMS     4  /* vectors of head dimensions: 4 x 4 accumulators */
#define V_KEYS     7  /* keys whose sums are held while queries pass, of so many vectors each: 7 x 2 accumulators */
#define V_KEY_DIMS 2
#define V_OUT_ROWS 4  /* rows and vectors of head dimensions of a permuted output */
#define V_OUT_DIMS 4
#define V_LANE_ROWS 2 /* rows of an output of four lanes by two vectors; 0: of one lane */
#define V_FAST_LOOKUP 1 /* v_lookup is as cheap as a load */
#define V_FN       static inline __attribute__((always_inline, unused))

typedef __m512 vf;
typedef __m512i vi;

/* ---- moving ---- */
V_FN vf v_zero(void) { return _mm512_setzero_ps(); }
V_FN vf v_set1(float x) { return _mm512_set1_ps(x); }
V_FN vf v_load(const float *p) { return _mm512_loadu_ps(p); }
V_FN void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
/* Past the caches, for data that nobody reads soon: p is a multiple of the vector's size. v_stream_end before other
 * threads may look. */
V_FN void v_stream(float *p, vf x) { _mm512_stream_ps(p, x); }
V_FN void v_stream_end(void) { _mm_sfence(); }
V_FN __mmask16 v_first(int n) { return (__mmask16)((1u << n) - 1u); } /* 0 <= n <= VF */
/* The first n lanes; the others are 0 and their memory is not touched. */
V_FN vf v_load_part(const float *p, int n) { return _mm512_maskz_loadu_ps(v_first(n), p); }
V_FN void v_store_part(float *p, vf x, int n) { _mm512_mask_storeu_ps(p, v_first(n), x); }
V_FN vf v_select(unsigned bits, vf yes, vf no) { return _mm512_mask_blend_ps((__mmask16)bits, no, yes); }

/* x, held in a register: compilers like to fold a load into each of its uses, which doubles the loads. */
V_FN vf v_keep(vf x)
{
    __asm__("" : "+v"(x));
    return x;
}
V_FN vi v_iload(const int *p) { return _mm512_loadu_si512(p); }
V_FN vi v_iset1(int x) { return _mm512_set1_epi32(x); }
V_FN vi v_iadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
V_FN vi v_imin(vi a, vi b) { return _mm512_min_epi32(a, b); }
/* Lane l: bit set: p[index[l]], else 0 and no access. */
V_FN vf v_gather(const float *p, vi index, unsigned bits)
{
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), (__mmask16)bits, index, p, 4);
}
/* Lane l: element index[l] of x. */
V_FN vf v_permute(vf x, vi index) { return _mm512_permutexvar_ps(index, x); }
/* Lane l: element index[l] of the 2 * VF elements low, high. */
V_FN vf v_lookup(vf low, vf high, vi index) { return _mm512_permutex2var_ps(low, index, high); }

/* ---- arithmetic ---- */
V_FN vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
V_FN vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
V_FN vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
V_FN vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
V_FN vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); } /* a b + c */
V_FN vf v_fms(vf a, vf b, vf c) { return _mm512_fmsub_ps(a, b, c); } /* a b - c */
V_FN vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }           /* b where one is NaN */
V_FN float v_sum(vf a) { return _mm512_reduce_add_ps(a); }
V_FN unsigned v_less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
V_FN unsigned v_is_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }

/* 2^x for x <= 127: 2e-7 relative; exactly 0 below -126, so also for -inf; NaN for NaN. */
V_FN vf v_exp2(vf x)
{
    __mmask16 keep = _mm512_cmp_ps_mask(x, v_set1(-126.0f), _CMP_NLT_UQ);
    vf n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf f = _mm512_sub_ps(x, n);
    vf y = v_set1(0.0013264727f);
    y = v_fma(y, f, v_set1(0.009671513f));
    y = v_fma(y, f, v_set1(0.055507336f));
    y = v_fma(y, f, v_set1(0.24022242f));
    y = v_fma(y, f, v_set1(0.693147f));
    y = v_fma(y, f, v_set1(1.0f));
    return _mm512_maskz_scalef_ps(keep, y, n);
}

/* log2 x = e + log2 m, m in [0.75, 1.5); 2e-7 absolute or relative. 0: -inf, NaN: NaN, inf: inf. */
V_FN vf v_log2(vf x)
{
    vf e = _mm512_getexp_ps(_mm512_mul_ps(x, v_set1(1.3333334f)));
    vf m = _mm512_scalef_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), e));
    vf s = _mm512_div_ps(_mm512_sub_ps(m, v_set1(1.0f)), _mm512_add_ps(m, v_set1(1.0f)));
    vf z = _mm512_mul_ps(s, s);
    vf y = v_set1(0.32059889f); /* 2 log2(e) / 9, / 7, / 5, / 3, / 1 */
    y = v_fma(y, z, v_set1(0.41219859f));
    y = v_fma(y, z, v_set1(0.57707802f));
    y = v_fma(y, z, v_set1(0.96179669f));
    y = v_fma(y, z, v_set1(2.88539008f));
    y = v_fma(y, s, e);
    __mmask16 odd = _mm512_fpclass_ps_mask(x, 0x01 | 0x02 | 0x04 | 0x08 | 0x80); /* NaN, +-0, +inf */
    return _mm512_mask_blend_ps(odd, y, _mm512_getexp_ps(x));
}

/* ---- transposing: x[i] lane j becomes x[j] lane i ---- */
V_FN void v_transpose(vf x[VF])
{
    vf t[VF];
#pragma GCC unroll 8
    for (int i = 0; i < VF; i += 2) {
        t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < VF; i += 4) {
        x[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        x[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        x[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        x[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        x[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        x[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* ---- 16-bit floats: the first n values as float, or back (round to nearest even) ---- */
V_FN vf v_load_f16(const uint16_t *p, int n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(v_first(n), p));
}
V_FN vf v_load_bf16(const uint16_t *p, int n)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(v_first(n), p)), 16));
}
V_FN void v_store_f16(uint16_t *p, vf x, int n)
{
    _mm256_mask_storeu_epi16(p, v_first(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* Rounded bits of a bf16 in the upper half of each lane. */
V_FN vi v_round_bf16(vf x)
{
    const vi u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), v_iset1(1));
    const vi r = v_iadd(u, v_iadd(odd, v_iset1(0x7fff)));
    return _mm512_mask_mov_epi32(r, (__mmask16)v_is_nan(x), v_iset1(0x7fc00000));
}
V_FN void v_store_bf16(uint16_t *p, vf x, int n)
{
    const vi r = _mm512_srli_epi32(v_round_bf16(x), 16);
    _mm256_mask_storeu_epi16(p, v_first(n), _mm512_cvtepi32_epi16(r));
}

/* Two vectors of bf16 in one, which a lane holds side by side: those at even places, at odd ones; and back, rounded. */
V_FN vf v_even_bf16(vf x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
V_FN vf v_odd_bf16(vf x)
{
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), v_iset1((int)0xffff0000u)));
}
V_FN vf v_join_bf16(vf even, vf odd)
{
    const vi low = _mm512_srli_epi32(v_round_bf16(even), 16), high = v_round_bf16(odd);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(low, high, v_iset1((int)0xffff0000u), 0xf8)); /* a | b & c */
}

#endif
