/* Gradients of K and V on Hopper, one warpgroup for each: for rows too wide for one warpgroup to hold both. dQ is
 * computed by bwd_sm90_dq.cu. Host half: bwd_sm90.c; box shapes: sm90_bwd_plan.c.
 *
 * A CTA holds 64 keys and streams boxes of queries (device/keys_sm90.cuh). With keys as rows:
 *     warpgroup 1      S = K Q^T      P = exp2(S scale - lse)    dV += P dO
 *     warpgroup 2      dP = V dO^T    dS = P (dP - delta)        dK += dS Q
 * P goes from one to the other through shared memory, packed, as the accumulator lies: a thread reads what the thread
 * with its number in the other warpgroup wrote. So each warpgroup holds one sum, and each has half of the products.
 * Nothing is shared between CTAs, so the sums have one order.
 *
 *     warpgroup 0      warp 0: K, V, Q boxes, and what each box needs of a mask    warp 1: dO boxes and statistics
 *
 * Its own part of shared memory is P: 2 stages x N x 128 bytes.
 *
 * A step of warpgroup 1, with dV of the step before still running when it begins, and of warpgroup 2, with dK:
 *     issue S, mask | wait dV | wait S | P | to shared memory | issue dV
 *     issue dP | wait dK | wait for P | wait dP | dS | issue dK
 *
 * Registers of a consumer thread: the sum head_dim/2 or head_dim_v/2, scores N/2, packed N/4. */
#if NBHD_GROUPS != 2
#error "NBHD_GROUPS: one warpgroup for dV, one for dK"
#endif

#define BLOCKS 1
#define OWN_BYTES (STAGES * P_BYTES)
#define P_BYTES (NBHD_N * 128) /* a stage */
#include "device/keys_sm90.cuh"
#include "device/key_loaders_sm90.cuh"
#include "device/key_products_sm90.cuh"
#include "device/key_setup_sm90.cuh"

/* P, to the other warpgroup. place: of this thread. */
NBHD_FN void hand_over(const unsigned *p, unsigned place)
{
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++)
        st_shared_v4(place + i * 2048, make_uint4(p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]));
}

/* dS = P (dP - delta), packed, from P as hand_over left it. */
NBHD_FN void receive(unsigned *ds, unsigned place, const float *dp, const float *delta)
{
    delta += 2 * (threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++) {
        uint4 x = ld_shared_v4(place + i * 2048);
        unsigned word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            float2 p = unpack(word[w]), d = *(const float2 *)&delta[16 * i + w / 2 * 8];
            const float *g = dp + 8 * i + 2 * w;
            ds[4 * i + w] = pack(p.x * (g[0] - d.x), p.y * (g[1] - d.y));
        }
    }
}

/* Warpgroup 1: all boxes, then the rows of dV. The loop ends with only dV in flight: ptxas would not keep scores in
 * flight across its end. */
NBHD_FN void sum_dv(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab,
                    const struct memory *m)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, number = warp * 16 + (lane >> 2);
    unsigned place = m->own + (threadIdx.x & 127) * 16;
    unsigned p_full = smem_address(tab->own), p_empty = p_full + 8 * STAGES;
    float s[NBHD_N / 2], dv[NBHD_HEAD_DIM_V / 2];
    unsigned packed[NBHD_N / 4];
    zero(dv, NBHD_HEAD_DIM_V / 2);
    if (NBHD_MASK_STEPS)
        write_probes(b, tab, m->probes, number);
    unsigned long long k = wgmma_k_major(m->k);
    mbar_wait(smem_address(&tab->kv_full), 0);

    int step = 0, flags, begun = 0;
    do {
        int stage = step % STAGES, phase = step / STAGES & 1, slot = step % SLOTS;
        mbar_wait(smem_address(&tab->q_full[stage]), phase);
        flags = __shfl_sync(~0u, tab->flags[slot], 0);
        add_scores(s, k, wgmma_k_major(m->q + stage * Q_BYTES), K_STEPS);
        if (NBHD_MASK_STEPS && flags & FLAG_MASK(0))
            add_mask(s, tab, slot, m->probes, m->queries, threadIdx.x & 3, threadIdx.x & 127);
        wgmma_fence(); /* for what comes together here: ptxas would add it, with a remark */
        wgmma_commit();
        mbar_wait(smem_address(&tab->do_full[stage]), phase);
        wgmma_wait_1(); /* dV of the step before */
        NBHD_PIN_F(dv, NBHD_HEAD_DIM_V / 2);
        NBHD_KEEP_R(packed, NBHD_N / 4);
        if (begun && lane == 0)
            mbar_arrive(smem_address(&tab->do_empty[stage ^ 1]));
        begun = 1;
        wgmma_wait_0();
        NBHD_PIN_F(s, NBHD_N / 2);
        if (NBHD_MASK_BITS && flags & FLAG_MASK(0))
            compare_mask(s, b, tab, slot, number);
        probabilities(s, packed, tab->lse[slot], b->scale_log2);
        mbar_wait(p_empty + 8 * stage, phase ^ 1);
        hand_over(packed, place + stage * P_BYTES);
        __syncwarp();
        if (lane == 0) {
            mbar_arrive(p_full + 8 * stage);
            mbar_arrive(smem_address(&tab->q_empty[stage]));
        }
        issue_dv(dv, packed, m->dout + stage * DO_BYTES);
        step = (step + 1) % (2 * SLOTS);
    } while (flags & FLAG_MORE);
    wgmma_wait_0();
    NBHD_PIN_F(dv, NBHD_HEAD_DIM_V / 2);
    named_barrier_sync(1, 256); /* V has been read, whose place dV takes */
    store_rows(p, b, tab, &p->dv, dv, NBHD_HEAD_DIM_V, 1, m->v + warp * 2048, warp * 16);
}

/* Warpgroup 2: all boxes, then the rows of dK. */
NBHD_FN void sum_dk(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab,
                    const struct memory *m)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    unsigned place = m->own + (threadIdx.x & 127) * 16;
    unsigned p_full = smem_address(tab->own), p_empty = p_full + 8 * STAGES;
    float dp[NBHD_N / 2], dk[NBHD_HEAD_DIM / 2];
    unsigned ds[NBHD_N / 4];
    zero(dk, NBHD_HEAD_DIM / 2);
    unsigned long long v = wgmma_k_major(m->v);
    mbar_wait(smem_address(&tab->kv_full), 0);

    int step = 0, flags, begun = 0;
    do {
        int stage = step % STAGES, phase = step / STAGES & 1, slot = step % SLOTS;
        mbar_wait(smem_address(&tab->do_full[stage]), phase);
        issue_scores(dp, v, wgmma_k_major(m->dout + stage * DO_BYTES), V_STEPS);
        wgmma_wait_1(); /* dK of the step before */
        NBHD_PIN_F(dk, NBHD_HEAD_DIM / 2);
        NBHD_KEEP_R(ds, NBHD_N / 4);
        if (begun && lane == 0)
            mbar_arrive(smem_address(&tab->q_empty[stage ^ 1]));
        begun = 1;
        mbar_wait(smem_address(&tab->q_full[stage]), phase);
        flags = __shfl_sync(~0u, tab->flags[slot], 0);
        mbar_wait(p_full + 8 * stage, phase);
        wgmma_wait_0();
        NBHD_PIN_F(dp, NBHD_N / 2);
        receive(ds, place + stage * P_BYTES, dp, tab->delta[slot]);
        __syncwarp();
        if (lane == 0) {
            mbar_arrive(smem_address(&tab->do_empty[stage]));
            mbar_arrive(p_empty + 8 * stage);
        }
        issue_dk(dk, ds, m->q + stage * Q_BYTES);
        step = (step + 1) % (2 * SLOTS);
    } while (flags & FLAG_MORE);
    wgmma_wait_0();
    NBHD_PIN_F(dk, NBHD_HEAD_DIM / 2);
    named_barrier_sync(1, 256); /* K has been read, whose place dK takes */
    store_rows(p, b, tab, &p->dk, dk, NBHD_HEAD_DIM, p->scale, m->k + warp * 2048, warp * 16);
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_bwd_sm90_apart(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_bwd_boxes b,
                        const __grid_constant__ struct maps maps)
{
    extern __shared__ __align__(1024) char shared[];
    struct memory m = lay_out(shared);
    struct tables *tab = m.tab;
    if (threadIdx.x < 2 * STAGES)
        mbar_init(smem_address(&tab->own[threadIdx.x]), 4); /* one lane of each warp */
    mbar_fence_init();
    if (!set_up(&p, &b, &maps, &m, tile_place(&p, &b, blockIdx)))
        return;

    if (threadIdx.x < 128) {
        NBHD_SET_REGISTERS_DOWN(24);
        int warp = threadIdx.x / 32;
        if (warp == 0)
            load_queries(&b, tab, maps.q, m.q);
        else if (warp == 1)
            load_gradients(&p, &b, tab, maps.dout, m.dout);
    } else {
        NBHD_SET_REGISTERS_UP(NBHD_REGISTERS);
        if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 1)
            sum_dv(&p, &b, tab, &m);
        else
            sum_dk(&p, &b, tab, &m);
    }
}
