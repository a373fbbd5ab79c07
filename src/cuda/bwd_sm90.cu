/* Gradients of neighborhood attention on Hopper: wgmma and TMA. Host half: bwd_sm90.c; box shapes: sm90_bwd_plan.c.
 *
 * One CTA holds a box of 128 keys (K and V) and streams the boxes of N queries that see them (Q, dO and their
 * statistics), for every query head of the key/value head. A warpgroup has 64 keys as rows:
 *     S = K Q^T    P = exp2(S scale - lse)    dP = V dO^T    dS = P (dP - delta)    dV += P dO    dK += dS Q
 * with P and dS in registers. dS goes through shared memory, as [query][key], to the product of all 128 keys that
 * is the tile's part of dQ^T = K^T dS^T; a bulk reduction adds it to a float32 dQ in the workspace (NBHD_DQ). The boxes
 * of queries start at the corner of the tile's own inverse window.
 *
 *     warpgroup 0      warp 0: K, V, Q boxes, and what each box needs of a mask    warp 1: dO boxes and
 *                      statistics    warps 2, 3: add dQ to the workspace
 *     warpgroups 1, 2  the products
 *
 *     shared memory, from a multiple of 1024; a chunk is 64 columns of 16 bits or 32 floats, 128 bytes a row:
 *     | K, later dK | V, later dV | Q: 2 stages | dO: 2 | dS: 2 x 2 x N x 128 | dQ: chunks x N x 128 |
 *     | mask probes | mask queries | struct tables |
 *
 * A step, with dK of the step before still running when it begins. dQ comes first after the barrier, since it has the
 * longest way:
 *     issue S, mask | issue dP | wait S | P | wait dP | issue dV | dS, to shared memory | barrier | issue dQ | issue dK |
 *     wait dQ | dQ to shared memory
 *
 * Masks are as in fwd_sm90.cu, roles changed: a box of queries has a one-hot column per coordinate, a key -2^100 (float16:
 * -2^30) in those columns from which it is not seen. Problems of one axis compare instead. Keys outside the tensor are
 * seen from nowhere; queries outside it, and rows past a box, have dO, delta and logsumexp 0 and add nothing.
 *
 * Registers of a consumer thread: dK head_dim/2, dV head_dim_v/2, S, dP (then dQ) N/2 each, P and dS N/4 each. */
#if !defined(NBHD_HEAD_DIM) || !defined(NBHD_HEAD_DIM_V)
#error "NBHD_HEAD_DIM, NBHD_HEAD_DIM_V: multiples of 8 up to 128"
#endif
#ifndef NBHD_DTYPE
#error "NBHD_DTYPE: 1 for float16, 2 for bfloat16; goes with NBHD_MMA_TYPE"
#endif
#ifndef NBHD_N
#error "NBHD_N: queries of a box, 64 or 128"
#endif
#ifndef NBHD_DQ
#error "NBHD_DQ: 1 adds dQ up in the workspace"
#endif
#if !defined(NBHD_SCORES) || !defined(NBHD_SCORES_FIRST) || !defined(NBHD_MASK)
#error "NBHD_SCORES, NBHD_SCORES_FIRST, NBHD_MASK: wgmma_ss_n<N>, wgmma_ss_first_n<N>, wgmma_rs_n<N>"
#endif
#if !defined(NBHD_DV_PRODUCT) || !defined(NBHD_DK_PRODUCT)
#error "NBHD_DV_PRODUCT, NBHD_DK_PRODUCT: wgmma_rs_bt_n<head_dim_v>, wgmma_rs_bt_n<head_dim>"
#endif
#if NBHD_DQ && (!defined(NBHD_DQ_PRODUCT) || !defined(NBHD_DQ_FIRST) || !defined(NBHD_DQ_QUERIES))
#error "NBHD_DQ_QUERIES: queries of a warpgroup's dQ: N, or N / 2 where head_dim <= 64; wgmma_ss_at_n<it>, .._first_n<it>"
#endif
#if !defined(NBHD_MASK_STEPS) || !defined(NBHD_MASK_BITS)
#error "NBHD_MASK_STEPS: mask columns / 16, 0 to 2; NBHD_MASK_BITS: 1 compares instead, boxes of 1 x 1 x N"
#endif
#ifndef NBHD_MAPS
#error "NBHD_MAPS: slices of a launch, at most"
#endif

#include "nbhd_params.h"
#include "device/bwd_boxes_sm90.cuh"
#include "device/ptx.cuh"
#include "device/tma_sm90.cuh"
#include "device/wgmma_sm90.cuh"

#define K_STEPS ((NBHD_HEAD_DIM + 15) / 16)
#define V_STEPS ((NBHD_HEAD_DIM_V + 15) / 16)
#define K_CHUNKS ((NBHD_HEAD_DIM + 63) / 64)
#define V_CHUNKS ((NBHD_HEAD_DIM_V + 63) / 64)
#define ROWS NBHD_BWD_SM90_ROWS
#define K_BYTES (K_CHUNKS * ROWS * 128)
#define V_BYTES (V_CHUNKS * ROWS * 128)
#define Q_BYTES (K_CHUNKS * NBHD_N * 128) /* a stage */
#define DO_BYTES (V_CHUNKS * NBHD_N * 128)
#define DS_BYTES (NBHD_DQ * 2 * NBHD_N * 128)
#define DQ_BYTES (NBHD_DQ * 2 * K_CHUNKS * NBHD_N * 128)
#define PROBE_BYTES (NBHD_MASK_STEPS * 256 * 32)
#define MASK_BYTES (NBHD_MASK_STEPS * NBHD_N * 32)
#define MASK_BIAS 256 /* as in fwd_sm90.cu: origins and bounds count from the begin of the union, plus this */
#define STAGES 2
#define SLOTS (2 * STAGES) /* what is small is loaded before its stage is free */
#define THREADS 384
#define NOWHERE (1 << 30)
/* Where head_dim fills only one product of 64 rows, a warpgroup computes dQ of half the queries, and the sum is complete
 * when both have. */
#define DQ_BY_QUERIES (NBHD_DQ && K_CHUNKS == 1)

/* Named barriers. */
#define BARRIER_DS 1
#define BARRIER_DQ_FULL 2  /* + group, unless DQ_BY_QUERIES */
#define BARRIER_DQ_EMPTY 4

struct maps {
    struct nbhd_tensor_map q[NBHD_MAPS], dout[NBHD_MAPS], dq[NBHD_MAPS], k[NBHD_MAPS], v[NBHD_MAPS];
};

/* Where this CTA's tile lies: origin in elements of its dilation group, and the group. */
struct place {
    int origin[3], group[3], keys[3], queries[3]; /* keys, queries: elements of the group */
    int batch, kv_head, head, head_end; /* query heads that share it */
};

/* Beside the tiles in shared memory. */
struct tables {
    unsigned long long kv_full, q_full[STAGES], q_empty[STAGES], do_full[STAGES], do_empty[STAGES];
    /* Of each box, in slots: */
    float lse[SLOTS][NBHD_N], delta[SLOTS][NBHD_N];
    unsigned position[SLOTS][32]; /* of each mask column: the box's origin on its axis, in both halves */
    int flags[SLOTS][2], origin[SLOTS]; /* for each warpgroup; its origin on the last axis */
    unsigned row[ROWS];
    int2 query[NBHD_N]; /* row of a box: its place, packed as in row, and its distance from the box's origin in tokens */
    int2 window[ROWS + 2]; /* queries that see each coordinate of the key box, axis after axis */
    int2 any[3], all[2][3]; /* queries that see some key of the tile, all keys of a warpgroup, per axis */
    uint4 at[4]; /* each loading warp's box */
    struct place place;
    unsigned scratch;
};

NBHD_STATIC_ASSERT(sizeof(struct tables) <= NBHD_BWD_SM90_TABLES(NBHD_N), "the host counts on it");

/* Bits of a box's flags for one warpgroup: axes on which it needs a mask; axes, and heads, on which there are more boxes. */
#define FLAG_MASK 7
#define FLAG_MORE (15 << 6)

NBHD_FN struct place tile_place(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b)
{
    struct place t;
    int x = blockIdx.x, slice = b->slice_begin + blockIdx.z;
    t.origin[0] = x % b->tiles[0], x /= b->tiles[0];
    t.origin[2] = x % b->tiles[2];
    t.origin[1] = x / b->tiles[2];
    for (int a = 2; a >= 0; a--) {
        struct nbhd_axis axis = p->axis[a];
        t.origin[a] *= b->k_box[a];
        t.group[a] = slice % axis.dilation;
        slice /= axis.dilation;
        t.queries[a] = nbhd_group_size(axis, t.group[a]);
        t.keys[a] = axis.keys == axis.length ? t.queries[a] : axis.keys;
    }
    t.batch = slice;
    t.kv_head = blockIdx.y;
    t.head = t.kv_head * (p->heads / p->kv_heads);
    t.head_end = t.head + p->heads / p->kv_heads;
    return t;
}

/* The thread's number, read anew: loading warps have no register to keep what follows from it. */
NBHD_FN int fresh_thread(void)
{
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

NBHD_FN int coordinate(unsigned row, int axis) { return row >> 8 * axis & 0xff; }

/* ---- the boxes of queries, in the order in which all roles meet them ---- */

/* A loading warp has 24 registers a thread, so it keeps the box that it is at in shared memory. */
struct box {
    int origin[3], head;
};

NBHD_FN struct box box_at(const struct tables *tab)
{
    uint4 at = ld_shared_v4(smem_address(&tab->at[threadIdx.x >> 5]));
    struct box x = {{(int)at.x, (int)at.y, (int)at.z}, (int)at.w};
    return x;
}

NBHD_FN void set_box(struct tables *tab, const struct box *x)
{
    __syncwarp();
    st_shared_v4(smem_address(&tab->at[threadIdx.x >> 5]), make_uint4(x->origin[0], x->origin[1], x->origin[2], x->head));
    __syncwarp();
}

NBHD_FN void set_first_box(struct tables *tab)
{
    struct box x = {{tab->any[0].x, tab->any[1].x, tab->any[2].x}, tab->place.head};
    set_box(tab, &x);
}

/* False after the last. */
NBHD_FN int next_box(struct box *x, const struct nbhd_bwd_boxes *b, const struct tables *tab)
{
#pragma unroll
    for (int a = 2; a >= 0; a--) {
        x->origin[a] += b->q_box[a];
        if (x->origin[a] < tab->any[a].y)
            return 1;
        x->origin[a] = tab->any[a].x;
    }
    return ++x->head < tab->place.head_end;
}

/* Moves this warp's box on; false after the last. */
NBHD_FN int set_next_box(const struct nbhd_bwd_boxes *b, struct tables *tab)
{
    struct box x = box_at(tab);
    int more = next_box(&x, b, tab);
    set_box(tab, &x);
    return more;
}

/* Coordinate 0 of the maps: axis 0 or, where that has one token, the batch. */
NBHD_FN int slowest(const struct nbhd_bwd_boxes *b, const struct tables *tab, const int *origin)
{
    return origin[0] + (b->sliced ? 0 : tab->place.batch);
}

/* The flags of this warp's box, a lane looks for each bit; warpgroup 1's mask stands above warpgroup 0's. */
NBHD_FN unsigned box_flags(const struct nbhd_bwd_boxes *b, const struct tables *tab)
{
    int lane = fresh_thread() & 31, axis = lane < 9 ? lane % 3 : 3, set = 0; /* of warp 0 */
    int origin = ld_shared_b32(smem_address(&tab->at[0]) + 4 * axis);
    if (lane < 6) {
        int2 all = tab->all[lane >= 3][axis];
        set = origin < all.x || origin + b->q_box[axis] > all.y;
    } else if (lane < 9) {
        set = origin + b->q_box[axis] < tab->any[axis].y;
    } else if (lane == 9) {
        set = origin + 1 < tab->place.head_end;
    }
    return __ballot_sync(~0u, set);
}

/* ---- loading ---- */

NBHD_FN void load_keys(const struct nbhd_bwd_boxes *b, const struct tables *tab, const struct maps *maps, int slice,
                       unsigned k_tile, unsigned v_tile)
{
    const struct place *t = &tab->place;
    unsigned full = smem_address(&tab->kv_full);
    mbar_arrive_expect(full, (K_CHUNKS + V_CHUNKS) * b->rows * 128);
    for (int c = 0; c < K_CHUNKS; c++)
        tma_load_5d(k_tile + c * ROWS * 128, &maps->k[slice], full, 64 * c, t->kv_head, t->origin[2], t->origin[1],
                    slowest(b, tab, t->origin));
    for (int c = 0; c < V_CHUNKS; c++)
        tma_load_5d(v_tile + c * ROWS * 128, &maps->v[slice], full, 64 * c, t->kv_head, t->origin[2], t->origin[1],
                    slowest(b, tab, t->origin));
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
    for (int r = fresh_thread() & 31; r < b->queries; r += 32) {
        int2 query = tab->query[r];
        int inside = coordinate(query.x, 0) < x.origin[0] && coordinate(query.x, 1) < x.origin[1] &&
                     coordinate(query.x, 2) < x.origin[2];
        unsigned token = inside ? first + query.y : 0;
        cp_async_4(smem_address(&tab->lse[step % SLOTS][r]), b->lse + token, inside);
        cp_async_4(smem_address(&tab->delta[step % SLOTS][r]), b->delta + token, inside);
    }
}

/* The axis of a mask column; 3: none. */
NBHD_FN int column_axis(const struct nbhd_bwd_boxes *b, int column)
{
    for (int a = 0; a < 3; a++)
        if (b->mask_at[a] >= 0 && column >= b->mask_at[a] && column < b->mask_at[a] + b->q_box[a])
            return a;
    return 3;
}

/* Warp 0: all boxes of Q, and what the consumers must know of each. */
NBHD_FN void load_queries(const struct nbhd_bwd_boxes *b, struct tables *tab, const struct nbhd_tensor_map *map,
                          unsigned q_tiles)
{
    int step = 0, lane = threadIdx.x & 31, axis = NBHD_MASK_STEPS ? column_axis(b, lane) : 3;
    set_first_box(tab);
    do {
        unsigned flags = box_flags(b, tab);
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
            mbar_arrive_expect(full, K_CHUNKS * b->queries * 128);
            for (int c = 0; c < K_CHUNKS; c++)
                tma_load_5d(dst + c * NBHD_N * 128, map, full, 64 * c, x.head, x.origin[2], x.origin[1],
                            slowest(b, tab, x.origin));
        }
        step = (step + 1) % (2 * SLOTS);
    } while (set_next_box(b, tab));
}

/* Warp 1: all boxes of dO, and their statistics; these arrive only after the stage is free, or they would count for the box
 * before. */
NBHD_FN void load_gradients(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab,
                            const struct nbhd_tensor_map *map, unsigned do_tiles)
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
            mbar_arrive_expect(full, V_CHUNKS * b->queries * 128);
            for (int c = 0; c < V_CHUNKS; c++)
                tma_load_5d(dst + c * NBHD_N * 128, map, full, 64 * c, x.head, x.origin[2], x.origin[1],
                            slowest(b, tab, x.origin));
        }
        step = (step + 1) % (2 * SLOTS);
    } while (set_next_box(b, tab));
}

#if NBHD_DQ
/* Threads that meet at the barriers around the staged dQ. */
#define DQ_THREADS (DQ_BY_QUERIES ? 320 : 160)

NBHD_FN void dq_sync(int id, int group)
{
    if (DQ_BY_QUERIES || group == 0)
        named_barrier_sync(id, DQ_THREADS);
    else
        named_barrier_sync(id + 1, DQ_THREADS);
}

NBHD_FN void dq_arrive(int id, int group)
{
    if (DQ_BY_QUERIES || group == 0)
        named_barrier_arrive(id, DQ_THREADS);
    else
        named_barrier_arrive(id + 1, DQ_THREADS);
}

/* Warps 2 and 3: add what the consumers have staged to the workspace. */
NBHD_FN void add_dq(const struct nbhd_bwd_boxes *b, struct tables *tab, const struct nbhd_tensor_map *map,
                    unsigned dq_tile)
{
    int group = (threadIdx.x >> 5) - 2, more;
    set_first_box(tab);
    dq_arrive(BARRIER_DQ_EMPTY, group);
    do {
        struct box x = box_at(tab);
        more = set_next_box(b, tab);
        dq_sync(BARRIER_DQ_FULL, group);
        if ((threadIdx.x & 31) == 0) {
            fence_proxy_async();
            int first = DQ_BY_QUERIES ? group : 2 * group, end = first + (DQ_BY_QUERIES ? 1 : 2);
            for (int c = first; c < end; c++)
                if (32 * c < NBHD_HEAD_DIM)
                    tma_add_5d(map, dq_tile + c * NBHD_N * 128, 32 * c, x.head, x.origin[2], x.origin[1],
                               slowest(b, tab, x.origin));
            bulk_commit();
            bulk_wait_read_0();
        }
        __syncwarp();
        if (more)
            dq_arrive(BARRIER_DQ_EMPTY, group);
    } while (more);
    if ((threadIdx.x & 31) == 0)
        bulk_wait_0();
}
#endif

/* ---- masks ---- */

/* Times MASK_ONE, what a query that does not see a key adds to their score: -2^100, in float16 -2^30. */
#define MASK_FAR (NBHD_DTYPE == 2 ? 0xf180f180u : 0xf800f800u)
#define MASK_ONE (NBHD_DTYPE == 2 ? 0x3f80u : 0x7800u)

/* What a thread knows of its rows' mask columns: columns 2q, 2q + 1, 2q + 8, 2q + 9 of each step. For each the bounds between
 * which a box's origin must lie, as 0x8000 - bound, row 1's in the upper half: a sum with an origin has the sign bit of
 * a half set where the origin has reached the bound. In shared memory, 16 bytes a thread for the begins, then the ends. */
NBHD_FN void write_probes(const struct nbhd_bwd_boxes *b, const struct tables *tab, unsigned probes, int number)
{
    int q = threadIdx.x & 3, thread = threadIdx.x - 128;
#pragma unroll 1
    for (int i = 0; i < NBHD_MASK_STEPS; i++) {
        unsigned begin[4], end[4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int column = 16 * i + 2 * q + c % 2 + c / 2 * 8, axis = column_axis(b, column);
            begin[c] = 0x80008000;
            end[c] = 0;
            int shift = axis < 3 ? tab->any[axis].x + column - b->mask_at[axis] - MASK_BIAS : 0;
            int first = axis == 0 ? 0 : axis == 1 ? b->k_box[0] : b->k_box[0] + b->k_box[1];
            for (int r = 0; r < 2 && axis < 3; r++) {
                int2 w = tab->window[first + coordinate(tab->row[number + 8 * r], axis)];
                if (w.x == NOWHERE || number + 8 * r >= b->rows) {
                    end[c] |= 0x8000u << 16 * r;
                } else {
                    begin[c] -= (unsigned)(w.x - shift) << 16 * r;
                    end[c] += (unsigned)(0x8000 - (w.y - shift)) << 16 * r;
                }
            }
        }
        st_shared_v4(probes + i * 8192 + thread * 16, make_uint4(begin[0], begin[1], begin[2], begin[3]));
        st_shared_v4(probes + i * 8192 + 4096 + thread * 16, make_uint4(end[0], end[1], end[2], end[3]));
    }
}

/* The queries' one-hot columns: tiles of 16 columns, a query's 32 bytes a row, 32-byte swizzle (address bit 4 ^= bit 7). */
NBHD_FN void write_mask_queries(const struct nbhd_bwd_boxes *b, unsigned queries)
{
    for (int i = threadIdx.x; i < 2 * NBHD_MASK_STEPS * NBHD_N; i += THREADS) {
        int piece = i / NBHD_N, r = i % NBHD_N; /* 8 columns of a query */
        int at[3] = {r / (b->q_box[1] * b->q_box[2]), r / b->q_box[2] % b->q_box[1], r % b->q_box[2]};
        unsigned words[4] = {0, 0, 0, 0};
        for (int a = 0; a < 3; a++) {
            int column = b->mask_at[a] + at[a] - 8 * piece;
            for (int w = 0; w < 4; w++)
                if (b->mask_at[a] >= 0 && r < b->queries && column >> 1 == w)
                    words[w] |= MASK_ONE << 16 * (column & 1);
        }
        st_shared_v4(queries + piece / 2 * (NBHD_N * 32) + r * 32 + ((piece & 1) << 4 ^ (r & 4) << 2),
                     make_uint4(words[0], words[1], words[2], words[3]));
    }
}

/* Issues the mask's part of S for the box in `slot`. */
NBHD_FN void issue_mask(float *s, const struct tables *tab, int slot, unsigned probes, unsigned queries)
{
    int thread = threadIdx.x - 128, q = thread & 3;
    unsigned a[4 * NBHD_MASK_STEPS + !NBHD_MASK_STEPS];
#pragma unroll
    for (int i = 0; i < NBHD_MASK_STEPS; i++) {
        uint4 begin = ld_shared_v4(probes + i * 8192 + thread * 16);
        uint4 end = ld_shared_v4(probes + i * 8192 + 4096 + thread * 16);
        uint2 low = *(const uint2 *)&tab->position[slot][16 * i + 2 * q];
        uint2 high = *(const uint2 *)&tab->position[slot][16 * i + 2 * q + 8];
        unsigned unseen[4] = {~(low.x + begin.x) | (low.x + end.x), ~(low.y + begin.y) | (low.y + end.y),
                              ~(high.x + begin.z) | (high.x + end.z), ~(high.y + begin.w) | (high.y + end.w)};
#pragma unroll
        for (int c = 0; c < 2; c++) { /* the sign of each lower half, 16 times; of each upper half */
            a[4 * i + 2 * c] = prmt_b32(unseen[2 * c], unseen[2 * c + 1], 0xdd99) & MASK_FAR;
            a[4 * i + 2 * c + 1] = prmt_b32(unseen[2 * c], unseen[2 * c + 1], 0xffbb) & MASK_FAR;
        }
    }
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_MASK_STEPS; i++)
        NBHD_MASK(s, a + 4 * i, wgmma_k_major_32(queries + i * NBHD_N * 32), 1);
    wgmma_commit();
}

/* Scores of queries outside the rows' windows become -inf, where a box is consecutive queries. */
NBHD_FN void compare_mask(float *s, const struct nbhd_bwd_boxes *b, const struct tables *tab, int slot, int number)
{
    const float masked = -__int_as_float(0x7f800000);
    int origin = tab->origin[slot] + 2 * (threadIdx.x & 3);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int2 w = tab->window[b->k_box[0] + b->k_box[1] + coordinate(tab->row[number + 8 * r], 2)];
        if (number + 8 * r >= b->rows)
            w.x = NOWHERE;
        w.x -= origin, w.y -= origin;
#pragma unroll
        for (int i = 0; i < NBHD_N / 4; i++) {
            int column = i / 2 * 8 + i % 2;
            float *x = &s[i / 2 * 4 + 2 * r + i % 2];
            *x = column >= w.x && column < w.y ? *x : masked;
        }
    }
}

/* ---- the products ---- */

NBHD_FN unsigned pack(float low, float high)
{
    return NBHD_DTYPE == 2 ? cvt_rn_bf16x2_f32(low, high) : cvt_rn_f16x2_f32(low, high);
}

/* x = A B^T for a warpgroup's rows of a key tile and a box of queries. */
NBHD_FN void issue_scores(float *x, unsigned long long a, unsigned long long b, int steps)
{
    wgmma_fence();
    NBHD_SCORES_FIRST(x, a, b);
#pragma unroll
    for (int i = 1; i < steps; i++)
        NBHD_SCORES(x, wgmma_advance(a, i / 4 * (ROWS * 8) + i % 4 * 2),
                    wgmma_advance(b, i / 4 * (NBHD_N * 8) + i % 4 * 2), 1);
    wgmma_commit();
}

/* S becomes P, also packed. */
NBHD_FN void probabilities(float *s, unsigned *packed, const float *lse, float scale_log2)
{
    lse += 2 * (threadIdx.x & 3);
#pragma unroll
    for (int j = 0; j < NBHD_N / 8; j++) {
        float2 l = *(const float2 *)&lse[8 * j];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float *x = &s[4 * j + 2 * r];
            x[0] = ex2_approx_ftz_f32(fmaf(x[0], scale_log2, -l.x));
            x[1] = ex2_approx_ftz_f32(fmaf(x[1], scale_log2, -l.y));
            packed[2 * j + r] = pack(x[0], x[1]);
        }
    }
}

NBHD_FN void score_gradients(unsigned *packed, const float *p, const float *dp, const float *delta)
{
    delta += 2 * (threadIdx.x & 3);
#pragma unroll
    for (int j = 0; j < NBHD_N / 8; j++) {
        float2 d = *(const float2 *)&delta[8 * j];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int i = 4 * j + 2 * r;
            packed[2 * j + r] = pack(p[i] * (dp[i] - d.x), p[i + 1] * (dp[i + 1] - d.y));
        }
    }
}

#if NBHD_DQ
/* Writes dS as [query][key] for the product with K. place: this lane's row and piece of the first 16 queries. */
NBHD_FN void store_score_gradients(const unsigned *packed, unsigned place)
{
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++)
        stmatrix_x4_trans(place + i * 2048, packed + 4 * i);
}

/* dQ^T of this warpgroup's 64 columns of head_dim (or, DQ_BY_QUERIES, of its half of the queries). */
NBHD_FN void issue_dq(float *dq, unsigned long long k, unsigned long long ds)
{
    wgmma_fence();
    NBHD_DQ_FIRST(dq, k, ds);
#pragma unroll
    for (int i = 1; i < ROWS / 16; i++)
        NBHD_DQ_PRODUCT(dq, wgmma_advance(k, 128 * i), wgmma_advance(ds, i / 4 * (NBHD_N * 8) + i % 4 * 2), 1);
    wgmma_commit();
}

/* Stages dQ^T as rows of 32 floats, 128-byte swizzle. place: chunks and first row of this warpgroup. */
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
            for (int j = 0; j < NBHD_DQ_QUERIES / 8; j++)
                st_shared_b32(at + j * 1024, __float_as_uint(dq[4 * j + 2 * r + c]));
        }
}
#endif

NBHD_FN void issue_dv(float *dv, const unsigned *p, unsigned tile)
{
    unsigned long long b = wgmma_mn_major(tile, NBHD_N);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++)
        NBHD_DV_PRODUCT(dv, p + 4 * i, wgmma_advance(b, 128 * i), 1);
    wgmma_commit();
}

NBHD_FN void issue_dk(float *dk, const unsigned *ds, unsigned tile)
{
    unsigned long long b = wgmma_mn_major(tile, NBHD_N);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++)
        NBHD_DK_PRODUCT(dk, ds + 4 * i, wgmma_advance(b, 128 * i), 1);
    wgmma_commit();
}

/* ---- the results ---- */

/* Writes a warp's 16 rows of dK or dV. stage: the first row's place in shared memory. */
NBHD_FN void store_rows(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct tables *tab,
                        const struct nbhd_view *view, const float *sum, int dim, float scale, unsigned stage, int number)
{
    const struct place *t = &tab->place;
    int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int j = 0; j < dim / 8; j++)
            st_shared_b32(stage + j / 8 * (ROWS * 128) + (g + 8 * r) * 128 + ((j % 8 ^ g) << 4) + q * 4,
                          pack(sum[4 * j + 2 * r] * scale, sum[4 * j + 2 * r + 1] * scale));
    __syncwarp();
    /* Eight lanes a row, 16 bytes each. */
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
        int at = 4 * i + (lane >> 3), piece = lane & 7, inside = number + at < b->rows;
        char *dst = view->data + t->batch * view->batch + (long long)t->kv_head * view->head + 16 * piece;
        for (int a = 0; a < 3; a++) {
            int x = t->origin[a] + coordinate(tab->row[number + at], a);
            inside &= x < t->keys[a];
            dst += ((long long)x * p->axis[a].dilation + t->group[a]) * view->axis[a];
        }
        if (!inside)
            continue;
        for (int c = 0; c < (dim + 63) / 64; c++)
            if (64 * c + 8 * piece < dim)
                *(uint4 *)(dst + 128 * c) = ld_shared_v4(stage + c * (ROWS * 128) + at * 128 + ((piece ^ at & 7) << 4));
    }
}

struct memory {
    unsigned k, v, q, dout, ds, dq, probes, queries;
};

/* What a consumer thread holds: sums, scores of the box at hand, and operands. */
struct registers {
    float dk[NBHD_HEAD_DIM / 2], dv[NBHD_HEAD_DIM_V / 2], s[NBHD_N / 2], dp[NBHD_N / 2];
    unsigned p[NBHD_N / 4], ds[NBHD_N / 4];
#if NBHD_DQ
    float dq[NBHD_DQ_QUERIES / 2];
#endif
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
    if (NBHD_MASK_STEPS && c->flags & FLAG_MASK)
        issue_mask(r->s, tab, c->step % SLOTS, m->probes, m->queries);
}

/* From S to P, with dP beside it. previous: 1 if the box before still holds its stage of Q, for its dK. */
NBHD_FN void find_probabilities(struct registers *r, const struct consumer *c, const struct nbhd_bwd_boxes *b,
                                struct tables *tab, const struct memory *m, int previous)
{
    unsigned all = 0;
    mbar_wait(smem_address(&tab->do_full[c->step % STAGES]), c->step / STAGES & 1);
    issue_scores(r->dp, c->v, wgmma_k_major(m->dout + c->step % STAGES * DO_BYTES), V_STEPS);
    wgmma_wait_1(); /* S, and dK of the box before */
    NBHD_PIN_F(r->s, NBHD_N / 2);
    NBHD_PIN_F(r->dk, NBHD_HEAD_DIM / 2);
    NBHD_PIN_R(r->ds, NBHD_N / 4);
    if (previous && (threadIdx.x & 31) == 0)
        mbar_arrive(smem_address(&tab->q_empty[(c->step + 1) % STAGES]));
    if (NBHD_MASK_BITS && c->flags & FLAG_MASK)
        compare_mask(r->s, b, tab, c->step % SLOTS, c->number);
    probabilities(r->s, r->p, tab->lse[c->step % SLOTS], b->scale_log2);
#pragma unroll
    for (int i = 0; i < NBHD_N / 4; i++)
        all |= r->p[i];
    wgmma_wait_0_after_bits(all, smem_address(&tab->scratch));
    NBHD_PIN_F(r->dp, NBHD_N / 2);
}

/* From P and dP to dV, dS, dQ and dK. Leaves dK running. */
NBHD_FN void find_gradients(struct registers *r, const struct consumer *c, struct tables *tab, const struct memory *m)
{
    issue_dv(r->dv, r->p, m->dout + c->step % STAGES * DO_BYTES);
    score_gradients(r->ds, r->s, r->dp, tab->delta[c->step % SLOTS]);
#if NBHD_DQ
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    store_score_gradients(r->ds, m->ds + c->step % STAGES * DS_BYTES + c->group * (NBHD_N * 128) + (lane & 7) * 128 +
                                     (lane >> 4) * 1024 + ((2 * warp + (lane >> 3 & 1) ^ lane & 7) << 4));
    named_barrier_sync(BARRIER_DS, 256);
    fence_proxy_async(); /* after the barrier: before it, each warp would wait for its own stores first */
    issue_dq(r->dq, wgmma_mn_major(m->k + (DQ_BY_QUERIES ? 0 : c->group * ROWS * 128), ROWS),
             wgmma_k_major(m->ds + c->step % STAGES * DS_BYTES + (DQ_BY_QUERIES ? c->group * NBHD_DQ_QUERIES * 128 : 0)));
#endif
    issue_dk(r->dk, r->ds, m->q + c->step % STAGES * Q_BYTES);
    wgmma_wait_1(); /* dV and dQ */
    NBHD_PIN_F(r->dv, NBHD_HEAD_DIM_V / 2);
    NBHD_PIN_R(r->p, NBHD_N / 4);
#if NBHD_DQ
    NBHD_PIN_F(r->dq, NBHD_DQ_QUERIES / 2);
#endif
    if ((threadIdx.x & 31) == 0)
        mbar_arrive(smem_address(&tab->do_empty[c->step % STAGES]));
}

/* Hands the box's dQ over to the warp that adds it to the workspace, and whose fence makes the stores seen by the copy
 * engine: a fence here would have eight warps wait for them. */
NBHD_FN void give_dq(const struct registers *r, const struct consumer *c, const struct memory *m)
{
#if NBHD_DQ
    dq_sync(BARRIER_DQ_EMPTY, c->group);
    stage_dq(r->dq, m->dq + (DQ_BY_QUERIES ? c->group * NBHD_DQ_QUERIES * 128 : c->group * 2 * NBHD_N * 128));
    dq_arrive(BARRIER_DQ_FULL, c->group);
#endif
}

/* One consumer warpgroup: all boxes, then its rows of dK and dV. The loop ends with only dK in flight: ptxas would not keep
 * scores in flight across its end. */
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

    int begun = 0;
    do {
        begin_box(&r, &c, tab, m);
        find_probabilities(&r, &c, b, tab, m, begun);
        find_gradients(&r, &c, tab, m);
        give_dq(&r, &c, m);
        c.step = (c.step + 1) % (2 * SLOTS);
        begun = 1;
    } while (c.flags & FLAG_MORE);
    wgmma_wait_0();
    NBHD_PIN_F(r.dk, NBHD_HEAD_DIM / 2);
    named_barrier_sync(BARRIER_DS, 256); /* both warpgroups have read K, whose place dK takes */
    int first = c.group * 64 + warp * 16;
    store_rows(p, b, tab, &p->dv, r.dv, NBHD_HEAD_DIM_V, 1, m->v + first * 128, first);
    store_rows(p, b, tab, &p->dk, r.dk, NBHD_HEAD_DIM, p->scale, m->k + first * 128, first);
}

/* ---- preparation ---- */

NBHD_FN void prepare(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct place *t,
                     struct tables *tab)
{
    int thread = threadIdx.x;
    if (thread == 0) {
        mbar_init(smem_address(&tab->kv_full), 1);
        for (int i = 0; i < STAGES; i++) {
            mbar_init(smem_address(&tab->q_full[i]), 1);
            mbar_init(smem_address(&tab->do_full[i]), 33); /* the copy engine's thread, and each lane for its statistics */
            mbar_init(smem_address(&tab->q_empty[i]), 8); /* one lane of each consumer warp */
            mbar_init(smem_address(&tab->do_empty[i]), 8);
        }
        mbar_fence_init();
        tab->place = *t;
    }
    for (int i = thread; i < ROWS; i += THREADS)
        tab->row[i] = b->row[i];
    for (int i = thread; i < SLOTS * NBHD_N; i += THREADS) /* rows past a box: never loaded */
        tab->lse[0][i] = tab->delta[0][i] = 0;
    for (int i = thread; i < b->queries; i += THREADS) {
        int at[3] = {i / (b->q_box[1] * b->q_box[2]), i / b->q_box[2] % b->q_box[1], i % b->q_box[2]}, distance = 0;
        for (int a = 0; a < 3; a++)
            distance = distance * p->axis[a].length + at[a] * p->axis[a].dilation;
        tab->query[i] = make_int2(at[0] | at[1] << 8 | at[2] << 16, distance);
    }
    for (int a = 0, first = 0; a < 3; first += b->k_box[a++])
        for (int i = thread; i < b->k_box[a]; i += THREADS) {
            struct nbhd_range seen = nbhd_range_of(NOWHERE, 0);
            if (t->origin[a] + i < t->keys[a])
                seen = nbhd_queries(p->axis[a], t->queries[a], t->origin[a] + i);
            tab->window[first + i] = make_int2(seen.begin, seen.end);
        }
}

/* The tile's union and the warpgroups' intersections, read off the windows by one thread per axis. */
NBHD_FN void prepare_bounds(const struct nbhd_bwd_boxes *b, struct tables *tab)
{
    int a = threadIdx.x;
    if (a >= 3)
        return;
    const int2 *window = tab->window + (a > 0) * b->k_box[0] + (a > 1) * b->k_box[1];
    int last = nbhd_min(b->k_box[a], tab->place.keys[a] - tab->place.origin[a]) - 1;
    tab->any[a] = make_int2(window[0].x, window[last].y);
    for (int g = 0; g < 2; g++) {
        int2 all = make_int2(window[coordinate(b->high[g], a)].x, window[coordinate(b->low[g], a)].y);
        tab->all[g][a] = 64 * (g + 1) > b->rows ? make_int2(NOWHERE, 0) : all;
    }
}

/* Zeros in the rows past the boxes, which no copy fills. */
NBHD_FN void clear_rows(unsigned tiles, int chunks, int rows, int used)
{
    int unused = (rows - used) * 8; /* 16-byte pieces of a chunk */
    for (int i = threadIdx.x; i < unused * chunks; i += THREADS)
        st_shared_v4(tiles + i / unused * (rows * 128) + used * 128 + i % unused * 16, make_uint4(0, 0, 0, 0));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
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
    clear_rows(m.k, K_CHUNKS + V_CHUNKS, ROWS, b.rows);
    clear_rows(m.q, STAGES * (K_CHUNKS + V_CHUNKS), NBHD_N, b.queries);
    if (NBHD_MASK_STEPS)
        write_mask_queries(&b, m.queries);
    fence_proxy_async();
    __syncthreads();
    prepare_bounds(&b, tab);
    __syncthreads();

    if (threadIdx.x < 128) {
        NBHD_SET_REGISTERS_DOWN(24);
        int warp = threadIdx.x / 32;
        if (threadIdx.x == 0)
            load_keys(&b, tab, &maps, slice, m.k, m.v);
        if (warp == 0)
            load_queries(&b, tab, &maps.q[slice], m.q);
        else if (warp == 1)
            load_gradients(&p, &b, tab, &maps.dout[slice], m.dout);
#if NBHD_DQ
        else if (warp >= 2)
            add_dq(&b, tab, &maps.dq[slice], m.dq);
#endif
    } else {
        NBHD_SET_REGISTERS_UP(240);
        consume(&p, &b, tab, &m);
    }
}
