/* The gradient of Q on Hopper: wgmma and TMA. Host half: bwd_sm90_dq.c; dK and dV: bwd_sm90.cu.
 *
 * As the forward: one CTA holds a tile of queries, Q and dO, 64 rows per consumer warpgroup, streams the boxes of K and
 * V that they see (device/queries_sm90.cuh), and sums up
 *     S = Q K^T + mask    P = exp2(S - logsumexp)    dP = dO V^T    dS = P (dP - delta)    dQ += dS K
 * in registers. Nothing is shared between CTAs or warpgroups, so the sums have one order: the result is the same bits
 * every time. dS goes from accumulator to operand without leaving its registers; K is read k-major for S, mn-major for
 * dQ.
 *
 *     warpgroup 0      warp 0, one thread: Q, dO, K boxes, and what each needs of a mask    NBHD_REGISTERS_LOAD
 *                      warp 1, one thread: V boxes
 *     warpgroups 1..   64 rows each                                                         NBHD_REGISTERS_MATH
 *
 *     shared memory, from a multiple of 1024:
 *     | Q, later dQ: chunks x 64 G rows x 128 | dO: the same | K: stages x chunks x N x 128 | V | mask keys |
 *     | struct tables |
 *
 * A consumer's step j; the other warpgroup's products fill the gaps:
 *     issue S(j) | wait dQ(j-1), free K(j-1) | issue dP(j) | wait S, exp2 | wait dP, free V(j) | dS | issue dQ(j)
 * The wait for dQ stands before the issue of dP: S, dP, dQ and the packed dS do not fit into the registers at once.
 *
 * Registers of a consumer thread: S N/2, dP N/2, dQ head_dim/2; the packed dS N/4 in the place of S and dP. */
#ifndef NBHD_DQ
#error "NBHD_DQ: the instruction of dS K, wgmma_rs_bt_n<head_dim>"
#endif
#ifndef NBHD_FIRST
#error "NBHD_FIRST: the instruction of a product's first step, wgmma_ss_first_n<N>"
#endif
#ifndef NBHD_V_STAGES
#error "NBHD_V_STAGES: boxes of V in flight, at most NBHD_STAGES"
#endif

#define K_STAGES NBHD_STAGES
#define V_STAGES NBHD_V_STAGES
#include "device/queries_sm90.cuh"

#define Q_BYTES (QK_CHUNKS * Q_ROWS * 128)
#define DO_BYTES (PV_CHUNKS * Q_ROWS * 128)

struct gradient_maps {
    struct maps maps;
    struct nbhd_tensor_map dout[NBHD_MAPS];
};

/* Of a thread's two rows. */
struct statistics {
    float lse_log2[2], delta[2];
};

/* Both arrays are [batch][heads][tokens of the tensor]. What rows without a token get is finite and never stored. */
NBHD_FN struct statistics load_statistics(const struct nbhd_params *p, const struct nbhd_boxes *b,
                                          const struct tables *tab, const float *lse_log2, const float *delta,
                                          int number)
{
    struct statistics s = {{0, 0}, {0, 0}};
    const struct place *t = &tab->place;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int at = number + ((int)threadIdx.x >> 2 & 7) + 8 * i;
        unsigned row = tab->row[at];
        int x[3];
        long long offset = (long long)t->batch * p->heads + t->head + (int)(row >> 24);
        if (!row_token(p, b, t, row, at, x))
            continue;
        for (int a = 0; a < 3; a++)
            offset = offset * p->axis[a].length + x[a];
        s.lse_log2[i] = lse_log2[offset];
        s.delta[i] = delta[offset];
    }
    return s;
}

/* Issues d = A B^T of A's rows (Q or dO) and B's keys (K or V), both k-major; to be committed. */
NBHD_FN void issue_scores(float *d, unsigned long long a, unsigned tile, int steps)
{
    unsigned long long b = wgmma_k_major(tile);
    wgmma_fence();
    NBHD_FIRST(d, a, b);
#pragma unroll
    for (int i = 1; i < steps; i++)
        NBHD_QK(d, wgmma_advance(a, i / 4 * (Q_ROWS * 8) + i % 4 * 2),
                wgmma_advance(b, i / 4 * (NBHD_N * 8) + i % 4 * 2), 1);
}

/* Issues dQ += dS K. */
NBHD_FN void issue_dq(float *dq, const unsigned *ds, unsigned tile)
{
    unsigned long long k = wgmma_mn_major(tile, NBHD_N);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++)
        NBHD_DQ(dq, ds + 4 * i, wgmma_advance(k, 128 * i), 1);
    wgmma_commit();
}

/* Scores become probabilities. Returns a word whose upper bit is clear and that needs all of them, for
 * wgmma_wait_0_after_bits. */
NBHD_FN unsigned find_probabilities(float *s, const struct statistics *r, float scale_log2)
{
    unsigned all = 0;
#pragma unroll
    for (int i = 0; i < NBHD_N / 2; i++) {
        s[i] = ex2_approx_ftz_f32(fmaf(s[i], scale_log2, -r->lse_log2[i >> 1 & 1]));
        all |= __float_as_uint(s[i]);
    }
    return all;
}

NBHD_FN void find_ds(unsigned *ds, const float *p, const float *dp, const struct statistics *r)
{
#pragma unroll
    for (int i = 0; i < NBHD_N / 4; i++)
        ds[i] = pack(p[2 * i] * (dp[2 * i] - r->delta[i & 1]), p[2 * i + 1] * (dp[2 * i + 1] - r->delta[i & 1]));
}

/* Writes a warp's 16 rows of dQ. number: of the warp's first row; stage: its place in shared memory. */
NBHD_FN void store_rows(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct tables *tab,
                        const float *dq, unsigned stage, int number)
{
    int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < NBHD_HEAD_DIM / 8; j++)
            st_shared_b32(stage + j / 8 * (Q_ROWS * 128) + (g + 8 * i) * 128 + ((j % 8 ^ g) << 4) + q * 4,
                          pack(dq[4 * j + 2 * i] * p->scale, dq[4 * j + 2 * i + 1] * p->scale));
    __syncwarp();
    copy_rows_out(p, b, tab, &p->dq, stage, number, NBHD_HEAD_DIM);
}

/* Two warpgroups take turns: one issues S only when the other's is complete, so that its products fill the time of the
 * other's exponentials. With columns of a mask they do not: one step of them and turns take 1 % longer, two spill.
 * Barriers 4 and 5: it is the turn of warpgroup 0, of warpgroup 1; literals, or ptxas reserves all 16. */
#define TAKES_TURNS (NBHD_GROUPS == 2 && !NBHD_MASK_STEPS)

NBHD_FN void wait_turn(int group)
{
    if (TAKES_TURNS && group == 0)
        named_barrier_sync(4, 256);
    else if (TAKES_TURNS)
        named_barrier_sync(5, 256);
}

/* To the other warpgroup. */
NBHD_FN void pass_turn(int group)
{
    if (TAKES_TURNS && group == 0)
        named_barrier_arrive(5, 256);
    else if (TAKES_TURNS)
        named_barrier_arrive(4, 256);
}

/* One consumer warpgroup: all boxes, then the output. */
NBHD_FN void consume(const struct nbhd_params *p, const struct nbhd_boxes *b, struct tables *tab, const float *lse_log2,
                     const float *delta, unsigned q_tile, unsigned mask_keys)
{
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1; /* uniform: else descriptors live in vector registers */
    int lane = threadIdx.x & 31, quarter = lane & 3;
    int number = group * 64 + (threadIdx.x / 32 & 3) * 16; /* the warp's first row */
    unsigned row0 = tab->row[number + (lane >> 2)], row1 = tab->row[number + (lane >> 2) + 8];
    unsigned k_tiles = q_tile + Q_BYTES + DO_BYTES, v_tiles = k_tiles + K_STAGES * K_BYTES;
    unsigned k_full = smem_address(tab->full[0]), k_empty = smem_address(tab->empty[0]);
    unsigned v_full = smem_address(tab->full[1]), v_empty = smem_address(tab->empty[1]);
    float scale_log2 = p->scale * 1.44269504f;
    struct statistics r = load_statistics(p, b, tab, lse_log2, delta, number);
    struct probes probes;
    find_probes(&probes, b, tab, row0, row1, quarter);
    float dq[NBHD_HEAD_DIM / 2];
    unsigned ds[NBHD_N / 4];
#pragma unroll
    for (int i = 0; i < NBHD_HEAD_DIM / 2; i++)
        dq[i] = 0;

    mbar_wait(smem_address(&tab->q_full), 0);
    unsigned long long q = wgmma_k_major(q_tile + group * 64 * 128);
    unsigned long long dout = wgmma_k_major(q_tile + Q_BYTES + group * 64 * 128);
    int k = 0, k_phase = 0, v = 0, v_phase = 0, last = -1; /* stages and their phases; last: K's of the box before */
    int4 box;
    if (group == 1)
        pass_turn(group);
    do {
        float s[NBHD_N / 2], dp[NBHD_N / 2];
        mbar_wait(k_full + 8 * k, k_phase);
        box = tab->box[k];
        wait_turn(group);
        issue_scores(s, q, k_tiles + k * K_BYTES, QK_STEPS);
        int flags = box_flags(box, group);
        if (NBHD_MASK_STEPS && flags & BY_COLUMNS)
            issue_mask(s, &probes, tab, k, mask_keys);
        wgmma_fence(); /* for what comes together here: ptxas would add it, with a remark */
        wgmma_commit();
        wgmma_wait_1(); /* dQ of the box before */
        NBHD_PIN_F(dq, NBHD_HEAD_DIM / 2);
        NBHD_KEEP_R(ds, NBHD_N / 4);
        if (lane == 0 && last >= 0)
            mbar_arrive(k_empty + 8 * last);
        mbar_wait(v_full + 8 * v, v_phase);
        issue_scores(dp, dout, v_tiles + v * V_BYTES, PV_STEPS);
        wgmma_commit();
        wgmma_wait_1();
        NBHD_PIN_F(s, NBHD_N / 2);
        if (group == 0 || !(box.w & NBHD_SM90_LAST))
            pass_turn(group);
        if (NBHD_MASK_BITS && flags & BY_BITS)
            apply_bits(s, row_bits(b, tab, box, p->extra, row0, quarter),
                       row_bits(b, tab, box, p->extra, row1, quarter));
        wgmma_wait_0_after_bits(find_probabilities(s, &r, scale_log2), smem_address(&tab->scratch));
        NBHD_PIN_F(dp, NBHD_N / 2);
        if (lane == 0)
            mbar_arrive(v_empty + 8 * v);
        find_ds(ds, s, dp, &r);
        issue_dq(dq, ds, k_tiles + k * K_BYTES);
        last = k;
        if (++k == K_STAGES)
            k = 0, k_phase ^= 1;
        if (++v == V_STAGES)
            v = 0, v_phase ^= 1;
    } while (!(box.w & NBHD_SM90_LAST));
    wgmma_wait_0();
    NBHD_PIN_F(dq, NBHD_HEAD_DIM / 2);
    named_barrier_sync(1 + group, 128); /* all four warps have read Q, whose place dQ takes */
    store_rows(p, b, tab, dq, q_tile + number * 128, number);
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_bwd_sm90_dq(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_boxes b,
                     const __grid_constant__ struct gradient_maps maps, const float *lse_log2, const float *delta)
{
    extern __shared__ __align__(1024) char shared[];
    const int tiles = Q_BYTES + DO_BYTES + K_STAGES * K_BYTES + V_STAGES * V_BYTES;
    unsigned q_tile = smem_address(shared), k_tiles = q_tile + Q_BYTES + DO_BYTES, mask_keys = q_tile + tiles;
    struct tables *tab = (struct tables *)(shared + tiles + MASK_BYTES);
    struct place t = tile_place(&p, &b);
    if (t.origin[0] >= t.size[0] || t.origin[1] >= t.size[1] || t.origin[2] >= t.size[2])
        return; /* a dilation group with fewer elements than the first */
    int slice = b.sliced ? blockIdx.z : 0;
    if (threadIdx.x < 32)
        choose_shape(&p, &b, &t, tab);
    if (threadIdx.x == 32) {
        prepare_barriers(&b, &t, tab);
        mbar_arrive_expect(smem_address(&tab->q_full), (QK_CHUNKS + PV_CHUNKS) * b.rows * 128);
        load_rows(&b, &t, tab, &maps.maps.q[slice], q_tile, QK_CHUNKS);
        load_rows(&b, &t, tab, &maps.dout[slice], q_tile + Q_BYTES, PV_CHUNKS);
    }
    prepare_rows(&p, &b, &t, tab);
    __syncthreads();
    prepare_bounds(&b, tab);
    prepare_shape(&b, tab, k_tiles, mask_keys);
    __syncthreads();

    if (threadIdx.x < 128) {
        NBHD_SET_REGISTERS_DOWN(NBHD_REGISTERS_LOAD);
        int v = threadIdx.x / 32;
        if (threadIdx.x == 0 || threadIdx.x == 32)
            load_boxes(&b, tab, v, v ? k_tiles + K_STAGES * K_BYTES : k_tiles, p.extra,
                       &maps.maps.kv[v][slice * b.shapes + tab->shape], &maps.maps.extra[v]);
    } else {
        NBHD_SET_REGISTERS_UP(NBHD_REGISTERS_MATH);
        consume(&p, &b, tab, lse_log2, delta, q_tile, mask_keys);
    }
}
