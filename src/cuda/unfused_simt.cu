/* The unfused passes on any GPU, naively: each pair of a query and a key by itself. A pass is one or two of these
 * products (src/cuda/unfused_simt.c), over the pairs that the mask allows:
 *     scores    scores[q][k] = scale * query[q] . key[k] + bias; `fill` where a window has no key
 *     queries   query[q]     = scale * sum over k of scores[q][k] key[k]
 *     keys      key[k]       = scale * sum over q of scores[q][k] query[q], over the inverse neighborhood and
 *                              query heads
 *     table     bias[h][d]   = sum of scores[q][q + d] over queries and batch, in double
 * An entry of a row of scores is a key's distance from the query's first key, per axis.
 * A warp has one row of its output; its lanes have the columns, NBHD_COLUMNS each. Parameters: NBHD_DTYPE,
 * NBHD_COLUMNS, NBHD_WRAPS (device/problem.cuh). */
#include "device/real.cuh"
#include "device/unfused.cuh"

#ifndef NBHD_COLUMNS
#error "NBHD_COLUMNS is missing"
#endif

#define THREADS 256
#define WARPS (THREADS / 32)
#define LANE ((int)threadIdx.x % 32)

/* One token: of a row of queries or keys. */
struct token {
    int batch, head, group[3], at[3], size[3];
};

NBHD_FN struct token token_of(const struct nbhd_unfused &p, long long row, int heads, int of_keys)
{
    struct token t;
#pragma unroll
    for (int i = 2; i >= 0; i--) {
        struct nbhd_axis a = p.axis[i];
        int extent = of_keys ? a.keys : a.length, x = (int)(row % extent);
        row /= extent;
        t.group[i] = x % a.dilation;
        t.at[i] = x / a.dilation;
        t.size[i] = nbhd_group_size(a, t.group[i]);
        if (a.keys != a.length)
            t.size[i] = extent;
    }
    t.head = (int)(row % heads);
    t.batch = (int)(row / heads);
    return t;
}

NBHD_FN int place_of(const struct nbhd_unfused &p, const struct token &t, int axis, int at)
{
    return nbhd_place(p.axis[axis], t.size[axis], t.group[axis], at);
}

/* The row of element at of the token's groups. */
NBHD_FN char *row_of(const struct nbhd_unfused &p, const struct nbhd_view &v, const struct token &t, int at0, int at1,
                     int at2, int head)
{
    return v.data + nbhd_offset(v, t.batch, place_of(p, t, 0, at0), place_of(p, t, 1, at1), place_of(p, t, 2, at2),
                                head);
}

NBHD_FN long long rows(const struct nbhd_unfused &p, int heads, int of_keys)
{
    long long count = (long long)p.batch * heads;
    for (int i = 0; i < 3; i++)
        count *= of_keys ? p.axis[i].keys : p.axis[i].length;
    return count;
}

NBHD_FN void load_row(real x[NBHD_COLUMNS], const char *row, int width)
{
#pragma unroll
    for (int c = 0; c < NBHD_COLUMNS; c++)
        x[c] = LANE + 32 * c < width ? simt_load(row, LANE + 32 * c) : (real)0;
}

NBHD_FN void store_row(char *row, const real x[NBHD_COLUMNS], real scale, int width)
{
#pragma unroll
    for (int c = 0; c < NBHD_COLUMNS; c++)
        if (LANE + 32 * c < width)
            simt_store(row, LANE + 32 * c, x[c] * scale);
}

/* ---- scores ---- */
NBHD_FN long long bias_at(const struct nbhd_unfused &p, const struct token &t, int k0, int k1, int k2)
{
    const int k[3] = {k0, k1, k2};
    long long at = t.head;
#pragma unroll
    for (int i = 0; i < 3; i++)
        at = at * (2 * p.axis[i].window - 1) + k[i] - t.at[i] + p.axis[i].window - 1;
    return at;
}

NBHD_FN void scores_of(const struct nbhd_unfused &p, const struct token &t)
{
    struct nbhd_range keys[3];
#pragma unroll
    for (int i = 0; i < 3; i++)
        keys[i] = nbhd_keys(p.axis[i], t.size[i], t.at[i]);
    const int w1 = p.axis[1].window, w2 = p.axis[2].window, window = p.axis[0].window * w1 * w2;
    const int kv_head = t.head / (p.heads / p.kv_heads);
    char *scores = row_of(p, p.scores, t, t.at[0], t.at[1], t.at[2], t.head);
    real q[NBHD_COLUMNS], mine = p.fill;
    load_row(q, row_of(p, p.query, t, t.at[0], t.at[1], t.at[2], t.head), p.width);
    for (int entry = 0; entry < window; entry++) { /* lane e % 32 keeps entry e until 32 can be written at once */
        int k2 = keys[2].begin + entry % w2, k1 = keys[1].begin + entry / w2 % w1, k0 = keys[0].begin + entry / w2 / w1;
        real score = p.fill;
        if (k0 < keys[0].end && k1 < keys[1].end && k2 < keys[2].end) {
            real k[NBHD_COLUMNS];
            load_row(k, row_of(p, p.key, t, k0, k1, k2, kv_head), p.width);
            score = 0;
#pragma unroll
            for (int c = 0; c < NBHD_COLUMNS; c++)
                score += q[c] * k[c];
            for (int mask = 16; mask > 0; mask /= 2)
                score += __shfl_xor_sync(0xffffffff, score, mask);
            score *= (real)p.scale;
            if (p.bias)
                score += p.bias[bias_at(p, t, k0, k1, k2)];
        }
        if (LANE == entry % 32)
            mine = score;
        if (entry % 32 == 31 || entry == window - 1) {
            int first = entry / 32 * 32;
            if (first + LANE <= entry)
                simt_store(scores, first + LANE, mine);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nbhd_unfused_scores(const __grid_constant__ struct nbhd_unfused p)
{
    const long long count = rows(p, p.heads, 0);
    for (long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32; row < count;
         row += (long long)gridDim.x * WARPS)
        scores_of(p, token_of(p, row, p.heads, 0));
}

/* ---- queries ---- */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nbhd_unfused_queries(const __grid_constant__ struct nbhd_unfused p)
{
    const long long count = rows(p, p.heads, 0);
    const int w1 = p.axis[1].window, w2 = p.axis[2].window;
    for (long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32; row < count;
         row += (long long)gridDim.x * WARPS) {
        struct token t = token_of(p, row, p.heads, 0);
        struct nbhd_range keys[3];
        real sum[NBHD_COLUMNS];
#pragma unroll
        for (int i = 0; i < 3; i++)
            keys[i] = nbhd_keys(p.axis[i], t.size[i], t.at[i]);
#pragma unroll
        for (int c = 0; c < NBHD_COLUMNS; c++)
            sum[c] = 0;
        const char *scores = row_of(p, p.scores, t, t.at[0], t.at[1], t.at[2], t.head);
        for (int k0 = keys[0].begin; k0 < keys[0].end; k0++)
            for (int k1 = keys[1].begin; k1 < keys[1].end; k1++)
                for (int k2 = keys[2].begin; k2 < keys[2].end; k2++) {
                    int entry = ((k0 - keys[0].begin) * w1 + k1 - keys[1].begin) * w2 + k2 - keys[2].begin;
                    real k[NBHD_COLUMNS], weight = simt_load(scores, entry);
                    load_row(k, row_of(p, p.key, t, k0, k1, k2, t.head / (p.heads / p.kv_heads)), p.width);
#pragma unroll
                    for (int c = 0; c < NBHD_COLUMNS; c++)
                        sum[c] += weight * k[c];
                }
        store_row(row_of(p, p.query, t, t.at[0], t.at[1], t.at[2], t.head), sum, p.scale, p.width);
    }
}

/* ---- keys ---- */
/* The score of the pair of a query and the token, which is a key. */
NBHD_FN real score_of_pair(const struct nbhd_unfused &p, const struct token &t, const int query[3], int head)
{
    int entry = 0;
#pragma unroll
    for (int i = 0; i < 3; i++) {
        int size = p.axis[i].keys != p.axis[i].length ? p.axis[i].length : t.size[i];
        entry = entry * p.axis[i].window + t.at[i] - nbhd_keys(p.axis[i], size, query[i]).begin;
    }
    return simt_load(row_of(p, p.scores, t, query[0], query[1], query[2], head), entry);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nbhd_unfused_keys(const __grid_constant__ struct nbhd_unfused p)
{
    const long long count = rows(p, p.kv_heads, 1);
    const int share = p.heads / p.kv_heads;
    for (long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32; row < count;
         row += (long long)gridDim.x * WARPS) {
        struct token t = token_of(p, row, p.kv_heads, 1);
        struct nbhd_range queries[3];
        real sum[NBHD_COLUMNS];
#pragma unroll
        for (int i = 0; i < 3; i++) {
            int size = p.axis[i].keys != p.axis[i].length ? p.axis[i].length : t.size[i];
            queries[i] = nbhd_queries(p.axis[i], size, t.at[i]);
        }
#pragma unroll
        for (int c = 0; c < NBHD_COLUMNS; c++)
            sum[c] = 0;
        for (int head = t.head * share; head < (t.head + 1) * share; head++)
            for (int q0 = queries[0].begin; q0 < queries[0].end; q0++)
                for (int q1 = queries[1].begin; q1 < queries[1].end; q1++)
                    for (int q2 = queries[2].begin; q2 < queries[2].end; q2++) {
                        const int query[3] = {q0, q1, q2};
                        real q[NBHD_COLUMNS], weight = score_of_pair(p, t, query, head);
                        load_row(q, row_of(p, p.query, t, q0, q1, q2, head), p.width);
#pragma unroll
                        for (int c = 0; c < NBHD_COLUMNS; c++)
                            sum[c] += weight * q[c];
                    }
        store_row(row_of(p, p.key, t, t.at[0], t.at[1], t.at[2], t.head), sum, p.scale, p.width);
    }
}

/* ---- table ---- */
/* A block has one entry of one head's table at a time; a thread takes every 256th query. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nbhd_unfused_table(const __grid_constant__ struct nbhd_unfused p)
{
    __shared__ double sums[THREADS];
    const int t0 = 2 * p.axis[0].window - 1, t1 = 2 * p.axis[1].window - 1, t2 = 2 * p.axis[2].window - 1;
    const long long entries = (long long)t0 * t1 * t2, queries = rows(p, 1, 0);
    for (long long at = blockIdx.x; at < entries * p.heads; at += gridDim.x) {
        const int head = (int)(at / entries), entry = (int)(at % entries);
        const int apart[3] = {entry / t2 / t1 + 1 - p.axis[0].window, entry / t2 % t1 + 1 - p.axis[1].window,
                              entry % t2 + 1 - p.axis[2].window};
        double sum = 0;
        for (long long i = threadIdx.x; i < queries; i += THREADS) {
            struct token t = token_of(p, i, 1, 0);
            int sees = 1, place = 0;
#pragma unroll
            for (int a = 0; a < 3; a++) {
                struct nbhd_range keys = nbhd_keys(p.axis[a], t.size[a], t.at[a]);
                int key = t.at[a] + apart[a];
                sees &= key >= keys.begin && key < keys.end;
                place = place * p.axis[a].window + key - keys.begin;
            }
            if (sees)
                sum += simt_load(row_of(p, p.scores, t, t.at[0], t.at[1], t.at[2], head), place);
        }
        sums[threadIdx.x] = sum;
        __syncthreads();
        for (int half = THREADS / 2; half > 0; half /= 2) {
            if ((int)threadIdx.x < half)
                sums[threadIdx.x] += sums[threadIdx.x + half];
            __syncthreads();
        }
        if (threadIdx.x == 0)
            p.dbias[at] = (float)(p.flags & NBHD_PARAMS_ADD ? (double)p.dbias[at] + sums[0] : sums[0]);
        __syncthreads();
    }
}
