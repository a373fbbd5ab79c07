/* Forward for large windows, in tiles of broadcast.inc.h:
 *
 *     S[key][64]    = Q[d][64]  * K[key][d]         6 keys x V_STRIP vectors of accumulators
 *     P[key][64]    = exp2(f S - running maximum)   maximum and sum run down the keys: no horizontal step
 *     O[column][64] = O * alpha + P[key][64] * V[key][column]
 *
 * for blocks of FWD_BLOCK keys of the box that is the union of the lanes' windows. A key that some lane does not see has
 * its score replaced there by -inf; if its value row holds a NaN or infinity, which 0 would not silence, it is added to
 * the lanes that see it one by one. Included by fwd.inc.h. */

/* ---- softmax of a block ---- */

/* Scores become probabilities relative to the new running maximum; alpha is what older sums are to be multiplied by.
 * The maximum is of factor * score: its own rounding is the same for all keys, so it cancels. */
V_FN void softmax_strip(float *s, int keys, float factor, float *maximum, float *sum, float *alpha, const int nv)
{
    vf m[V_STRIP], l[V_STRIP];
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++)
        m[v] = v_set1(-INFINITY);
    for (int i = 0; i < keys; i++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            m[v] = v_max(v_load(s + i * FWD_LANES + v * VF), m[v]);
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) {
        vf old = v_load(maximum + v * VF);
        m[v] = v_max(v_mul(m[v], v_set1(factor)), old);
        vf a = v_exp2(v_sub(old, m[v]));
        v_store(maximum + v * VF, m[v]);
        v_store(alpha + v * VF, a);
        l[v] = v_mul(a, v_load(sum + v * VF));
    }
    for (int i = 0; i < keys; i++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) {
            vf x = v_exp2(v_fms(v_load(s + i * FWD_LANES + v * VF), v_set1(factor), m[v]));
            l[v] = v_add(l[v], x);
            v_store(s + i * FWD_LANES + v * VF, x);
        }
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++)
        v_store(sum + v * VF, l[v]);
}

static void block_softmax(float *s, int keys, int vectors, float factor, float *maximum, float *sum, float *alpha)
{
    int v = 0;
    for (; v + V_STRIP <= vectors; v += V_STRIP)
        softmax_strip(s + v * VF, keys, factor, maximum + v * VF, sum + v * VF, alpha + v * VF, V_STRIP);
    for (; v < vectors; v++)
        softmax_strip(s + v * VF, keys, factor, maximum + v * VF, sum + v * VF, alpha + v * VF, 1);
}

/* ---- values that are not finite ---- */

/* Values that are not finite, of keys that some lane does not see: takes them out of the block's product and adds them
 * to the lanes that do. Rare, so plain. */
static int block_odd_values(struct key_block *b, uint64_t everyone, int columns, const float *zeros, int odd[FWD_BLOCK],
                            const float *odd_row[FWD_BLOCK])
{
    int n = 0;
    for (int i = 0; i < b->count; i++) {
        if (b->bits[i] == everyone || row_is_finite(b->v[i], columns))
            continue;
        odd[n] = i;
        odd_row[n++] = b->v[i];
        b->v[i] = zeros;
    }
    return n;
}

static void add_odd_value(float *ot, const float *p, const float *row, int columns, uint64_t bits)
{
    for (int lane = 0; lane < FWD_LANES; lane++)
        for (int c = 0; c < columns && (bits >> lane & 1); c++)
            ot[c * FWD_LANES + lane] += p[lane] * row[c];
}

/* ---- a tile ---- */

static void broadcast_tile(const struct nbhd_params *p, const struct nbhd_fwd *f, struct tile *t, char *scratch)
{
    float *qt = (float *)(scratch + f->at_q), *ot = (float *)(scratch + f->at_o), *s = (float *)(scratch + f->at_s);
    float *maximum = (float *)(scratch + f->at_lanes), *sum = maximum + FWD_LANES, *alpha = sum + FWD_LANES;
    struct key_block *b = (struct key_block *)(scratch + f->at_block);
    float factor = fabsf(p->scale) * LOG2E;
    char *rows[FWD_LANES];
    lane_rows(t, &p->q, rows);
    pack_queries(qt, FWD_LANES, (const char *const *)rows, f->dtype, t->lanes, t->vectors, p->head_dim, p->scale < 0.0f);
    memset(ot, 0, (size_t)p->head_dim_v * FWD_LANES * sizeof *ot);
    for (int i = 0; i < FWD_LANES; i++) {
        maximum[i] = -FLT_MAX;
        sum[i] = 0.0f;
    }
    struct key_walk walk = walk_begin(p, t);
    while (walk_block(p, t, &walk, b)) {
        if (f->dtype != NBHD_F32)
            unpack_block(b, f->dtype, p->head_dim, p->head_dim_v, (float *)(scratch + f->at_keys));
        int odd[FWD_BLOCK], odds = 0;
        const float *odd_row[FWD_BLOCK];
        block_scores(qt, p->head_dim, b->k, b->count, t->vectors, s);
        if (p->bias)
            block_bias(b, t, factor, s);
        if (b->masked) {
            block_mask(b, t->everyone, t->vectors, s);
            odds = block_odd_values(b, t->everyone, p->head_dim_v, (const float *)(scratch + f->at_zeros), odd, odd_row);
        }
        block_softmax(s, b->count, t->vectors, p->bias ? 1.0f : factor, maximum, sum, alpha);
        block_output(s, b->v, b->count, p->head_dim_v, t->vectors, alpha, ot);
        for (int i = 0; i < odds; i++)
            add_odd_value(ot, s + odd[i] * FWD_LANES, odd_row[i], p->head_dim_v, b->bits[odd[i]]);
    }
    lane_rows(t, &p->o, rows);
    unpack_outputs(ot, FWD_LANES, rows, f->dtype, t->lanes, t->vectors, p->head_dim_v, sum);
    if (!p->lse.data)
        return;
    lane_rows(t, &p->lse, rows);
    store_lse(rows, t->lanes, t->vectors, maximum, sum);
}

static void broadcast_task(const struct nbhd_params *p, const struct nbhd_fwd *f, long long task, char *scratch)
{
    struct tile t;
    memset(scratch + f->at_zeros, 0, (size_t)p->head_dim_v * sizeof(float));
    const long long end = (task + 1) * f->run < f->tiles ? (task + 1) * f->run : f->tiles;
    for (long long i = task * f->run; i < end; i++) {
        tile_number(&t, p, f, i);
        broadcast_tile(p, f, &t, scratch);
    }
}
