/* The products of fwd_pairs.inc.h by dot products of pairs: the microkernels of broadcast.inc.h, with a pair of
 * dimensions, or of keys, for a float. Lanes are queries, as there:
 *
 *     S[key][64]      = sum over pairs of dimensions of Q[pair][64] * K[key][pair]
 *     P[key pair][64] = exp2(f S - reference)
 *     O[column][64]   = O * alpha + sum over pairs of keys of P[pair][64] * V[pair][column]
 *
 * Values of a block lie as [key pair][column], a pair each, in rows of a multiple of VP columns. */

static void pair_begin(void) {}
static void pair_end(void) {}

static void run_slots(struct pair_slot *slots, int n, const struct nbhd_params *p, struct pair_scratch *c);

static void pair_slots(struct pair_slot *slots, int n, const struct nbhd_params *p, const struct nbhd_fwd *f,
                       struct pair_scratch *c)
{
    (void)f;
    run_slots(slots, n, p, c);
}

/* Never. */
static int pair_beats(const struct pair_slot *x, int keys, const struct nbhd_params *p)
{
    (void)x, (void)keys, (void)p;
    return 1;
}

/* ---- rows of tensors ---- */

/* qt[pair][lane], zeros in lanes that no query has, up to an even number of vectors, and in dimensions from d up to a
 * multiple of VP. */
static void pack_query_pairs(uint32_t *qt, const char *const *rows, int lanes, int vectors, int d, bool negate)
{
    for (int v = 0; v < vectors + vectors % 2; v++)
        for (int i = 0; i < d; i += VP) {
            vi x[VF];
            for (int l = 0; l < VF; l++) {
                const int lane = v * VF + l;
                x[l] = v_pair_zero();
                if (lane < lanes)
                    x[l] = v_pair_load_part((const uint16_t *)(const void *)rows[lane] + i, nbhd_min(VP, d - i));
                if (negate)
                    x[l] = v_pair_negate(x[l]);
            }
            v_pair_transpose(x);
            for (int j = 0; j < VF; j++)
                v_pair_store(qt + (i / 2 + j) * FWD_LANES + v * VF, x[j]);
        }
}

static void pair_queries(struct pair_slot *x, const struct nbhd_params *p)
{
    char *rows[FWD_LANES];
    lane_rows(&x->tile, &p->q, rows);
    pack_query_pairs(x->qt, (const char *const *)rows, x->tile.lanes, x->tile.vectors, p->head_dim, p->scale < 0.0f);
    memset(x->ot, 0, (size_t)((p->head_dim_v + VP - 1) / VP * VP) * FWD_LANES * sizeof *x->ot);
}

/* to[key][dimension], zeros from d up to a multiple of VP. */
static void pair_keys(const struct key_block *b, int d, uint16_t *to)
{
    for (int i = 0; i < b->count; i++)
        for (int c = 0; c < d; c += VP, to += VP)
            v_pair_store((uint32_t *)(void *)to,
                         v_pair_load_part((const uint16_t *)(const void *)b->k[i] + c, nbhd_min(VP, d - c)));
}

static void pair_values(const struct key_block *b, int columns, uint16_t *to)
{
    const int step = (columns + VP - 1) / VP * VP;
    uint32_t *pairs = (uint32_t *)(void *)to;
    for (int i = 0; i < b->count; i += 2, pairs += step) {
        for (int c = 0; c < columns; c += VP) {
            const vi low = pair_load(b->v[i], true, c, columns);
            const vi high = pair_load(b->v[i + 1], i + 1 < b->count, c, columns);
            v_pair_store(pairs + c, v_pair_zip_low(low, high));
            v_pair_store(pairs + c + VF, v_pair_zip_high(low, high));
        }
    }
}

static void pair_outputs(struct pair_slot *x, const struct nbhd_params *p)
{
    const struct tile *t = &x->tile;
    char *rows[FWD_LANES];
    lane_rows(t, &p->o, rows);
    unpack_outputs(x->ot, FWD_LANES, rows, NBHD_BF16, t->lanes, t->vectors, p->head_dim_v, x->sum);
}

/* ---- softmax ---- */

/* Scores s[key][lane] become pairs of probabilities p[key / 2][lane], which may be the same memory. One pair of keys at
 * a time, so that it can be done beside products. */
struct pair_softmax {
    const float *s;
    uint32_t *p;
    int next; /* key */
    vf factor, m[V_STRIP], l[V_STRIP], top[V_STRIP];
};

/* With the reference as it is; softmax_exceeds tells afterwards whether it will do. */
V_FN void softmax_begin(struct pair_softmax *x, const float *s, uint32_t *p, float factor, const float *reference,
                        const float *sum, const int nv)
{
    x->s = s;
    x->p = p;
    x->next = 0;
    x->factor = v_set1(factor);
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) {
        x->m[v] = v_load(reference + v * VF);
        x->l[v] = v_load(sum + v * VF);
        x->top[v] = v_set1(-INFINITY);
    }
}

/* Of the next pair of keys, vectors v .. v + n - 1 for n <= 2. single: it is a last key with none beside it. */
V_FN void softmax_vectors(struct pair_softmax *x, const bool single, const int v, const int n)
{
    const float *at = x->s + x->next * FWD_LANES + v * VF;
    uint32_t *to = x->p + x->next / 2 * FWD_LANES + v * VF;
    const int both = single ? n : 2 * n;
    vf e[4];
#pragma GCC unroll 4
    for (int i = 0; i < both; i++) {
        e[i] = v_fms(v_load(at + i / n * FWD_LANES + i % n * VF), x->factor, x->m[v + i % n]);
        x->top[v + i % n] = v_max(e[i], x->top[v + i % n]);
    }
    v_pair_exp2(e, both);
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) {
        const vf second = single ? v_zero() : e[n + i];
        x->l[v + i] = v_add(x->l[v + i], v_add(e[i], second));
        v_pair_store(to + i * VF, v_pair_of(e[i], second));
    }
}

V_FN void softmax_pair(struct pair_softmax *x, const bool single, const int nv)
{
    const int n = nv < 2 ? 1 : 2;
#pragma GCC unroll 2
    for (int v = 0; v < nv; v += n)
        softmax_vectors(x, single, v, n);
    x->next += 2;
}

/* Some score exceeds its lane's reference by more than PAIR_SLACK. */
V_FN bool softmax_exceeds(const struct pair_softmax *x, const int nv)
{
    unsigned higher = 0;
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++)
        higher |= v_less(v_set1(PAIR_SLACK), x->top[v]);
    return higher != 0;
}

V_FN void softmax_end(const struct pair_softmax *x, float *sum, const int nv)
{
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++)
        v_store(sum + v * VF, x->l[v]);
}

/* Moves the reference of lanes where a score exceeds it by more than PAIR_SLACK, multiplies the sums by alpha, and says
 * whether O must be too: not where those lanes have seen no key yet. */
V_FN bool move_reference(const float *s, int keys, float factor, float *reference, float *sum, float *alpha,
                         const int nv)
{
    unsigned moved = 0;
    vf m[V_STRIP];
    strip_maximum(s, FWD_LANES, keys, m, nv);
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) {
        const vf old = v_load(reference + v * VF), top = v_mul(m[v], v_set1(factor));
        const unsigned higher = v_less(v_add(old, v_set1(PAIR_SLACK)), top);
        const vf now = v_select(higher, top, old), a = v_exp2(v_sub(old, now));
        moved |= higher & v_less(v_set1(-FLT_MAX), old);
        v_store(reference + v * VF, now);
        v_store(alpha + v * VF, a);
        v_store(sum + v * VF, v_mul(a, v_load(sum + v * VF)));
    }
    return moved != 0;
}

/* ---- a block ---- */

static void add_odd_pair(float *ot, const uint32_t *p, int key, const uint16_t *row, int columns, uint64_t bits)
{
    for (int lane = 0; lane < FWD_LANES; lane++)
        for (int c = 0; c < columns && (bits >> lane & 1); c++) {
            const uint16_t weight = (uint16_t)(p[key / 2 * FWD_LANES + lane] >> key % 2 * 16);
            ot[c * FWD_LANES + lane] += nbhd_from_bf16(weight) * nbhd_from_bf16(row[c]);
        }
}

/* Scores s of keys [begin, end) of the block get the bias, and -infinity in lanes that do not see the key. */
static void scores_finish(const struct pair_slot *x, const struct nbhd_params *p, const struct key_block *b, int begin,
                          int end, float *s)
{
    if (p->bias)
        strip_bias(b, begin, end, &x->tile, fabsf(p->scale) * LOG2E, s, FWD_LANES, 0, x->tile.vectors);
    strip_mask(b, begin, end, x->tile.everyone, s, FWD_LANES, 0, x->tile.vectors);
}

/* What the softmax multiplies scores by, in powers of two. */
static float score_factor(const struct nbhd_params *p) { return p->bias ? 1.0f : fabsf(p->scale) * LOG2E; }

/* Of the keys [begin, end) of the block, given its pairs of probabilities. */
static void add_odd_pairs(struct pair_slot *x, const struct pair_scratch *c, int columns, const uint32_t *pairs,
                          int begin, int end)
{
    for (int i = 0; i < c->odds; i++)
        if (c->odd[i] >= begin && c->odd[i] < end)
            add_odd_pair(x->ot, pairs, c->odd[i], c->odd_row[i], columns, c->b->bits[c->odd[i]]);
}

/* nv vectors of lanes from vector v on. */
V_FN void dots_softmax(struct pair_slot *x, struct pair_scratch *c, float factor, int v, const int nv)
{
    struct pair_softmax softmax;
    const int lane = v * VF, keys = c->b->count;
    float *s = c->s + lane;
    move_reference(s, keys, factor, x->reference + lane, x->sum + lane, x->alpha + lane, nv);
    softmax_begin(&softmax, s, (uint32_t *)(void *)s, factor, x->reference + lane, x->sum + lane, nv);
    while (softmax.next + 1 < keys)
        softmax_pair(&softmax, false, nv);
    if (softmax.next < keys)
        softmax_pair(&softmax, true, nv);
    softmax_end(&softmax, x->sum + lane, nv);
}

/* rows[i] = row i of so many pairs each. */
static void pair_rows(const uint16_t *at, int rows, int pairs, const float **row)
{
    for (int i = 0; i < rows; i++)
        row[i] = (const float *)(const void *)at + i * pairs;
}

static void pair_block(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                       struct pair_scratch *c, bool unlike)
{
    (void)follow;
    const int keys = c->b->count, pairs = (keys + 1) / 2, d = p->head_dim, columns = p->head_dim_v;
    const int vectors = x->tile.vectors;
    const float factor = score_factor(p);
    const float *row[WALK_KEYS];
    pair_rows(c->keys, keys, (d + VP - 1) / VP * VF, row);
    qk_strip((const float *)(const void *)x->qt, (d + 1) / 2, row, keys, c->s, FWD_LANES, vectors, PANEL_FLOATS,
             false, NULL);
    if (unlike)
        scores_finish(x, p, c->b, 0, keys, c->s);
    if (vectors == V_STRIP)
        dots_softmax(x, c, factor, 0, V_STRIP);
    for (int v = 0; v < vectors && vectors < V_STRIP; v++)
        dots_softmax(x, c, factor, v, 1);
    pair_rows(c->values, pairs, (columns + VP - 1) / VP * VP, row);
    pv_strip(c->s, row, pairs, columns, x->alpha, x->ot, FWD_LANES, vectors, NULL);
    add_odd_pairs(x, c, columns, (const uint32_t *)(const void *)c->s, 0, keys);
}
