/* Forward for large windows, in tiles of tiles.inc.h:
 *
 *     S[key][64]    = Q[d][64]  * K[key][d]         6 keys x V_STRIP vectors of accumulators
 *     P[key][64]    = exp2(f S - running maximum)   maximum and sum run down the keys: no horizontal step
 *     O[column][64] = O * alpha + P[key][64] * V[key][column]
 *
 * for blocks of FWD_BLOCK keys of the box that is the union of the lanes' windows. A key that some lane does not see
 * has its score replaced there by -inf; if its value row holds a NaN or infinity, which 0 would not silence, it is
 * added to the lanes that see it one by one. Included by fwd.inc.h. */

/* Lanes go by strips of V_STRIP vectors, each with its rows of queries, scores and outputs side by side, and each done
 * with a block of keys before the next begins. */
enum { STRIP = V_STRIP * VF };

/* ---- softmax of a block ---- */

/* Scores become probabilities relative to the new running maximum; alpha is what older sums are to be multiplied by.
 * The maximum is of factor * score: its own rounding is the same for all keys, so it cancels. */
V_FN void softmax_vectors(float *s, int keys, float factor, float *maximum, float *sum, float *alpha, const int nv)
{
    vf m[V_STRIP], l[V_STRIP];
    strip_maximum(s, STRIP, keys, m, nv);
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
            vf x = v_exp2(v_fms(v_load(s + i * STRIP + v * VF), v_set1(factor), m[v]));
            l[v] = v_add(l[v], x);
            v_store(s + i * STRIP + v * VF, x);
        }
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++)
        v_store(sum + v * VF, l[v]);
}

static void strip_softmax(float *s, int keys, float factor, float *maximum, float *sum, float *alpha, int nv)
{
    if (nv == V_STRIP)
        softmax_vectors(s, keys, factor, maximum, sum, alpha, V_STRIP);
    else
        for (int v = 0; v < nv; v++)
            softmax_vectors(s + v * VF, keys, factor, maximum + v * VF, sum + v * VF, alpha + v * VF, 1);
}

/* ---- values that are not finite ---- */

/* Values of a block that its product leaves out: they are added to the lanes that see them, one by one. Rare: plain. */
struct odd_values {
    int count, key[FWD_BLOCK];
    const float *row[FWD_BLOCK];
};

/* Of keys that some lane does not see. */
static void take_odd_values(struct key_block *b, uint64_t everyone, int columns, const float *zeros,
                            struct odd_values *odd)
{
    for (int i = 0; i < b->count; i++) {
        if (b->bits[i] == everyone || row_is_finite(b->v[i], columns))
            continue;
        odd->key[odd->count] = i;
        odd->row[odd->count++] = b->v[i];
        b->v[i] = zeros;
    }
}

/* bits, p and ot are of the strip's lanes. */
static void add_odd_value(float *ot, const float *p, const float *row, int columns, uint64_t bits)
{
    for (int lane = 0; lane < STRIP; lane++)
        for (int c = 0; c < columns && (bits >> lane & 1); c++)
            ot[c * STRIP + lane] += p[lane] * row[c];
}

/* Puts back what take_odd_values took. */
static void return_odd_values(struct key_block *b, const struct odd_values *odd)
{
    for (int i = 0; i < odd->count; i++)
        b->v[odd->key[i]] = odd->row[i];
}

/* ---- tiles ---- */

/* A tile on its way through its keys. Tiles that see the same keys, and bands (take_tiles), go through them together,
 * block by block: keys come from far away once for all of them, and 16-bit ones are unpacked once. */
struct slot {
    struct tile tile;
    struct key_walk walk;
    bool whole; /* all its lanes see the same keys */
    float *qt, *ot, *lanes; /* lanes: maximum, sum, alpha */
};

/* Of a strip of lanes. */
struct strip {
    int first, vectors; /* of the tile's vectors */
    float *qt, *ot, *maximum, *sum, *alpha;
};

static struct strip strip_at(const struct nbhd_params *p, const struct slot *x, int first)
{
    float *lanes = x->lanes + first * VF;
    return (struct strip){first,
                          nbhd_min(V_STRIP, x->tile.vectors - first),
                          x->qt + first * VF * p->head_dim,
                          x->ot + first * VF * p->head_dim_v,
                          lanes,
                          lanes + FWD_LANES,
                          lanes + 2 * FWD_LANES};
}

static void begin_strip(const struct nbhd_params *p, int dtype, const struct tile *t, const struct strip *x,
                        char *const *rows)
{
    const int lane = x->first * VF;
    pack_queries(x->qt, STRIP, (const char *const *)rows + lane, dtype, t->lanes - lane, x->vectors, p->head_dim,
                 p->scale < 0.0f);
    memset(x->ot, 0, (size_t)p->head_dim_v * STRIP * sizeof *x->ot);
    for (int i = 0; i < STRIP; i++) {
        x->maximum[i] = -FLT_MAX;
        x->sum[i] = 0.0f;
    }
}

static void slot_begin(struct slot *x, const struct nbhd_params *p, int dtype)
{
    char *rows[FWD_LANES];
    lane_rows(&x->tile, &p->q, rows);
    for (int v = 0; v < x->tile.vectors; v += V_STRIP) {
        const struct strip strip = strip_at(p, x, v);
        begin_strip(p, dtype, &x->tile, &strip, rows);
    }
    x->walk = walk_begin(p, &x->tile);
    x->whole = !p->bias && sees_alike(&x->tile);
}

static void slot_end(const struct slot *x, const struct nbhd_params *p, int dtype)
{
    const struct tile *t = &x->tile;
    char *rows[FWD_LANES];
    lane_rows(t, &p->o, rows);
    for (int v = 0; v < t->vectors; v += V_STRIP) {
        const struct strip strip = strip_at(p, x, v);
        unpack_outputs(strip.ot, STRIP, rows + v * VF, dtype, t->lanes - v * VF, strip.vectors, p->head_dim_v,
                       strip.sum);
    }
    if (!p->lse.data)
        return;
    const struct strip strip = strip_at(p, x, 0);
    lane_rows(t, &p->lse, rows);
    store_lse(rows, t->lanes, t->vectors, strip.maximum, strip.sum);
}

static void strip_block(const struct nbhd_params *p, const struct tile *t, const struct strip *x,
                        const struct key_block *b, const struct odd_values *odd, bool masked, bool far,
                        struct rows_ahead *ahead, float *s)
{
    const float factor = fabsf(p->scale) * LOG2E;
    qk_strip(x->qt, p->head_dim, b->k, b->count, s, STRIP, x->vectors, PANEL_FLOATS,
             far && x->first == 0, ahead);
    if (p->bias)
        strip_bias(b, 0, b->count, t, factor, s, STRIP, x->first, x->vectors);
    if (masked)
        strip_mask(b, 0, b->count, t->everyone, s, STRIP, x->first, x->vectors);
    strip_softmax(s, b->count, p->bias ? 1.0f : factor, x->maximum, x->sum, x->alpha, x->vectors);
    pv_strip(s, b->v, b->count, p->head_dim_v, x->alpha, x->ot, STRIP, x->vectors, ahead);
    for (int i = 0; i < odd->count; i++)
        add_odd_value(x->ot, s + odd->key[i] * STRIP, odd->row[i], p->head_dim_v,
                      b->bits[odd->key[i]] >> (x->first * VF));
}

/* far: this tile is the first to see the block. */
static void slot_block(const struct slot *x, const struct nbhd_params *p, struct key_block *b, const float *zeros,
                       bool far, struct rows_ahead *ahead, float *s)
{
    const bool masked = b->masked && !x->whole;
    struct odd_values odd;
    odd.count = 0;
    if (masked)
        take_odd_values(b, x->tile.everyone, p->head_dim_v, zeros, &odd);
    for (int v = 0; v < x->tile.vectors; v += V_STRIP) {
        const struct strip strip = strip_at(p, x, v);
        strip_block(p, &x->tile, &strip, b, &odd, masked, far, ahead, s);
    }
    return_odd_values(b, &odd);
}

/* The block `first` as another slot's lanes see it that goes through the same keys. */
static struct key_block *slot_keys(struct slot *x, const struct nbhd_params *p, struct key_block *first,
                                   struct key_block *own)
{
    if (x->whole) {
        if (nbhd_counters)
            nbhd_count_visits(first->count - first->extra, 0);
        return first;
    }
    walk_block(p, &x->tile, &x->walk, own);
    memcpy(own->k, first->k, (size_t)first->count * sizeof *own->k); /* where they are unpacked */
    memcpy(own->v, first->v, (size_t)first->count * sizeof *own->v);
    return own;
}

/* Of a band's block the keys that some lane of the tile sees, in `own`. b may be `own`. */
static struct key_block *seen_keys(const struct key_block *b, struct key_block *own)
{
    const int count = b->count;
    int n = 0;
    for (int i = 0; i < count; i++) {
        if (!b->bits[i])
            continue;
        own->k[n] = b->k[i];
        own->v[n] = b->v[i];
        own->bias[n] = b->bias[i];
        own->bits[n++] = b->bits[i];
    }
    own->count = n;
    own->masked = b->masked;
    return own;
}

/* The block `next`, to be asked for while n tiles of so many vectors work on `keys` keys. */
static struct rows_ahead ask_for(const struct key_block *next, int keys, int n, int vectors,
                                 const struct nbhd_params *p, int dtype)
{
    const int size = dtype == NBHD_F32 ? 4 : 2, k = p->head_dim * size, v = p->head_dim_v * size;
    struct rows_ahead a = {.row = {next->k, next->v}, .kinds = 2, .count = next->count, .bytes = {k, v}};
    pace_rows(&a, ask_beats(keys, p->head_dim_v) * n * ((vectors + V_STRIP - 1) / V_STRIP));
    return a;
}

/* Keys that each lie on a page of their own, and all in one set of the first-level cache: as with many heads. */
static bool far_apart(const struct nbhd_params *p)
{
    enum { PAGE = 4096 };
    return p->k.axis[2] * p->axis[2].dilation >= PAGE;
}

static void run_slots(struct slot *slots, int n, const struct nbhd_params *p, const struct nbhd_fwd *f, char *scratch)
{
    struct key_block *now = (struct key_block *)(scratch + f->at_block), *next = now + 1, *own = now + 2;
    const bool copy = n >= FWD_COPY_TILES && far_apart(p);
    for (int i = 0; i < n; i++)
        slot_begin(&slots[i], p, f->dtype);
    bool more = walk_block(p, &slots[0].tile, &slots[0].walk, now);
    while (more) {
        more = walk_block(p, &slots[0].tile, &slots[0].walk, next);
        if (f->dtype != NBHD_F32 || copy)
            unpack_block(now, f->dtype, p->head_dim, p->head_dim_v, f->key_step, (float *)(scratch + f->at_keys));
        struct rows_ahead ahead = ask_for(next, now->count, n, slots[0].tile.vectors, p, f->dtype);
        for (int i = 0; i < n; i++) {
            struct key_block *keys = i ? slot_keys(&slots[i], p, now, own) : now;
            if (f->band > 1 && keys->masked && !slots[i].whole)
                keys = seen_keys(keys, own);
            if (keys->count)
                slot_block(&slots[i], p, keys, (const float *)(scratch + f->at_zeros), i == 0, &ahead,
                           (float *)(scratch + f->at_s));
        }
        struct key_block *swap = now;
        now = next;
        next = swap;
    }
    for (int i = 0; i < n; i++)
        slot_end(&slots[i], p, f->dtype);
}

static void broadcast_task(const struct nbhd_params *p, const struct nbhd_fwd *f, long long task, char *scratch)
{
    struct slot slots[FWD_TILES];
    struct tile *tiles[FWD_TILES];
    memset(scratch + f->at_zeros, 0, (size_t)p->head_dim_v * sizeof(float));
    for (int i = 0; i < f->together; i++) {
        slots[i].qt = (float *)(scratch + f->at_q + (size_t)i * f->q_size);
        slots[i].ot = (float *)(scratch + f->at_o + (size_t)i * f->o_size);
        slots[i].lanes = (float *)(scratch + f->at_lanes) + 3 * FWD_LANES * i;
        tiles[i] = &slots[i].tile;
    }
    const long long end = (task + 1) * f->run < f->tiles ? (task + 1) * f->run : f->tiles;
    int n;
    for (long long i = task * f->run; i < end; i += n) {
        n = take_tiles(tiles, f->together, p, f, i, end);
        run_slots(slots, n, p, f, scratch);
    }
}
