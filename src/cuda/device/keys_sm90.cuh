/* What bwd_sm90.cu, _keys and _apart share: a CTA that holds a tile of keys and streams the boxes of queries that
 * see them. Where the tile lies, its tables, the order of the boxes, masks, products, rows out, and what comes before
 * the first box.
 *
 * One CTA holds a box of 64 keys per consumer warpgroup (K and V) and streams the boxes of N queries that see them
 * (Q, dO and their statistics), for every query head of the key/value head. The boxes of queries start at the corner
 * of the tile's own inverse window. A chunk is 64 columns of 16 bits, 128 bytes a row.
 *
 * Masks are as in fwd_sm90.cu, roles changed: a box of queries has a one-hot column per coordinate, a key -2^100
 * (float16: -2^30) in those columns from which it is not seen. Problems of one axis compare instead. Keys outside the
 * tensor are seen from nowhere; queries outside it, and rows past a box, have dO, delta and logsumexp 0 and add
 * nothing.
 *
 *     shared memory, from a multiple of 1024:
 *     | K, later dK | V, later dV | Q: 2 stages | dO: 2 | the kernel's own | mask probes | mask queries |
 *     | struct tables |
 *
 * The kernel defines, before it includes this: OWN_BYTES, unless 0, a multiple of 1024; BLOCKS, unless each consumer
 * warpgroup has 64 keys of its own; SKIPS, 1 where a block of 64 keys skips boxes of which it sees no query. */
#ifndef NBHD_DEVICE_KEYS_SM90_CUH
#define NBHD_DEVICE_KEYS_SM90_CUH

#if !defined(NBHD_HEAD_DIM) || !defined(NBHD_HEAD_DIM_V)
#error "NBHD_HEAD_DIM, NBHD_HEAD_DIM_V: multiples of 8 up to 128"
#endif
#ifndef NBHD_DTYPE
#error "NBHD_DTYPE: 1 for float16, 2 for bfloat16; goes with NBHD_MMA_TYPE"
#endif
#ifndef NBHD_N
#error "NBHD_N: queries of a box, a multiple of 16 up to 128"
#endif
#if !defined(NBHD_SCORES) || !defined(NBHD_SCORES_FIRST) || !defined(NBHD_MASK)
#error "NBHD_SCORES, NBHD_SCORES_FIRST, NBHD_MASK: wgmma_ss_n<N>, wgmma_ss_first_n<N>, wgmma_rs_n<N>"
#endif
#if !defined(NBHD_DV_PRODUCT) || !defined(NBHD_DK_PRODUCT)
#error "NBHD_DV_PRODUCT, NBHD_DK_PRODUCT: wgmma_rs_bt_n<head_dim_v>, wgmma_rs_bt_n<head_dim>"
#endif
#if !defined(NBHD_MASK_STEPS) || !defined(NBHD_MASK_BITS)
#error "NBHD_MASK_STEPS: mask columns / 16, 0 to 2; NBHD_MASK_BITS: 1 compares instead, boxes of 1 x 1 x N"
#endif
#if !defined(NBHD_GROUPS) || !defined(NBHD_CTAS) || !defined(NBHD_REGISTERS)
#error "NBHD_GROUPS: consumer warpgroups, 1 or 2; NBHD_CTAS: per multiprocessor; NBHD_REGISTERS: of a consumer thread"
#endif
#ifndef NBHD_MAPS
#error "NBHD_MAPS: slices of a launch or shapes of query boxes, at most"
#endif
#ifndef OWN_BYTES
#define OWN_BYTES 0
#endif
#ifndef SKIPS
#define SKIPS 0
#endif
#ifndef NBHD_IN_ORDER
#define NBHD_IN_ORDER 0 /* 1: dQ is added up in one order */
#endif
#ifndef BLOCKS
#define BLOCKS NBHD_GROUPS /* of 64 keys: one for each consumer warpgroup */
#endif

#include "nbhd_params.h"
#include "device/bwd_boxes_sm90.cuh"
#include "device/ptx.cuh"
#include "device/scores_sm90.cuh"
#include "device/tma_sm90.cuh"
#include "device/wgmma_sm90.cuh"

#define K_STEPS ((NBHD_HEAD_DIM + 15) / 16)
#define V_STEPS ((NBHD_HEAD_DIM_V + 15) / 16)
#define K_CHUNKS ((NBHD_HEAD_DIM + 63) / 64)
#define V_CHUNKS ((NBHD_HEAD_DIM_V + 63) / 64)
#define ROWS (64 * BLOCKS)
#define K_BYTES (K_CHUNKS * ROWS * 128)
#define V_BYTES (V_CHUNKS * ROWS * 128)
#define Q_BYTES (K_CHUNKS * NBHD_N * 128) /* a stage */
#define DO_BYTES (V_CHUNKS * NBHD_N * 128)
#define PROBE_STEP (BLOCKS * 128 * 32)
#define PROBE_BYTES (NBHD_MASK_STEPS * PROBE_STEP)
#define MASK_BYTES (NBHD_MASK_STEPS * NBHD_N * 32)
#define STAGES 2
#define SLOTS 4 /* twice the stages: what is small of a box is loaded before its stage is free */
#define THREADS (128 * (NBHD_GROUPS + 1))
/* Without the registers for S beside P, P is only kept packed. */
#define IS_TIGHT (NBHD_GROUPS == 2 && (NBHD_HEAD_DIM + NBHD_HEAD_DIM_V) / 2 + 3 * NBHD_N / 2 > 224)
#define NOWHERE (1 << 30)

struct maps {
    struct nbhd_tensor_map q[NBHD_MAPS], dout[NBHD_MAPS], dq[NBHD_MAPS], k[NBHD_MAPS], v[NBHD_MAPS];
};

/* Where this CTA's tile lies: origin in elements of its dilation group, and the group. */
struct place {
    int origin[3], group[3], keys[3], queries[3]; /* keys, queries: elements of the group */
    int batch, kv_head, head, head_end; /* query heads that share it */
    int tile; /* its number among the head's */
    int part, split; /* where queries are shared out (device/split_sm90.cuh): which part; which of those tiles, or -1 */
    int slice; /* the first of its maps: each slice has some of its own, or, where not sliced, each shape */
};

/* Beside the tiles in shared memory. */
struct tables {
    unsigned long long kv_full, q_full[STAGES], q_empty[STAGES], do_full[STAGES], do_empty[STAGES];
    unsigned long long own[2 * STAGES]; /* the kernel's */
    /* Of each box, in slots: */
    float lse[SLOTS][NBHD_N], delta[SLOTS][NBHD_N];
    unsigned position[SLOTS][32]; /* of each mask column: the box's origin on its axis, in both halves */
    int flags[SLOTS], origin[SLOTS]; /* its origin: on the last axis */
    unsigned row[ROWS];
    int2 query[NBHD_N]; /* row of a box: its place, packed as in row, and its distance from the origin in tokens */
    int2 window[ROWS + 2]; /* queries that see each coordinate of the key box, axis after axis */
    /* Queries that see some key of the tile, of a block of 64, all of its keys: */
    int2 any[3], some[BLOCKS][3], all[BLOCKS][3];
    uint4 at[4]; /* each loading warp's box */
    struct place place;
    struct nbhd_query_box q; /* of the tile's shape */
    int shape;               /* its number */
    unsigned scratch;
};

NBHD_STATIC_ASSERT(sizeof(struct tables) <= NBHD_BWD_SM90_TABLES(NBHD_N), "the host counts on it");

/* Addresses in shared memory. */
struct memory {
    unsigned k, v, q, dout, own, probes, queries;
    struct tables *tab;
};

NBHD_FN struct memory lay_out(char *shared)
{
    struct memory m;
    m.k = smem_address(shared);
    m.v = m.k + K_BYTES;
    m.q = m.v + V_BYTES;
    m.dout = m.q + STAGES * Q_BYTES;
    m.own = m.dout + STAGES * DO_BYTES;
    m.probes = m.own + OWN_BYTES;
    m.queries = m.probes + PROBE_BYTES;
    m.tab = (struct tables *)(shared + (m.queries - m.k) + MASK_BYTES);
    return m;
}

/* Bits of a box's flags: axes on which block i of 64 keys needs a mask; axes, and heads, on which there are more
 * boxes; axes on which no key of block i is seen. */
#define FLAG_MASK(i) (7 << 3 * (i))
#define FLAG_MORE (15 << 6)
#define FLAG_UNSEEN(i) (7 << (10 + 3 * (i)))

/* Of three values in registers, that of axis a. */
NBHD_FN int of_axis(const int *x, int a) { return a == 0 ? x[0] : a == 1 ? x[1] : x[2]; }

/* The shape of query boxes that covers the tile's union with the fewest. */
NBHD_FN int best_shape(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct place *t)
{
    int length[3], best = 0, least = 0;
#pragma unroll 1
    for (int a = 0; a < 3; a++) {
        int origin = of_axis(t->origin, a), queries = of_axis(t->queries, a);
        int last = nbhd_min(origin + b->k_box[a], of_axis(t->keys, a)) - 1;
        int count = nbhd_queries(p->axis[a], queries, last).end - nbhd_queries(p->axis[a], queries, origin).begin;
        length[0] = a == 0 ? count : length[0];
        length[1] = a == 1 ? count : length[1];
        length[2] = count;
    }
#pragma unroll 1
    for (int i = 0; i < b->shapes; i++) {
        int count = 1;
        for (int a = 0; a < 3; a++)
            count *= (length[a] + b->shape[i].extent[a] - 1) / b->shape[i].extent[a];
        if (i == 0 || count < least)
            best = i, least = count;
    }
    return best;
}

/* at: the tile's place in the grid. */
NBHD_FN struct place tile_place(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, uint3 at)
{
    struct place t;
    int x = at.x, slice = b->slice_begin + at.z;
    t.tile = x;
    t.part = 0;
    t.split = -1;
    t.origin[0] = x % b->tiles[0], x /= b->tiles[0];
    int next = b->tiles[NBHD_IN_ORDER ? 1 : 2];
    t.origin[2] = NBHD_IN_ORDER ? x / next : x % next;
    t.origin[1] = NBHD_IN_ORDER ? x % next : x / next;
    for (int a = 2; a >= 0; a--) {
        struct nbhd_axis axis = p->axis[a];
        t.origin[a] *= b->k_box[a];
        t.group[a] = slice % axis.dilation;
        slice /= axis.dilation;
        t.queries[a] = nbhd_group_size(axis, t.group[a]);
        t.keys[a] = axis.keys == axis.length ? t.queries[a] : axis.keys;
    }
    t.batch = slice;
    t.kv_head = at.y;
    t.head = t.kv_head * (p->heads / p->kv_heads);
    t.head_end = t.head + p->heads / p->kv_heads;
    t.slice = b->sliced ? at.z : 0;
    return t;
}

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
    st_shared_v4(smem_address(&tab->at[threadIdx.x >> 5]),
                 make_uint4(x->origin[0], x->origin[1], x->origin[2], x->head));
    __syncwarp();
}

NBHD_FN void set_first_box(struct tables *tab)
{
    struct box x = {{tab->any[0].x, tab->any[1].x, tab->any[2].x}, tab->place.head};
    set_box(tab, &x);
}

/* False after the last. */
NBHD_FN int next_box(struct box *x, const struct tables *tab)
{
#pragma unroll
    for (int a = 2; a >= 0; a--) {
        x->origin[a] += tab->q.extent[a];
        if (x->origin[a] < tab->any[a].y)
            return 1;
        x->origin[a] = tab->any[a].x;
    }
    return ++x->head < tab->place.head_end;
}

/* Moves this warp's box on; false after the last. */
NBHD_FN int set_next_box(struct tables *tab)
{
    struct box x = box_at(tab);
    int more = next_box(&x, tab);
    set_box(tab, &x);
    return more;
}

/* The tile's own of NBHD_MAPS maps. */
NBHD_FN const struct nbhd_tensor_map *map_of(const struct nbhd_tensor_map *maps, const struct tables *tab)
{
    return maps + (NBHD_MAPS > 1 ? tab->place.slice + tab->shape : 0); /* where sliced, there is one shape */
}

/* Coordinate 0 of the maps: axis 0 or, where that has one token, the batch. */
NBHD_FN int slowest(const struct nbhd_bwd_boxes *b, const struct tables *tab, const int *origin)
{
    return origin[0] + (b->sliced ? 0 : tab->place.batch);
}

/* ---- loading ---- */

NBHD_FN void load_keys(const struct nbhd_bwd_boxes *b, const struct memory *m, const struct maps *maps, int slice)
{
    const struct tables *tab = m->tab;
    const struct place *t = &tab->place;
    unsigned full = smem_address(&tab->kv_full);
    mbar_arrive_expect(full, (K_CHUNKS + V_CHUNKS) * b->rows * 128);
    for (int c = 0; c < K_CHUNKS; c++)
        tma_load_5d(m->k + c * ROWS * 128, &maps->k[slice], full, 64 * c, t->kv_head, t->origin[2], t->origin[1],
                    slowest(b, tab, t->origin));
    for (int c = 0; c < V_CHUNKS; c++)
        tma_load_5d(m->v + c * ROWS * 128, &maps->v[slice], full, 64 * c, t->kv_head, t->origin[2], t->origin[1],
                    slowest(b, tab, t->origin));
}

/* The axis of a mask column; 3: none. */
NBHD_FN int column_axis(const struct nbhd_query_box *q, int column)
{
    for (int a = 0; a < 3; a++)
        if (q->mask_at[a] >= 0 && column >= q->mask_at[a] && column < q->mask_at[a] + q->extent[a])
            return a;
    return 3;
}

/* ---- masks ---- */

/* What a thread knows of its rows' mask columns: columns 2q, 2q + 1, 2q + 8, 2q + 9 of each step. For each the bounds
 * between which a box's origin must lie, as 0x8000 - bound, row 1's in the upper half: a sum with an origin has the
 * sign bit of a half set where the origin has reached the bound. In shared memory, 16 bytes a thread for the begins,
 * then the ends. */
NBHD_FN void write_probes(const struct nbhd_bwd_boxes *b, const struct tables *tab, unsigned probes, int number)
{
    int q = threadIdx.x & 3, thread = number / 64 * 128 + (threadIdx.x & 127);
#pragma unroll /* a loop here has ptxas take what follows for divergent: descriptors in vector registers, 7 % */
    for (int i = 0; i < NBHD_MASK_STEPS; i++) {
        unsigned begin[4], end[4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int column = 16 * i + 2 * q + c % 2 + c / 2 * 8, axis = column_axis(&tab->q, column);
            begin[c] = 0x80008000;
            end[c] = 0;
            int shift = axis < 3 ? tab->any[axis].x + column - tab->q.mask_at[axis] - MASK_BIAS : 0;
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
        st_shared_v4(probes + i * PROBE_STEP + thread * 16, make_uint4(begin[0], begin[1], begin[2], begin[3]));
        st_shared_v4(probes + i * PROBE_STEP + PROBE_STEP / 2 + thread * 16,
                     make_uint4(end[0], end[1], end[2], end[3]));
    }
}

/* The queries' one-hot columns: tiles of 16 columns, a query's 32 bytes a row, 32-byte swizzle (address bit 4 ^= bit
 * 7). */
NBHD_FN void write_mask_queries(const struct nbhd_query_box *q, unsigned queries)
{
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * NBHD_MASK_STEPS * NBHD_N; i += THREADS) {
        int piece = i / NBHD_N, r = i % NBHD_N; /* 8 columns of a query */
        int at[3] = {r / (q->extent[1] * q->extent[2]), r / q->extent[2] % q->extent[1], r % q->extent[2]};
        unsigned words[4] = {0, 0, 0, 0};
        for (int a = 0; a < 3; a++) {
            int column = q->mask_at[a] + at[a] - 8 * piece;
            for (int w = 0; w < 4; w++)
                if (q->mask_at[a] >= 0 && r < q->queries && column >> 1 == w)
                    words[w] |= MASK_ONE << 16 * (column & 1);
        }
        st_shared_v4(queries + piece / 2 * (NBHD_N * 32) + r * 32 + ((piece & 1) << 4 ^ (r & 4) << 2),
                     make_uint4(words[0], words[1], words[2], words[3]));
    }
}

/* The A operands of the mask's part of S for the box in `slot`. thread: whose probes; q: its place in its quad. */
NBHD_FN void find_mask(unsigned *a, const struct tables *tab, int slot, unsigned probes, int q, int thread)
{
#pragma unroll
    for (int i = 0; i < NBHD_MASK_STEPS; i++) {
        uint4 begin = ld_shared_v4(probes + i * PROBE_STEP + thread * 16);
        uint4 end = ld_shared_v4(probes + i * PROBE_STEP + PROBE_STEP / 2 + thread * 16);
        uint2 low = *(const uint2 *)&tab->position[slot][16 * i + 2 * q];
        uint2 high = *(const uint2 *)&tab->position[slot][16 * i + 2 * q + 8];
        unsigned unseen[4] = {~(low.x + begin.x) | (low.x + end.x), ~(low.y + begin.y) | (low.y + end.y),
                              ~(high.x + begin.z) | (high.x + end.z), ~(high.y + begin.w) | (high.y + end.w)};
#pragma unroll
        for (int c = 0; c < 2; c++)
            mask_operands(a + 4 * i + 2 * c, unseen[2 * c], unseen[2 * c + 1]);
    }
}

#define MASK_OPERANDS (4 * NBHD_MASK_STEPS + !NBHD_MASK_STEPS)

/* Issues the mask's part of S, to be committed. */
NBHD_FN void add_mask(float *s, const struct tables *tab, int slot, unsigned probes, unsigned queries, int q,
                      int thread)
{
    unsigned a[MASK_OPERANDS];
    find_mask(a, tab, slot, probes, q, thread);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_MASK_STEPS; i++)
        NBHD_MASK(s, a + 4 * i, wgmma_k_major_32(queries + i * NBHD_N * 32), 1);
}

NBHD_FN void issue_mask(float *s, const struct tables *tab, int slot, unsigned probes, unsigned queries, int q,
                        int thread)
{
    add_mask(s, tab, slot, probes, queries, q, thread);
    wgmma_commit();
}

/* Scores of queries outside the rows' windows become -inf, where a box is consecutive queries. */
NBHD_FN void compare_mask(float *s, const struct nbhd_bwd_boxes *b, const struct tables *tab, int slot, int number)
{
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
            *x = column >= w.x && column < w.y ? *x : MASKED;
        }
    }
}

/* ---- the products ---- */

/* x = A B^T for 64 rows of a key tile and a box of queries, to be committed. */
NBHD_FN void add_scores(float *x, unsigned long long a, unsigned long long b, int steps)
{
    wgmma_fence();
    NBHD_SCORES_FIRST(x, a, b);
#pragma unroll
    for (int i = 1; i < steps; i++)
        NBHD_SCORES(x, wgmma_advance(a, i / 4 * (ROWS * 8) + i % 4 * 2),
                    wgmma_advance(b, i / 4 * (NBHD_N * 8) + i % 4 * 2), 1);
}

NBHD_FN void issue_scores(float *x, unsigned long long a, unsigned long long b, int steps)
{
    add_scores(x, a, b, steps);
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

NBHD_FN float2 unpack(unsigned x)
{
    if (NBHD_DTYPE == 2)
        return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
    return make_float2(cvt_f32_f16((unsigned short)x), cvt_f32_f16((unsigned short)(x >> 16)));
}

/* dS = P (dP - delta), packed. */
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

/* The same from a packed P. */
NBHD_FN void score_gradients_packed(unsigned *ds, const unsigned *p, const float *dp, const float *delta)
{
    delta += 2 * (threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < NBHD_N / 4; i++) {
        float2 d = *(const float2 *)&delta[8 * (i / 2)], x = unpack(p[i]);
        ds[i] = pack(x.x * (dp[2 * i] - d.x), x.y * (dp[2 * i + 1] - d.y));
    }
}

NBHD_FN void zero(float *x, int count)
{
#pragma unroll
    for (int i = 0; i < count; i++)
        x[i] = 0;
}

/* Issues dV += P dO (of_v) or dK += dS Q. a: P or dS; tile: of dO or Q. */
NBHD_FN void issue_sum(float *sum, const unsigned *a, unsigned tile, int of_v)
{
    unsigned long long b = wgmma_mn_major(tile, NBHD_N);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++)
        if (of_v)
            NBHD_DV_PRODUCT(sum, a + 4 * i, wgmma_advance(b, 128 * i), 1);
        else
            NBHD_DK_PRODUCT(sum, a + 4 * i, wgmma_advance(b, 128 * i), 1);
    wgmma_commit();
}

NBHD_FN void issue_dv(float *dv, const unsigned *p, unsigned tile) { issue_sum(dv, p, tile, 1); }
NBHD_FN void issue_dk(float *dk, const unsigned *ds, unsigned tile) { issue_sum(dk, ds, tile, 0); }

/* ---- the results ---- */

/* Writes a warp's 16 rows of dK or dV. stage: the first row's place in shared memory. */
NBHD_FN void store_rows(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct tables *tab,
                        const struct nbhd_view *view, const float *sum, int dim, float scale, unsigned stage,
                        int number)
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

/* ---- preparation ---- */

NBHD_FN void prepare(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct place *t,
                     struct tables *tab)
{
    int thread = threadIdx.x;
    if (thread == 32) /* each shape has maps of its own */
        tab->shape = NBHD_MAPS > 1 && b->shapes > 1 ? best_shape(p, b, t) : 0;
    if (thread == 0) {
        mbar_init(smem_address(&tab->kv_full), 1);
        for (int i = 0; i < STAGES; i++) {
            mbar_init(smem_address(&tab->q_full[i]), 1);
            mbar_init(smem_address(&tab->do_full[i]), 33); /* the copy engine's thread; each lane for its statistics */
            mbar_init(smem_address(&tab->q_empty[i]), 4 * NBHD_GROUPS); /* one lane of each consumer warp */
            mbar_init(smem_address(&tab->do_empty[i]), 4 * NBHD_GROUPS);
        }
        mbar_fence_init();
        tab->place = *t;
    }
    int first[3] = {0, b->k_box[0], b->k_box[0] + b->k_box[1]};
#pragma unroll 1 /* here and below: what runs once a CTA is compiled once */
    for (int i = thread; i < ROWS; i += THREADS)
        tab->row[i] = b->row[i];
#pragma unroll 1
    for (int i = thread; i < SLOTS * NBHD_N; i += THREADS) /* rows past a box: never loaded */
        tab->lse[0][i] = tab->delta[0][i] = 0;
#pragma unroll 1
    for (int i = thread; i < first[2] + b->k_box[2]; i += THREADS) {
        int a = (i >= first[1]) + (i >= first[2]), key = of_axis(t->origin, a) + i - of_axis(first, a);
        struct nbhd_range seen = nbhd_range_of(NOWHERE, 0);
        if (key < of_axis(t->keys, a))
            seen = nbhd_queries(p->axis[a], of_axis(t->queries, a), key);
        tab->window[i] = make_int2(seen.begin, seen.end);
    }
}

/* Leaves the queries of this part, of a tile's union on the axis that is shared out. */
NBHD_FN void take_part(const struct nbhd_bwd_boxes *b, const struct place *t, int2 *any)
{
    int begin = any->x + t->part * b->part_queries, end = begin + b->part_queries;
    if (t->part == b->parts - 1 || end > any->y)
        end = any->y;
    *any = make_int2(begin < end ? begin : NOWHERE, end); /* none: one box far outside */
}

/* The tile's union and the warpgroups' intersections, read off the windows by one thread per axis. */
NBHD_FN void prepare_bounds(const struct nbhd_bwd_boxes *b, struct tables *tab)
{
    int a = threadIdx.x;
    if (a >= 3)
        return;
    const int2 *window = tab->window + (a > 0) * b->k_box[0] + (a > 1) * b->k_box[1];
    int last = nbhd_min(b->k_box[a], tab->place.keys[a] - tab->place.origin[a]) - 1;
    int grid = NBHD_IN_ORDER ? b->shape[0].extent[a] : 1;
    tab->any[a] = make_int2(window[0].x / grid * grid, window[last].y);
    if (tab->place.split >= 0 && a == b->part_axis)
        take_part(b, &tab->place, &tab->any[a]);
    for (int g = 0; g < BLOCKS; g++) {
        int2 all = make_int2(window[coordinate(b->high[g], a)].x, window[coordinate(b->low[g], a)].y);
        tab->all[g][a] = 64 * (g + 1) > b->rows ? make_int2(NOWHERE, 0) : all;
        int low = coordinate(b->low[g], a), high = nbhd_min(coordinate(b->high[g], a), last);
        tab->some[g][a] = low > last ? make_int2(NOWHERE, 0) : make_int2(window[low].x, window[high].y);
    }
}

/* Zeros in the rows past the boxes, which no copy fills. */
NBHD_FN void clear_rows(unsigned tiles, int chunks, int rows, int used)
{
    int unused = (rows - used) * 8; /* 16-byte pieces of a chunk */
#pragma unroll 1
    for (int i = threadIdx.x; i < unused * chunks; i += THREADS)
        st_shared_v4(tiles + i / unused * (rows * 128) + used * 128 + i % unused * 16, make_uint4(0, 0, 0, 0));
}

/* What depends on the shape that was chosen. */
NBHD_FN void prepare_shape(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct memory *m)
{
    const struct nbhd_query_box *q = &b->shape[m->tab->shape];
    if (threadIdx.x == 0)
        m->tab->q = *q;
#pragma unroll 1
    for (int i = threadIdx.x; i < q->queries; i += THREADS) {
        int at[3] = {i / (q->extent[1] * q->extent[2]), i / q->extent[2] % q->extent[1], i % q->extent[2]};
        int distance = 0;
        for (int a = 0; a < 3; a++)
            distance = distance * p->axis[a].length + at[a] * p->axis[a].dilation;
        m->tab->query[i] = make_int2(at[0] | at[1] << 8 | at[2] << 16, distance);
    }
    clear_rows(m->q, STAGES * (K_CHUNKS + V_CHUNKS), NBHD_N, q->queries);
    if (NBHD_MASK_STEPS)
        write_mask_queries(q, m->queries);
}

/* All that comes before the first box of a tile. False where there is none: in a dilation group with fewer elements
 * than the first. */
NBHD_FN int set_up(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct maps *maps,
                   const struct memory *m, struct place t)
{
    if (t.origin[0] >= t.keys[0] || t.origin[1] >= t.keys[1] || t.origin[2] >= t.keys[2])
        return 0;
    prepare(p, b, &t, m->tab);
    if (threadIdx.x == 0) /* the tables are made meanwhile */
        load_keys(b, m, maps, t.slice);
    clear_rows(m->k, K_CHUNKS + V_CHUNKS, ROWS, b->rows);
    __syncthreads();
    prepare_bounds(b, m->tab);
    prepare_shape(p, b, m);
    fence_proxy_async();
    __syncthreads();
    return 1;
}

#endif
