/* The backward's products by tiles, over the vocabulary of amx.h, in units of 32 keys, 32 queries or 32 columns. Keys
 * are rows, queries columns, as the bits of a block of keys have them:
 *
 *     S^T[16 keys][16 queries]   += K[16 keys][32 dims] * Q^T[16 pairs of dims][16 queries], dP^T likewise of V and dO
 *     dV[16 keys][16 columns]    += P^T[16 keys][32 queries] * dO[16 pairs of queries][16 columns], dK likewise
 *     dQ^T[16 dims][16 queries]  += K^T[16 dims][32 keys] * dS^T[16 pairs of keys][16 queries]
 *
 * so that P^T and dS^T, rounded to bfloat16, are left factors as they are, and dS^T a right one once neighbouring rows
 * are zipped. Everything that is a factor lies in tiles of 1 KiB but K and V, which are rows. */

enum {
    UNIT = 32,
    HALVES = FWD_LANES / UNIT
};

NBHD_STATIC_ASSERT(UNIT == VP && UNIT == 2 * VF, "a row of a unit is two vectors of floats, one of bfloat16");

/* ---- packing ---- */

V_FN vi unit_load(const uint16_t *p) { return v_pair_load((const uint32_t *)(const void *)p); }
V_FN void unit_store(uint16_t *p, vi x) { v_pair_store((uint32_t *)(void *)p, x); }

/* A row of n values, with zeros up to a multiple of UNIT. true: it is not finite, and to is all zeros. */
static bool copy_row(uint16_t *to, const uint16_t *row, int n)
{
    bool odd = false;
    for (int i = 0; i < n; i += UNIT) {
        const vi x = v_pair_load_part(row + i, nbhd_min(UNIT, n - i));
        odd |= v_pair_is_odd(x);
        unit_store(to + i, x);
    }
    for (int i = 0; i < n && odd; i += UNIT)
        unit_store(to + i, v_pair_zero());
    return odd;
}

/* A row of `width` values, all of them NaN. */
static void fill_odd(uint16_t *to, int width)
{
    for (int i = 0; i < width; i += UNIT)
        unit_store(to + i, v_iset1(0x7fc07fc0));
}

/* Queries' rows of `width` values as right factors of scores: a tile is [16 pairs of dims][16 queries]; those of 16
 * queries follow one another. */
static void pair_dims(const uint16_t *rows, int queries, int width, uint16_t *to)
{
    for (int q = 0; q < queries; q += VF)
        for (int i = 0; i < width; i += UNIT) {
            vi x[VF];
            for (int l = 0; l < VF; l++)
                x[l] = unit_load(rows + (q + l) * width + i);
            v_pair_transpose(x);
            for (int l = 0; l < VF; l++, to += VP)
                unit_store(to, x[l]);
        }
}

/* And as right factors of gradients: a tile is [16 pairs of queries][16 columns]; those of 32 queries follow one
 * another. */
static void pair_rows(const uint16_t *rows, int queries, int width, uint16_t *to)
{
    for (int q = 0; q < queries; q += UNIT)
        for (int i = 0; i < width; i += UNIT, to += 2 * TILE)
            for (int l = 0; l < TILE_ROWS; l++) {
                const uint16_t *row = rows + (q + 2 * l) * width + i;
                const vi a = unit_load(row), b = unit_load(row + width);
                unit_store(to + l * VP, v_pair_zip_low(a, b));
                unit_store(to + TILE + l * VP, v_pair_zip_high(a, b));
            }
}

/* Rows of 32 keys as left factors of dQ^T: a tile is [16 dims][32 keys]. */
static void turn_keys(const uint16_t *rows, int width, uint16_t *to)
{
    for (int i = 0; i < width; i += UNIT, to += 2 * TILE) {
        vi low[VF], high[VF];
        for (int l = 0; l < VF; l++) {
            const vi a = unit_load(rows + 2 * l * width + i), b = unit_load(rows + (2 * l + 1) * width + i);
            low[l] = v_pair_mix_low(a, b);
            high[l] = v_pair_mix_high(a, b);
        }
        v_pair_transpose(low);
        v_pair_transpose(high);
        for (int l = 0; l < VF; l++) { /* see v_pair_mix_low */
            uint16_t *at = to + (l / 4 * 8 + l % 4) * VP;
            unit_store(at, low[l]);
            unit_store(at + 4 * VP, high[l]);
        }
    }
}

/* ---- weights, and scores beside them ---- */

/* What becomes of a unit's S^T and dP^T. */
struct unit_weights {
    const float *s;            /* [32 keys][32 queries] */
    float *ds;                 /* likewise; becomes dS^T where `keep` */
    const float *lse, *delta;  /* [32] */
    const uint64_t *seen;      /* [32], of a key from bit 0 on the queries that see it; NULL: all do */
    uint16_t *p, *x, *pairs;   /* P^T and dS^T [32 keys][32 queries]; dS^T in pairs of keys, two tiles */
    float factor;
    int next;                  /* row; UNIT: it is done */
    bool keep;
};

/* Two rows. Queries lie in `pairs` as v_pair_mix_low leaves them. */
V_FN void weigh_rows(struct unit_weights *w, const bool masked)
{
    const int row = w->next;
    float *const ds = w->ds + row * UNIT;
    vf p[4], x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        p[i] = v_fms(v_load(w->s + row * UNIT + i * VF), v_set1(w->factor), v_load(w->lse + i % 2 * VF));
    v_pair_exp2_lookup(p, 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = v_mul(p[i], v_sub(v_load(ds + i * VF), v_load(w->delta + i % 2 * VF)));
        if (masked) {
            const unsigned seen = (unsigned)(w->seen[row + i / 2] >> i % 2 * VF) & V_ALL;
            p[i] = v_select(seen, p[i], v_zero());
            x[i] = v_select(seen, x[i], v_zero());
        }
    }
    for (int i = 0; i < 4 && w->keep; i++)
        v_store(ds + i * VF, x[i]);
    const vi a = v_pair_round(x[0], x[1]), b = v_pair_round(x[2], x[3]);
    unit_store(w->p + row * UNIT, v_pair_round(p[0], p[1]));
    unit_store(w->p + (row + 1) * UNIT, v_pair_round(p[2], p[3]));
    unit_store(w->x + row * UNIT, a);
    unit_store(w->x + (row + 1) * UNIT, b);
    unit_store(w->pairs + row / 2 * VP, v_pair_mix_low(a, b));
    unit_store(w->pairs + TILE + row / 2 * VP, v_pair_mix_high(a, b));
    w->next += 2;
}

static __attribute__((noinline)) void weigh_rest(struct unit_weights *w)
{
    while (w->next < UNIT && w->seen)
        weigh_rows(w, true);
    while (w->next < UNIT)
        weigh_rows(w, false);
}

/* s[32 keys][32 queries], of keys in rows of `width` and queries in pairs; beside them `rows` rows of another unit's
 * weights to every two products. */
V_FN void unit_scores(const uint16_t *keys, const uint16_t *queries, int width, float *s, struct unit_weights *w,
                      int rows, const bool masked)
{
    const uint16_t *const right = queries + TILE_ROWS * width;
    TILE_FENCE();
    sums_zero();
#pragma GCC unroll 4
    for (int i = 0; i < width; i += UNIT) {
        factors_load(keys + i, width * 2, queries + i * TILE_ROWS, right + i * TILE_ROWS);
        sums_add_upper();
        for (int r = 0; r < rows && w->next < UNIT; r += 2)
            weigh_rows(w, masked);
        sums_add_lower();
        for (int r = 0; r < rows && w->next < UNIT; r += 2)
            weigh_rows(w, masked);
    }
    sums_store(s, UNIT * 4);
    TILE_FENCE();
}

/* Functions of their own: inside a large one the compiler runs out of registers for addresses. */
static __attribute__((noinline)) void scores_alone(const uint16_t *keys, const uint16_t *queries, int width, float *s)
{
    struct unit_weights none = {.next = UNIT};
    if (width == 128)
        unit_scores(keys, queries, 128, s, &none, 0, false);
    else
        unit_scores(keys, queries, width, s, &none, 0, false);
}

static __attribute__((noinline)) void scores_beside(const uint16_t *keys, const uint16_t *queries, int width, float *s,
                                                    struct unit_weights *w)
{
    struct unit_weights here = *w;
    if (width == 128)
        unit_scores(keys, queries, 128, s, &here, 2, false);
    else
        unit_scores(keys, queries, width, s, &here, 2, false);
    w->next = here.next;
}

static __attribute__((noinline)) void scores_beside_masked(const uint16_t *keys, const uint16_t *queries, int width,
                                                           float *s, struct unit_weights *w)
{
    struct unit_weights here = *w;
    unit_scores(keys, queries, width, s, &here, 2, true);
    w->next = here.next;
}

/* w: what is to be done beside, or done already. */
static void find_scores(const uint16_t *keys, const uint16_t *queries, int width, float *s, struct unit_weights *w)
{
    if (w->next == UNIT)
        scores_alone(keys, queries, width, s);
    else if (w->seen)
        scores_beside_masked(keys, queries, width, s, w);
    else
        scores_beside(keys, queries, width, s, w);
}

/* ---- gradients ---- */

/* dq[32 dims][32 queries], rows of FWD_LANES, += over groups of 32 keys of K^T, whose tiles are `next` values from one
 * group to the next, times dS^T in pairs. fresh: nothing is there yet. */
static __attribute__((noinline)) void unit_dq(const uint16_t *columns, int next, const uint16_t *pairs, int groups,
                                              float *dq, bool fresh)
{
    TILE_FENCE();
    if (fresh)
        sums_zero();
    else
        sums_load(dq, FWD_LANES * 4);
    for (int g = 0; g < groups; g++, columns += next, pairs += 2 * TILE)
        sums_add(columns, TILE_STEP, pairs, pairs + TILE);
    sums_store(dq, FWD_LANES * 4);
    TILE_FENCE();
}

/* rows[key][32 columns from `column` on] += factor * sums, of rows of `width`. */
static void unit_add(float *const *rows, int keys, int column, int width, float factor, const float *sums)
{
    for (int v = 0; v < 2 && column < width; v++, column += VF) {
        const int n = nbhd_min(VF, width - column);
        for (int i = 0; i < keys; i++) {
            float *at = rows[i] + column;
            store_up_to(at, v_fma(v_set1(factor), v_load(sums + i * UNIT + v * VF), load_up_to(at, n)), n);
        }
    }
}
