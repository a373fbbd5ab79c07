/* The products of fwd_pairs.inc.h by tiles, over the vocabulary of amx.h:
 *
 *     S[16 keys][16 lanes]    += K[16 keys][32 dims]    * Q[16 pairs of dims][16 lanes]
 *     O[16 columns][16 lanes] += V^T[16 columns][32 keys] * P[16 pairs of keys][16 lanes]
 *
 * so that Q and P lie in the pairs that the softmax makes anyway, and only V is transposed, once for a block.
 * Registers: 0 .. 3 sums, 2 x 2; 4, 5 the left factors; 6, 7 the right ones: four loads for four products. */

enum {
    TILE_ROWS = 16,
    STRIP = 2, /* vectors of lanes that products take at once */
    LANE_STEP = FWD_LANES * 4,  /* bytes between rows of lanes */
    VALUE_STEP = FWD_BLOCK * 2, /* bytes between columns of V^T */
    TILE_LANES = TILE_ROWS * FWD_LANES /* elements from a tile of lanes to the one below it */
};

NBHD_STATIC_ASSERT(FWD_BLOCK % VP == 0, "a block of keys is whole tiles");

static void pair_begin(void) { tile_begin(); }
static void pair_end(void) { tile_end(); }

/* What is done beside a strip's products, for every four of them: asking for rows ahead, and, where `soft`, `pairs` pairs of
 * keys of another strip's softmax. */
struct beside {
    struct pair_ahead *ahead;
    struct pair_softmax softmax;
    int pairs;
};

V_FN void do_beside(struct beside *x, const bool soft)
{
    ask_ahead(x->ahead);
    if (soft)
        softmax_some(&x->softmax, x->pairs, STRIP);
}

/* Scores of 32 keys for a strip of lanes. step: bytes between keys. */
V_FN void tile_scores(const uint32_t *qt, int d, const uint16_t *k, int step, float *s, struct beside *x, const bool soft)
{
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int i = 0; i < d; i += VP, qt += TILE_LANES) {
        TILE_LOAD(4, k + i, step);
        TILE_LOAD(6, qt, LANE_STEP);
        TILE_LOAD(7, qt + VF, LANE_STEP);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        TILE_LOAD(5, k + TILE_ROWS * step / 2 + i, step);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
        do_beside(x, soft);
    }
    TILE_STORE(0, s, LANE_STEP);
    TILE_STORE(1, s + VF, LANE_STEP);
    TILE_STORE(2, s + TILE_LANES, LANE_STEP);
    TILE_STORE(3, s + TILE_LANES + VF, LANE_STEP);
}

/* Keys past the last one, up to a multiple of 32, get scores of whatever their rows hold; nobody reads them. */
V_FN void strip_scores(const uint32_t *qt, int d, const uint16_t *keys, int count, float *s, struct beside *x,
                       const bool soft)
{
    const int step = (d + VP - 1) / VP * VP * 2;
    TILE_FENCE();
    for (int i = 0; i < count; i += VP)
        tile_scores(qt, d, keys + i * (step / 2), step, s + i * FWD_LANES, x, soft);
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
            v_pair_store((uint32_t *)(void *)(to + column * FWD_BLOCK + first), low[j]);
            v_pair_store((uint32_t *)(void *)(to + (column + 4) * FWD_BLOCK + first), high[j]);
        }
    }
}

static void pair_values(const struct key_block *b, int columns, uint16_t *to)
{
    for (int i = 0; i < b->count; i += VP)
        transpose_values(b, i, columns, to);
}

/* 32 columns for a strip of lanes. */
V_FN void tile_output(const uint32_t *p, int keys, const uint16_t *values, float *o, struct beside *x, const bool soft)
{
    TILE_LOAD(0, o, LANE_STEP);
    TILE_LOAD(1, o + VF, LANE_STEP);
    TILE_LOAD(2, o + TILE_LANES, LANE_STEP);
    TILE_LOAD(3, o + TILE_LANES + VF, LANE_STEP);
    for (int i = 0; i < keys; i += VP, p += TILE_LANES) {
        TILE_LOAD(4, values + i, VALUE_STEP);
        TILE_LOAD(6, p, LANE_STEP);
        TILE_LOAD(7, p + VF, LANE_STEP);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        TILE_LOAD(5, values + TILE_ROWS * FWD_BLOCK + i, VALUE_STEP);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
        do_beside(x, soft);
    }
    TILE_STORE(0, o, LANE_STEP);
    TILE_STORE(1, o + VF, LANE_STEP);
    TILE_STORE(2, o + TILE_LANES, LANE_STEP);
    TILE_STORE(3, o + TILE_LANES + VF, LANE_STEP);
}

/* Before the output of a strip: what O holds already, and zeros for keys that fill up a tile. */
static void strip_prepare(uint32_t *p, int keys, int columns, const float *alpha, bool moved, float *ot)
{
    for (int i = (keys + 1) / 2; i < (keys + VP - 1) / VP * VF; i++)
        for (int v = 0; v < STRIP; v++)
            v_pair_store(p + i * FWD_LANES + v * VF, v_pair_zero());
    for (int c = 0; c < columns && moved; c++)
        for (int v = 0; v < STRIP; v++) {
            float *at = ot + c * FWD_LANES + v * VF;
            v_store(at, v_mul(v_load(at), v_load(alpha + v * VF)));
        }
}

V_FN void strip_output(const uint32_t *p, int keys, const uint16_t *values, int columns, float *ot, struct beside *x,
                       const bool soft)
{
    TILE_FENCE();
    for (int c = 0; c < columns; c += VP)
        tile_output(p, keys, values + c * FWD_BLOCK, ot + c * FWD_LANES, x, soft);
    TILE_FENCE();
}

/* ---- what fwd_pairs.inc.h asks for; the strips of a tile of one or three vectors work on lanes that nobody has ---- */

/* How many pairs of keys to do beside every four products so that they last: `width` is of those products. */
static int pairs_beside(int keys, int width)
{
    const int steps = (keys + VP - 1) / VP * ((width + VP - 1) / VP);
    return ((keys + 1) / 2 + steps - 1) / steps;
}

V_FN bool strip_begin(struct beside *b, struct pair_slot *x, struct pair_scratch *c, float factor, int lane)
{
    return softmax_begin(&b->softmax, c->s + lane, c->b->count, factor, x->reference + lane, x->sum + lane, x->alpha + lane, STRIP);
}

static void pair_scores(struct pair_slot *x, struct pair_scratch *c, int d)
{
    struct beside b = {.ahead = &c->ahead};
    for (int lane = 0; lane < x->tile.lanes; lane += STRIP * VF)
        strip_scores(x->qt + lane, d, c->keys, c->b->count, c->s + lane, &b, false);
}

/* The outputs, given the first strip's pairs; of a second one the softmax is done beside the first's output. */
static void strips_output(struct pair_slot *x, struct pair_scratch *c, int columns, float factor, bool moved)
{
    const int keys = c->b->count, second = STRIP * VF;
    uint32_t *p = (uint32_t *)(void *)c->s;
    struct beside b = {.ahead = &c->ahead, .pairs = pairs_beside(keys, columns)};
    strip_prepare(p, keys, columns, x->alpha, moved, x->ot);
    if (x->tile.lanes <= second) {
        strip_output(p, keys, c->values, columns, x->ot, &b, false);
        return;
    }
    moved = strip_begin(&b, x, c, factor, second);
    strip_output(p, keys, c->values, columns, x->ot, &b, true);
    softmax_end(&b.softmax, x->sum + second, STRIP);
    strip_prepare(p + second, keys, columns, x->alpha + second, moved, x->ot + second);
    strip_output(p + second, keys, c->values, columns, x->ot + second, &b, false);
}

static void pair_finish(struct pair_slot *x, struct pair_scratch *c, int columns, float factor)
{
    struct beside b = {.ahead = &c->ahead};
    const bool moved = strip_begin(&b, x, c, factor, 0);
    softmax_end(&b.softmax, x->sum, STRIP);
    strips_output(x, c, columns, factor, moved);
}

/* Tiles and vectors work side by side: the first strip's softmax beside the second's scores. */
static void pair_plain(struct pair_slot *x, struct pair_scratch *c, int d, int columns, float factor)
{
    const int keys = c->b->count, second = STRIP * VF;
    struct beside b = {.ahead = &c->ahead, .pairs = pairs_beside(keys, d)};
    strip_scores(x->qt, d, c->keys, keys, c->s, &b, false);
    const bool moved = strip_begin(&b, x, c, factor, 0);
    if (x->tile.lanes > second)
        strip_scores(x->qt + second, d, c->keys, keys, c->s + second, &b, true);
    softmax_end(&b.softmax, x->sum, STRIP);
    strips_output(x, c, columns, factor, moved);
}
