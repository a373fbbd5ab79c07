/* The checks of what simd_avx512bf16.h adds, against plain C. */
#include <math.h>
#include "cpu/simd_avx512bf16.h"
#include "simd_test.h"

static void get(uint16_t to[VP], vi x) { v_pair_store((uint32_t *)(void *)to, x); }

/* Every operation that moves values: x and y hold 0, 1, ... and 100, 101, ... */
static void check_moving(const struct simd_test *t)
{
    uint16_t x[VP], y[VP], got[VP];
    for (int i = 0; i < VP; i++) {
        x[i] = (uint16_t)i;
        y[i] = (uint16_t)(100 + i);
    }
    const vi a = v_pair_load_part(x, VP), b = v_pair_load_part(y, VP);
    const struct {
        const char *name;
        vi is;
        int first, cut; /* lane l: value first + l, but `cut` are left out after every 4 lanes */
    } zips[] = {{"zip_low", v_pair_zip_low(a, b), 0, 0},
                {"zip_high", v_pair_zip_high(a, b), VF, 0},
                {"mix_low", v_pair_mix_low(a, b), 0, 4},
                {"mix_high", v_pair_mix_high(a, b), 4, 4}};
    for (int z = 0; z < 4; z++) {
        get(got, zips[z].is);
        for (int l = 0; l < VF; l++) {
            const int value = zips[z].first + l + l / 4 * zips[z].cut;
            t->check(got[2 * l] == value && got[2 * l + 1] == 100 + value, zips[z].name, l, value, got[2 * l]);
        }
    }
    for (int n = 0; n <= VP; n++) {
        uint16_t *end = (uint16_t *)(void *)(t->page_end - 2 * n);
        memcpy(end, y, 2 * (size_t)n);
        get(got, v_pair_load_part(end, n));
        for (int i = 0; i < VP; i++)
            t->check(got[i] == (i < n ? y[i] : 0), "pair_load_part", i, n, got[i]);
        v_pair_store_part(end, a, n);
        for (int i = 0; i < n; i++)
            t->check(end[i] == x[i], "pair_store_part", i, n, end[i]);
    }
    for (int i = 0; i < VP; i++) /* the order of mix_low, then that of mix_high */
        got[i] = (uint16_t)(i % VF / 4 * 8 + i % 4 + i / VF * 4);
    get(got, v_pair_unmix(v_pair_load_part(got, VP)));
    for (int i = 0; i < VP; i++)
        t->check(got[i] == i, "pair_unmix", i, i, got[i]);
    get(got, v_pair_or(a, v_iset1(0x01000200), 0x5555));
    for (int i = 0; i < VP; i++)
        t->check(got[i] == (x[i] | (i / 2 % 2 ? 0 : i % 2 ? 0x100 : 0x200)), "pair_or", i, x[i], got[i]);
    get(got, v_pair_negate(a));
    for (int i = 0; i < VP; i++)
        t->check(got[i] == (x[i] ^ 0x8000), "pair_negate", i, x[i], got[i]);
    uint32_t pair = 0x12345678;
    get(got, v_pair_set1(&pair));
    for (int i = 0; i < VP; i++)
        t->check(got[i] == (i % 2 ? 0x1234 : 0x5678), "pair_set1", i, 0, got[i]);
    vi rows[VF];
    for (int i = 0; i < VF; i++)
        rows[i] = v_iadd(v_iset1(100 * i),
                         v_pair_load((const uint32_t[]){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}));
    v_pair_transpose(rows);
    for (int i = 0; i < VF; i++) {
        uint32_t row[VF];
        v_pair_store(row, rows[i]);
        for (int l = 0; l < VF; l++)
            t->check(row[l] == (uint32_t)(100 * l + i), "pair_transpose", l, i, row[l]);
    }
}

static void check_rounding(const struct simd_test *t)
{
    for (uint32_t bits = 0; bits < 0x7f900000u; bits += 0x3fff) {
        float low[VF], high[VF];
        uint16_t got[VP];
        for (int l = 0; l < VF; l++) {
            low[l] = nbhd_float_from_bits(bits + 0x4000u * (uint32_t)l);
            high[l] = -low[l];
        }
        get(got, v_pair_of(v_load(low), v_load(high)));
        for (int l = 0; l < VF; l++) {
            const bool tiny = low[l] < 0x1p-126f; /* counts as 0 */
            const uint16_t right = tiny ? 0 : nbhd_to_bf16(low[l]);
            t->check(isnan(low[l]) ? isnan(nbhd_from_bf16(got[2 * l])) : got[2 * l] == right, "pair_of", l,
                     (double)low[l], got[2 * l]);
            t->check(isnan(low[l]) || got[2 * l + 1] == (right | 0x8000), "pair_of, high", l, (double)high[l],
                     got[2 * l + 1]);
        }
        uint16_t pairs[VP];
        get(pairs, v_pair_of(v_load(low), v_load(high)));
        get(got, v_pair_round(v_load(low), v_load(high)));
        for (int l = 0; l < VP; l++)
            t->check(got[l] == pairs[l % VF * 2 + l / VF], "pair_round", l, pairs[l % VF * 2 + l / VF], got[l]);
    }
}

static void check_dots(const struct simd_test *t)
{
    uint16_t a[VP], b[VP];
    float sum[VF], got[VF];
    for (int round = 0; round < 1000; round++) {
        for (int i = 0; i < VP; i++) {
            a[i] = nbhd_to_bf16((float)((i * 7 + round * 13) % 101 - 50) * 0.37f);
            b[i] = nbhd_to_bf16((float)((i * 5 + round * 17) % 97 - 48) * 1.13f);
        }
        for (int l = 0; l < VF; l++)
            sum[l] = (float)(l - round) * 0.71f;
        v_store(got, v_pair_dot(v_load(sum), v_pair_load_part(a, VP), v_pair_load_part(b, VP)));
        for (int l = 0; l < VF; l++) {
            const double x = (double)nbhd_from_bf16(a[2 * l]) * (double)nbhd_from_bf16(b[2 * l]);
            const double y = (double)nbhd_from_bf16(a[2 * l + 1]) * (double)nbhd_from_bf16(b[2 * l + 1]);
            const double right = (double)sum[l] + x + y, size = fabs((double)sum[l]) + fabs(x) + fabs(y);
            t->check(fabs((double)got[l] - right) <= 1.2e-7 * size, "pair_dot", l, right, (double)got[l]);
        }
    }
    for (int i = 0; i < VP; i++) {
        static const uint16_t odd[] = {0x7f80, 0xff80, 0x7fc0, 0xff81}, even[] = {0x7f7f, 0xff7f, 0, 0x8000};
        for (int k = 0; k < 4; k++) {
            memset(a, 0, sizeof a);
            a[i] = odd[k];
            t->check(v_pair_is_odd(v_pair_load_part(a, VP)), "pair_is_odd", i, odd[k], 0);
            a[i] = even[k];
            t->check(!v_pair_is_odd(v_pair_load_part(a, VP)), "pair_is_odd", i, even[k], 1);
        }
    }
}

static void check_exp2_at(const struct simd_test *t, float x)
{
    vf two[2] = {v_set1(x), v_set1(x)}, four[4] = {v_set1(x), v_set1(x), v_set1(x), v_set1(x)};
    vf other[4] = {v_set1(x), v_set1(x), v_set1(x), v_set1(x)};
    float got[3][VF];
    v_pair_exp2(two, 2);
    v_pair_exp2(four, 4);
    v_store(got[0], two[1]);
    v_store(got[1], four[3]);
    v_pair_exp2_lookup(other, 4);
    v_store(got[2], other[3]);
    const double right = x < -126.0f ? 0.0 : exp2((double)x);
    for (int i = 0; i < 3; i++)
        for (int l = 0; l < VF; l++) {
            const double y = (double)got[i][l];
            t->check(isnan(x) ? isnan(got[i][l]) : fabs(y - right) <= 2e-7 * right,
                     i < 2 ? "pair_exp2" : "pair_exp2_lookup", l, (double)x, y);
        }
}

static void check_exp2(const struct simd_test *t)
{
    static const float special[] = {0.0f, -0.0f, -INFINITY, NAN, -126.0f, -126.5f, -149.0f, -1e30f, -1e-30f, 1e-30f};
    const unsigned state = v_flush_begin();
    for (int i = 0; i < (int)(sizeof special / sizeof *special); i++)
        check_exp2_at(t, special[i]);
    for (float x = -130.0f; x < 127.0f; x += 0.0037f)
        check_exp2_at(t, x);
    v_flush_end(state);
    t->check(_mm_getcsr() == state, "flush_end", 0, state, _mm_getcsr());
}

void test_simd_avx512bf16(const struct simd_test *test)
{
    check_moving(test);
    check_rounding(test);
    check_dots(test);
    check_exp2(test);
}
