/* Backward for large windows, in tiles of broadcast.inc.h. Five products of one microkernel shape, none with a
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
 * of Q and dO, whose lanes are given a NaN for P instead. Included by bwd.inc.h. */

/* ---- the products that sum over a tile's queries ---- */

/* Q and dO of a tile in strips of as many columns as kv_micro takes: [strip][64][KV_STRIP], so that a strip is
 * contiguous. */
#define KV_STRIP (V_STRIP * VF)

static float *strip_at(float *x, int lane, int column)
{
    return x + (column / KV_STRIP * FWD_LANES + lane) * KV_STRIP + column % KV_STRIP;
}

/* rows[n][nv vectors from column on] += sum over lanes of p[row][lane] * x[lane][0..]; the last vector has `last`
 * columns. */
V_FN void kv_micro(const float *p, const float *x, int lanes, float *const *rows, int column, const int n, const int nv,
                   const int last)
{
    vf acc[V_ROWS][V_STRIP];
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            acc[r][v] = load_up_to(rows[r] + column + v * VF, v + 1 < nv ? VF : last);
    for (int i = 0; i < lanes; i++) {
        vf y[V_STRIP];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            y[v] = v_load(x + i * KV_STRIP + v * VF);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) {
            vf weight = v_set1(p[r * FWD_LANES + i]);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                acc[r][v] = v_fma(weight, y[v], acc[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            store_up_to(rows[r] + column + v * VF, acc[r][v], v + 1 < nv ? VF : last);
}

V_FN void kv_panel(const float *p, const float *x, int lanes, float *const *rows, int keys, int column, const int nv,
                   const int last)
{
    int i = 0;
    for (; i + V_ROWS <= keys; i += V_ROWS) {
        prefetch_rows((const float *const *)rows + i + V_ROWS, nbhd_min(V_ROWS, keys - i - V_ROWS), column,
                      column + nv * VF);
        kv_micro(p + i * FWD_LANES, x, lanes, rows + i, column, V_ROWS, nv, last);
    }
    if (i + 4 <= keys) {
        kv_micro(p + i * FWD_LANES, x, lanes, rows + i, column, 4, nv, last);
        i += 4;
    }
    for (; i < keys; i++)
        kv_micro(p + i * FWD_LANES, x, lanes, rows + i, column, 1, nv, last);
}

/* rows[key][width] += sum over lanes of p[key][lane] * x[lane][width]; x in strips. */
static void block_gradient(const float *p, const float *x, int lanes, float *const *rows, int keys, int width)
{
    int column = 0;
    for (; column + KV_STRIP <= width; column += KV_STRIP, x += FWD_LANES * KV_STRIP)
        kv_panel(p, x, lanes, rows, keys, column, V_STRIP, VF);
    const int left = (width - column + VF - 1) / VF, last = width - column - (left - 1) * VF;
#if V_STRIP > 2
    if (left == 4)
        kv_panel(p, x, lanes, rows, keys, column, 4, last);
    if (left == 3)
        kv_panel(p, x, lanes, rows, keys, column, 3, last);
#endif
    if (left == 2)
        kv_panel(p, x, lanes, rows, keys, column, 2, last);
    if (left == 1)
        kv_panel(p, x, lanes, rows, keys, column, 1, last);
}

/* ---- P and dS of a block ---- */

struct bwd_tile {
    struct tile tile;
    float *qt, *dt, *dqt; /* [d][64] */
    float *q, *d;         /* in strips */
    float *s, *ds;        /* [FWD_BLOCK][64] */
    float *lse, *delta;   /* [64]; in the units of s and ds */
    const float *ones, *zeros;
    float *keys; /* unpacked K and V of a block */
    float *dk[FWD_BLOCK], *dv[FWD_BLOCK];
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

static void find_gradient_rows(const struct bwd_task *task, struct bwd_tile *t, const struct key_block *b)
{
    const struct bwd_call *c = task->call;
    for (int i = 0; i < b->count; i++) {
        const int *token = b->token[i];
        if (i < b->extra) {
            t->dk[i] = extra_dk(c, task->batch, task->kv_head, task->slot, token[2]);
            t->dv[i] = extra_dv(c, task->batch, task->kv_head, task->slot, token[2]);
        } else {
            t->dk[i] = (float *)(void *)nbhd_view_at(&c->dk, task->batch, token, task->kv_head);
            t->dv[i] = (float *)(void *)nbhd_view_at(&c->dv, task->batch, token, task->kv_head);
        }
    }
}

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

/* A query's delta; if tasks of several rounds need it, made once. */
static float find_delta(const struct bwd_task *t, const int token[3], int head)
{
    const struct bwd_call *c = t->call;
    const struct nbhd_params *p = c->p;
    float *saved = c->delta.data ? (float *)(void *)nbhd_view_at(&c->delta, t->batch, token, head) : NULL;
    if (saved && !t->first)
        return *saved;
    const float delta = make_delta(c, nbhd_view_at(&p->o, t->batch, token, head),
                                   nbhd_view_at(&p->dout, t->batch, token, head),
                                   p->dlse.data ? nbhd_view_at(&p->dlse, t->batch, token, head) : NULL);
    if (saved)
        *saved = delta;
    return delta;
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
        t->delta[lane] = find_delta(task, x, head);
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

static void bwd_tile(const struct bwd_task *task, struct bwd_tile *t, struct key_block *b)
{
    const struct bwd_call *c = task->call;
    const struct nbhd_params *p = c->p;
    const float factor = p->scale * LOG2E;
    load_tile(task, t);
    struct key_walk walk = walk_begin(p, &t->tile);
    if (!task->first)
        walk.extra = p->extra;
    while (walk_block(p, &t->tile, &walk, b)) {
        if (c->dtype != NBHD_F32)
            unpack_block(b, c->dtype, p->head_dim, p->head_dim_v,
                         (p->head_dim + VF - 1) / VF * VF + (p->head_dim_v + VF - 1) / VF * VF, t->keys);
        find_gradient_rows(task, t, b);
        block_scores(t->qt, p->head_dim, b->k, b->count, t->tile.vectors, t->s);
        block_scores(t->dt, p->head_dim_v, b->v, b->count, t->tile.vectors, t->ds);
        if (p->bias)
            strip_bias(b, 0, b->count, &t->tile, factor, t->s, FWD_LANES, 0, t->tile.vectors);
        block_weights(t, b, p->bias ? 1.0f : factor, p->scale);
        if (p->dbias)
            block_bias_gradient(t, b, p->bias, bias_sums(c, task->batch, task->slot));
        block_gradient(t->s, t->d, t->tile.lanes, t->dv, b->count, p->head_dim_v);
        block_gradient(t->ds, t->q, t->tile.lanes, t->dk, b->count, p->head_dim);
        if (b->masked)
            silence_keys(b, t->tile.everyone, p->head_dim, t->zeros);
        block_output(t->ds, b->k, b->count, p->head_dim, t->tile.vectors, t->ones, t->dqt);
    }
    store_tile(task, t);
}

/* The keys of the task's regions only; false: there are none. */
static bool clip_keys(struct tile *t, const struct nbhd_region region[3])
{
    for (int a = 0; a < 3; a++) {
        t->axis[a].any.begin = nbhd_max(t->axis[a].any.begin, region[a].keys.begin);
        t->axis[a].any.end = nbhd_min(t->axis[a].any.end, region[a].keys.end);
    }
    bool some = true;
    for (int a = 0; a < 3; a++)
        some &= t->axis[a].any.begin < t->axis[a].any.end;
    if (!some)
        t->axis[0].any.end = t->axis[0].any.begin;
    return some;
}

static void bwd_broadcast_task(const struct bwd_task *task, char *scratch)
{
    const struct bwd_call *c = task->call;
    const struct nbhd_bwd *b = c->b;
    const int share = c->p->heads / c->p->kv_heads, first = task->kv_head * share;
    struct bwd_tile t = {.tile = {.batch = task->batch, .kv_head = task->kv_head}};
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
    const struct nbhd_region *region = task->region;
    struct nbhd_range q[3];
    for (int h = first; h < first + share; h += b->head_tile)
        for (q[0].begin = region[0].q.begin; q[0].begin < region[0].q.end; q[0].begin += b->tile[0])
            for (q[1].begin = region[1].q.begin; q[1].begin < region[1].q.end; q[1].begin += b->tile[1])
                for (q[2].begin = region[2].q.begin; q[2].begin < region[2].q.end; q[2].begin += b->tile[2]) {
                    for (int a = 0; a < 3; a++) {
                        q[a].end = nbhd_min(q[a].begin + b->tile[a], region[a].q.end);
                        tile_axis_init(&t.tile.axis[a], c->p->axis[a],
                                       (struct nbhd_cell){region[a].group, region[a].size, q[a]});
                    }
                    t.tile.heads = nbhd_range_of(h, nbhd_min(h + b->head_tile, first + share));
                    tile_lanes(&t.tile, c->p);
                    if (clip_keys(&t.tile, region) || task->first)
                        bwd_tile(task, &t, (struct key_block *)(void *)(scratch + b->at_block));
                }
}
