/* See oracle.h: the mask, roundings, and what fused and unfused passes share. Nothing of the library is included. */
#include "oracle_pairs.h"
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* ---- the mask, by membership ---- */

/* Of the dilation group that a token is in. */
static int members_of(const struct oracle_axis *a, int token)
{
    return (a->length - token % a->dilation + a->dilation - 1) / a->dilation;
}

/* Queries come in groups of `stride`; all of a group use the window around one of them, or around the last member. */
static int leader_of(const struct oracle_axis *a, int query)
{
    const int p = query / a->dilation, last = members_of(a, query) - 1;
    const int leader = p - p % a->stride + (a->edge == ORACLE_CAUSAL ? a->stride - 1 : a->stride / 2);
    return leader > last ? last : leader;
}

int oracle_around(const struct oracle_axis *a, int query, int key, int left)
{
    const int members = members_of(a, query);
    int far = key / a->dilation - leader_of(a, query);
    for (; far < -left; far += members) {}
    for (; far >= members - left; far -= members) {}
    return far;
}

bool oracle_sees(const struct oracle_axis *a, int query, int key)
{
    if (a->keys != a->length)
        return true; /* cross attention: the whole axis */
    if (query % a->dilation != key % a->dilation)
        return false;
    const int members = members_of(a, query), leader = leader_of(a, query);
    const int p = query / a->dilation, j = key / a->dilation;
    if (a->edge == ORACLE_CAUSAL)
        return j <= p && leader - j < a->window;
    int left = a->window / 2, right = a->window - 1 - left; /* how far the window reaches from its leader */
    if (a->edge == ORACLE_PERIODIC)
        return oracle_around(a, query, key, left) <= right;
    if (a->edge == ORACLE_NEAREST) {
        for (; leader - left < 0; left--) /* what the border cuts off on one side is given to the other */
            right++;
        for (; leader + right > members - 1; right--)
            left++;
    }
    return j >= leader - left && j <= leader + right;
}

/* ---- rounding ---- */

static double round_to_bits(double value, int bits, double smallest_normal)
{
    if (!isfinite(value) || value == 0)
        return value;
    int exponent;
    frexp(value, &exponent);
    double unit = ldexp(1.0, exponent - bits);
    const double least = smallest_normal * ldexp(1.0, 1 - bits);
    if (unit < least)
        unit = least;
    return nearbyint(value / unit) * unit;
}

double oracle_round(enum oracle_precision precision, double value)
{
    switch (precision) {
    case ORACLE_F32:
    case ORACLE_F32_BASE2:
    case ORACLE_TF32:
    case ORACLE_TF32_NEAREST: return (double)(float)value;
    case ORACLE_F16:
        value = round_to_bits(value, 11, 0x1p-14);
        return fabs(value) > 65504 ? copysign(INFINITY, value) : value;
    case ORACLE_BF16: return round_to_bits(value, 8, 0x1p-126);
    default: return value;
    }
}

double oracle_operand(const struct oracle_problem *p, double value)
{
    if (p->precision == ORACLE_TF32_NEAREST)
        return round_to_bits(value, 11, 0x1p-126);
    if (p->precision != ORACLE_TF32)
        return oracle_round(p->precision, value);
    float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, 4);
    if (!isfinite(single))
        return value;
    bits &= ~UINT32_C(0x1fff);
    memcpy(&single, &bits, 4);
    return (double)single;
}

/* ---- pairs of queries and keys ---- */

void oracle_close(struct oracle *c)
{
    for (int i = 0; i < 3; i++)
        free(c->sees[i]);
    free(c->weights);
    free(c->seen);
}

bool oracle_open(struct oracle *c, const struct oracle_problem *p, const struct oracle_tensors *t)
{
    memset(c, 0, sizeof *c);
    c->p = p;
    c->t = t;
    c->tokens = c->keys = 1;
    bool ok = true;
    for (int i = 0; i < 3; i++) {
        const struct oracle_axis *a = &p->axis[i];
        c->tokens *= a->length;
        c->keys *= a->keys;
        c->sees[i] = malloc(sizeof(bool) * (size_t)a->length * (size_t)a->keys);
        for (int q = 0; c->sees[i] && q < a->length; q++)
            for (int k = 0; k < a->keys; k++)
                c->sees[i][(size_t)q * (size_t)a->keys + (size_t)k] = oracle_sees(a, q, k);
        ok = ok && c->sees[i];
    }
    c->weights = malloc(sizeof(double) * (size_t)(c->keys + p->extra));
    c->seen = malloc(sizeof(long long) * (size_t)(c->keys + p->extra));
    ok = ok && c->weights && c->seen;
    if (!ok)
        oracle_close(c);
    return ok;
}

void oracle_coordinates(const struct oracle_problem *p, bool of_key, long long token, int x[3])
{
    for (int i = 2; i >= 0; i--) {
        const int extent = of_key ? p->axis[i].keys : p->axis[i].length;
        x[i] = (int)(token % extent);
        token /= extent;
    }
}

void oracle_find_visible(struct oracle *c, long long query)
{
    const struct oracle_axis *a = c->p->axis;
    const bool *sees[3];
    int x[3];
    oracle_coordinates(c->p, false, query, x);
    for (int i = 0; i < 3; i++)
        sees[i] = c->sees[i] + (size_t)x[i] * (size_t)a[i].keys;
    long long key = 0;
    c->count = 0;
    for (int i = 0; i < a[0].keys; i++)
        for (int j = 0; j < a[1].keys; j++)
            for (int k = 0; k < a[2].keys; k++, key++)
                if (sees[0][i] && sees[1][j] && sees[2][k])
                    c->seen[c->count++] = key;
    for (int e = 0; e < c->p->extra; e++)
        c->seen[c->count++] = c->keys + e;
}

double *oracle_key_row(const struct oracle *c, double *grid, double *extra, int batch, long long key, int kv_head,
                       int width)
{
    const struct oracle_problem *p = c->p;
    if (key < c->keys)
        return grid + (((long long)batch * c->keys + key) * p->kv_heads + kv_head) * width;
    return extra + (((long long)batch * p->extra + key - c->keys) * p->kv_heads + kv_head) * width;
}

double *oracle_query_row(const struct oracle *c, double *array, int batch, long long token, int head, int width)
{
    return array + (((long long)batch * c->tokens + token) * c->p->heads + head) * width;
}

long long oracle_bias_index(const struct oracle *c, int head, long long query, long long key)
{
    int x[3], y[3];
    oracle_coordinates(c->p, false, query, x);
    oracle_coordinates(c->p, true, key, y);
    long long at = head;
    for (int i = 0; i < 3; i++) {
        const struct oracle_axis *a = &c->p->axis[i];
        int apart = (y[i] - x[i]) / a->dilation;
        if (a->edge == ORACLE_PERIODIC)
            apart = leader_of(a, x[i]) + oracle_around(a, x[i], y[i], a->window / 2) - x[i] / a->dilation;
        at = at * (2 * a->window - 1) + apart + a->window - 1;
    }
    return at;
}

/* ---- sums of products ---- */

double oracle_dot(const struct oracle *c, const double *a, const double *b, int n)
{
    const bool reversed = c->p->precision == ORACLE_F32_BASE2;
    double sum = 0;
    if (c->p->precision == ORACLE_EXACT) { /* the same as below, in less time */
        for (int j = 0; j < n; j++)
            sum += a[j] * b[j];
        return sum;
    }
    for (int j = 0; j < n; j++) {
        const int i = reversed ? n - 1 - j : j;
        sum = oracle_sum(c->p, sum + oracle_sum(c->p, oracle_element(c->p, a[i]) * oracle_element(c->p, b[i])));
    }
    return sum;
}

void oracle_add_scaled(const struct oracle *c, double *to, double factor, const double *from, int n)
{
    for (int d = 0; d < n; d++)
        to[d] = oracle_sum(c->p, to[d] + oracle_sum(c->p, factor * oracle_element(c->p, from[d])));
}

void oracle_finish(const struct oracle_problem *p, double *array, double factor, long long count)
{
    for (long long i = 0; array && i < count; i++)
        array[i] = oracle_round(p->precision, array[i] * factor);
}

void oracle_clear(double *array, long long count)
{
    if (array)
        memset(array, 0, sizeof(double) * (size_t)count);
}
