/* The products of fwd_pairs.inc.h by dot products of pairs: the microkernels of broadcast.inc.h, with a pair of
 * dimensions, or of keys, for a float. Values of a block lie as [key pair][column], a pair each, in rows of a multiple
 * of VP columns. */

static void pair_begin(void) {}
static void pair_end(void) {}

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
    qk_strip((const float *)(const void *)x->qt, (d + 1) / 2, row, keys, c->s, FWD_LANES, vectors, false, NULL);
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
