/* Every operation of a vocabulary against plain C, lane by lane. Included after simd_<isa>.h by simd_<isa>.c and by
 * test_simd.c itself; gives check_vocabulary. Memory is read and written right up to an inaccessible page. */
#include <math.h>
#include <string.h>
#include "simd_test.h"

static const float samples[] = {0.0f,     -0.0f,    1.0f,      -1.0f,     0.5f,    -2.75f,   3.1415927f, 1e-30f,
                                -1e30f,   INFINITY, -INFINITY, NAN,       126.99f, -126.0f,  -126.5f,    -150.0f,
                                1e-40f,   65504.0f, 65520.0f,  6.1e-5f,   3e-8f,   0.33333f, 1.0039062f, 1.0117188f,
                                -0.4999f, 12345.6f, 2049.0f,   0.999999f, 77.0f,   1e10f,    -77.125f,   42.0f};
enum { SAMPLES = sizeof samples / sizeof *samples };

static bool same(float a, float b) { return (isnan(a) && isnan(b)) || (a == b && signbit(a) == signbit(b)); }
static bool near(float a, double b, double relative)
{
    if (isnan(a) || isnan(b))
        return isnan(a) && isnan(b);
    if (isinf(a) || isinf(b))
        return (double)a == b;
    return fabs((double)a - b) <= relative * fmax(fabs(b), 1.0);
}

/* x = a b + c: rounded once, or once more relative to the product; past the largest float anything goes. */
static bool near_fma(float x, float a, float b, float c, bool fused)
{
    const double product = (double)a * (double)b, right = product + (double)c;
    if (isfinite(product) && fabs(product) > 3e38)
        return true;
    if (isnan(right) || isinf(product) || isinf(c))
        return near(x, right, 0);
    const double allowed = 6.1e-8 * (fabs(right) + (fused ? 0 : fabs(product))) + 1e-45;
    return fabs(right) > 3e38 || fabs((double)x - right) <= allowed;
}

static void check_arithmetic(const struct simd_test *t, const float *a, const float *b, const float *c)
{
    float x[VF];
    const vf va = v_load(a), vb = v_load(b), vc = v_load(c);
#define LANES(name, expression, right) \
    v_store(x, (expression));          \
    for (int l = 0; l < VF; l++)       \
        t->check(right, name, l, (double)a[l], (double)x[l]);
    LANES("add", v_add(va, vb), same(x[l], a[l] + b[l]))
    LANES("sub", v_sub(va, vb), same(x[l], a[l] - b[l]))
    LANES("mul", v_mul(va, vb), same(x[l], a[l] * b[l]))
    LANES("div", v_div(va, vb), same(x[l], a[l] / b[l]))
    LANES("fma", v_fma(va, vb, vc), near_fma(x[l], a[l], b[l], c[l], t->fused))
    LANES("fms", v_fms(va, vb, vc), near_fma(x[l], a[l], b[l], -c[l], t->fused))
    LANES("max", v_max(va, vb), (a[l] == 0.0f && b[l] == 0.0f) || same(x[l], a[l] > b[l] ? a[l] : b[l]))
    LANES("keep", v_keep(va), same(x[l], a[l]))
    LANES("zero", v_zero(), same(x[l], 0.0f))
    LANES("set1", v_set1(a[0]), same(x[l], a[0]))
    LANES("select", v_select(0xa5a5u, va, vb), same(x[l], 0xa5a5u >> l & 1 ? a[l] : b[l]))
#undef LANES
    const unsigned less = v_less(va, vb), nan = v_is_nan(va);
    for (int l = 0; l < VF; l++) {
        t->check((less >> l & 1) == (a[l] < b[l]), "less", l, (double)a[l], (double)b[l]);
        t->check((nan >> l & 1) == (unsigned)isnan(a[l]), "is_nan", l, (double)a[l], 0);
    }
    t->check(less >> (VF - 1) >> 1 == 0 && nan >> (VF - 1) >> 1 == 0, "bits past the last lane", VF, less, nan);
}

static void check_functions(const struct simd_test *t)
{
    float a[VF], x[VF], y[VF];
    for (int i = 0; i < 40000; i++) {
        for (int l = 0; l < VF; l++)
            a[l] =
                i < SAMPLES ? samples[(i + l) % SAMPLES] : -160.0f + 286.9f * (float)((i * VF + l) % 65521) / 65521.0f;
        v_store(x, v_exp2(v_load(a)));
        for (int l = 0; l < VF; l++) {
            const double right = a[l] < -126.0f ? 0.0 : exp2((double)a[l]);
            t->check((double)a[l] > 127.0 || near(x[l], right, 0) || fabs((double)x[l] / right - 1.0) < 2.5e-7 ||
                         (isnan(a[l]) && isnan(x[l])), "exp2", l, (double)a[l], (double)x[l]);
            a[l] = fabsf(i < SAMPLES ? a[l] : x[l] * 1.2345f);
        }
        v_store(y, v_log2(v_load(a)));
        for (int l = 0; l < VF; l++)
            t->check(near(y[l], log2((double)a[l]), 2.5e-7), "log2", l, (double)a[l], (double)y[l]);
    }
}

/* Loads and stores of n elements that end at the page's end; what lies before them stays as it was. */
static void check_memory(const struct simd_test *t, const float *a)
{
    for (int n = 0; n <= VF; n++) {
        float *end = (float *)(void *)t->page_end, x[VF];
        memcpy(end - n, a, sizeof(float) * (size_t)n);
        v_store(x, v_load_part(end - n, n));
        for (int l = 0; l < VF; l++)
            t->check(same(x[l], l < n ? a[l] : 0.0f), "load_part", l, n, (double)x[l]);
        end[-n - 1] = 7.0f;
        v_store_part(end - n, v_load(a), n);
        t->check(!memcmp(end - n, a, sizeof(float) * (size_t)n) && same(end[-n - 1], 7.0f), "store_part", n, n, 0);
        uint16_t *half = (uint16_t *)(void *)t->page_end;
        for (int type = 0; type < 2; type++) {
            uint16_t bits[VF];
            for (int l = 0; l < VF; l++)
                bits[l] = type ? nbhd_to_bf16(a[l]) : nbhd_to_f16(a[l]);
            memset(half - n - 1, 0x55, sizeof(uint16_t) * (size_t)(n + 1));
            (type ? v_store_bf16 : v_store_f16)(half - n, v_load(a), n);
            for (int l = 0; l < n; l++)
                t->check(half[l - n] == bits[l] || isnan(a[l]), type ? "store_bf16" : "store_f16", l, (double)a[l],
                         half[l - n]);
            t->check(half[-n - 1] == 0x5555, "store_16 before", n, half[-n - 1], 0);
            v_store(x, (type ? v_load_bf16 : v_load_f16)(half - n, n));
            for (int l = 0; l < VF; l++)
                t->check(same(x[l], l >= n ? 0.0f
                                    : type ? nbhd_from_bf16(bits[l])
                                           : nbhd_from_f16(bits[l])) ||
                             isnan(a[l]),
                         type ? "load_bf16" : "load_f16", l, n, (double)x[l]);
        }
    }
}

static void check_pairs(const struct simd_test *t, const float *a)
{
    uint16_t bits[2 * VF], back[2 * VF];
    float both[VF], even[VF], odd[VF];
    for (int l = 0; l < VF; l++) {
        bits[2 * l] = nbhd_to_bf16(a[l]);
        bits[2 * l + 1] = nbhd_to_bf16(-a[VF - 1 - l]);
    }
    memcpy(both, bits, sizeof both);
    const vf pairs = v_load(both);
    v_store(even, v_even_bf16(pairs));
    v_store(odd, v_odd_bf16(pairs));
    v_store(both, v_join_bf16(v_load(a), v_load(odd)));
    memcpy(back, both, sizeof back);
    for (int l = 0; l < VF; l++) {
        t->check(same(even[l], nbhd_from_bf16(bits[2 * l])) || isnan(a[l]), "even_bf16", l, (double)a[l],
                 (double)even[l]);
        t->check(same(odd[l], nbhd_from_bf16(bits[2 * l + 1])) || isnan(a[VF - 1 - l]), "odd_bf16", l,
                 (double)a[VF - 1 - l], (double)odd[l]);
        t->check(back[2 * l] == bits[2 * l] || isnan(a[l]), "join_bf16 even", l, (double)a[l], back[2 * l]);
        t->check(back[2 * l + 1] == bits[2 * l + 1] || isnan(odd[l]), "join_bf16 odd", l, (double)odd[l],
                 back[2 * l + 1]);
    }
}

static void check_stream(const struct simd_test *t, const float *a)
{
    float *to = (float *)(void *)t->page_end - VF;
    memset(to, 0, sizeof(float) * VF);
    v_stream(to, v_load(a));
    v_stream_end();
    t->check(!memcmp(to, a, sizeof(float) * VF), "stream", 0, (double)a[0], (double)to[0]);
}

static void check_moves(const struct simd_test *t)
{
    float table[2 * VF], x[VF], sum = 0;
    int index[VF], y[VF];
    for (int l = 0; l < 2 * VF; l++)
        table[l] = (float)(l * l + 1);
    for (int step = 0; step < 7; step++) {
        for (int l = 0; l < VF; l++)
            index[l] = (l * step + step) % (2 * VF);
        v_store(x, v_lookup(v_load(table), v_load(table + VF), v_iload(index)));
        for (int l = 0; l < VF; l++)
            t->check(same(x[l], table[index[l]]), "lookup", l, index[l], (double)x[l]);
        for (int l = 0; l < VF; l++)
            index[l] %= VF;
        v_store(x, v_permute(v_load(table), v_iload(index)));
        for (int l = 0; l < VF; l++)
            t->check(same(x[l], table[index[l]]), "permute", l, index[l], (double)x[l]);
        /* Lanes without their bit must not be read: their index points far outside. */
        for (int l = 0; l < VF; l++)
            if (!(0x96u >> l & 1))
                index[l] = 1 << 28;
        v_store(x, v_gather(table, v_iload(index), 0x96u));
        for (int l = 0; l < VF; l++)
            t->check(same(x[l], 0x96u >> l & 1 ? table[index[l]] : 0.0f), "gather", l, index[l], (double)x[l]);
    }
    const vi low = v_imin(v_iadd(v_iload(index), v_iset1(-3)), v_iset1(4));
    memcpy(y, &low, sizeof y);
    for (int l = 0; l < VF; l++)
        t->check(y[l] == (index[l] - 3 < 4 ? index[l] - 3 : 4), "iadd, imin, iset1", l, index[l], y[l]);
    for (int l = 0; l < VF; l++)
        sum += table[l];
    t->check(same(v_sum(v_load(table)), sum), "sum", 0, (double)sum, (double)v_sum(v_load(table)));
    vf rows[VF];
    for (int i = 0; i < VF; i++) {
        for (int l = 0; l < VF; l++)
            x[l] = (float)(100 * i + l);
        rows[i] = v_load(x);
    }
    v_transpose(rows);
    for (int i = 0; i < VF; i++) {
        v_store(x, rows[i]);
        for (int l = 0; l < VF; l++)
            t->check(same(x[l], (float)(100 * l + i)), "transpose", l, i, (double)x[l]);
    }
}

static void check_vocabulary(const struct simd_test *t)
{
    float a[VF], b[VF], c[VF];
    for (int i = 0; i < SAMPLES; i++)
        for (int j = 0; j < SAMPLES; j++) {
            for (int l = 0; l < VF; l++) {
                a[l] = samples[(i + l) % SAMPLES];
                b[l] = samples[(j + 3 * l) % SAMPLES];
                c[l] = samples[(i + j + l) % SAMPLES];
            }
            check_arithmetic(t, a, b, c);
            if (j == 0) {
                check_memory(t, a);
                check_pairs(t, a);
                check_stream(t, a);
            }
        }
    check_functions(t);
    check_moves(t);
}
