/* The products of fwd_pairs.inc.h by dot products of pairs: microkernels of V_ROWS x V_STRIP vectors of accumulators,
 * as those of broadcast.inc.h, but a step is a pair of dimensions, or of keys. Values of a block lie as [key
 * pair][column], a pair each, in rows of a multiple of VP columns. */

/* s[n keys][nv vectors] (+)= sum over the pairs begin <= i < end; rows of k are `step` pairs apart. begin 0 sets,
 * others add. */
V_FN void dots_scores(const uint32_t *qt, int begin, int end, const uint32_t *k, int step, float *s, const int n,
                      const int nv)
{
    vf acc[V_ROWS][V_STRIP];
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            acc[r][v] = begin ? v_load(s + r * FWD_LANES + v * VF) : v_zero();
    for (int i = begin; i < end; i++) {
        vi q[V_STRIP];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            q[v] = v_pair_load(qt + i * FWD_LANES + v * VF);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) {
            const vi key = v_pair_set1(k + r * step + i);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                acc[r][v] = v_pair_dot(acc[r][v], q[v], key);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            v_store(s + r * FWD_LANES + v * VF, acc[r][v]);
}

/* Of qt, so many rows at once as leave half of a first-level cache of 32 KiB to the rest. */
enum { PANEL_PAIRS = 16384 / (FWD_LANES * (int)sizeof(uint32_t)) };

V_FN void dots_scores_panel(const uint32_t *qt, int d, const uint32_t *k, int keys, float *s, const int nv)
{
    const int pairs = (d + 1) / 2, step = (d + VP - 1) / VP * VF;
    for (int begin = 0; begin < pairs; begin += PANEL_PAIRS) {
        const int end = nbhd_min(begin + PANEL_PAIRS, pairs);
        int i = 0;
        for (; i + V_ROWS <= keys; i += V_ROWS)
            dots_scores(qt, begin, end, k + i * step, step, s + i * FWD_LANES, V_ROWS, nv);
        if (i + 4 <= keys) {
            dots_scores(qt, begin, end, k + i * step, step, s + i * FWD_LANES, 4, nv);
            i += 4;
        }
        for (; i < keys; i++)
            dots_scores(qt, begin, end, k + i * step, step, s + i * FWD_LANES, 1, nv);
    }
}

/* ot[n columns][nv vectors] = alpha * ot + sum over key pairs of p[pair][nv vectors] * value[pair][column]. */
V_FN void dots_output(const uint32_t *p, const uint32_t *value, int step, int pairs, const float *alpha, float *ot,
                      const int n, const int nv)
{
    vf acc[V_ROWS][V_STRIP];
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) {
        const vf a = v_load(alpha + v * VF);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++)
            acc[r][v] = v_mul(a, v_load(ot + r * FWD_LANES + v * VF));
    }
    for (int i = 0; i < pairs; i++) {
        vi x[V_STRIP];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            x[v] = v_pair_load(p + i * FWD_LANES + v * VF);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) {
            const vi y = v_pair_set1(value + i * step + r);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                acc[r][v] = v_pair_dot(acc[r][v], x[v], y);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            v_store(ot + r * FWD_LANES + v * VF, acc[r][v]);
}

V_FN void dots_output_panel(const uint32_t *p, const uint32_t *value, int columns, int pairs, const float *alpha,
                            float *ot, const int nv)
{
    const int step = (columns + VP - 1) / VP * VP;
    int c = 0;
    for (; c + V_ROWS <= columns; c += V_ROWS)
        dots_output(p, value + c, step, pairs, alpha, ot + c * FWD_LANES, V_ROWS, nv);
    if (c + 4 <= columns) {
        dots_output(p, value + c, step, pairs, alpha, ot + c * FWD_LANES, 4, nv);
        c += 4;
    }
    if (c + 2 <= columns) {
        dots_output(p, value + c, step, pairs, alpha, ot + c * FWD_LANES, 2, nv);
        c += 2;
    }
    if (c < columns)
        dots_output(p, value + c, step, pairs, alpha, ot + c * FWD_LANES, 1, nv);
}

/* ---- what fwd_pairs.inc.h asks for ---- */

static void pair_begin(void) {}
static void pair_end(void) {}

static void dots_block_scores(struct pair_slot *x, struct pair_scratch *c, int d)
{
    const uint32_t *k = (const uint32_t *)(const void *)c->keys;
    const int keys = c->b->count;
    switch (x->tile.vectors) {
    case 4: dots_scores_panel(x->qt, d, k, keys, c->s, 4); break;
    case 3: dots_scores_panel(x->qt, d, k, keys, c->s, 3); break;
    case 2: dots_scores_panel(x->qt, d, k, keys, c->s, 2); break;
    default: dots_scores_panel(x->qt, d, k, keys, c->s, 1); break;
    }
}

static void pair_values(const struct key_block *b, int columns, uint16_t *to)
{
    const int step = (columns + VP - 1) / VP * VP;
    uint32_t *pairs = (uint32_t *)(void *)to;
    for (int i = 0; i < b->count; i += 2, pairs += step) {
        const uint16_t *x = (const uint16_t *)(const void *)b->v[i];
        const uint16_t *y = (const uint16_t *)(const void *)b->v[i + 1];
        for (int c = 0; c < columns; c += VP) {
            const int n = nbhd_min(VP, columns - c);
            const vi low = v_pair_load_part(x + c, n);
            const vi high = i + 1 < b->count ? v_pair_load_part(y + c, n) : v_pair_zero();
            v_pair_store(pairs + c, v_pair_zip_low(low, high));
            v_pair_store(pairs + c + VF, v_pair_zip_high(low, high));
        }
    }
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

static void pair_block(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                       struct pair_scratch *c, bool unlike)
{
    (void)follow;
    const uint32_t *pairs = (const uint32_t *)(const void *)c->s, *value = (const uint32_t *)(const void *)c->values;
    const int keys = c->b->count, count = (keys + 1) / 2, vectors = x->tile.vectors, columns = p->head_dim_v;
    const float factor = score_factor(p);
    dots_block_scores(x, c, p->head_dim);
    if (unlike)
        scores_finish(x, p, c->b, 0, keys, c->s);
    if (vectors == V_STRIP)
        dots_softmax(x, c, factor, 0, V_STRIP);
    for (int v = 0; v < vectors && vectors < V_STRIP; v++)
        dots_softmax(x, c, factor, v, 1);
    switch (vectors) {
    case 4: dots_output_panel(pairs, value, columns, count, x->alpha, x->ot, 4); break;
    case 3: dots_output_panel(pairs, value, columns, count, x->alpha, x->ot, 3); break;
    case 2: dots_output_panel(pairs, value, columns, count, x->alpha, x->ot, 2); break;
    default: dots_output_panel(pairs, value, columns, count, x->alpha, x->ot, 1); break;
    }
    add_odd_pairs(x, c, columns, pairs, 0, keys);
}
