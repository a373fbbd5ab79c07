/* The products of fwd_pairs.inc.h by tiles, over the vocabulary of amx.h, with queries in rows:
 *
 *     S[16 queries][16 keys]    += Q[16 queries][32 dims] * K^T[16 pairs of dims][16 keys]
 *     O[16 queries][16 columns] += P[16 queries][32 keys] * V[16 pairs of keys][16 columns]
 *
 * so that Q, P and O lie in their natural order. K is transposed and V's rows are paired, once for a block, in tiles of
 * 1 KiB: K as [16 keys][32 dims], V as [32 keys][16 columns]. O's columns lie as v_pair_mix_low leaves those of V. */
#include "cpu/amx_sums.inc.h"
#include "cpu/amx_softmax.inc.h"

enum {
    SCORE_STEP = GROUP * 4,
    SCORES = 2 * UNIT + FWD_GROUPS * UNIT / 2 /* floats of c->s: scores of two units, probabilities of all */
};

NBHD_STATIC_ASSERT(WALK_KEYS % GROUP == 0 && WALK_KEYS / GROUP <= FWD_GROUPS, "a block's probabilities fit c->s");

static void pair_begin(void) { tile_begin(); }
static void pair_end(void) { tile_end(); }

/* ---- rows of tensors ---- */

static int pair_beats(const struct pair_slot *x, int keys, const struct nbhd_params *p)
{
    const int halves = (x->tile.lanes + UNIT_ROWS - 1) / UNIT_ROWS;
    return halves * ((keys + GROUP - 1) / GROUP + padded(p->head_dim_v) / VP);
}

static uint16_t *slot_queries(const struct pair_slot *x) { return (uint16_t *)(void *)x->qt; }

/* [SUMS], twice, after the outputs. */
static float *slot_sums(const struct pair_slot *x, int columns, int turn)
{
    return x->ot + padded(columns) * FWD_LANES + (turn & 1) * SUMS;
}

/* [query][dimension], zeros from d up to a multiple of VP, and in rows up to a multiple of UNIT_ROWS. */
static void pair_queries(struct pair_slot *x, const struct nbhd_params *p)
{
    char *rows[FWD_LANES];
    uint16_t *to = slot_queries(x);
    const int d = p->head_dim, end = (x->tile.lanes + UNIT_ROWS - 1) / UNIT_ROWS * UNIT_ROWS;
    lane_rows(&x->tile, &p->q, rows);
    for (int lane = 0; lane < end; lane++)
        for (int i = 0; i < d; i += VP, to += VP)
            v_pair_store((uint32_t *)(void *)to,
                         pair_load(rows[nbhd_min(lane, x->tile.lanes - 1)], lane < x->tile.lanes, i, d));
    for (int lane = x->tile.lanes; lane < end; lane++)
        x->reference[lane] = 0; /* as their scores: it need not move */
    memset(slot_sums(x, p->head_dim_v, 0), 0, SUMS * sizeof(float));
    x->turn = 0;
    x->fresh = true;
}

/* Rows that are not there are zeros, so are keys up to a multiple of GROUP. */
static void pack_keys(const float *const *row, int count, int d, uint16_t *to)
{
    const int end = (count + GROUP - 1) / GROUP * GROUP;
    for (int key = 0; key < end; key += VF)
        for (int i = 0; i < d; i += VP) {
            vi x[VF];
            for (int k = 0; k < VF; k++) {
                const float *from = row[nbhd_min(key + k, count - 1)];
                x[k] = pair_load(from, from && key + k < count, i, d);
            }
            v_pair_transpose(x);
            for (int k = 0; k < VF; k++, to += VP)
                v_pair_store((uint32_t *)(void *)to, x[k]);
        }
}

static void pack_values(const float *const *row, int count, int columns, uint16_t *to)
{
    for (int key = 0; key < count; key += GROUP, to += GROUP * padded(columns))
        for (int i = 0; i < TILE_ROWS; i++) {
            const int even = key + 2 * i, odd = even + 1;
            const float *const first = even < count ? row[even] : NULL, *const second = odd < count ? row[odd] : NULL;
            uint16_t *at = to + i * VP;
            for (int c = 0; c < columns; c += VP, at += 2 * TILE) {
                const vi low = pair_load(first, first != NULL, c, columns);
                const vi high = pair_load(second, second != NULL, c, columns);
                v_pair_store((uint32_t *)(void *)at, v_pair_mix_low(low, high));
                v_pair_store((uint32_t *)(void *)(at + TILE), v_pair_mix_high(low, high));
            }
        }
}

static void pair_keys(const struct key_block *b, int d, uint16_t *to) { pack_keys(b->k, b->count, d, to); }

static void pair_values(const struct key_block *b, int columns, uint16_t *to)
{
    pack_values(b->v, b->count, columns, to);
}

static void pair_outputs(struct pair_slot *x, const struct nbhd_params *p)
{
    const struct tile *t = &x->tile;
    const int columns = p->head_dim_v;
    char *rows[FWD_LANES];
    lane_rows(t, &p->o, rows);
    for (int lane = 0; lane < t->lanes; lane += VF) {
        vf sums[VF];
        for (int i = 0; i < VF; i++)
            sums[i] = v_load(slot_sums(x, columns, x->turn) + (lane + i) * VF);
        v_transpose(sums);
        for (int i = 1; i < VF; i++)
            sums[0] = v_add(sums[0], sums[i]);
        v_store(x->sum + lane, sums[0]);
    }
    for (int lane = 0; lane < t->lanes; lane++) {
        const float *o = x->ot + lane * padded(columns);
        uint16_t *to = (uint16_t *)(void *)rows[lane];
        const vf factor = v_set1(1.0f / x->sum[lane]);
        for (int c = 0; c < columns; c += VP) {
            const vi row = v_pair_round(v_mul(factor, v_load(o + c)), v_mul(factor, v_load(o + c + VF)));
            v_pair_store_part(to + c, v_pair_unmix(row), nbhd_min(VP, columns - c));
        }
    }
}

/* ---- scores ---- */

/* What is done beside the products of a unit's scores: asking for rows ahead, and of the softmax of the unit before
 * `rows` rows after the first two of four products, two fewer after the others: some are better left for afterwards, as
 * most vectors have one of their two ports beside tiles (docs/notes/cpu-bf16.md). */
struct beside {
    struct pair_ahead *ahead;
    struct row_softmax softmax;
    int rows;
};

enum softmax_kind { SOFTMAX_NONE, SOFTMAX_WHOLE, SOFTMAX_MASKED };

V_FN void softmax_beside(struct row_softmax *x, int rows, const enum softmax_kind kind)
{
    for (int i = 0; kind != SOFTMAX_NONE && i < rows && x->next < UNIT_ROWS; i += 2)
        softmax_rows(x, kind == SOFTMAX_MASKED);
}

/* How many, an even number, so that they last for all products. */
static int rows_beside(int d) { return (UNIT_ROWS / 2 - 1) / (2 * padded(d) / VP) * 2 + 2; }

/* s[32 queries][32 keys], of queries and keys of `d` dimensions, a multiple of VP. */
V_FN void unit_scores(const uint16_t *q, const uint16_t *k, int d, float *s, struct beside *x,
                      const enum softmax_kind kind)
{
    const uint16_t *const right = k + TILE_ROWS * d;
    struct row_softmax softmax = x->softmax;
    TILE_FENCE();
    sums_zero();
#pragma GCC unroll 4
    for (int i = 0; i < d; i += VP) {
        factors_load(q + i, d * 2, k + i * TILE_ROWS, right + i * TILE_ROWS);
        sums_add_upper();
        softmax_beside(&softmax, x->rows, kind);
        sums_add_lower();
        softmax_beside(&softmax, x->rows - 2, kind);
    }
    ask_ahead(x->ahead);
    sums_store(s, SCORE_STEP);
    TILE_FENCE();
    x->softmax.next = softmax.next;
    x->softmax.top = softmax.top;
}

/* Functions of their own: inside a large one the compiler runs out of registers for addresses. 128 dimensions, the
 * most usual, are worth constants. */
static __attribute__((noinline)) void scores_alone(const uint16_t *q, const uint16_t *k, int d, float *s,
                                                   struct beside *x)
{
    if (d == 128)
        unit_scores(q, k, 128, s, x, SOFTMAX_NONE);
    else
        unit_scores(q, k, d, s, x, SOFTMAX_NONE);
}

static __attribute__((noinline)) void scores_beside(const uint16_t *q, const uint16_t *k, int d, float *s,
                                                    struct beside *x)
{
    if (d == 128)
        unit_scores(q, k, 128, s, x, SOFTMAX_WHOLE);
    else
        unit_scores(q, k, d, s, x, SOFTMAX_WHOLE);
}

static __attribute__((noinline)) void scores_beside_masked(const uint16_t *q, const uint16_t *k, int d, float *s,
                                                           struct beside *x)
{
    if (d == 128)
        unit_scores(q, k, 128, s, x, SOFTMAX_MASKED);
    else
        unit_scores(q, k, d, s, x, SOFTMAX_MASKED);
}

/* ---- output ---- */

/* O of 32 queries and 32 columns, in rows of `step` bytes, nothing yet where it is fresh; p: the rows' probabilities, a
 * UNIT for 32 keys; values: of each group of keys, of which the columns begin at value `at`. */
static __attribute__((noinline)) void unit_output(const uint16_t *p, int groups, const uint16_t *const *values, int at,
                                                  float *o, int step, bool fresh, struct pair_ahead *ahead)
{
    if (fresh)
        sums_zero();
    else
        sums_load(o, step);
    for (int i = 0; i < groups; i++, p += UNIT)
        sums_add(p, TILE_STEP, values[i] + at, values[i] + at + TILE);
    ask_ahead(ahead);
    sums_store(o, step);
}

/* Of the values that are not in c->values: pair_odd_values. p: the probabilities of the queries from `first` on. */
static void add_odd_values(struct pair_slot *x, const struct pair_scratch *c, const uint16_t *p, int first, int columns)
{
    for (int i = 0; i < c->odds; i++) {
        const int key = c->odd[i];
        for (int lane = first; lane < first + UNIT_ROWS; lane++) {
            const uint16_t *weight = p + key / GROUP * UNIT + (lane - first) * GROUP + key % GROUP;
            for (int at = 0; at < columns && (c->b->bits[key] >> lane & 1); at++) {
                const int place = at % VP / 8 * 4 + at % 4 + at % 8 / 4 * VF; /* see v_pair_mix_low */
                x->ot[lane * padded(columns) + at / VP * VP + place] +=
                    nbhd_from_bf16(*weight) * nbhd_from_bf16(c->odd_row[i][at]);
            }
        }
    }
}

/* Of the UNIT_ROWS queries from `lane` on. */
static void half_output(struct pair_slot *x, struct pair_scratch *c, const uint16_t *p, int groups, int lane,
                        int columns)
{
    const int step = padded(columns);
    TILE_FENCE();
    for (int i = 0; i < columns; i += VP)
        unit_output(p, groups, c->v, i * GROUP, x->ot + lane * step + i, step * 4, x->fresh, &c->ahead);
    TILE_FENCE();
    add_odd_values(x, c, p, lane, columns);
}

/* ---- a block ---- */

/* A tile and the `groups` groups of keys of c->k. Half of its queries go through all of them, then the other: their
 * queries, and a block's probabilities, stay in the first-level cache. The scores of a unit are made beside the softmax
 * of the one before it, those of the next tile's first unit beside the last. c->s holds the scores of two units, then
 * the probabilities of a half. */
static void groups_block(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                         struct pair_scratch *c, int groups)
{
    const int d = padded(p->head_dim), columns = padded(p->head_dim_v);
    const int units = groups * ((x->tile.lanes + UNIT_ROWS - 1) / UNIT_ROWS);
    const float factor = p->scale * LOG2E;
    float *const ring = c->s;
    uint16_t *const probabilities = (uint16_t *)(void *)(c->s + 2 * UNIT);
    struct beside b = {.ahead = &c->ahead, .rows = rows_beside(d)};
    struct row_softmax *const softmax = &b.softmax;
    softmax->factor = v_set1(p->bias ? 1.0f : factor);
    if (!c->scored)
        scores_alone(slot_queries(x), c->k[0], d, ring + c->ring * UNIT, &b);
    for (int u = 0; u < units; u++, c->ring = 1 - c->ring) {
        const int group = u % groups, lane = u / groups * UNIT_ROWS;
        float *const s = ring + c->ring * UNIT, *const next = ring + (1 - c->ring) * UNIT;
        float *const o = x->ot + lane * columns;
        if (p->bias)
            unit_bias(c->b, group * GROUP, &x->tile, lane, factor, s);
        softmax->s = s;
        softmax->first = probabilities;
        softmax->p = probabilities + group * UNIT;
        softmax->reference = x->reference + lane;
        softmax->from = slot_sums(x, p->head_dim_v, x->turn + group) + lane * VF;
        softmax->to = slot_sums(x, p->head_dim_v, x->turn + group + 1) + lane * VF;
        softmax->seen = c->seen[group] ? c->seen[group] + lane : NULL;
        if (x->reference[lane] == -FLT_MAX)
            move_references(softmax, o, columns);
        softmax_begin(softmax);
        const bool last = u + 1 == units;
        const struct pair_slot *of = last ? follow : x;
        if (of) {
            const uint16_t *q = slot_queries(of) + (last ? 0 : (u + 1) / groups * UNIT_ROWS * d);
            const uint16_t *k = c->k[last ? 0 : (u + 1) % groups];
            if (softmax->seen)
                scores_beside_masked(q, k, d, next, &b);
            else
                scores_beside(q, k, d, next, &b);
        }
        softmax_rest(softmax);
        if (softmax_exceeds(softmax)) { /* once more, with higher references */
            move_references(softmax, o, columns);
            softmax_begin(softmax);
            softmax_rest(softmax);
        }
        if (group + 1 == groups)
            half_output(x, c, probabilities, groups, lane, p->head_dim_v);
    }
    x->turn += groups;
    x->fresh = false;
    c->scored = follow != NULL;
}

static void pair_block(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                       struct pair_scratch *c, bool unlike)
{
    const int groups = (c->b->count + GROUP - 1) / GROUP;
    uint32_t bits[WALK_KEYS / GROUP][FWD_LANES];
    for (int g = 0; g < groups; g++) {
        c->k[g] = c->keys + g * GROUP * padded(p->head_dim);
        c->v[g] = c->values + g * GROUP * padded(p->head_dim_v);
        c->seen[g] = group_seen(c->b, g * GROUP, x->tile.everyone, unlike, bits[g]);
    }
    groups_block(x, follow, p, c, groups);
}
