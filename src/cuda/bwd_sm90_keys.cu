/* Gradients of K and V on Hopper, where dQ is computed by bwd_sm90_dq.cu: wgmma and TMA. Host half: bwd_sm90.c; box
 * shapes: sm90_bwd_plan.c.
 *
 * A CTA holds 64 or 128 keys and streams boxes of queries (device/keys_sm90.cuh). A warpgroup has 64 keys as rows:
 *     S = K Q^T    P = exp2(S scale - lse)    dP = V dO^T    dS = P (dP - delta)    dV += P dO    dK += dS Q
 * with P and dS in registers. Nothing is shared between CTAs or warpgroups, so the sums have one order.
 * With one warpgroup several CTAs share a multiprocessor: for small windows, where set-up and first loads are most of
 * a tile.
 *
 *     warpgroup 0      warp 0: K, V, Q boxes, and what each box needs of a mask    warp 1: dO boxes and statistics
 *     warpgroups 1..   the products
 *
 * A step, with dK of the step before still running when it begins:
 *     issue S, mask | issue dP | wait S | P | wait dP | issue dV | dS | issue dK | wait dV
 * With two warpgroups, one skips the boxes of which none of its 64 keys is seen: at the ends of the tile's union. And
 * they take turns: one issues its S only when the other's is complete, so that its products fill the time of the
 * other's exponentials.
 *
 * Registers of a consumer thread: dK head_dim/2, dV head_dim_v/2, S, dP N/2 each, P and dS N/4 each. */
#define SKIPS (NBHD_GROUPS == 2)
#include "device/keys_sm90.cuh"
#include "device/key_loaders_sm90.cuh"
#include "device/key_products_sm90.cuh"
#include "device/key_setup_sm90.cuh"

/* Barriers 2 and 3: it is the turn of warpgroup 0, of warpgroup 1. The ids are literals, or ptxas reserves all 16. */
NBHD_FN void wait_turn(int group)
{
    if (NBHD_GROUPS == 2 && group == 0)
        named_barrier_sync(2, 256);
    else if (NBHD_GROUPS == 2)
        named_barrier_sync(3, 256);
}

/* To the other warpgroup. */
NBHD_FN void pass_turn(int group)
{
    if (NBHD_GROUPS == 2 && group == 0)
        named_barrier_arrive(3, 256);
    else if (NBHD_GROUPS == 2)
        named_barrier_arrive(2, 256);
}

/* One consumer warpgroup: all boxes, then its rows of dK and dV. */
NBHD_FN void consume(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab,
                     const struct memory *m)
{
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1; /* uniform: else descriptors live in vector registers */
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    int number = group * 64 + warp * 16 + (lane >> 2); /* the thread's first row; its second: + 8 */
    unsigned q_full = smem_address(tab->q_full), q_empty = smem_address(tab->q_empty);
    unsigned do_full = smem_address(tab->do_full), do_empty = smem_address(tab->do_empty);
    float s[NBHD_N / 2], dp[NBHD_N / 2], dk[NBHD_HEAD_DIM / 2], dv[NBHD_HEAD_DIM_V / 2];
    unsigned packed[NBHD_N / 4], ds[NBHD_N / 4];
    zero(dk, NBHD_HEAD_DIM / 2);
    zero(dv, NBHD_HEAD_DIM_V / 2);
    if (NBHD_MASK_STEPS)
        write_probes(b, tab, m->probes, number);
    unsigned long long k = wgmma_k_major(m->k + group * 8192), v = wgmma_k_major(m->v + group * 8192);
    mbar_wait(smem_address(&tab->kv_full), 0);

    int step = 0, flags, held = 0;
    if (group == 1)
        pass_turn(group);
    do {
        int stage = step % STAGES, phase = step / STAGES & 1, slot = step % SLOTS;
        mbar_wait(q_full + 8 * stage, phase);
        flags = __shfl_sync(~0u, tab->flags[slot], 0);
        int others = group == 0 || flags & FLAG_MORE; /* whether the other warpgroup has a turn after this one */
        wait_turn(group);
        if (SKIPS && flags & FLAG_UNSEEN(group)) {
            if (others)
                pass_turn(group);
            wgmma_wait_0(); /* dK of the step before */
            NBHD_PIN_F(dk, NBHD_HEAD_DIM / 2);
            NBHD_KEEP_R(ds, NBHD_N / 4);
            if (lane == 0) {
                mbar_arrive(do_empty + 8 * stage); /* before Q's: else it might count for the stage's box before */
                if (held)
                    mbar_arrive(q_empty + 8 * (stage ^ 1));
                mbar_arrive(q_empty + 8 * stage);
            }
            held = 0;
            step = (step + 1) % (2 * SLOTS);
            continue;
        }
        add_scores(s, k, wgmma_k_major(m->q + stage * Q_BYTES), K_STEPS);
        if (NBHD_MASK_STEPS && flags & FLAG_MASK(group))
            add_mask(s, tab, slot, m->probes, m->queries, threadIdx.x & 3, threadIdx.x - 128);
        wgmma_fence();
        wgmma_commit();
        if (IS_TIGHT) {
            wgmma_wait_1();
            NBHD_PIN_F(dk, NBHD_HEAD_DIM / 2);
            NBHD_KEEP_R(ds, NBHD_N / 4);
        }
        mbar_wait(do_full + 8 * stage, phase);
        issue_scores(dp, v, wgmma_k_major(m->dout + stage * DO_BYTES), V_STEPS);
        wgmma_wait_1(); /* S, and dK of the step before */
        NBHD_PIN_F(s, NBHD_N / 2);
        if (!IS_TIGHT) {
            NBHD_PIN_F(dk, NBHD_HEAD_DIM / 2);
            NBHD_KEEP_R(ds, NBHD_N / 4);
        }
        if (others)
            pass_turn(group);
        if (held && lane == 0)
            mbar_arrive(q_empty + 8 * (stage ^ 1));
        held = 1;
        if (NBHD_MASK_BITS && flags & FLAG_MASK(group))
            compare_mask(s, b, tab, slot, number);
        probabilities(s, packed, tab->lse[slot], b->scale_log2);
        unsigned all = 0;
#pragma unroll
        for (int i = 0; i < NBHD_N / 4; i++)
            all |= packed[i];
        wgmma_wait_0_after_bits(all, smem_address(&tab->scratch));
        NBHD_PIN_F(dp, NBHD_N / 2);
        issue_dv(dv, packed, m->dout + stage * DO_BYTES);
        if (IS_TIGHT)
            score_gradients_packed(ds, packed, dp, tab->delta[slot]);
        else
            score_gradients(ds, s, dp, tab->delta[slot]);
        issue_dk(dk, ds, m->q + stage * Q_BYTES);
        wgmma_wait_1(); /* dV */
        NBHD_PIN_F(dv, NBHD_HEAD_DIM_V / 2);
        NBHD_PIN_R(packed, NBHD_N / 4);
        if (lane == 0)
            mbar_arrive(do_empty + 8 * stage);
        step = (step + 1) % (2 * SLOTS);
    } while (flags & FLAG_MORE);
    wgmma_wait_0();
    NBHD_PIN_F(dk, NBHD_HEAD_DIM / 2);
    named_barrier_sync(1, 128 * NBHD_GROUPS); /* all warpgroups have read K, whose place dK takes */
    int first = group * 64 + warp * 16;
    store_rows(p, b, tab, &p->dv, dv, NBHD_HEAD_DIM_V, 1, m->v + first * 128, first);
    store_rows(p, b, tab, &p->dk, dk, NBHD_HEAD_DIM, p->scale, m->k + first * 128, first);
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_bwd_sm90_keys(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_bwd_boxes b,
                       const __grid_constant__ struct maps maps)
{
    extern __shared__ __align__(1024) char shared[];
    struct memory m = lay_out(shared);
    struct tables *tab = m.tab;
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
        consume(&p, &b, tab, &m);
    }
}
