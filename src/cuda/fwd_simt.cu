/* Forward on any GPU: a block holds a box of queries and walks the union of their windows in chunks of 64 keys, then
 * the extra keys, with online softmax in float (double for f64). The reference for the kernels made for one generation.
 *
 * 256 threads; products, tables and parameters: device/simt.cuh. Registers: O takes ROWS x ACC a thread (32 at a
 * head_dim of 128), the scores ROWS x 4. About 45 KB of shared memory. */
#include "device/simt.cuh"

struct softmax {
    real max[ROWS], sum[ROWS]; /* max: agreed among the threads of a row; sum: this thread's columns */
};

NBHD_FN void load_queries(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t)
{
    int i = (int)threadIdx.x, at[3];
    if (i >= M)
        return;
    int there = simt_token(t.box, i, at);
    simt_set_query(s.q, i, t, at, there);
    s.q.rows[0][i] = there ? simt_row(p.q, t, at, t.head) : 0;
    s.q.rows[1][i] = there ? simt_row(p.o, t, at, t.head) : 0;
}

/* Scores become probabilities relative to the row's new maximum, in the stage; o and the sums are brought to it. */
NBHD_FN void softmax_step(struct softmax &m, real score[ROWS][COLS], real o[ROWS][ACC], real *stage)
{
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        real max = m.max[i];
#pragma unroll
        for (int j = 0; j < COLS; j++)
            max = simt_max(max, score[i][j]);
        max = simt_row_max(max);
        /* A row that has seen no key yet keeps 0: exp(-inf - -inf) would be NaN. */
        real from = max == MINUS_INFINITY ? (real)0 : max, keep = simt_exp(m.max[i] - from);
        m.max[i] = max;
        m.sum[i] *= keep;
#pragma unroll
        for (int v = 0; v < ACC; v++)
            o[i][v] *= keep;
#pragma unroll
        for (int j = 0; j < COLS; j++) {
            real weight = simt_exp(score[i][j] - from);
            m.sum[i] += weight;
            stage[(TY + 16 * i) * P_PITCH + TX + 16 * j] = weight;
        }
    }
}

NBHD_FN void finish(const struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t,
                    struct softmax &m, const real o[ROWS][ACC])
{
    real factor[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        real sum = simt_row_sum(m.sum[i]);
        int query = TY + 16 * i;
        factor[i] = 1 / sum;
        if (p.lse.data && TX == 0 && s.q.rows[1][query]) {
            int at[3] = {s.q.at[0][query], s.q.at[1][query], s.q.at[2][query]};
            *(float *)simt_row(p.lse, t, at, t.head) = (float)(m.max[i] + simt_log(sum));
        }
    }
    simt_write(o, s.q.rows[1], factor, p.head_dim_v);
}

NBHD_FN void attend(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t)
{
    struct nbhd_range any[3];
    struct softmax m;
    real o[ROWS][ACC];
    simt_clear(o);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        m.max[i] = MINUS_INFINITY;
        m.sum[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < 3; i++)
        any[i] = nbhd_tile_any(t.axis[i], t.size[i], t.box[i]);
    load_queries(s, p, t);
    const long long grid = simt_volume(any);
#pragma unroll 1
    for (long long first = 0; first < grid + p.extra; first += N) {
        simt_load_keys(s, p, t, any, grid, first, t.head / (p.heads / p.kv_heads));
        __syncthreads();
        real score[ROWS][COLS];
        simt_nt(score, s, s.q.rows[0], s.k.rows[0], p.head_dim);
        simt_scores(score, s, p, t.head, 0);
        softmax_step(m, score, o, s.stage.p);
        simt_nn(o, s, s.k.rows[1], p.head_dim_v);
    }
    finish(s, p, t, m, o);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nbhd_fwd_simt(NBHD_LAUNCH, const __grid_constant__ struct nbhd_simt_box box)
{
    NBHD_ENTER
    __shared__ struct simt_shared s;
    const long long count = simt_tile_count(p, box, 0) * p.heads * p.batch;
    for (long long i = turn.block; i < count; i += turn.blocks) {
        struct simt_tile t = simt_tile_at(p, box, i, p.heads, 0);
        if (!t.empty)
            attend(s, p, t);
        __syncthreads();
    }
}
