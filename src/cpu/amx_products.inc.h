/* The products of fwd_pairs.inc.h by tiles, over the vocabulary of amx.h:
 *
 *     S[16 keys][16 lanes]    += K[16 keys][32 dims]    * Q[16 pairs of dims][16 lanes]
 *     O[16 columns][16 lanes] += V^T[16 columns][32 keys] * P[16 pairs of keys][16 lanes]
 *
 * so that Q and P lie in the pairs that the softmax makes anyway, and only V is transposed, once for a block.
 * Registers: 0 .. 3 sums, 2 x 2; 4, 5 the left factors; 6, 7 the right ones: four loads for four products. */

enum {
    TILE_ROWS = 16,
    GROUP = VP, /* keys whose scores are made at once */
    STRIP = 2,  /* vectors of lanes that products take at once */
    STRIP_LANES = STRIP * VF,
    LANE_STEP = FWD_LANES * 4,  /* bytes between rows of lanes */
    VALUE_STEP = WALK_KEYS * 2, /* bytes between columns of V^T */
    TILE_LANES = TILE_ROWS * FWD_LANES, /* elements from a tile of lanes to the one below it */
    GROUP_SCORES = GROUP * FWD_LANES
};

NBHD_STATIC_ASSERT(WALK_KEYS % GROUP == 0 && WALK_KEYS >= 4 * GROUP,
                   "pairs of all keys and scores of two groups fit c->s");

static void pair_begin(void) { tile_begin(); }
static void pair_end(void) { tile_end(); }

/* What is done beside products, for every two of them: asking for rows ahead, and `pairs` pairs of keys of the softmax
 * of the group before. Vectors have one of their two ports then: docs/notes/cpu-bf16.md. */
struct beside {
    struct pair_ahead *ahead;
    struct pair_softmax softmax;
    int pairs;
};

V_FN void softmax_beside(struct beside *x, const int nv)
{
    for (int i = 0; i < x->pairs && x->softmax.next < GROUP; i++)
        softmax_pair(&x->softmax, false, nv);
}

/* How many, so that they last for all products of a group's scores. */
static int pairs_beside(int d, int nv)
{
    const int halves = 2 * (nv / STRIP) * ((d + VP - 1) / VP);
    return (GROUP / 2 + halves - 1) / halves;
}

/* Scores of 32 keys, in rows of `step` bytes, for a strip of lanes. soft: vectors of the softmax beside it, or none. */
V_FN void tile_scores(const uint32_t *qt, int d, const uint16_t *k, int step, float *s, struct beside *x,
                      const int soft)
{
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int i = 0; i < d; i += VP, qt += TILE_LANES) {
        TILE_LOAD(4, k + i, step);
        TILE_LOAD(6, qt, LANE_STEP);
        TILE_LOAD(7, qt + VF, LANE_STEP);
        TILE_LOAD(5, k + TILE_ROWS * step / 2 + i, step);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        if (soft)
            softmax_beside(x, soft);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
        if (soft)
            softmax_beside(x, soft);
        ask_ahead(x->ahead);
    }
    TILE_STORE(0, s, LANE_STEP);
    TILE_STORE(1, s + VF, LANE_STEP);
    TILE_STORE(2, s + TILE_LANES, LANE_STEP);
    TILE_STORE(3, s + TILE_LANES + VF, LANE_STEP);
}

V_FN void group_scores(const struct pair_slot *x, int d, const uint16_t *keys, float *s, struct beside *b, const int nv,
                       const int soft)
{
    const int step = (d + VP - 1) / VP * VP * 2;
    TILE_FENCE();
    for (int lane = 0; lane < nv * VF; lane += STRIP_LANES)
        tile_scores(x->qt + lane, d, keys, step, s + lane, b, soft);
    TILE_FENCE();
}

/* to[column][key], for 32 keys from `first` on; those past the block's last are zeros. */
static void transpose_values(const struct key_block *b, int first, int columns, uint16_t *to)
{
    for (int c = 0; c < columns; c += VP) {
        const int n = nbhd_min(VP, columns - c);
        vi low[VF], high[VF];
        for (int i = 0; i < VF; i++) {
            const int key = first + 2 * i;
            const uint16_t *x = (const uint16_t *)(const void *)b->v[key];
            const uint16_t *y = (const uint16_t *)(const void *)b->v[key + 1];
            const vi even = key < b->count ? v_pair_load_part(x + c, n) : v_pair_zero();
            const vi odd = key + 1 < b->count ? v_pair_load_part(y + c, n) : v_pair_zero();
            low[i] = v_pair_mix_low(even, odd);
            high[i] = v_pair_mix_high(even, odd);
        }
        v_pair_transpose(low);
        v_pair_transpose(high);
        for (int j = 0; j < VF; j++) {
            const int column = c + j / 4 * 8 + j % 4; /* see v_pair_mix_low */
            v_pair_store((uint32_t *)(void *)(to + column * WALK_KEYS + first), low[j]);
            v_pair_store((uint32_t *)(void *)(to + (column + 4) * WALK_KEYS + first), high[j]);
        }
    }
}

static void pair_values(const struct key_block *b, int columns, uint16_t *to)
{
    for (int i = 0; i < b->count; i += VP)
        transpose_values(b, i, columns, to);
}

/* Of keys [begin, end), whole tiles: 32 columns for a strip of lanes. */
V_FN void tile_output(const uint32_t *p, int begin, int end, const uint16_t *values, float *o, struct beside *x)
{
    TILE_LOAD(0, o, LANE_STEP);
    TILE_LOAD(1, o + VF, LANE_STEP);
    TILE_LOAD(2, o + TILE_LANES, LANE_STEP);
    TILE_LOAD(3, o + TILE_LANES + VF, LANE_STEP);
    for (int i = begin; i < end; i += VP) {
        const uint32_t *at = p + i / 2 * FWD_LANES;
        TILE_LOAD(4, values + i, VALUE_STEP);
        TILE_LOAD(6, at, LANE_STEP);
        TILE_LOAD(7, at + VF, LANE_STEP);
        TILE_LOAD(5, values + TILE_ROWS * WALK_KEYS + i, VALUE_STEP);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
        ask_ahead(x->ahead);
    }
    TILE_STORE(0, o, LANE_STEP);
    TILE_STORE(1, o + VF, LANE_STEP);
    TILE_STORE(2, o + TILE_LANES, LANE_STEP);
    TILE_STORE(3, o + TILE_LANES + VF, LANE_STEP);
}

static void group_output(struct pair_slot *x, const struct pair_scratch *c, int columns, int begin, int end, int nv,
                         struct beside *b)
{
    const uint32_t *pairs = (const uint32_t *)(const void *)c->s;
    if (begin >= end)
        return;
    TILE_FENCE();
    for (int i = 0; i < columns; i += VP)
        for (int lane = 0; lane < nv * VF; lane += STRIP_LANES)
            tile_output(pairs + lane, begin, end, c->values + i * WALK_KEYS, x->ot + i * FWD_LANES + lane, b);
    TILE_FENCE();
    add_odd_pairs(x, c, columns, pairs, begin, end);
}

static void scale_output(struct pair_slot *x, int columns, int nv)
{
    for (int i = 0; i < columns; i++)
        for (int v = 0; v < nv; v++) {
            float *at = x->ot + i * FWD_LANES + v * VF;
            v_store(at, v_mul(v_load(at), v_load(x->alpha + v * VF)));
        }
}

/* A group's scores before their softmax: keys that fill up a tile count as unseen. */
V_FN void group_finish(struct pair_slot *x, const struct nbhd_params *p, const struct key_block *b, int first, float *s,
                       bool unlike)
{
    const int end = nbhd_min(first + GROUP, b->count);
    if (unlike)
        scores_finish(x, p, b, first, end, s);
    for (float *at = s + (end - first) * FWD_LANES; at < s + GROUP_SCORES; at += VF)
        v_store(at, v_set1(-INFINITY));
}

/* nv: vectors of lanes, 2 or 4; those of a tile of one or three work on lanes that nobody has. The scores of a group
 * are made beside the softmax of the group before it, those of the next tile's first group beside the last. c->s holds
 * the pairs of all keys, then the scores of two groups. */
V_FN void block_in_groups(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                          struct pair_scratch *c, bool unlike, const int nv)
{
    const int count = c->b->count, d = p->head_dim, columns = p->head_dim_v;
    const int step = (d + VP - 1) / VP * VP;
    const float factor = score_factor(p);
    uint32_t *pairs = (uint32_t *)(void *)c->s;
    float *const ring = c->s + WALK_KEYS / 2 * FWD_LANES;
    float *s = ring + c->ring * GROUP_SCORES, *next = ring + (1 - c->ring) * GROUP_SCORES;
    struct beside b = {.ahead = &c->ahead, .pairs = pairs_beside(d, nv)};
    int from = 0; /* keys that are not in the output yet */
    if (!c->scored)
        group_scores(x, d, c->keys, s, &b, nv, 0);
    group_finish(x, p, c->b, 0, s, unlike);
    c->scored = follow != NULL;
    for (int key = 0; key < count; key += GROUP) {
        uint32_t *to = pairs + key / 2 * FWD_LANES;
        softmax_begin(&b.softmax, s, to, factor, x->reference, x->sum, nv);
        if (key + GROUP < count) {
            group_scores(x, d, c->keys + (key + GROUP) * step, next, &b, nv, nv);
            group_finish(x, p, c->b, key + GROUP, next, unlike);
        } else if (follow) {
            group_scores(follow, d, c->keys, next, &b, nv, nv);
        }
        while (b.softmax.next < GROUP)
            softmax_pair(&b.softmax, false, nv);
        if (softmax_exceeds(&b.softmax, nv)) { /* once more, with a higher reference */
            if (move_reference(s, GROUP, factor, x->reference, x->sum, x->alpha, nv)) {
                group_output(x, c, columns, from, key, nv, &b);
                scale_output(x, columns, nv);
                from = key;
            }
            softmax_begin(&b.softmax, s, to, factor, x->reference, x->sum, nv);
            while (b.softmax.next < GROUP)
                softmax_pair(&b.softmax, false, nv);
        }
        softmax_end(&b.softmax, x->sum, nv);
        float *swap = s;
        s = next;
        next = swap;
    }
    c->ring = s != ring;
    group_output(x, c, columns, from, (count + VP - 1) / VP * VP, nv, &b);
}

static void block_of_strip(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                           struct pair_scratch *c, bool unlike)
{
    block_in_groups(x, follow, p, c, unlike, STRIP);
}

static void block_of_strips(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                            struct pair_scratch *c, bool unlike)
{
    block_in_groups(x, follow, p, c, unlike, 2 * STRIP);
}

static void pair_block(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                       struct pair_scratch *c, bool unlike)
{
    const bool narrow = x->tile.vectors <= STRIP;
    if (follow && narrow != (follow->tile.vectors <= STRIP))
        follow = NULL;
    if (narrow)
        block_of_strip(x, follow, p, c, unlike);
    else
        block_of_strips(x, follow, p, c, unlike);
}
