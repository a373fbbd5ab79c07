/* The SIMD vocabulary in plain C, 4 floats to a vector: for machines without a vocabulary of their own, and to read.
 * simd_avx512.h says what the names mean where it is not said here. */
#ifndef NBHD_CPU_SIMD_SCALAR_H
#define NBHD_CPU_SIMD_SCALAR_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#include "cpu/cpu.h"

#define VF        4
#define V_STRIP   2
#define V_ROWS    4
#define V_COLUMNS 2
#define V_DIMS    2
#define V_OUT_ROWS 4
#define V_OUT_DIMS 2
#define V_LANE_ROWS 0
#define V_FAST_LOOKUP 0
#define V_FN      static inline __attribute__((always_inline, unused))
#define V_EACH    for (int i = 0; i < VF; i++)

typedef struct {
    float x[VF];
} vf;
typedef struct {
    int x[VF];
} vi;

/* ---- moving ---- */
V_FN vf v_set1(float x) { return (vf){{x, x, x, x}}; }
V_FN vf v_zero(void) { return v_set1(0.0f); }
V_FN vf v_load_part(const float *p, int n)
{
    vf r = v_zero();
    for (int i = 0; i < n; i++)
        r.x[i] = p[i];
    return r;
}
V_FN void v_store_part(float *p, vf a, int n)
{
    for (int i = 0; i < n; i++)
        p[i] = a.x[i];
}
/* Whole vectors may lie where the memory's type is another one: pairs of bf16. */
V_FN vf v_load(const float *p)
{
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
}
V_FN void v_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
V_FN void v_stream(float *p, vf a) { v_store(p, a); }
V_FN void v_stream_end(void) {}
V_FN vf v_select(unsigned bits, vf yes, vf no)
{
    V_EACH no.x[i] = bits >> i & 1 ? yes.x[i] : no.x[i];
    return no;
}
V_FN vf v_keep(vf x) { return x; }
V_FN vi v_iload(const int *p) { return (vi){{p[0], p[1], p[2], p[3]}}; }
V_FN vi v_iset1(int x) { return (vi){{x, x, x, x}}; }
V_FN vi v_iadd(vi a, vi b)
{
    V_EACH a.x[i] += b.x[i];
    return a;
}
V_FN vi v_imin(vi a, vi b)
{
    V_EACH a.x[i] = a.x[i] < b.x[i] ? a.x[i] : b.x[i];
    return a;
}
V_FN vf v_gather(const float *p, vi index, unsigned bits)
{
    vf r = v_zero();
    V_EACH if (bits >> i & 1) r.x[i] = p[index.x[i]];
    return r;
}
V_FN vf v_permute(vf x, vi index)
{
    vf r;
    V_EACH r.x[i] = x.x[index.x[i]];
    return r;
}
V_FN vf v_lookup(vf low, vf high, vi index)
{
    vf r;
    V_EACH r.x[i] = index.x[i] < VF ? low.x[index.x[i]] : high.x[index.x[i] - VF];
    return r;
}

/* ---- arithmetic ---- */
V_FN vf v_add(vf a, vf b)
{
    V_EACH a.x[i] += b.x[i];
    return a;
}
V_FN vf v_sub(vf a, vf b)
{
    V_EACH a.x[i] -= b.x[i];
    return a;
}
V_FN vf v_mul(vf a, vf b)
{
    V_EACH a.x[i] *= b.x[i];
    return a;
}
V_FN vf v_div(vf a, vf b)
{
    V_EACH a.x[i] /= b.x[i];
    return a;
}
V_FN vf v_fma(vf a, vf b, vf c)
{
    V_EACH c.x[i] += a.x[i] * b.x[i];
    return c;
}
V_FN vf v_fms(vf a, vf b, vf c)
{
    V_EACH c.x[i] = a.x[i] * b.x[i] - c.x[i];
    return c;
}
V_FN vf v_max(vf a, vf b)
{
    V_EACH b.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
    return b;
}
V_FN float v_sum(vf a) { return a.x[0] + a.x[1] + a.x[2] + a.x[3]; }
V_FN unsigned v_less(vf a, vf b)
{
    unsigned bits = 0;
    V_EACH bits |= (unsigned)(a.x[i] < b.x[i]) << i;
    return bits;
}
V_FN unsigned v_is_nan(vf a)
{
    unsigned bits = 0;
    V_EACH bits |= (unsigned)(a.x[i] != a.x[i]) << i;
    return bits;
}
V_FN vf v_exp2(vf a)
{
    V_EACH a.x[i] = a.x[i] < -126.0f ? 0.0f : exp2f(a.x[i]);
    return a;
}
V_FN vf v_log2(vf a)
{
    V_EACH a.x[i] = log2f(a.x[i]);
    return a;
}
V_FN void v_transpose(vf a[VF])
{
    for (int i = 0; i < VF; i++)
        for (int j = 0; j < i; j++) {
            float t = a[i].x[j];
            a[i].x[j] = a[j].x[i];
            a[j].x[i] = t;
        }
}

/* ---- 16-bit floats ---- */
V_FN vf v_load_f16(const uint16_t *p, int n)
{
    vf r = v_zero();
    for (int i = 0; i < n; i++)
        r.x[i] = nbhd_from_f16(p[i]);
    return r;
}
V_FN vf v_load_bf16(const uint16_t *p, int n)
{
    vf r = v_zero();
    for (int i = 0; i < n; i++)
        r.x[i] = nbhd_from_bf16(p[i]);
    return r;
}
V_FN void v_store_f16(uint16_t *p, vf a, int n)
{
    for (int i = 0; i < n; i++)
        p[i] = nbhd_to_f16(a.x[i]);
}
V_FN void v_store_bf16(uint16_t *p, vf a, int n)
{
    for (int i = 0; i < n; i++)
        p[i] = nbhd_to_bf16(a.x[i]);
}

/* Two vectors of bf16 in one, which a lane holds side by side: those at even places, at odd ones; and back, rounded. */
V_FN vf v_place_bf16(vf a, int odd)
{
    uint16_t bits[2 * VF];
    memcpy(bits, &a, sizeof bits);
    V_EACH a.x[i] = nbhd_from_bf16(bits[2 * i + odd]);
    return a;
}
V_FN vf v_even_bf16(vf a) { return v_place_bf16(a, 0); }
V_FN vf v_odd_bf16(vf a) { return v_place_bf16(a, 1); }
V_FN vf v_join_bf16(vf even, vf odd)
{
    uint16_t bits[2 * VF];
    for (int i = 0; i < VF; i++) {
        bits[2 * i] = nbhd_to_bf16(even.x[i]);
        bits[2 * i + 1] = nbhd_to_bf16(odd.x[i]);
    }
    memcpy(&even, bits, sizeof bits);
    return even;
}

#endif
