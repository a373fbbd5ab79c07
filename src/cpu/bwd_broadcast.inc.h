/* Backward for large windows, in tiles of tiles.inc.h. Five products of one microkernel shape, none with a
 * transposed key:
 *
 *     S[key][64]   = Qt[d][64]  * K[key][d]            dP[key][64] = dOt[d][64] * V[key][d]
 *     P = exp2(factor S - lse)                         dS = P (scale dP - scale delta)
 *     dV[key][d]  += P[key][q]  * dO[q][d]             dK[key][d] += dS[key][q] * Q[q][d]
 *     dQt[d][64]  += dS[key][64] * K[key][d]
 *
 * K, V, dK and dV are used where they lie (16-bit K and V are unpacked block by block); a tile keeps Q and dO both as
 * they lie, unpacked, and transposed. dK and dV are added to in memory, once for each tile and block of FWD_BLOCK keys.
 * What a lane does not see has P = dS = 0. A zero does not silence a NaN or infinity on the other side of a product, so
 * in masked blocks such key rows count as zeros (lanes that see one have a NaN in P or dS anyway), and so do such rows
 * of Q and dO, whose lanes are given a NaN for P instead. What comes next is asked for with each microkernel: a task's
 * first tile asks for its next block, the others, which find their keys in the second-level cache, for the next tile's
 * rows. Included by bwd.inc.h. */

/* ---- P and dS of a block ---- */

struct bwd_tile {
    struct tile tile;
    float *qt, *dt, *dqt; /* [d][64] */
    float *q, *d;         /* in strips */
    float *s, *ds;        /* [FWD_BLOCK][64] */
    float *lse, *delta;   /* [64]; in the units of s and ds */
    const float *ones, *zeros;
    float *keys; /* unpacked K and V of a block */
    const float *after[3][FWD_LANES]; /* rows of the tile after this one */
};

/* S becomes P, and dP dS. */
static void block_weights(const struct bwd_tile *t, const struct key_block *b, float factor, float scale)
{
    const int vectors = t->tile.vectors;
    for (int v = 0; v < vectors; v++) {
        const vf lse = v_load(t->lse + v * VF), delta = v_load(t->delta + v * VF);
        float *s = t->s + v * VF, *ds = t->ds + v * VF;
        for (int i = 0; i < b->count; i++, s += FWD_LANES, ds += FWD_LANES) {
            vf p = v_exp2(v_fms(v_load(s), v_set1(factor), lse));
            vf x = v_mul(p, v_fms(v_load(ds), v_set1(scale), delta));
            if (b->masked) {
                const unsigned bits = (unsigned)(b->bits[i] >> (v * VF)) & V_ALL;
                p = v_select(bits, p, v_zero());
                x = v_select(bits, x, v_zero());
            }
            v_store(s, p);
            v_store(ds, x);
        }
    }
}

/* Adds dS to the bias table's gradient, lane by lane: lanes may share an entry. */
static void block_bias_gradient(const struct bwd_tile *t, const struct key_block *b, const float *table, float *sums)
{
    for (int i = 0; i < b->count; i++) {
        if (!b->bias[i])
            continue;
        const long long at = b->bias[i] - table;
        for (int lane = 0; lane < t->tile.lanes; lane++)
            if (b->bits[i] >> lane & 1)
                sums[at + t->tile.bias[lane]] += t->ds[i * FWD_LANES + lane];
    }
}

/* Key rows that are not finite count as zeros in dS * K. */
static void silence_keys(struct key_block *b, uint64_t everyone, int width, const float *zeros)
{
    for (int i = 0; i < b->count; i++)
        if (b->bits[i] != everyone && !row_is_finite(b->k[i], width))
            b->k[i] = zeros;
}

/* ---- a tile ---- */

/* A row into strips, as float32. false: it is not finite. */
static bool load_strips(float *x, int lane, const char *row, int dtype, int n)
{
    vf test = v_zero();
    for (int i = 0; i < n; i += VF) {
        const vf part = v_load_as(row, dtype, i, nbhd_min(VF, n - i));
        test = v_fma(part, v_zero(), test);
        v_store(strip_at(x, lane, i), part);
    }
    return v_is_nan(test) == 0;
}

static void zero_strips(float *x, int lane, int n)
{
    for (int i = 0; i < n; i += VF)
        v_store(strip_at(x, lane, i), v_zero());
}

/* xt[i][lane] = x[lane][i] */
static void transpose_strips(float *xt, float *x, int vectors, int n)
{
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < n; i += VF) {
            vf part[VF];
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++)
                part[l] = v_load(strip_at(x, v * VF + l, i));
            v_transpose(part);
            for (int j = 0; j < VF && i + j < n; j++)
                v_store(xt + (i + j) * FWD_LANES + v * VF, part[j]);
        }
}

/* Queries, output gradients, logsumexps and deltas in. */
static void load_tile(const struct bwd_task *task, struct bwd_tile *t)
{
    const struct bwd_call *c = task->call;
    const struct nbhd_params *p = c->p;
    uint64_t odd = 0;
    for (int lane = 0; lane < t->tile.lanes; lane++) {
        const int *x = t->tile.token[lane], head = t->tile.head[lane];
        const char *dout = nbhd_view_at(&p->dout, task->batch, x, head);
        float lse;
        memcpy(&lse, nbhd_view_at(&p->lse, task->batch, x, head), sizeof lse);
        t->lse[lane] = lse * LOG2E;
        t->delta[lane] = p->scale * find_delta(task, x, head);
        const bool fine = load_strips(t->q, lane, nbhd_view_at(&p->q, task->batch, x, head), c->dtype, p->head_dim);
        if (!load_strips(t->d, lane, dout, c->dtype, p->head_dim_v) || !fine)
            odd |= 1ull << lane;
    }
    for (int lane = t->tile.lanes; lane < t->tile.vectors * VF; lane++)
        t->lse[lane] = t->delta[lane] = 0;
    transpose_strips(t->qt, t->q, t->tile.vectors, p->head_dim);
    transpose_strips(t->dt, t->d, t->tile.vectors, p->head_dim_v);
    for (int lane = 0; odd >> lane && lane < t->tile.lanes; lane++)
        if (odd >> lane & 1) {
            zero_strips(t->q, lane, p->head_dim);
            zero_strips(t->d, lane, p->head_dim_v);
            t->lse[lane] = NAN;
        }
    memset(t->dqt, 0, (size_t)p->head_dim * FWD_LANES * sizeof(float));
}

/* dq out: stored, or added to what earlier rounds have summed. */
static void store_tile(const struct bwd_task *task, const struct bwd_tile *t)
{
    const struct bwd_call *c = task->call;
    const bool add = !task->first;
    const int dtype = c->b->sum_dq ? NBHD_F32 : c->dtype;
    char *rows[FWD_LANES];
    lane_rows(&t->tile, &c->dq, rows);
    for (int v = 0; v < t->tile.vectors; v++)
        for (int i = 0; i < c->p->head_dim; i += VF) {
            const int n = nbhd_min(c->p->head_dim - i, VF);
            vf x[VF];
#pragma GCC unroll 16
            for (int j = 0; j < VF; j++)
                x[j] = j < n ? v_load(t->dqt + (i + j) * FWD_LANES + v * VF) : v_zero();
            v_transpose(x);
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++)
                if (v * VF + l < t->tile.lanes) {
                    char *row = rows[v * VF + l];
                    v_store_as(row, dtype, i, add ? v_add(x[l], v_load_as(row, dtype, i, n)) : x[l], n);
                }
        }
}

/* Calls of microkernels that ask, for one block of so many keys. */
static int block_beats(const struct bwd_task *task, const struct tile *t, int keys)
{
    const struct nbhd_params *p = task->call->p;
    const int strips = (t->vectors + V_STRIP - 1) / V_STRIP, columns = p->head_dim + p->head_dim_v;
    return strips * (2 * (keys / V_ROWS) + p->head_dim / V_ROWS) + columns / KV_STRIP * (keys / V_ROWS);
}

/* The block `next`, while one of so many keys is worked on. */
static struct rows_ahead ask_for_keys(const struct bwd_task *task, const struct tile *t, const struct bwd_block *next,
                                      int keys)
{
    const struct nbhd_params *p = task->call->p;
    const int size = task->call->dtype == NBHD_F32 ? 4 : 2;
    struct rows_ahead a = {.row = {next->keys.k, (const float *const *)next->dk, next->keys.v,
                                   (const float *const *)next->dv},
                           .kinds = 4,
                           .count = next->keys.count,
                           .bytes = {p->head_dim * size, p->head_dim * 4, p->head_dim_v * size, p->head_dim_v * 4}};
    pace_rows(&a, block_beats(task, t, keys));
    return a;
}

/* What load_tile and store_tile will read of the tile `after`, or of none, in so many blocks of this one. */
static struct rows_ahead ask_for_tile(const struct bwd_task *task, struct bwd_tile *t, const struct tile *after,
                                      int blocks)
{
    const struct bwd_call *c = task->call;
    const struct nbhd_params *p = c->p;
    const struct nbhd_view *sums = task->first ? &p->o : &c->dq;
    const int size = c->dtype == NBHD_F32 ? 4 : 2, sum = c->b->sum_dq && !task->first ? 4 : size;
    struct rows_ahead a = {.row = {t->after[0], t->after[1], t->after[2]},
                           .kinds = 3,
                           .count = after ? after->lanes : 0,
                           .bytes = {p->head_dim * size, p->head_dim_v * size,
                                     task->first ? p->head_dim_v * size : p->head_dim * sum}};
    for (int i = 0; i < a.count; i++) {
        const int *token = after->token[i], head = after->head[i];
        t->after[0][i] = (const float *)(const void *)nbhd_view_at(&p->q, task->batch, token, head);
        t->after[1][i] = (const float *)(const void *)nbhd_view_at(&p->dout, task->batch, token, head);
        t->after[2][i] = (const float *)(const void *)nbhd_view_at(sums, task->batch, token, head);
    }
    pace_rows(&a, blocks * block_beats(task, &t->tile, WALK_KEYS));
    return a;
}

static void tile_block(const struct bwd_task *task, struct bwd_tile *t, struct bwd_block *block,
                       struct rows_ahead *ahead)
{
    const struct bwd_call *c = task->call;
    const struct nbhd_params *p = c->p;
    const float factor = p->scale * LOG2E;
    struct key_block *b = &block->keys;
    if (c->dtype != NBHD_F32)
        unpack_block(b, c->dtype, p->head_dim, p->head_dim_v,
                     (p->head_dim + VF - 1) / VF * VF + (p->head_dim_v + VF - 1) / VF * VF, t->keys);
    block_scores(t->qt, p->head_dim, b->k, b->count, t->tile.vectors, t->s, c->b->panel, ahead);
    block_scores(t->dt, p->head_dim_v, b->v, b->count, t->tile.vectors, t->ds, c->b->panel, ahead);
    if (p->bias)
        strip_bias(b, 0, b->count, &t->tile, factor, t->s, FWD_LANES, 0, t->tile.vectors);
    block_weights(t, b, p->bias ? 1.0f : factor, p->scale);
    if (p->dbias)
        block_bias_gradient(t, b, p->bias, bias_sums(c, task->batch, task->slot));
    block_gradient(t->s, t->d, t->tile.lanes, block->dv, b->count, p->head_dim_v, ahead);
    block_gradient(t->ds, t->q, t->tile.lanes, block->dk, b->count, p->head_dim, ahead);
    if (b->masked)
        silence_keys(b, t->tile.everyone, p->head_dim, t->zeros);
    block_output(t->ds, b->k, b->count, p->head_dim, t->tile.vectors, t->ones, t->dqt, ahead);
}

static int count_blocks(const struct tile *t)
{
    struct nbhd_range box[3];
    tile_box(t, box);
    return 1 + (int)(box_keys(box) / WALK_KEYS);
}

/* far: its keys are read for the first time. after: the tile that comes next, or NULL. */
static void bwd_tile(const struct bwd_task *task, struct bwd_tile *t, bool far, const struct tile *after,
                     struct bwd_block *blocks)
{
    struct bwd_block *now = blocks, *next = blocks + 1;
    load_tile(task, t);
    struct key_walk walk = walk_begin(task->call->p, &t->tile);
    if (!task->first)
        walk.extra = task->call->p->extra;
    struct rows_ahead rows = ask_for_tile(task, t, after, far ? 1 : count_blocks(&t->tile));
    bool more = next_block(task, &t->tile, &walk, now);
    while (more) {
        more = next_block(task, &t->tile, &walk, next);
        struct rows_ahead keys = ask_for_keys(task, &t->tile, next, now->keys.count);
        tile_block(task, t, now, more && far ? &keys : &rows);
        struct bwd_block *swap = now;
        now = next;
        next = swap;
    }
    store_tile(task, t);
}

static void bwd_broadcast_task(const struct bwd_task *task, char *scratch)
{
    const struct bwd_call *c = task->call;
    const struct nbhd_bwd *b = c->b;
    struct bwd_tile t = {.tile = {.batch = task->batch, .kv_head = task->kv_head}};
    struct tile after = t.tile;
    t.qt = (float *)(void *)(scratch + b->at_qt);
    t.dt = (float *)(void *)(scratch + b->at_dt);
    t.dqt = (float *)(void *)(scratch + b->at_dqt);
    t.q = (float *)(void *)(scratch + b->at_q);
    t.d = (float *)(void *)(scratch + b->at_d);
    t.s = (float *)(void *)(scratch + b->at_s);
    t.ds = (float *)(void *)(scratch + b->at_ds);
    t.lse = (float *)(void *)(scratch + b->at_lanes);
    t.delta = t.lse + FWD_LANES;
    t.keys = (float *)(void *)(scratch + b->at_keys);
    float *ones = t.delta + FWD_LANES, *zeros = (float *)(void *)(scratch + b->at_zeros);
    for (int i = 0; i < FWD_LANES; i++)
        ones[i] = 1.0f;
    memset(zeros, 0, (size_t)c->p->head_dim * sizeof *zeros);
    t.ones = ones;
    t.zeros = zeros;
    long long number = 0;
    bool more = find_tile(task, &number, &t.tile);
    for (bool far = true; more; far = false) {
        more = find_tile(task, &number, &after);
        bwd_tile(task, &t, far, more ? &after : NULL, (struct bwd_block *)(void *)(scratch + b->at_block));
        if (more)
            t.tile = after;
    }
}
