/* Gradients of neighborhood attention on Hopper: wgmma and TMA. Host half: bwd_sm90.c; box shapes: sm90_bwd_plan.c.
 *
 * A CTA holds 128 keys and streams boxes of queries (device/keys_sm90.cuh). A warpgroup has 64 keys as rows:
 *     S = K Q^T    P = exp2(S scale - lse)    dP = V dO^T    dS = P (dP - delta)    dV += P dO    dK += dS Q
 * with P and dS in registers. dS goes through shared memory, as [query][key], to the product of all 128 keys that
 * is the tile's part of dQ^T = K^T dS^T; a bulk reduction adds it to a dQ in the workspace, in float32 or, for the same
 * bits in every run, in integers (device/sums_sm90.cuh). The warpgroups take turns with it, box by box, so that they
 * are out of step: one's products hide what the other does between its own. Without dQ: bwd_sm90_keys.cu.
 *
 *     warpgroup 0      warp 0: K, V, Q boxes, and what each box needs of a mask    warp 1: dO boxes and
 *                      statistics    warp 2: adds dQ to the workspace    warp 3: clears and converts
 *                      rows there, of heads to come and of heads that are done (device/tend_sm90.cuh)
 *     warpgroups 1, 2  the products
 *
 * Its own part of shared memory: dS, 2 stages x 2 warpgroups x N x 128 bytes; dQ, N x 128 for each 32 of its
 * columns; what warp 3 needs.
 *
 * A box, where the warpgroup has dQ, and where it only hands dS over:
 *     issue S, mask | issue dP | wait S | P | wait dP | issue dV | dS, to shared memory |
 *         wait for the other's dS, dV | issue dQ | issue dK | wait dQ | dQ to shared memory | wait dK
 *         tell the other | issue dK | wait dV, dK
 *
 * Registers of a consumer thread: dK head_dim/2, dV head_dim_v/2, S, dP (then dQ) N/2 each, P and dS N/4 each. */
#if !defined(NBHD_DQ_PRODUCT) || !defined(NBHD_DQ_FIRST) || !defined(NBHD_MASK_IF)
#error "NBHD_DQ_PRODUCT, NBHD_DQ_FIRST, NBHD_MASK_IF: wgmma_ss_at_n<N>, wgmma_ss_at_first_n<N>, wgmma_rs_if_n<N>"
#endif
#ifndef NBHD_TENDS
#error "NBHD_TENDS: 1 where tiles clear and convert sums of other heads beside their products"
#endif
#if NBHD_GROUPS != 2
#error "NBHD_GROUPS: two warpgroups take turns with dQ"
#endif

#define DS_BYTES (2 * NBHD_N * 128) /* a stage */
#define DQ_BYTES (2 * K_CHUNKS * NBHD_N * 128)
#define TEND_BYTES (NBHD_TENDS ? NBHD_BWD_SM90_TENDING(NBHD_HEAD_DIM) : 0)
#define OWN_BYTES (STAGES * DS_BYTES + DQ_BYTES + TEND_BYTES)

/* Named barriers; + the warpgroup that computes the box's dQ. */
#define BARRIER_DS 1
#define BARRIER_DQ_FULL 3
#define BARRIER_DQ_EMPTY 5
#define BARRIER_END 7

#include "device/keys_sm90.cuh"
#include "device/key_loaders_sm90.cuh"
#include "device/key_products_sm90.cuh"
#include "device/key_setup_sm90.cuh"
#include "device/split_sm90.cuh"
#include "device/tend_sm90.cuh"

/* ---- dQ, to the workspace ---- */

NBHD_FN void group_sync(int id, int group, int threads)
{
    if (group == 0)
        named_barrier_sync(id, threads);
    else
        named_barrier_sync(id + 1, threads);
}

NBHD_FN void group_arrive(int id, int group, int threads)
{
    if (group == 0)
        named_barrier_arrive(id, threads);
    else
        named_barrier_arrive(id + 1, threads);
}

/* By one thread: begins to add what the consumers have staged for box x. Their place is then free again. */
NBHD_FN void issue_add(const struct nbhd_bwd_boxes *b, const struct tables *tab, const struct box *x,
                       const struct nbhd_tensor_map *maps, unsigned dq_tile)
{
    fence_proxy_async();
    for (int c = 0; c < (NBHD_HEAD_DIM + 31) / 32; c++)
        tma_add_5d(map_of(maps, tab), dq_tile + c * NBHD_N * 128, 32 * c, x->head, x->origin[2], x->origin[1],
                   slowest(b, tab, x->origin));
    bulk_commit();
    bulk_wait_read_0();
}

/* Warp 2: adds to the workspace what the consumers have staged, one warpgroup and the other in turn. */
NBHD_FN void add_dq(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab,
                    const struct nbhd_tensor_map *maps, unsigned dq_tile)
{
    int group = 0, more;
    if (NBHD_TENDS && unit_of(p, tab) >= b->lag)
        await_count(&b->counts[unit_of(p, tab)], b->unit_tiles);
    set_first_box(tab);
    group_arrive(BARRIER_DQ_EMPTY, group, 160);
    do {
        struct box x = box_at(tab);
        more = set_next_box(tab);
        group_sync(BARRIER_DQ_FULL, group, 160);
        if ((threadIdx.x & 31) == 0)
            issue_add(b, tab, &x, maps, dq_tile);
        __syncwarp();
        group ^= 1;
        if (more)
            group_arrive(BARRIER_DQ_EMPTY, group, 160);
    } while (more);
    if ((threadIdx.x & 31) == 0) {
        bulk_wait_0();
        if (NBHD_TENDS)
            count_up(&b->counts[b->units + unit_of(p, tab)]);
    }
}

/* ---- the products ---- */

/* Writes dS as [query][key] for the product with K. place: this lane's row and piece of the first 16 queries. */
NBHD_FN void store_score_gradients(const unsigned *packed, unsigned place)
{
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++)
        stmatrix_x4_trans(place + i * 2048, packed + 4 * i);
}

/* 64 rows of dQ^T = K^T dS^T: columns of head_dim. */
NBHD_FN void issue_dq(float *dq, unsigned long long k, unsigned long long ds)
{
    wgmma_fence();
    NBHD_DQ_FIRST(dq, k, ds);
#pragma unroll
    for (int i = 1; i < ROWS / 16; i++)
        NBHD_DQ_PRODUCT(dq, wgmma_advance(k, 128 * i), wgmma_advance(ds, i / 4 * (NBHD_N * 8) + i % 4 * 2), 1);
    wgmma_commit();
}

/* Where a thread stages its part of 64 rows of dQ^T, two chunks of 32 columns of each query, 128-byte swizzle: row r
 * and query c of its first four elements; 8 queries further, 1024 bytes further. */
NBHD_FN unsigned place_of_dq(unsigned place, int r, int c)
{
    int thread = threadIdx.x, g = thread >> 2 & 7, q = 2 * (thread & 3) + c, warp = thread >> 5 & 3;
    /* A warp has 16 of 64 columns: half of a chunk of 32. */
    unsigned base = place + (warp >> 1) * (NBHD_N * 128) + (g & 3) * 4, piece = (warp & 1) * 4 + (g >> 2);
    return base + q * 128 + (((piece + 2 * r) ^ q) << 4);
}

NBHD_FN void stage_dq(const float *dq, unsigned place)
{
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            unsigned at = place_of_dq(place, r, c);
#pragma unroll
            for (int j = 0; j < NBHD_N / 8; j++)
                st_shared_b32(at + j * 1024, __float_as_uint(dq[4 * j + 2 * r + c]));
        }
}

/* dQ^T of one chunk becomes integers where it is: while the box before is still staged. */
NBHD_FN void make_integers(float *dq, const float *fineness)
{
    fineness += 2 * (threadIdx.x & 3);
#pragma unroll
    for (int j = 0; j < NBHD_N / 8; j++) {
        float2 f = *(const float2 *)&fineness[8 * j];
#pragma unroll
        for (int i = 0; i < 4; i++)
            dq[4 * j + i] = __uint_as_float(to_integer(dq[4 * j + i], i % 2 ? f.y : f.x));
    }
}

/* dQ^T of two chunks becomes integers on its way out, once the box before has left: faster than in registers before.
 * fineness: of the box's queries. */
NBHD_FN void stage_integers(const float (*dq)[NBHD_N / 2], unsigned place, const float *fineness)
{
    unsigned at[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        at[i] = place_of_dq(place, i / 2, i % 2);
    fineness += 2 * (threadIdx.x & 3);
#pragma unroll
    for (int j = 0; j < NBHD_N / 8; j++) {
        float2 f = *(const float2 *)&fineness[8 * j];
#pragma unroll
        for (int i = 0; i < 4 * K_CHUNKS; i++)
            st_shared_b32(at[i % 4] + j * 1024 + i / 4 * (2 * NBHD_N * 128),
                          to_integer(dq[i / 4][4 * j + i % 4], i % 2 ? f.y : f.x));
    }
}

/* What a consumer thread holds: sums, scores of the box at hand, and operands. */
struct registers {
    float dk[NBHD_HEAD_DIM / 2], dv[NBHD_HEAD_DIM_V / 2], s[NBHD_N / 2], dp[NBHD_N / 2];
    unsigned p[NBHD_N / 4], ds[NBHD_N / 4];
    float dq[K_CHUNKS][NBHD_N / 2];
};

/* Where a consumer is: of which keys, at which box. */
struct consumer {
    int group, number; /* the thread's first row; its second: + 8 */
    int step, flags;   /* boxes before this one, modulo twice the slots */
    unsigned long long k, v;
};

/* Issues S for the box at hand. */
NBHD_FN void begin_box(struct registers *r, struct consumer *c, const struct tables *tab, const struct memory *m)
{
    mbar_wait(smem_address(&tab->q_full[c->step % STAGES]), c->step / STAGES & 1);
    c->flags = __shfl_sync(~0u, tab->flags[c->step % SLOTS], 0);
    issue_scores(r->s, c->k, wgmma_k_major(m->q + c->step % STAGES * Q_BYTES), K_STEPS);
    int thread = threadIdx.x - 128, masked = c->flags & FLAG_MASK(c->group);
    if (NBHD_MASK_STEPS == 1) { /* ptxas serializes the products that a branch is around, or two such */
        unsigned a[4] = {0};
        if (masked)
            find_mask(a, tab, c->step % SLOTS, m->probes, thread & 3, thread);
        NBHD_MASK_IF(r->s, a, wgmma_k_major_32(m->queries), masked);
        wgmma_commit();
    } else if (NBHD_MASK_STEPS && masked) {
        issue_mask(r->s, tab, c->step % SLOTS, m->probes, m->queries, thread & 3, thread);
    }
}

/* From S to P, with dP beside it. */
NBHD_FN void find_probabilities(struct registers *r, const struct consumer *c, const struct nbhd_bwd_boxes *b,
                                struct tables *tab, const struct memory *m)
{
    unsigned all = 0;
    mbar_wait(smem_address(&tab->do_full[c->step % STAGES]), c->step / STAGES & 1);
    issue_scores(r->dp, c->v, wgmma_k_major(m->dout + c->step % STAGES * DO_BYTES), V_STEPS);
    wgmma_wait_1(); /* S */
    NBHD_PIN_F(r->s, NBHD_N / 2);
    if (NBHD_MASK_BITS && c->flags & FLAG_MASK(c->group))
        compare_mask(r->s, b, tab, c->step % SLOTS, c->number);
    probabilities(r->s, r->p, tab->lse[c->step % SLOTS], b->scale_log2);
#pragma unroll
    for (int i = 0; i < NBHD_N / 4; i++)
        all |= r->p[i];
    wgmma_wait_0_after_bits(all, smem_address(&tab->scratch));
    NBHD_PIN_F(r->dp, NBHD_N / 2);
}

/* dQ of the box, when dS is complete and dV done: dQ, with dK behind it, and over to the warp that adds it to the
 * workspace. That one's fence makes the stores seen by the copy engine: a fence here would have four warps wait for
 * them. */
NBHD_FN void find_dq(struct registers *r, const struct consumer *c, const struct tables *tab, const struct memory *m,
                     unsigned ds)
{
    for (int i = 0; i < K_CHUNKS; i++)
        issue_dq(r->dq[i], wgmma_mn_major(m->k + i * ROWS * 128, ROWS), wgmma_k_major(ds));
    issue_dk(r->dk, r->ds, m->q + c->step % STAGES * Q_BYTES);
    wgmma_wait_1();
    for (int i = 0; i < K_CHUNKS; i++)
        NBHD_PIN_F(r->dq[i], NBHD_N / 2);
    if (NBHD_INTEGERS && K_CHUNKS == 1)
        make_integers(r->dq[0], fineness_in(tab, c->step % SLOTS));
    group_sync(BARRIER_DQ_EMPTY, c->group, 160);
    if (NBHD_INTEGERS && K_CHUNKS > 1)
        stage_integers(r->dq, m->own + STAGES * DS_BYTES, fineness_in(tab, c->step % SLOTS));
    for (int i = 0; i < K_CHUNKS && !(NBHD_INTEGERS && K_CHUNKS > 1); i++)
        stage_dq(r->dq[i], m->own + STAGES * DS_BYTES + i * 2 * NBHD_N * 128);
    group_arrive(BARRIER_DQ_FULL, c->group, 160);
}

/* From P and dP to dV, dS and dK; with_dq: and dQ. All are done at the end: products in flight across a turn's end
 * would need more registers than there are, and the other warpgroup's keep the tensor cores busy. */
NBHD_FN void find_gradients(struct registers *r, const struct consumer *c, struct tables *tab, const struct memory *m,
                            int with_dq)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    unsigned ds = m->own + c->step % STAGES * DS_BYTES;
    issue_dv(r->dv, r->p, m->dout + c->step % STAGES * DO_BYTES);
    if (IS_TIGHT)
        score_gradients_packed(r->ds, r->p, r->dp, tab->delta[c->step % SLOTS]);
    else
        score_gradients(r->ds, r->s, r->dp, tab->delta[c->step % SLOTS]);
    store_score_gradients(r->ds, ds + c->group * (NBHD_N * 128) + (lane & 7) * 128 + (lane >> 4) * 1024 +
                                     ((2 * warp + (lane >> 3 & 1) ^ lane & 7) << 4));
    if (with_dq) {
        group_sync(BARRIER_DS, c->group, 256);
        wgmma_wait_0();
    } else {
        group_arrive(BARRIER_DS, !c->group, 256);
        issue_dk(r->dk, r->ds, m->q + c->step % STAGES * Q_BYTES);
        wgmma_wait_1();
    }
    NBHD_PIN_F(r->dv, NBHD_HEAD_DIM_V / 2);
    NBHD_PIN_R(r->p, NBHD_N / 4);
    if (lane == 0)
        mbar_arrive(smem_address(&tab->do_empty[c->step % STAGES]));
    if (with_dq) {
        fence_proxy_async(); /* after the barrier: before it, each warp would wait for its own stores first */
        find_dq(r, c, tab, m, ds);
    }
    wgmma_wait_0();
    NBHD_PIN_F(r->dk, NBHD_HEAD_DIM / 2);
    NBHD_PIN_R(r->ds, NBHD_N / 4);
    if (lane == 0)
        mbar_arrive(smem_address(&tab->q_empty[c->step % STAGES]));
}

/* One box; returns whether there are more. */
NBHD_FN int do_box(struct registers *r, struct consumer *c, const struct nbhd_bwd_boxes *b, struct tables *tab,
                   const struct memory *m, int with_dq)
{
    begin_box(r, c, tab, m);
    find_probabilities(r, c, b, tab, m);
    find_gradients(r, c, tab, m, with_dq);
    c->step = (c->step + 1) % (2 * SLOTS);
    return c->flags & FLAG_MORE;
}

/* One consumer warpgroup: all boxes, then its rows of dK and dV. */
NBHD_FN void consume(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab,
                     const struct memory *m)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    struct registers r;
    struct consumer c;
    c.group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1; /* uniform: else descriptors live in vector registers */
    c.number = c.group * 64 + warp * 16 + (lane >> 2);
    c.step = 0;
    c.k = wgmma_k_major(m->k + c.group * 8192);
    c.v = wgmma_k_major(m->v + c.group * 8192);
    zero(r.dk, NBHD_HEAD_DIM / 2);
    zero(r.dv, NBHD_HEAD_DIM_V / 2);
    if (NBHD_MASK_STEPS)
        write_probes(b, tab, m->probes, c.number);
    mbar_wait(smem_address(&tab->kv_full), 0);

    int with_dq = !c.group; /* dQ of boxes 0, 2, ... is warpgroup 0's, of the others 1's */
    while (do_box(&r, &c, b, tab, m, with_dq)) /* one body for both: two would compile a quarter of a second longer */
        with_dq ^= 1;
    named_barrier_sync(BARRIER_END, 256); /* both warpgroups have read K, whose place dK takes */
    if (NBHD_TENDS && !join_parts(p, b, tab, r.dk, r.dv))
        return;
    int first = c.group * 64 + warp * 16;
    store_rows(p, b, tab, &p->dv, r.dv, NBHD_HEAD_DIM_V, 1, m->v + first * 128, first);
    store_rows(p, b, tab, &p->dk, r.dk, NBHD_HEAD_DIM, p->scale, m->k + first * 128, first);
}

/* The CTA's tile, by the whole CTA. */
NBHD_FN struct place own_tile(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab)
{
    if (NBHD_TENDS)
        return next_tile(p, b, tab);
    return tile_place(p, b, blockIdx);
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_bwd_sm90(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_bwd_boxes b,
                  const __grid_constant__ struct maps maps)
{
    extern __shared__ __align__(1024) char shared[];
    struct memory m = lay_out(shared);
    struct tables *tab = m.tab;
    if (NBHD_TENDS && threadIdx.x < 2)
        mbar_init(smem_address(&tab->own[threadIdx.x]), 1);
    if (!set_up(&p, &b, &maps, &m, own_tile(&p, &b, tab)))
        return;

    if (threadIdx.x < 128) {
        NBHD_SET_REGISTERS_DOWN(24);
        int warp = threadIdx.x / 32;
        if (warp == 0)
            load_queries(&b, tab, maps.q, m.q);
        else if (warp == 1)
            load_gradients(&p, &b, tab, maps.dout, m.dout);
        else if (warp == 2)
            add_dq(&p, &b, tab, maps.dq, m.own + STAGES * DS_BYTES);
        else if (NBHD_TENDS)
            tend_sums(&p, &b, tab, m.own + OWN_BYTES - TEND_BYTES);
    } else {
        NBHD_SET_REGISTERS_UP(NBHD_REGISTERS);
        consume(&p, &b, tab, &m);
    }
}
