/* Where the rows of the dQ lie that bwd_sm90.cu adds up in the workspace, [batch][queries][heads][head_dim], and the
 * caller's rows of the same queries.
 *
 * They are float32 or, with NBHD_INTEGERS, integers, whose sum is the same in any order: those of a query count parts
 * of 1 / fineness, a power of two, found before the products (bwd_sm90_rows.cu) so that no sum reaches 2^31:
 *     |dQ| <= sum of P |dP - delta| |K| <= (|dO| most |V| + |delta|) most |K|        as P sums up to 1
 * Typical sums are a thousandth of that, so they keep some 20 bits, where dS has 8 or 11. What is not finite has no
 * integer: a query with such a bound has NaN for its fineness, and so for its dQ. */
#ifndef NBHD_DEVICE_SUMS_SM90_CUH
#define NBHD_DEVICE_SUMS_SM90_CUH

#include "nbhd_params.h"

NBHD_FN int queries_of(const struct nbhd_params *p)
{
    return p->axis[0].length * p->axis[1].length * p->axis[2].length;
}

/* A query's place on the axes. */
struct query {
    int x[3];
};

NBHD_FN struct query query_at(const struct nbhd_params *p, int number)
{
    int line = number / p->axis[2].length;
    struct query q = {{line / p->axis[1].length, line % p->axis[1].length, number % p->axis[2].length}};
    return q;
}

/* Moves it on to the next. */
NBHD_FN void step_query(const struct nbhd_params *p, struct query *q)
{
    if (++q->x[2] < p->axis[2].length)
        return;
    q->x[2] = 0;
    if (++q->x[1] < p->axis[1].length)
        return;
    q->x[1] = 0;
    q->x[0]++;
}

NBHD_FN long long place_of(const struct nbhd_view *view, const struct query *q)
{
    return (unsigned)q->x[0] * view->axis[0] + (unsigned)q->x[1] * view->axis[1] + (unsigned)q->x[2] * view->axis[2];
}

NBHD_FN float *sum_address(const struct nbhd_params *p, float *sums, int batch, int head, int query)
{
    unsigned row = (batch * queries_of(p) + query) * p->heads + head; /* less than 2^31 (bwd_sm90.c) */
    return sums + (unsigned long long)row * NBHD_HEAD_DIM;
}

/* x fineness to the nearest integer, if that is less than 2^31 in magnitude. By arithmetic, as the unit that has an
 * instruction for it is that of the exponentials: h is 2^23 + C + H, where 1024 H is nearest to x fineness, l is 3
 * 2^22 + L, where L is what is left. Of their bits all but 1024 H + L cancels, modulo 2^32, with this C. */
NBHD_FN unsigned to_integer(float x, float fineness)
{
    const float upper = 11350016, lower = 12582912; /* 0x4b2d3000, 0x4b400000 */
    float h = fmaf(x, fineness * (1.0f / 1024), upper);
    float l = fmaf(x, fineness, fmaf(h, -1024, lower + 1024 * upper)); /* the inner one, lower - 1024 H, is exact */
    return (__float_as_uint(h) << 10) + __float_as_uint(l);
}

/* The largest power of two with which a query's sums fit; from 2^-97 to 2^125. */
NBHD_FN float fineness_of(float bound)
{
    int exponent = (int)(__float_as_uint(bound) >> 23 & 255);
    if (exponent == 255)
        return __uint_as_float(0x7fffffff);
    return __uint_as_float((unsigned)(284 - nbhd_max(exponent, 32)) << 23);
}

/* A sum as it stands in the workspace, and what it is to be multiplied by; row: the query's number. */
NBHD_FN float sum_of(unsigned x) { return NBHD_INTEGERS ? (float)(int)x : __uint_as_float(x); }

NBHD_FN float weight_of(const float *fineness, unsigned row)
{
    float x = 1;
    if (NBHD_INTEGERS)
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(fineness[row])); /* of a power of two exact */
    return x;
}

#endif
