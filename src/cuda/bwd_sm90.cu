/* Gradients of neighborhood attention on Hopper: wgmma and TMA. Host half: bwd_sm90.c; box shapes: sm90_bwd_plan.c.
 *
 * A CTA holds 128 keys and streams boxes of queries (device/keys_sm90.cuh). A warpgroup has 64 keys as rows:
 *     S = K Q^T    P = exp2(S scale - lse)    dP = V dO^T    dS = P (dP - delta)    dV += P dO    dK += dS Q
 * with P and dS in registers. dS goes through shared memory, as [query][key], to the product of all 128 keys that
 * is the tile's part of dQ^T = K^T dS^T; a bulk reduction adds it to a float32 dQ in the workspace. The warpgroups take
 * turns with it, box by box, so that they are out of step: one's products hide what the other does between its own.
 * Without dQ: bwd_sm90_keys.cu.
 *
 *     warpgroup 0      warp 0: K, V, Q boxes, and what each box needs of a mask    warp 1: dO boxes and
 *                      statistics    warp 2: adds dQ to the workspace
 *     warpgroups 1, 2  the products
 *
 *     shared memory, from a multiple of 1024; a chunk is 64 columns of 16 bits or 32 floats, 128 bytes a row:
 *     | K, later dK | V, later dV | Q: 2 stages | dO: 2 | dS: 2 x 2 x N x 128 | dQ: chunks x N x 128 |
 *     | mask probes | mask queries | struct tables |
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
#if NBHD_GROUPS != 2
#error "NBHD_GROUPS: two warpgroups take turns with dQ"
#endif

#define SLOTS 4 /* twice the stages: what is small is loaded before its stage is free */
#define FLAG_SETS 2
#include "device/keys_sm90.cuh"

#define DS_BYTES (2 * NBHD_N * 128) /* a stage */
#define DQ_BYTES (2 * K_CHUNKS * NBHD_N * 128)

/* Named barriers; + the warpgroup that computes the box's dQ. */
#define BARRIER_DS 1
#define BARRIER_DQ_FULL 3
#define BARRIER_DQ_EMPTY 5
#define BARRIER_END 7

/* The thread's number, read anew: loading warps have no register to keep what follows from it. */
NBHD_FN int fresh_thread(void)
{
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/* ---- loading ---- */

/* The flags of this warp's box, a lane looks for each bit; warpgroup 1's mask stands above warpgroup 0's. */
NBHD_FN unsigned box_flags(const struct tables *tab)
{
    int lane = fresh_thread() & 31, axis = lane < 9 ? lane % 3 : 3, set = 0; /* of warp 0 */
    int origin = ld_shared_b32(smem_address(&tab->at[0]) + 4 * axis);
    if (lane < 3 * NBHD_GROUPS) {
        int2 all = tab->all[lane >= 3][axis];
        set = origin < all.x || origin + tab->q.extent[axis] > all.y;
    } else if (lane >= 6 && lane < 9) {
        set = origin + tab->q.extent[axis] < tab->any[axis].y;
    } else if (lane == 9) {
        set = origin + 1 < tab->place.head_end;
    }
    return __ballot_sync(~0u, set);
}

/* One lane's part of a box's statistics: rows lane, lane + 32, ...; those outside the tensor get 0. */
NBHD_FN void load_statistics(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct tables *tab,
                             int step)
{
    const struct place *t = &tab->place;
    struct box x = box_at(tab);
    unsigned first = (unsigned)t->batch * p->heads + x.head;
#pragma unroll
    for (int a = 0; a < 3; a++) {
        first = first * p->axis[a].length + x.origin[a] * p->axis[a].dilation + t->group[a];
        x.origin[a] = t->queries[a] - x.origin[a]; /* rows that are inside */
    }
#pragma unroll 1
    for (int r = fresh_thread() & 31; r < tab->q.queries; r += 32) {
        int2 query = tab->query[r];
        int inside = coordinate(query.x, 0) < x.origin[0] && coordinate(query.x, 1) < x.origin[1] &&
                     coordinate(query.x, 2) < x.origin[2];
        unsigned token = inside ? first + query.y : 0;
        cp_async_4(smem_address(&tab->lse[step % SLOTS][r]), b->lse + token, inside);
        cp_async_4(smem_address(&tab->delta[step % SLOTS][r]), b->delta + token, inside);
    }
}

/* Warp 0: all boxes of Q, and what the consumers must know of each. */
NBHD_FN void load_queries(const struct nbhd_bwd_boxes *b, struct tables *tab, const struct nbhd_tensor_map *maps,
                          unsigned q_tiles)
{
    int step = 0, lane = threadIdx.x & 31, axis = NBHD_MASK_STEPS ? column_axis(&tab->q, lane) : 3;
    set_first_box(tab);
    do {
        unsigned flags = box_flags(tab);
        if (lane < 2)
            tab->flags[step % SLOTS][lane] = flags >> 3 * lane & FLAG_MASK | flags & FLAG_MORE;
        if (NBHD_MASK_BITS && lane == 2)
            tab->origin[step % SLOTS] = ld_shared_b32(smem_address(&tab->at[0]) + 8);
        if (NBHD_MASK_STEPS && axis < 3) {
            int origin = ld_shared_b32(smem_address(&tab->at[0]) + 4 * axis);
            tab->position[step % SLOTS][lane] = (unsigned)(origin - tab->any[axis].x + MASK_BIAS) * 0x10001;
        }
        __syncwarp();
        if (lane == 0) {
            struct box x = box_at(tab);
            unsigned full = smem_address(&tab->q_full[step % STAGES]), dst = q_tiles + step % STAGES * Q_BYTES;
            mbar_wait(smem_address(&tab->q_empty[step % STAGES]), ~(step / STAGES) & 1);
            mbar_arrive_expect(full, K_CHUNKS * tab->q.queries * 128);
            for (int c = 0; c < K_CHUNKS; c++)
                tma_load_5d(dst + c * NBHD_N * 128, map_of(maps, tab), full, 64 * c, x.head, x.origin[2], x.origin[1],
                            slowest(b, tab, x.origin));
        }
        step = (step + 1) % (2 * SLOTS);
    } while (set_next_box(tab));
}

/* Warp 1: all boxes of dO, and their statistics; these arrive only after the stage is free, or they would count for the box
 * before. */
NBHD_FN void load_gradients(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab,
                            const struct nbhd_tensor_map *maps, unsigned do_tiles)
{
    int step = 0;
    set_first_box(tab);
    do {
        load_statistics(p, b, tab, step);
        mbar_wait(smem_address(&tab->do_empty[step % STAGES]), ~(step / STAGES) & 1);
        cp_async_mbar_arrive(smem_address(&tab->do_full[step % STAGES]));
        if ((threadIdx.x & 31) == 0) {
            struct box x = box_at(tab);
            unsigned full = smem_address(&tab->do_full[step % STAGES]), dst = do_tiles + step % STAGES * DO_BYTES;
            mbar_arrive_expect(full, V_CHUNKS * tab->q.queries * 128);
            for (int c = 0; c < V_CHUNKS; c++)
                tma_load_5d(dst + c * NBHD_N * 128, map_of(maps, tab), full, 64 * c, x.head, x.origin[2], x.origin[1],
                            slowest(b, tab, x.origin));
        }
        step = (step + 1) % (2 * SLOTS);
    } while (set_next_box(tab));
}

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

/* Warp 2: adds to the workspace what the consumers have staged, one warpgroup and the other in turn. */
NBHD_FN void add_dq(const struct nbhd_bwd_boxes *b, struct tables *tab, const struct nbhd_tensor_map *maps,
                    unsigned dq_tile)
{
    int group = 0, more;
    set_first_box(tab);
    group_arrive(BARRIER_DQ_EMPTY, group, 160);
    do {
        struct box x = box_at(tab);
        more = set_next_box(tab);
        group_sync(BARRIER_DQ_FULL, group, 160);
        if ((threadIdx.x & 31) == 0) {
            fence_proxy_async();
            for (int c = 0; c < (NBHD_HEAD_DIM + 31) / 32; c++)
                tma_add_5d(map_of(maps, tab), dq_tile + c * NBHD_N * 128, 32 * c, x.head, x.origin[2], x.origin[1],
                           slowest(b, tab, x.origin));
            bulk_commit();
            bulk_wait_read_0();
        }
        __syncwarp();
        group ^= 1;
        if (more)
            group_arrive(BARRIER_DQ_EMPTY, group, 160);
    } while (more);
    if ((threadIdx.x & 31) == 0)
        bulk_wait_0();
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

/* Stages 64 rows of dQ^T as two chunks of 32 floats of each query, 128-byte swizzle. */
NBHD_FN void stage_dq(const float *dq, unsigned place)
{
    int thread = threadIdx.x, g = thread >> 2 & 7, q = thread & 3, warp = thread >> 5 & 3;
    /* A warp has 16 of 64 columns: half of a chunk of 32. */
    unsigned base = place + (warp >> 1) * (NBHD_N * 128) + (g & 3) * 4, piece = (warp & 1) * 4 + (g >> 2);
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            unsigned at = base + (2 * q + c) * 128 + (((piece + 2 * r) ^ (2 * q + c)) << 4);
#pragma unroll
            for (int j = 0; j < NBHD_N / 8; j++)
                st_shared_b32(at + j * 1024, __float_as_uint(dq[4 * j + 2 * r + c]));
        }
}

struct memory {
    unsigned k, v, q, dout, ds, dq, probes, queries;
};

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

NBHD_FN void zero(float *x, int count)
{
#pragma unroll
    for (int i = 0; i < count; i++)
        x[i] = 0;
}

/* Issues S for the box at hand. */
NBHD_FN void begin_box(struct registers *r, struct consumer *c, const struct tables *tab, const struct memory *m)
{
    mbar_wait(smem_address(&tab->q_full[c->step % STAGES]), c->step / STAGES & 1);
    c->flags = __shfl_sync(~0u, tab->flags[c->step % SLOTS][c->group], 0);
    issue_scores(r->s, c->k, wgmma_k_major(m->q + c->step % STAGES * Q_BYTES), K_STEPS);
    int thread = threadIdx.x - 128, masked = c->flags & FLAG_MASK;
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
    if (NBHD_MASK_BITS && c->flags & FLAG_MASK)
        compare_mask(r->s, b, tab, c->step % SLOTS, c->number);
    probabilities(r->s, r->p, tab->lse[c->step % SLOTS], b->scale_log2);
#pragma unroll
    for (int i = 0; i < NBHD_N / 4; i++)
        all |= r->p[i];
    wgmma_wait_0_after_bits(all, smem_address(&tab->scratch));
    NBHD_PIN_F(r->dp, NBHD_N / 2);
}

/* dQ of the box, when dS is complete and dV done: dQ, with dK behind it, and over to the warp that adds it to the workspace.
 * That one's fence makes the stores seen by the copy engine: a fence here would have four warps wait for them. */
NBHD_FN void find_dq(struct registers *r, const struct consumer *c, const struct memory *m, unsigned ds)
{
    for (int i = 0; i < K_CHUNKS; i++)
        issue_dq(r->dq[i], wgmma_mn_major(m->k + i * ROWS * 128, ROWS), wgmma_k_major(ds));
    issue_dk(r->dk, r->ds, m->q + c->step % STAGES * Q_BYTES);
    wgmma_wait_1();
    for (int i = 0; i < K_CHUNKS; i++)
        NBHD_PIN_F(r->dq[i], NBHD_N / 2);
    group_sync(BARRIER_DQ_EMPTY, c->group, 160);
    for (int i = 0; i < K_CHUNKS; i++)
        stage_dq(r->dq[i], m->dq + i * 2 * NBHD_N * 128);
    group_arrive(BARRIER_DQ_FULL, c->group, 160);
}

/* From P and dP to dV, dS and dK; with_dq: and dQ. All are done at the end: products in flight across a turn's end would need
 * more registers than there are, and the other warpgroup's keep the tensor cores busy. */
NBHD_FN void find_gradients(struct registers *r, const struct consumer *c, struct tables *tab, const struct memory *m,
                            int with_dq)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    unsigned ds = m->ds + c->step % STAGES * DS_BYTES;
    issue_dv(r->dv, r->p, m->dout + c->step % STAGES * DO_BYTES);
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
        find_dq(r, c, m, ds);
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

    int more = 1, turn = c.group; /* dQ of boxes 0, 2, ... is warpgroup 0's, of the others 1's */
    do {
        if (turn)
            more = do_box(&r, &c, b, tab, m, 0);
        if (!more)
            break;
        more = do_box(&r, &c, b, tab, m, 1);
        turn = 1;
    } while (more);
    named_barrier_sync(BARRIER_END, 256); /* both warpgroups have read K, whose place dK takes */
    int first = c.group * 64 + warp * 16;
    store_rows(p, b, tab, &p->dv, r.dv, NBHD_HEAD_DIM_V, 1, m->v + first * 128, first);
    store_rows(p, b, tab, &p->dk, r.dk, NBHD_HEAD_DIM, p->scale, m->k + first * 128, first);
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_bwd_sm90(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_bwd_boxes b,
                  const __grid_constant__ struct maps maps)
{
    extern __shared__ __align__(1024) char shared[];
    struct memory m;
    m.k = smem_address(shared);
    m.v = m.k + K_BYTES;
    m.q = m.v + V_BYTES;
    m.dout = m.q + STAGES * Q_BYTES;
    m.ds = m.dout + STAGES * DO_BYTES;
    m.dq = m.ds + STAGES * DS_BYTES;
    m.probes = m.dq + DQ_BYTES;
    m.queries = m.probes + PROBE_BYTES;
    struct tables *tab = (struct tables *)(shared + (m.queries - m.k) + MASK_BYTES);
    struct place t = tile_place(&p, &b);
    if (t.origin[0] >= t.keys[0] || t.origin[1] >= t.keys[1] || t.origin[2] >= t.keys[2])
        return; /* a dilation group with fewer elements than the first */
    int slice = b.sliced ? blockIdx.z : 0;
    prepare(&p, &b, &t, tab);
    if (threadIdx.x == 0) /* the tables are made meanwhile */
        load_keys(&b, tab, &maps, slice, m.k, m.v);
    clear_rows(m.k, K_CHUNKS + V_CHUNKS, ROWS, b.rows);
    clear_rows(m.q, STAGES * (K_CHUNKS + V_CHUNKS), NBHD_N, b.shape[t.shape].queries);
    if (NBHD_MASK_STEPS)
        write_mask_queries(&b.shape[t.shape], m.queries);
    fence_proxy_async();
    __syncthreads();
    prepare_bounds(&b, tab);
    __syncthreads();

    if (threadIdx.x < 128) {
        NBHD_SET_REGISTERS_DOWN(24);
        int warp = threadIdx.x / 32;
        if (warp == 0)
            load_queries(&b, tab, maps.q, m.q);
        else if (warp == 1)
            load_gradients(&p, &b, tab, maps.dout, m.dout);
        else if (warp == 2)
            add_dq(&b, tab, maps.dq, m.dq);
    } else {
        NBHD_SET_REGISTERS_UP(NBHD_REGISTERS);
        consume(&p, &b, tab, &m);
    }
}
