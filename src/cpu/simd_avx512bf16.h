/* What AVX-512-BF16 adds to the vocabulary of simd_avx512.h: pairs of bfloat16, one a 32-bit lane, the first of a pair
 * in the lower half. VP values are one vector of them. Tested by tests/test_simd.c. */
#ifndef NBHD_CPU_SIMD_AVX512BF16_H
#define NBHD_CPU_SIMD_AVX512BF16_H

#include <stdbool.h>
#include "cpu/simd_avx512.h"

#define VP (2 * VF) /* bfloat16 values in a vector */

V_FN vi v_pair_zero(void) { return _mm512_setzero_si512(); }
V_FN vi v_pair_load(const uint32_t *p) { return _mm512_loadu_si512(p); }
V_FN void v_pair_store(uint32_t *p, vi x) { _mm512_storeu_si512(p, x); }
/* The first n <= VP values of p, then zeros; their memory is not touched. */
V_FN vi v_pair_load_part(const uint16_t *p, int n)
{
    return n == VP ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}
/* The first n <= VP values. */
V_FN void v_pair_store_part(uint16_t *p, vi x, int n)
{
    if (n == VP)
        _mm512_storeu_si512(p, x);
    else
        _mm512_mask_storeu_epi16(p, (__mmask32)((1ull << n) - 1), x);
}
/* All lanes: the pair at p. */
V_FN vi v_pair_set1(const uint32_t *p) { return _mm512_set1_epi32((int)*p); }
V_FN vi v_pair_negate(vi x) { return _mm512_xor_si512(x, v_iset1((int)0x80008000u)); }
/* x[i] = 2^x[i] for i < n <= 4 and x <= 127, to 1e-7 relative: 1 for 0, 0 for -inf, NaN for NaN; below -126 it is 0
 * between v_flush_begin and v_flush_end, elsewhere subnormal. Several side by side: one is a chain of 45 cycles. */
V_FN void v_pair_exp2(vf *x, const int n)
{
    static const float factors[] = {0.0089909951f, 0.055818676f, 0.24015927f, 0.69315174f, 1.0f};
    vf f[4], y[4];
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        f[i] = _mm512_reduce_ps(x[i], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        y[i] = v_set1(0.0018793187f);
    }
#pragma GCC unroll 5
    for (int k = 0; k < 5; k++)
#pragma GCC unroll 4
        for (int i = 0; i < n; i++)
            y[i] = v_fma(y[i], f[i], v_set1(factors[k]));
#pragma GCC unroll 4
    for (int i = 0; i < n; i++)
        x[i] = _mm512_scalef_ps(y[i], x[i]);
}
/* The same, with fewer multiply-adds and more of what runs beside tiles (docs/notes/cpu-bf16.md): the first five bits
 * of the fraction by a table, the rest by a polynomial of degree 2. */
V_FN void v_pair_exp2_lookup(vf *x, const int n)
{
    static const float table[32] = {
        1.0f, 1.0218972f, 1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f, 1.13878858f, 1.1637249f,
        1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
        1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f, 1.61049032f, 1.64575553f,
        1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f, 1.87416768f, 1.91520655f, 1.95714414f,
    };
    const vf low = v_load(table), high = v_load(table + VF), magic = v_set1(0x1.8p23f / 32); /* counts in 1/32 */
    vf f[4], y[4], step[4];
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        step[i] = _mm512_add_round_ps(x[i], magic, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        f[i] = _mm512_reduce_ps(x[i], 5 << 4 | _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        step[i] = v_lookup(low, high, _mm512_castps_si512(step[i]));
        y[i] = v_fma(f[i], v_set1(0.24265276f), v_set1(0.69312373f));
        f[i] = v_mul(f[i], step[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++)
        x[i] = _mm512_scalef_ps(v_fma(y[i], f[i], step[i]), x[i]);
}
/* From here to v_flush_end this thread's subnormal floats are 0, as dot products take them anyway: others are slow. */
V_FN unsigned v_flush_begin(void)
{
    const unsigned state = _mm_getcsr();
    _mm_setcsr(state | 0x8040);
    return state;
}
V_FN void v_flush_end(unsigned state) { _mm_setcsr(state); }
/* Lanes in bits: x | y, others x. */
V_FN vi v_pair_or(vi x, vi y, unsigned bits) { return _mm512_mask_or_epi32(x, (__mmask16)bits, x, y); }
/* Lane l: the pair of low[l] and high[l], rounded to nearest even. */
V_FN vi v_pair_of(vf low, vf high)
{
    const vi order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                      5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (vi)_mm512_cvtne2ps_pbh(high, low));
}
/* The values of low, then those of high, rounded to nearest even. */
V_FN vi v_pair_round(vf low, vf high) { return (vi)_mm512_cvtne2ps_pbh(high, low); }
/* sum + the pairs' products: lane l adds a[2 l] b[2 l] and a[2 l + 1] b[2 l + 1]. Subnormal values count as 0. */
V_FN vf v_pair_dot(vf sum, vi a, vi b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
/* The same of pairs that travel as floats, in the order of v_fma. */
V_FN vf v_pair_step(vf a, vf b, vf sum) { return v_pair_dot(sum, (vi)a, (vi)b); }
/* Pairs (a[i], b[i]) of the values i < VF, or of those from VF on. */
V_FN vi v_pair_zip_low(vi a, vi b)
{
    const vi order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                      5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(a, order, b);
}
V_FN vi v_pair_zip_high(vi a, vi b)
{
    const vi order = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22,
                                      53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
    return _mm512_permutex2var_epi16(a, order, b);
}
/* Pairs of a and b too, in an order that costs less: lane l of the lower ones is value l / 4 * 8 + l % 4, of the higher
 * ones that + 4. */
V_FN vi v_pair_mix_low(vi a, vi b) { return _mm512_unpacklo_epi16(a, b); }
V_FN vi v_pair_mix_high(vi a, vi b) { return _mm512_unpackhi_epi16(a, b); }
/* Values in that order, the lower ones' then the higher ones', back in their own. */
V_FN vi v_pair_unmix(vi x)
{
    return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), x);
}
/* Some value is a NaN or an infinity. */
V_FN bool v_pair_is_odd(vi x)
{
    const vi exponent = v_iset1(0x7f807f80);
    return _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent) != 0;
}
/* x[i] lane j becomes x[j] lane i. */
V_FN void v_pair_transpose(vi x[VF])
{
    vf t[VF];
#pragma GCC unroll 16
    for (int i = 0; i < VF; i++)
        t[i] = _mm512_castsi512_ps(x[i]);
    v_transpose(t);
#pragma GCC unroll 16
    for (int i = 0; i < VF; i++)
        x[i] = _mm512_castps_si512(t[i]);
}

#endif
