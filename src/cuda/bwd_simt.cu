/* Backward on any GPU, in two launches, with biases three, without atomics, so the same bits every time:
 *   dq     a block holds a box of queries and walks the keys they see: Δ, dQ
 *   dkv    a block holds a box of keys (or of extra keys) and walks the queries that see them, over all query heads of
 *          its key/value head: dK, dV
 *   dbias  a block sums one entry of the bias table's gradient over all pairs at that distance
 * P = exp(S - lse) is computed anew each time; dS = P (dP - Δ), Δ = o.dout less the gradient of lse.
 *
 * 256 threads; products, tables and parameters: device/simt.cuh. Registers: dkv holds 2 x ROWS x ACC accumulators.
 * stats: [batch][tokens][heads] of lse and Δ, written by dq, read by the others. */
#include "device/simt.cuh"

struct simt_stats {
    real lse, delta;
};

NBHD_FN long long stats_index(const struct nbhd_params &p, const struct simt_tile &t, const int at[3], int head)
{
    long long token = t.batch;
#pragma unroll
    for (int i = 0; i < 3; i++)
        token = token * p.axis[i].length + simt_place(t, i, at[i]);
    return token * p.heads + head;
}

/* ---- dq ---- */
NBHD_FN void dq_load_queries(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t)
{
    int i = (int)threadIdx.x, at[3];
    if (i < M) {
        int there = simt_token(t.box, i, at);
        simt_set_query(s.q, i, t, at, there);
        s.q.rows[0][i] = there ? simt_row(p.q, t, at, t.head) : 0;
        s.q.rows[1][i] = there ? simt_row(p.dout, t, at, t.head) : 0;
        s.q.lse[i] = there ? *(const float *)simt_row(p.lse, t, at, t.head) : 0;
    }
    __syncthreads();
}

/* Δ, summed in the order of simt_nt: where o is exactly a value that P weighs 1, dP - Δ is exactly 0. */
NBHD_FN void dq_deltas(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t)
{
    int i = (int)threadIdx.x;
    if (i < M && s.q.rows[1][i]) {
        int at[3] = {s.q.at[0][i], s.q.at[1][i], s.q.at[2][i]};
        const char *dout = s.q.rows[1][i], *o = simt_row(p.o, t, at, t.head);
        real sum = 0;
#pragma unroll 4
        for (int d = 0; d < p.head_dim_v; d++)
            sum += simt_load(dout, d) * simt_load(o, d);
        if (p.dlse.data)
            sum -= *(const float *)simt_row(p.dlse, t, at, t.head);
        s.q.delta[i] = sum;
    }
    __syncthreads();
}

#if NBHD_DTYPE == NBHD_F64
/* The given lse is a float: too coarse for f64, so it is computed anew. */
NBHD_FN void dq_lse(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t,
                    const struct nbhd_range any[3], long long grid)
{
    real max[ROWS], sum[ROWS];
    for (int i = 0; i < ROWS; i++) {
        max[i] = MINUS_INFINITY;
        sum[i] = 0;
    }
#pragma unroll 1
    for (long long first = 0; first < grid + p.extra; first += N) {
        simt_load_keys(s, p, t, any, grid, first, t.head / (p.heads / p.kv_heads));
        __syncthreads();
        real score[ROWS][COLS];
        simt_nt(score, s, s.q.rows[0], s.k.rows[0], p.head_dim);
        simt_scores(score, s, p, t.head, 0);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < COLS; j++)
                if (score[i][j] > MINUS_INFINITY) {
                    real next = simt_max(max[i], score[i][j]);
                    sum[i] = sum[i] * simt_exp(max[i] - next) + simt_exp(score[i][j] - next);
                    max[i] = next;
                }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        real most = simt_row_max(max[i]), total = simt_row_sum(sum[i] > 0 ? sum[i] * simt_exp(max[i] - most) : (real)0);
        if (TX == 0)
            s.q.lse[TY + 16 * i] = most + simt_log(total);
    }
    __syncthreads();
}
#endif

NBHD_FN void dq_store_stats(const struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t,
                            struct simt_stats *stats)
{
    int i = (int)threadIdx.x;
    if (i < M && s.q.rows[0][i]) {
        int at[3] = {s.q.at[0][i], s.q.at[1][i], s.q.at[2][i]};
        struct simt_stats *to = &stats[stats_index(p, t, at, t.head)];
        to->lse = s.q.lse[i];
        to->delta = s.q.delta[i];
    }
}

/* The rows' data become those of dq. */
NBHD_FN void dq_write(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t,
                      const real dq[ROWS][ACC])
{
    int i = (int)threadIdx.x;
    if (i < M && s.q.rows[0][i]) {
        int at[3] = {s.q.at[0][i], s.q.at[1][i], s.q.at[2][i]};
        s.q.rows[0][i] = simt_row(p.dq, t, at, t.head);
    }
    __syncthreads();
    real factor[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        factor[r] = p.scale;
    simt_write(dq, s.q.rows[0], factor, p.head_dim);
}

NBHD_FN void dq_tile(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t,
                     struct simt_stats *stats)
{
    struct nbhd_range any[3];
#pragma unroll
    for (int i = 0; i < 3; i++)
        any[i] = nbhd_tile_any(t.axis[i], t.size[i], t.box[i]);
    const long long grid = simt_volume(any);
    dq_load_queries(s, p, t);
    dq_deltas(s, p, t);
#if NBHD_DTYPE == NBHD_F64
    dq_lse(s, p, t, any, grid);
#endif
    dq_store_stats(s, p, t, stats);
    real dq[ROWS][ACC];
    simt_clear(dq);
#pragma unroll 1
    for (long long first = 0; first < grid + p.extra; first += N) {
        simt_load_keys(s, p, t, any, grid, first, t.head / (p.heads / p.kv_heads));
        __syncthreads();
        real weight[ROWS][COLS], dp[ROWS][COLS];
        simt_nt(weight, s, s.q.rows[0], s.k.rows[0], p.head_dim);
        simt_scores(weight, s, p, t.head, 0);
        simt_nt(dp, s, s.q.rows[1], s.k.rows[1], p.head_dim_v);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int query = TY + 16 * i;
#pragma unroll
            for (int j = 0; j < COLS; j++)
                s.stage.p[query * P_PITCH + TX + 16 * j] =
                    simt_exp(weight[i][j] - s.q.lse[query]) * (dp[i][j] - s.q.delta[query]);
        }
        simt_nn(dq, s, s.k.rows[0], p.head_dim);
    }
    dq_write(s, p, t, dq);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nbhd_bwd_simt_dq(NBHD_LAUNCH, const __grid_constant__ struct nbhd_simt_box box, struct simt_stats *stats)
{
    NBHD_ENTER
    __shared__ struct simt_shared s;
    const long long count = simt_tile_count(p, box, 0) * p.heads * p.batch;
    stats += turn.before * p.heads;
    for (long long i = turn.block; i < count; i += turn.blocks) {
        struct simt_tile t = simt_tile_at(p, box, i, p.heads, 0);
        if (!t.empty)
            dq_tile(s, p, t, stats);
        __syncthreads();
    }
}

/* ---- dkv ---- */
/* Tile `index` of the extra keys: its "queries" are the whole grid, whatever the dilation. extra: their range. */
NBHD_FN struct simt_tile dkv_extra_tile(const struct nbhd_params &p, long long index, struct nbhd_range &extra)
{
    struct simt_tile t;
    const int tiles = (p.extra + M - 1) / M;
    extra.begin = (int)(index % tiles) * M;
    extra.end = nbhd_min(extra.begin + M, p.extra);
    index /= tiles;
    t.head = (int)(index % p.kv_heads);
    t.batch = (int)(index / p.kv_heads);
    t.empty = 0;
#pragma unroll
    for (int i = 0; i < 3; i++) {
        t.axis[i] = p.axis[i];
        t.axis[i].dilation = 1;
        t.group[i] = 0;
        t.size[i] = p.axis[i].length;
        t.box[i] = nbhd_range_of(0, 0);
    }
    return t;
}

NBHD_FN void dkv_load_keys(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t,
                           struct nbhd_range extra)
{
    int i = (int)threadIdx.x, at[3] = {0, 0, 0}, kind = ABSENT;
    if (i < M) {
        char *k = 0, *v = 0;
        if (extra.begin + i < extra.end) {
            kind = EXTRA;
            k = p.extra_k.data + nbhd_offset(p.extra_k, t.batch, 0, 0, extra.begin + i, t.head);
            v = p.extra_v.data + nbhd_offset(p.extra_v, t.batch, 0, 0, extra.begin + i, t.head);
        } else if (extra.begin == extra.end && simt_token(t.box, i, at)) {
            kind = GRID;
            k = simt_row(p.k, t, at, t.head);
            v = simt_row(p.v, t, at, t.head);
        }
        simt_set_key(s.k, i, at, kind);
        s.k.rows[0][i] = k;
        s.k.rows[1][i] = v;
    }
}

NBHD_FN void dkv_load_queries(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t,
                              const struct nbhd_range any[3], long long first, int head, const struct simt_stats *stats)
{
    int i = (int)threadIdx.x, at[3];
    if (i >= N)
        return;
    int there = simt_token(any, first + i, at);
    simt_set_query(s.q, i, t, at, there);
    s.q.rows[0][i] = there ? simt_row(p.q, t, at, head) : 0;
    s.q.rows[1][i] = there ? simt_row(p.dout, t, at, head) : 0;
    s.q.lse[i] = s.q.delta[i] = 0;
    if (there) {
        struct simt_stats of = stats[stats_index(p, t, at, head)];
        s.q.lse[i] = of.lse;
        s.q.delta[i] = of.delta;
    }
}

/* The rows' data become those of the gradients. */
NBHD_FN void dkv_write(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t,
                       struct nbhd_range extra, const real dk[ROWS][ACC], const real dv[ROWS][ACC])
{
    int i = (int)threadIdx.x;
    if (i < M && s.k.kind[i] == GRID) {
        int at[3] = {s.k.at[0][i], s.k.at[1][i], s.k.at[2][i]};
        s.k.rows[0][i] = simt_row(p.dk, t, at, t.head);
        s.k.rows[1][i] = simt_row(p.dv, t, at, t.head);
    } else if (i < M && s.k.kind[i] == EXTRA) {
        s.k.rows[0][i] = p.dextra_k.data + nbhd_offset(p.dextra_k, t.batch, 0, 0, extra.begin + i, t.head);
        s.k.rows[1][i] = p.dextra_v.data + nbhd_offset(p.dextra_v, t.batch, 0, 0, extra.begin + i, t.head);
    }
    __syncthreads();
    real scale[ROWS], one[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        scale[r] = p.scale;
        one[r] = 1;
    }
    simt_write(dk, s.k.rows[0], scale, p.head_dim);
    simt_write(dv, s.k.rows[1], one, p.head_dim_v);
}

NBHD_FN void dkv_tile(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t,
                      struct nbhd_range extra, const struct simt_stats *stats)
{
    struct nbhd_range any[3];
#pragma unroll
    for (int i = 0; i < 3; i++)
        any[i] = extra.begin < extra.end ? nbhd_range_of(0, t.size[i])
                                         : nbhd_tile_any_queries(t.axis[i], p.axis[i].keys != p.axis[i].length
                                                                                ? p.axis[i].length
                                                                                : t.size[i], t.box[i]);
    const long long queries = simt_volume(any);
    real dk[ROWS][ACC], dv[ROWS][ACC];
    simt_clear(dk);
    simt_clear(dv);
    dkv_load_keys(s, p, t, extra);
    const int group = p.heads / p.kv_heads;
#pragma unroll 1
    for (int head = t.head * group; head < (t.head + 1) * group; head++)
#pragma unroll 1
        for (long long first = 0; first < queries; first += N) {
            dkv_load_queries(s, p, t, any, first, head, stats);
            __syncthreads();
            real weight[ROWS][COLS], dp[ROWS][COLS];
            simt_nt(weight, s, s.k.rows[0], s.q.rows[0], p.head_dim);
            simt_scores(weight, s, p, head, 1);
            simt_nt(dp, s, s.k.rows[1], s.q.rows[1], p.head_dim_v);
#pragma unroll
            for (int j = 0; j < COLS; j++) {
                int query = TX + 16 * j;
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
                    weight[i][j] = simt_exp(weight[i][j] - s.q.lse[query]);
                    dp[i][j] = weight[i][j] * (dp[i][j] - s.q.delta[query]);
                    s.stage.p[(TY + 16 * i) * P_PITCH + query] = weight[i][j];
                }
            }
            simt_nn(dv, s, s.q.rows[1], p.head_dim_v);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < COLS; j++)
                    s.stage.p[(TY + 16 * i) * P_PITCH + TX + 16 * j] = dp[i][j];
            simt_nn(dk, s, s.q.rows[0], p.head_dim);
        }
    dkv_write(s, p, t, extra, dk, dv);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nbhd_bwd_simt_dkv(NBHD_LAUNCH, const __grid_constant__ struct nbhd_simt_box box, const struct simt_stats *stats)
{
    NBHD_ENTER
    __shared__ struct simt_shared s;
    stats += turn.before * p.heads;
    /* the longest ones first */
    const long long extra_tiles = (long long)((p.extra + M - 1) / M) * p.kv_heads * p.batch;
    const long long count = extra_tiles + simt_tile_count(p, box, 1) * p.kv_heads * p.batch;
    for (long long i = turn.block; i < count; i += turn.blocks) {
        struct nbhd_range extra = nbhd_range_of(0, 0);
        struct simt_tile t = i < extra_tiles ? dkv_extra_tile(p, i, extra)
                                             : simt_tile_at(p, box, i - extra_tiles, p.kv_heads, 1);
        if (!t.empty)
            dkv_tile(s, p, t, extra, stats);
        __syncthreads();
    }
}

#if NBHD_BIAS && !NBHD_MANY
/* ---- dbias ---- */
/* dS of one pair, by a warp. */
NBHD_FN real dbias_pair(const struct nbhd_params &p, const struct simt_tile &t, const int query[3], const int key[3],
                        int head, real bias, const struct simt_stats *stats)
{
    const int kv_head = head / (p.heads / p.kv_heads), lane = (int)threadIdx.x % 32;
    const char *q = simt_row(p.q, t, query, head), *k = simt_row(p.k, t, key, kv_head);
    const char *dout = simt_row(p.dout, t, query, head), *v = simt_row(p.v, t, key, kv_head);
    real score = 0, dp = 0;
    for (int d = lane; d < p.head_dim; d += 32)
        score += simt_load(q, d) * simt_load(k, d);
    for (int d = lane; d < p.head_dim_v; d += 32)
        dp += simt_load(dout, d) * simt_load(v, d);
    for (int mask = 16; mask > 0; mask /= 2) {
        score += __shfl_xor_sync(0xffffffff, score, mask);
        dp += __shfl_xor_sync(0xffffffff, dp, mask);
    }
    struct simt_stats of = stats[stats_index(p, t, query, head)];
    return simt_exp(score * (real)p.scale + bias - of.lse) * (dp - of.delta);
}

/* The key at `distance` from the query that is token x; false if the query does not see it. */
NBHD_FN int dbias_find(const struct nbhd_params &p, struct simt_tile &t, const int x[3], const int distance[3],
                       int query[3], int key[3])
{
    int sees = 1;
#pragma unroll
    for (int i = 0; i < 3; i++) {
        struct nbhd_axis a = p.axis[i];
        t.axis[i] = a;
        t.group[i] = x[i] % a.dilation;
        t.size[i] = nbhd_group_size(a, t.group[i]);
        query[i] = x[i] / a.dilation;
        key[i] = query[i] + distance[i];
        struct nbhd_range keys = nbhd_keys(a, t.size[i], query[i]);
        sees &= key[i] >= keys.begin && key[i] < keys.end;
    }
    return sees;
}

/* Block x: entries x, x + gridDim.x, ... of the table. A warp takes every eighth query; its sum is in double. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nbhd_bwd_simt_dbias(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_simt_box box,
                        const struct simt_stats *stats)
{
    __shared__ double sums[THREADS / 32];
    const int warp = (int)threadIdx.x / 32;
    const struct nbhd_range whole[3] = {nbhd_range_of(0, p.axis[0].length), nbhd_range_of(0, p.axis[1].length),
                                        nbhd_range_of(0, p.axis[2].length)};
    const struct nbhd_range table[3] = {nbhd_range_of(1 - p.axis[0].window, p.axis[0].window),
                                        nbhd_range_of(1 - p.axis[1].window, p.axis[1].window),
                                        nbhd_range_of(1 - p.axis[2].window, p.axis[2].window)};
    const long long entries = simt_volume(table), tokens = simt_volume(whole);
    for (long long entry = blockIdx.x; entry < entries * p.heads; entry += gridDim.x) {
        int distance[3], x[3], query[3], key[3];
        const int head = (int)(entry / entries);
        simt_token(table, entry % entries, distance);
        double sum = 0;
        for (long long i = warp; i < tokens * p.batch; i += THREADS / 32) {
            struct simt_tile t;
            t.batch = (int)(i / tokens);
            simt_token(whole, i % tokens, x);
            if (dbias_find(p, t, x, distance, query, key))
                sum += dbias_pair(p, t, query, key, head, p.bias[entry], stats);
        }
        if (threadIdx.x % 32 == 0)
            sums[warp] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            double all = p.flags & NBHD_PARAMS_ADD ? (double)p.dbias[entry] : 0.0;
            for (int w = 0; w < THREADS / 32; w++)
                all += sums[w];
            p.dbias[entry] = (float)all;
        }
        __syncthreads();
    }
}
#endif
