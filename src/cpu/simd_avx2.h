/* The SIMD vocabulary on AVX2, FMA and F16C: 8 floats to a vector. The same names as simd_avx512.h, which says what
 * they mean where it is not said here. */
#ifndef NBHD_CPU_SIMD_AVX2_H
#define NBHD_CPU_SIMD_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define VF         8
#define V_STRIP    2 /* 6 x 2 accumulators of 16 registers */
#define V_ROWS     6
#define V_COLUMNS  8 /* with 4 rows 3 */
#define V_DIMS     2 /* 4 x 2 accumulators */
#define V_KEYS     5 /* 5 x 2 accumulators */
#define V_KEY_DIMS 2
#define V_OUT_ROWS 2 /* 2 x 4 */
#define V_OUT_DIMS 4
#define V_LANE_ROWS 0 /* four lanes at once are slower */
#define V_FAST_LOOKUP 0
#define V_FN       static inline __attribute__((always_inline, unused))

typedef __m256 vf;
typedef __m256i vi;

/* ---- moving ---- */
V_FN vf v_zero(void) { return _mm256_setzero_ps(); }
V_FN vf v_set1(float x) { return _mm256_set1_ps(x); }
V_FN vf v_load(const float *p) { return _mm256_loadu_ps(p); }
V_FN void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
V_FN vf v_keep(vf x)
{
    __asm__("" : "+x"(x));
    return x;
}
V_FN void v_stream(float *p, vf x) { _mm256_stream_ps(p, x); }
V_FN void v_stream_end(void) { _mm_sfence(); }
V_FN vi v_iload(const int *p) { return _mm256_loadu_si256((const __m256i *)p); }
V_FN vi v_iset1(int x) { return _mm256_set1_epi32(x); }
V_FN vi v_iadd(vi a, vi b) { return _mm256_add_epi32(a, b); }
V_FN vi v_imin(vi a, vi b) { return _mm256_min_epi32(a, b); }
V_FN vi v_first(int n) { return _mm256_cmpgt_epi32(v_iset1(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
V_FN vi v_mask(unsigned bits)
{
    vi one = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(v_iset1((int)bits), one), one);
}
V_FN vf v_load_part(const float *p, int n) { return _mm256_maskload_ps(p, v_first(n)); }
/* Not maskstore, which takes AMD's cores tens of cycles: two halves that may overlap. */
V_FN void v_store_part(float *p, vf x, int n)
{
    if (n == VF) {
        _mm256_storeu_ps(p, x);
    } else if (n >= 4) {
        vi last = v_iadd(v_iset1(n - 4), _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3));
        _mm_storeu_ps(p, _mm256_castps256_ps128(x));
        _mm_storeu_ps(p + n - 4, _mm256_castps256_ps128(_mm256_permutevar8x32_ps(x, last)));
    } else if (n > 0) {
        __m128 a = _mm256_castps256_ps128(x);
        if (n >= 2)
            _mm_storel_pi((__m64 *)(void *)p, a);
        if (n != 2)
            _mm_store_ss(p + n - 1, n == 3 ? _mm_movehl_ps(a, a) : a);
    }
}
V_FN vf v_select(unsigned bits, vf yes, vf no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(v_mask(bits))); }
V_FN vf v_gather(const float *p, vi index, unsigned bits)
{
    return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), p, index, _mm256_castsi256_ps(v_mask(bits)), 4);
}
V_FN vf v_permute(vf x, vi index) { return _mm256_permutevar8x32_ps(x, index); }
V_FN vf v_lookup(vf low, vf high, vi index)
{
    vf in_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), in_high);
}

/* ---- arithmetic ---- */
V_FN vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
V_FN vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
V_FN vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
V_FN vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
V_FN vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
V_FN vf v_fms(vf a, vf b, vf c) { return _mm256_fmsub_ps(a, b, c); }
V_FN vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
V_FN float v_sum(vf a)
{
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
V_FN unsigned v_less(vf a, vf b) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
V_FN unsigned v_is_nan(vf a) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }

V_FN vf v_exp2(vf x)
{
    vf keep = _mm256_cmp_ps(x, v_set1(-126.0f), _CMP_NLT_UQ);
    vf n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf f = _mm256_sub_ps(x, n);
    vf y = v_set1(0.0013264727f);
    y = v_fma(y, f, v_set1(0.009671513f));
    y = v_fma(y, f, v_set1(0.055507336f));
    y = v_fma(y, f, v_set1(0.24022242f));
    y = v_fma(y, f, v_set1(0.693147f));
    y = v_fma(y, f, v_set1(1.0f));
    vi power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_and_ps(keep, _mm256_castsi256_ps(v_iadd(_mm256_castps_si256(y), power)));
}

V_FN vf v_log2(vf x)
{
    vf tiny = _mm256_cmp_ps(x, v_set1(0x1p-126f), _CMP_LT_OQ); /* subnormals: through 2^24 x */
    vf a = _mm256_blendv_ps(x, _mm256_mul_ps(x, v_set1(0x1p24f)), tiny);
    vi u = _mm256_castps_si256(a);
    vi k = _mm256_srai_epi32(_mm256_sub_epi32(u, v_iset1(0x3f400000)), 23); /* exponent of a / 0.75 */
    vf m = _mm256_castsi256_ps(_mm256_sub_epi32(u, _mm256_slli_epi32(k, 23)));
    vf e = _mm256_sub_ps(_mm256_cvtepi32_ps(k), _mm256_and_ps(tiny, v_set1(24.0f)));
    vf s = _mm256_div_ps(_mm256_sub_ps(m, v_set1(1.0f)), _mm256_add_ps(m, v_set1(1.0f)));
    vf z = _mm256_mul_ps(s, s);
    vf y = v_set1(0.32059889f);
    y = v_fma(y, z, v_set1(0.41219859f));
    y = v_fma(y, z, v_set1(0.57707802f));
    y = v_fma(y, z, v_set1(0.96179669f));
    y = v_fma(y, z, v_set1(2.88539008f));
    y = v_fma(y, s, e);
    y = _mm256_blendv_ps(y, v_set1(-__builtin_inff()), _mm256_cmp_ps(x, v_zero(), _CMP_EQ_OQ));
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, v_set1(__builtin_inff()), _CMP_NLT_UQ)); /* inf, NaN */
}

/* ---- transposing ---- */
V_FN void v_transpose(vf x[VF])
{
    vf t[VF];
#pragma GCC unroll 4
    for (int i = 0; i < VF; i += 2) {
        t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < VF; i += 4) {
        x[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        x[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        x[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        x[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vf low = x[i], high = x[i + 4];
        x[i] = _mm256_permute2f128_ps(low, high, 0x20);
        x[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
}

/* ---- 16-bit floats ---- */
V_FN __m128i v_load_16(const uint16_t *p, int n)
{
    uint16_t part[8] = {0};
    if (n == VF)
        return _mm_loadu_si128((const __m128i *)p);
    memcpy(part, p, (size_t)n * 2);
    return _mm_loadu_si128((const __m128i *)part);
}
V_FN void v_store_16(uint16_t *p, __m128i x, int n)
{
    uint16_t part[8];
    _mm_storeu_si128((__m128i *)part, x);
    memcpy(p, part, (size_t)n * 2);
}
V_FN vf v_load_f16(const uint16_t *p, int n) { return _mm256_cvtph_ps(v_load_16(p, n)); }
V_FN vf v_load_bf16(const uint16_t *p, int n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v_load_16(p, n)), 16));
}
V_FN void v_store_f16(uint16_t *p, vf x, int n)
{
    v_store_16(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}
/* Rounded bits of a bf16 in the upper half of each lane. */
V_FN vi v_round_bf16(vf x)
{
    const vi u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), v_iset1(1));
    const vi nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(v_iadd(u, v_iadd(odd, v_iset1(0x7fff))), v_iset1(0x7fc00000), nan);
}
V_FN void v_store_bf16(uint16_t *p, vf x, int n)
{
    const vi r = _mm256_srli_epi32(v_round_bf16(x), 16);
    v_store_16(p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)), n);
}

/* Two vectors of bf16 in one, which a lane holds side by side: those at even places, at odd ones; and back, rounded. */
V_FN vf v_even_bf16(vf x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
V_FN vf v_odd_bf16(vf x)
{
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), v_iset1((int)0xffff0000u)));
}
V_FN vf v_join_bf16(vf even, vf odd)
{
    return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_srli_epi32(v_round_bf16(even), 16), v_round_bf16(odd), 0xaa));
}

#endif
