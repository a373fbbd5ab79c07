/* What bwd_sm90.cu, _keys and _apart share: a CTA that holds a tile of keys and streams the boxes of queries that
 * see them. Where the tile lies, its tables, the order of the boxes, masks. Goes with key_setup_sm90.cuh, what comes
 * before the first box, key_loaders_sm90.cuh, the loading warps, and key_products_sm90.cuh, products and rows out.
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
#ifndef NBHD_INTEGERS
#define NBHD_INTEGERS 0 /* 1: dQ is added up in integers (device/sums_sm90.cuh) */
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
#if NBHD_INTEGERS
    float fineness[SLOTS][NBHD_N];
#endif
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

NBHD_STATIC_ASSERT(sizeof(struct tables) <=
                       NBHD_BWD_SM90_TABLES(NBHD_N) + NBHD_INTEGERS * NBHD_BWD_SM90_FINENESS(NBHD_N),
                   "the host counts on it");

/* Of the queries of the box in `slot`, where dQ is added up in integers. */
NBHD_FN const float *fineness_in(const struct tables *tab, int slot)
{
#if NBHD_INTEGERS
    return tab->fineness[slot];
#else
    return tab->lse[slot]; /* never read */
#endif
}

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

/* at: the tile's place in the grid. */
NBHD_FN struct place tile_place(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, uint3 at)
{
    struct place t;
    int x = at.x, slice = b->slice_begin + at.z;
    t.tile = x;
    t.part = 0;
    t.split = -1;
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

#endif
