/* Forward neighborhood attention on Hopper: wgmma and TMA. Host half: fwd_sm90.c; box shapes: sm90_plan.c.
 *
 * One CTA computes one query tile: a box of tokens x the packed heads of one key/value head = 64 rows per consumer
 * warpgroup. It visits the union of its queries' windows in boxes of N keys, starting at the union's own corner.
 * TMA reads all boxes straight from [batch, axes, heads, head_dim]; tokens outside the tensor arrive as zeros, and the
 * window masks them. A row of shared memory is one token of a 64-column chunk (128 bytes, 128-byte swizzle), the row's
 * number its row-major place in the box: the layout wgmma reads, K k-major and V mn-major.
 *
 *     warpgroup 0      warp 0, one thread: Q, then K boxes, and what each box needs of a mask    NBHD_REGISTERS_LOAD
 *                      warp 1, one thread: V boxes
 *     warpgroups 1..   64 rows each: S = Q K^T, softmax, O += P V                                NBHD_REGISTERS_MATH
 *
 *     shared memory, from a multiple of 1024:
 *     | Q, later O: chunks x 64 G rows x 128 | K: stages x chunks x N x 128 | V: the same | mask keys | struct tables |
 *
 * A consumer's step j, with two products in flight while the softmax runs:
 *     issue S(j) = Q K(j)^T + mask | issue O += P(j-1) V(j-1) | wait S | max, exp, sum | wait O | scale O, pack P(j)
 *
 * A mask is one or two more k-steps of Q K^T (struct nbhd_key_box): it adds -2^100 per axis on which a query does not
 * see a key (-2^30 in float16: there scores must stay below 2^29). Problems of one axis and the tail of extra keys are
 * masked bit by bit instead. Only boxes that reach past what all rows of a warpgroup see are masked at all. The running
 * maximum starts at -1e30: what a row sums over boxes that are all masked, its first seen key scales by 0.
 * NaN or infinite keys reach all queries of the tiles that load them, not only those that see them.
 *
 * Registers of a consumer thread: S N/2, P N/4, O head_dim_v/2. */
#ifndef NBHD_HEAD_DIM
#error "NBHD_HEAD_DIM: of q and k, a multiple of 8 up to 256"
#endif
#ifndef NBHD_HEAD_DIM_V
#error "NBHD_HEAD_DIM_V: of v and o, a multiple of 8 up to 256"
#endif
#ifndef NBHD_DTYPE
#error "NBHD_DTYPE: 1 for float16, 2 for bfloat16; goes with NBHD_MMA_TYPE"
#endif
#ifndef NBHD_N
#error "NBHD_N: keys of a box, a multiple of 16 up to 256"
#endif
#ifndef NBHD_QK
#error "NBHD_QK: the instruction of Q K^T, wgmma_ss_n<N>"
#endif
#ifndef NBHD_PV
#error "NBHD_PV: the instruction of P V, wgmma_rs_bt_n<head_dim_v>"
#endif
#ifndef NBHD_GROUPS
#error "NBHD_GROUPS: consumer warpgroups, 1 to 3"
#endif
#ifndef NBHD_CTAS
#error "NBHD_CTAS: CTAs per multiprocessor"
#endif
#ifndef NBHD_STAGES
#error "NBHD_STAGES: boxes of K, and of V, in flight"
#endif
#ifndef NBHD_TAKE_TURNS
#error "NBHD_TAKE_TURNS: 1 lets two consumer warpgroups issue their products in turns"
#endif
#ifndef NBHD_MASK_STEPS
#error "NBHD_MASK_STEPS: masks of boxes as more columns of the product: their number / 16, 0 to 2"
#endif
#ifndef NBHD_MASK
#error "NBHD_MASK: the instruction of those columns, wgmma_rs_n<N>"
#endif
#ifndef NBHD_MASK_BITS
#error "NBHD_MASK_BITS: 1 where keys are masked by their number: boxes of 1 x 1 x N, extra keys"
#endif
#ifndef NBHD_MAPS
#error "NBHD_MAPS: room for maps in the arguments: slices x shapes of key boxes"
#endif
#if NBHD_TAKE_TURNS && NBHD_GROUPS != 2
#error "NBHD_TAKE_TURNS is for two groups: with another number they would wait forever"
#endif
#if !defined(NBHD_REGISTERS_LOAD) || !defined(NBHD_REGISTERS_MATH)
#error "NBHD_REGISTERS_LOAD, NBHD_REGISTERS_MATH: per thread of the loading and of the consumer warpgroups"
#endif

#include "nbhd_params.h"
#include "device/boxes_sm90.cuh"
#include "device/ptx.cuh"
#include "device/tma_sm90.cuh"
#include "device/wgmma_sm90.cuh"

#define QK_STEPS ((NBHD_HEAD_DIM + 15) / 16)
#define QK_CHUNKS ((NBHD_HEAD_DIM + 63) / 64)
#define PV_CHUNKS ((NBHD_HEAD_DIM_V + 63) / 64)
#define Q_ROWS (64 * NBHD_GROUPS)
#define Q_CHUNKS (QK_CHUNKS > PV_CHUNKS ? QK_CHUNKS : PV_CHUNKS) /* O is staged in the same place */
#define Q_BYTES (Q_CHUNKS * Q_ROWS * 128)
#define K_BYTES (QK_CHUNKS * NBHD_N * 128)
#define V_BYTES (PV_CHUNKS * NBHD_N * 128)
/* Origins of boxes and bounds of windows, where masks compare them, count from the begin of the tile's union, plus
 * this: a window may begin a box's extent before it. */
#define MASK_BIAS 256
#define MASK_BYTES (NBHD_MASK_STEPS * NBHD_N * 32)
#define THREADS (128 * (NBHD_GROUPS + 1))

/* A bit for each column of a row that a lane holds: bit 2j + c is column 8j + 2q + c. */
#if NBHD_N <= 128
typedef unsigned word;
#else
typedef unsigned long long word;
#endif

struct maps {
    struct nbhd_tensor_map q[NBHD_MAPS], kv[2][NBHD_MAPS], extra[2]; /* kv, extra: of K, of V; kv[slice][shape] */
};

/* Where this CTA's tile lies: origin in elements of its dilation group, and the group. */
struct place {
    int origin[3], group[3], size[3];
    int batch, head, kv_head;
};

/* Beside the tiles in shared memory. [2]: of K, of V. */
struct tables {
    unsigned long long q_full, full[2][NBHD_STAGES], empty[2][NBHD_STAGES];
    int4 box[NBHD_STAGES];       /* of each K stage: origin on the three axes, flags */
    unsigned row[Q_ROWS];        /* as in struct nbhd_boxes */
    unsigned origin[NBHD_STAGES][4]; /* of each K stage: as find_mask takes it, in both halves */
    int2 window[Q_ROWS + 2];     /* keys seen from each coordinate of the query box, axis after axis */
    int2 any[3], all[NBHD_GROUPS][3]; /* keys that some row of the tile, that all rows of a warpgroup see, per axis */
    struct place place;          /* here, since no role has the registers for it */
    int shift[3];                /* what selects the dilation group and the batch in the maps' coordinates */
    int shape;                   /* of this tile's key boxes */
    unsigned scratch;
};

NBHD_STATIC_ASSERT(sizeof(struct tables) <= NBHD_SM90_TABLES(NBHD_GROUPS, NBHD_STAGES), "the host counts on it");

NBHD_FN struct place tile_place(const struct nbhd_params *p, const struct nbhd_boxes *b)
{
    struct place t;
    int x = b->reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    int slice = b->slice_begin + blockIdx.z;
    t.origin[0] = x % b->tiles[0], x /= b->tiles[0];
    t.origin[2] = x % b->tiles[2];
    t.origin[1] = x / b->tiles[2];
    for (int a = 2; a >= 0; a--) {
        t.origin[a] *= b->q_box[a];
        t.group[a] = 0;
        t.size[a] = p->axis[a].length;
        if (p->axis[a].dilation > 1) {
            t.group[a] = slice % p->axis[a].dilation;
            slice /= p->axis[a].dilation;
            t.size[a] = nbhd_group_size(p->axis[a], t.group[a]);
        }
    }
    t.batch = slice;
    t.head = blockIdx.y * b->pack;
    t.kv_head = p->heads == p->kv_heads ? t.head : t.head / (p->heads / p->kv_heads);
    return t;
}

NBHD_FN int coordinate(unsigned row, int axis) { return row >> 8 * axis & 0xff; }

NBHD_FN int map_coordinate(const struct nbhd_boxes *b, const struct tables *tab, const int *origin, int axis)
{
    return origin[axis] * b->step[axis] + tab->shift[axis];
}

NBHD_FN void load_q_box(const struct nbhd_boxes *b, const struct place *t, const struct tables *tab,
                        const struct nbhd_tensor_map *map, unsigned tile)
{
    unsigned full = smem_address(&tab->q_full);
    mbar_arrive_expect(full, QK_CHUNKS * b->rows * 128);
    for (int c = 0; c < QK_CHUNKS; c++)
        tma_load_5d(tile + c * (Q_ROWS * 128), map, full, 64 * c, t->head, map_coordinate(b, tab, t->origin, 2),
                    map_coordinate(b, tab, t->origin, 1), map_coordinate(b, tab, t->origin, 0));
}

/* Axes, as bits 4g + a, on which warpgroup g needs a mask for the box at origin. */
NBHD_FN int mask_flags(const struct nbhd_key_box *k, const struct tables *tab, const int *origin)
{
    int flags = k->tokens < NBHD_N ? 4 * NBHD_SM90_ALL_GROUPS : 0; /* columns past the box */
#pragma unroll 1
    for (int g = NBHD_GROUPS - 1; g >= 0; g--)
#pragma unroll
        for (int a = 0; a < 3; a++) {
            int2 all = tab->all[g][a];
            flags |= (origin[a] < all.x || origin[a] + k->extent[a] > all.y) << (4 * g + a);
        }
    return flags;
}

/* Moves origin to the next box of the union. */
NBHD_FN void next_box(const struct nbhd_key_box *k, const struct tables *tab, int *origin)
{
#pragma unroll
    for (int a = 2; a >= 0; a--) {
        origin[a] += k->extent[a];
        if (origin[a] < tab->any[a].y)
            return;
        origin[a] = tab->any[a].x;
    }
}

NBHD_FN int is_last_box(const struct nbhd_key_box *k, const struct tables *tab, const int *origin)
{
    return origin[0] + k->extent[0] >= tab->any[0].y && origin[1] + k->extent[1] >= tab->any[1].y &&
           origin[2] + k->extent[2] >= tab->any[2].y;
}

NBHD_FN int extra_flags(int left) { return NBHD_SM90_EXTRA | (left < NBHD_N) * NBHD_SM90_ALL_GROUPS; }

/* One loading thread: all boxes of K (v = 0) or V (v = 1) that the tile needs, extra keys first. K's also tells the
 * consumers where each box lies and what mask it needs. tiles: the first stage; map, extra: K's or V's.
 * All that a box needs is worked out before its stage is free: the consumers wait for what comes after. */
NBHD_FN void load_boxes(const struct nbhd_boxes *b, struct tables *tab, int v, unsigned tiles, int extra_keys,
                        const struct nbhd_tensor_map *map, const struct nbhd_tensor_map *extra)
{
    const struct nbhd_key_box *k = &b->shape[tab->shape];
    int origin[3], stage = 0, phase = 1, flags;
    int chunks = v ? PV_CHUNKS : QK_CHUNKS, kv_head = tab->place.kv_head;
    for (int at = 0; at < extra_keys; at += NBHD_N) {
        unsigned full = smem_address(&tab->full[v][stage]), dst = tiles + stage * chunks * (NBHD_N * 128);
        mbar_wait(smem_address(&tab->empty[v][stage]), phase);
        if (!v)
            tab->box[stage] = make_int4(0, 0, at, extra_flags(extra_keys - at));
        mbar_arrive_expect(full, chunks * NBHD_N * 128);
        for (int c = 0; c < chunks; c++)
            tma_load_5d(dst + c * NBHD_N * 128, extra, full, 64 * c, kv_head, at, tab->place.batch, 0);
        if (++stage == NBHD_STAGES)
            stage = 0, phase ^= 1;
    }
    for (int a = 0; a < 3; a++)
        origin[a] = tab->any[a].x;
    do {
        unsigned full = smem_address(&tab->full[v][stage]), dst = tiles + stage * chunks * (NBHD_N * 128);
        int4 box = make_int4(origin[0], origin[1], origin[2], 0);
        unsigned from_union[3];
        for (int a = 0; a < 3; a++)
            from_union[a] = (unsigned)(origin[a] - tab->any[a].x + MASK_BIAS) * 0x10001;
        int x0 = map_coordinate(b, tab, origin, 0), x1 = map_coordinate(b, tab, origin, 1),
            x2 = map_coordinate(b, tab, origin, 2);
        flags = is_last_box(k, tab, origin) ? NBHD_SM90_LAST : 0;
        box.w = v ? 0 : flags | mask_flags(k, tab, origin);
        next_box(k, tab, origin);
        mbar_wait(smem_address(&tab->empty[v][stage]), phase);
        if (!v) {
            tab->box[stage] = box;
            for (int a = 0; a < 3; a++)
                tab->origin[stage][a] = from_union[a];
        }
        mbar_arrive_expect(full, chunks * k->tokens * 128);
        for (int c = 0; c < chunks; c++)
            tma_load_5d(dst + c * NBHD_N * 128, map, full, 64 * c, kv_head, x2, x1, x0);
        if (++stage == NBHD_STAGES)
            stage = 0, phase ^= 1;
    } while (!flags);
}

/* Bits of the columns below x where columns are consecutive tokens. */
NBHD_FN word bits_below(int x, int q)
{
    x = nbhd_max(0, nbhd_min(x, NBHD_N));
    int bits = 2 * (x >> 3) + nbhd_max(0, nbhd_min((x & 7) - 2 * q, 2));
    return sizeof(word) == 4 ? ~(word)shl_b32(~0u, bits) : ~(word)shl_b64(~0ull, bits);
}

/* The bits of a box of consecutive keys that one row sees; q: the lane's quarter. */
NBHD_FN word row_bits(const struct nbhd_boxes *b, const struct tables *tab, int4 box, int extra_keys, unsigned row,
                      int q)
{
    if (box.w & NBHD_SM90_EXTRA)
        return bits_below(extra_keys - box.z, q);
    int2 window = tab->window[b->q_box[0] + b->q_box[1] + coordinate(row, 2)];
    int end = nbhd_min(window.y - box.z, b->shape[0].tokens);
    return bits_below(end, q) & ~bits_below(window.x - box.z, q);
}

/* Scores outside the mask become -inf. Row by row: ptxas then moves a byte of the word to predicates at a time. */
NBHD_FN void apply_bits(float *s, word row0, word row1)
{
    const float masked = -__int_as_float(0x7f800000);
#pragma unroll
    for (int e = 0; e < NBHD_N / 4; e++)
        s[4 * (e / 2) + e % 2] = row0 >> e & 1 ? s[4 * (e / 2) + e % 2] : masked;
#pragma unroll
    for (int e = 0; e < NBHD_N / 4; e++)
        s[4 * (e / 2) + 2 + e % 2] = row1 >> e & 1 ? s[4 * (e / 2) + 2 + e % 2] : masked;
}

/* What a thread knows of its part of the queries' mask columns. An A operand of a step has four columns of it: 2q,
 * 2q + 1, 2q + 8, 2q + 9. For each: the column's axis, and the bounds between which a box's origin on that axis must
 * lie for the column's key to be seen by the thread's rows, as 0x8000 - bound, row 1's in the upper half. A sum
 * with an origin then has the sign bit of a half set where the origin has reached the bound. */
#define MASK_PROBES (4 * NBHD_MASK_STEPS + !NBHD_MASK_STEPS)
struct probes {
    unsigned begin[MASK_PROBES], end[MASK_PROBES], axis[MASK_PROBES];
};

NBHD_FN void find_probes(struct probes *p, const struct nbhd_boxes *b, const struct tables *tab, unsigned row0,
                         unsigned row1, int q)
{
    const struct nbhd_key_box *k = &b->shape[tab->shape];
#pragma unroll
    for (int i = 0; i < 4 * NBHD_MASK_STEPS; i++) {
        int column = i / 4 * 16 + 2 * q + i % 2 + (i & 2) * 4;
        p->axis[i] = 0;
        p->begin[i] = 0x80008000; /* seen from anywhere */
        p->end[i] = column == k->mask_at[3] ? 0x80008000 : 0; /* or from nowhere: keys past the box */
        for (int a = 0, first = 0; a < 3; first += b->q_box[a++]) {
            int x = column - k->mask_at[a];
            if (k->mask_at[a] < 0 || x < 0 || x >= k->extent[a])
                continue;
            int shift = tab->any[a].x + x - MASK_BIAS;
            int2 w0 = tab->window[first + coordinate(row0, a)], w1 = tab->window[first + coordinate(row1, a)];
            p->axis[i] = a;
            p->begin[i] = 0x80008000 - (w0.x - shift) - ((unsigned)(w1.x - shift) << 16);
            p->end[i] = 0x80008000 - (w0.y - shift) - ((unsigned)(w1.y - shift) << 16);
        }
    }
}

/* Times MASK_ONE, what a key that is not seen adds to its score: -2^100, or -2^30 where float16 allows no more. */
#define MASK_FAR (NBHD_DTYPE == 2 ? 0xf180f180u : 0xf800f800u)
#define MASK_ONE (NBHD_DTYPE == 2 ? 0x3f80u : 0x7800u)

/* The A operands of the mask columns for the box in this stage. */
NBHD_FN void find_mask(unsigned *a, const struct probes *p, const struct tables *tab, int stage)
{
#pragma unroll
    for (int i = 0; i < 2 * NBHD_MASK_STEPS; i++) { /* a pair of columns, for both rows */
        unsigned unseen[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            unsigned origin = tab->origin[stage][p->axis[2 * i + c]];
            unseen[c] = ~(origin + p->begin[2 * i + c]) | (origin + p->end[2 * i + c]);
        }
        a[2 * i] = prmt_b32(unseen[0], unseen[1], 0xdd99) & MASK_FAR; /* the sign of each lower half, 16 times */
        a[2 * i + 1] = prmt_b32(unseen[0], unseen[1], 0xffbb) & MASK_FAR;
    }
}

/* Issues the mask's part of S for the box in `stage`. keys: the keys' columns, see write_mask_keys. */
NBHD_FN void issue_mask(float *s, const struct probes *p, const struct tables *tab, int stage, unsigned keys)
{
    unsigned a[MASK_PROBES];
    find_mask(a, p, tab, stage);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_MASK_STEPS; i++)
        NBHD_MASK(s, a + 4 * i, wgmma_k_major_32(keys + i * NBHD_N * 32), 1);
    wgmma_commit();
}

/* The keys' mask columns: tiles of 16 columns, a key's 32 bytes a row, 32-byte swizzle (address bit 4 ^= bit 7). */
NBHD_FN void write_mask_keys(const struct nbhd_key_box *k, unsigned keys)
{
    for (int i = threadIdx.x; i < 2 * NBHD_MASK_STEPS * NBHD_N; i += THREADS) {
        int piece = i / NBHD_N, key = i % NBHD_N; /* 8 columns of a key */
        int one[3] = {key / (k->extent[1] * k->extent[2]), key / k->extent[2] % k->extent[1], key % k->extent[2]};
        unsigned words[4] = {0, 0, 0, 0};
        for (int a = 0; a < 4; a++) {
            int column = k->mask_at[a] + (a < 3 ? one[a] : 0) - 8 * piece;
            int is_set = k->mask_at[a] >= 0 && (a == 3) == (key >= k->tokens);
            for (int w = 0; w < 4; w++)
                if (is_set && column >> 1 == w)
                    words[w] |= MASK_ONE << 16 * (column & 1);
        }
        st_shared_v4(keys + piece / 2 * (NBHD_N * 32) + key * 32 + ((piece & 1) << 4 ^ (key & 4) << 2),
                     make_uint4(words[0], words[1], words[2], words[3]));
    }
}

/* How this warpgroup masks a box: not at all, by more columns of the product, or bit by bit. */
#define BY_COLUMNS 1
#define BY_BITS 2

NBHD_FN int box_flags(int4 box, int group)
{
    int how = NBHD_MASK_STEPS && !(box.w & NBHD_SM90_EXTRA) ? BY_COLUMNS : NBHD_MASK_BITS ? BY_BITS : 0;
    return __shfl_sync(~0u, box.w >> 4 * group & 7 ? how : 0, 0); /* uniform */
}

/* State of a thread's two rows: running maximum of raw scores, its part of the running sum, and the factor by which the
 * step scales what was summed before. */
struct rows {
    float max[2], sum[2], scale[2];
};

/* Scores become probabilities relative to the new maximum. */
NBHD_FN void softmax_step(float *s, struct rows *r, float scale_log2)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float high = s[2 * i];
#pragma unroll
        for (int j = 0; j < NBHD_N / 8; j++)
            high = fmaxf(high, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        high = fmaxf(high, r->max[i]);
        r->scale[i] = ex2_approx_ftz_f32((r->max[i] - high) * scale_log2);
        r->max[i] = high;
        float offset = high * scale_log2, sum = 0;
#pragma unroll
        for (int j = 0; j < NBHD_N / 8; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float *x = &s[4 * j + 2 * i + c];
                *x = ex2_approx_ftz_f32(fmaf(*x, scale_log2, -offset));
                sum += *x;
            }
        r->sum[i] = r->sum[i] * r->scale[i] + sum;
    }
}

NBHD_FN unsigned pack(float low, float high)
{
    return NBHD_DTYPE == 2 ? cvt_rn_bf16x2_f32(low, high) : cvt_rn_f16x2_f32(low, high);
}

NBHD_FN void pack_probabilities(unsigned *packed, const float *s)
{
#pragma unroll
    for (int i = 0; i < NBHD_N / 4; i++)
        packed[i] = pack(s[2 * i], s[2 * i + 1]);
}

NBHD_FN void scale_output(float *o, const struct rows *r)
{
#pragma unroll
    for (int i = 0; i < NBHD_HEAD_DIM_V / 2; i++)
        o[i] *= r->scale[i >> 1 & 1];
}

/* Issues S = Q K^T for the K tile at `tile`. */
NBHD_FN void issue_qk(float *s, unsigned long long q, unsigned tile)
{
    unsigned long long k = wgmma_k_major(tile);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < QK_STEPS; i++)
        NBHD_QK(s, wgmma_advance(q, i / 4 * (Q_ROWS * 8) + i % 4 * 2),
                wgmma_advance(k, i / 4 * (NBHD_N * 8) + i % 4 * 2), i > 0);
    wgmma_commit();
}

/* Issues O += P V for the V tile at `tile`. */
NBHD_FN void issue_pv(float *o, const unsigned *packed, unsigned tile)
{
    unsigned long long v = wgmma_mn_major(tile, NBHD_N);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++)
        NBHD_PV(o, packed + 4 * i, wgmma_advance(v, 128 * i), 1);
    wgmma_commit();
}

/* Token of a row, in the tensor; 0 if the row has none. */
NBHD_FN int row_token(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct place *t, unsigned row,
                      int number, long long *x)
{
    int inside = number < b->rows;
#pragma unroll
    for (int a = 0; a < 3; a++) {
        int at = t->origin[a] + coordinate(row, a);
        inside &= at < t->size[a];
        x[a] = (long long)at * p->axis[a].dilation + t->group[a];
    }
    return inside;
}

NBHD_FN char *row_address(const struct nbhd_view *view, const struct place *t, unsigned row, const long long *x)
{
    return view->data + t->batch * view->batch + x[0] * view->axis[0] + x[1] * view->axis[1] + x[2] * view->axis[2] +
           (long long)(t->head + (int)(row >> 24)) * view->head;
}

/* Writes a warp's 16 rows of O, and their logsumexp. number: of the warp's first row; stage: its place in shared
 * memory. */
NBHD_FN void store_rows(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct tables *tab,
                        const float *o, const struct rows *r, unsigned stage, int number)
{
    const struct place *t = &tab->place;
    int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    long long x[3];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = r->sum[i];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        float scale = 1 / sum;
#pragma unroll
        for (int j = 0; j < NBHD_HEAD_DIM_V / 8; j++) {
            float low = o[4 * j + 2 * i] * scale, high = o[4 * j + 2 * i + 1] * scale;
            st_shared_b32(stage + j / 8 * (Q_ROWS * 128) + (g + 8 * i) * 128 + ((j % 8 ^ g) << 4) + q * 4,
                             pack(low, high));
        }
        unsigned row = tab->row[number + g + 8 * i];
        if (p->lse.data && q == 0 && row_token(p, b, t, row, number + g + 8 * i, x))
            *(float *)row_address(&p->lse, t, row, x) = r->max[i] * p->scale + logf(sum);
    }
    __syncwarp();
    /* Eight lanes a row, 16 bytes each. */
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int at = 4 * i + (lane >> 3), piece = lane & 7;
        unsigned row = tab->row[number + at];
        if (!row_token(p, b, t, row, number + at, x))
            continue;
        char *dst = row_address(&p->o, t, row, x) + 16 * piece;
#pragma unroll
        for (int c = 0; c < PV_CHUNKS; c++)
            if (64 * c + 8 * piece < NBHD_HEAD_DIM_V)
                *(uint4 *)(dst + 128 * c) =
                    ld_shared_v4(stage + c * (Q_ROWS * 128) + at * 128 + ((piece ^ at & 7) << 4));
    }
}

/* One consumer warpgroup: all boxes, then the output. */
NBHD_FN void consume(const struct nbhd_params *p, const struct nbhd_boxes *b, struct tables *tab, unsigned q_tile,
                     unsigned k_tiles, unsigned v_tiles, unsigned mask_keys)
{
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1; /* uniform: else descriptors live in vector registers */
    int lane = threadIdx.x & 31, quarter = lane & 3;
    int number = group * 64 + (threadIdx.x / 32 & 3) * 16; /* the warp's first row */
    unsigned row0 = tab->row[number + (lane >> 2)], row1 = tab->row[number + (lane >> 2) + 8];
    unsigned k_full = smem_address(tab->full[0]), k_empty = smem_address(tab->empty[0]);
    unsigned v_full = smem_address(tab->full[1]), v_empty = smem_address(tab->empty[1]);
    float scale_log2 = p->scale * 1.44269504f;
    float s[NBHD_N / 2], o[NBHD_HEAD_DIM_V / 2];
    unsigned packed[NBHD_N / 4];
    struct rows r = {{-1e30f, -1e30f}, {0, 0}, {1, 1}};
#pragma unroll
    for (int i = 0; i < NBHD_HEAD_DIM_V / 2; i++)
        o[i] = 0;

    mbar_wait(smem_address(&tab->q_full), 0);
    unsigned long long q = wgmma_k_major(q_tile + group * 64 * 128);

    struct probes probes;
    find_probes(&probes, b, tab, row0, row1, quarter);

    mbar_wait(k_full, 0);
    int4 box = tab->box[0];
    issue_qk(s, q, k_tiles);
    int flags = box_flags(box, group);
    if (NBHD_MASK_STEPS && flags & BY_COLUMNS)
        issue_mask(s, &probes, tab, 0, mask_keys);
    wgmma_wait_0();
    NBHD_PIN_F(s, NBHD_N / 2);
    if (lane == 0)
        mbar_arrive(k_empty);
    if (NBHD_MASK_BITS && flags & BY_BITS)
        apply_bits(s, row_bits(b, tab, box, p->extra, row0, quarter),
                   row_bits(b, tab, box, p->extra, row1, quarter));
    softmax_step(s, &r, scale_log2);
    pack_probabilities(packed, s);

    if (NBHD_TAKE_TURNS && group == 1)
        named_barrier_arrive(4, 256); /* group 0 begins */
    int stage = 0, phase = 0; /* of the box whose probabilities are packed */
    while (!(box.w & NBHD_SM90_LAST)) {
        int next = stage + 1 == NBHD_STAGES ? 0 : stage + 1, next_phase = phase ^ (next == 0);
        mbar_wait(k_full + 8 * next, next_phase);
        box = tab->box[next];
        if (NBHD_TAKE_TURNS)
            named_barrier_sync(4 + group, 256);
        issue_qk(s, q, k_tiles + next * K_BYTES);
        flags = box_flags(box, group);
        if (NBHD_MASK_STEPS && flags & BY_COLUMNS)
            issue_mask(s, &probes, tab, next, mask_keys);
        mbar_wait(v_full + 8 * stage, phase);
        issue_pv(o, packed, v_tiles + stage * V_BYTES);
        if (NBHD_TAKE_TURNS)
            named_barrier_arrive(5 - group, 256);
        wgmma_wait_1();
        NBHD_PIN_F(s, NBHD_N / 2);
        if (lane == 0)
            mbar_arrive(k_empty + 8 * next);
        if (NBHD_MASK_BITS && flags & BY_BITS)
            apply_bits(s, row_bits(b, tab, box, p->extra, row0, quarter),
                       row_bits(b, tab, box, p->extra, row1, quarter));
        softmax_step(s, &r, scale_log2);
        wgmma_wait_0_after(r.sum[0] + r.sum[1], smem_address(&tab->scratch));
        NBHD_PIN_F(o, NBHD_HEAD_DIM_V / 2);
        NBHD_PIN_R(packed, NBHD_N / 4);
        if (lane == 0)
            mbar_arrive(v_empty + 8 * stage);
        scale_output(o, &r);
        pack_probabilities(packed, s);
        stage = next, phase = next_phase;
    }

    mbar_wait(v_full + 8 * stage, phase);
    issue_pv(o, packed, v_tiles + stage * V_BYTES);
    wgmma_wait_0();
    NBHD_PIN_F(o, NBHD_HEAD_DIM_V / 2);
    named_barrier_sync(1 + group, 128); /* all four warps have read Q, whose place O takes */
    store_rows(p, b, tab, o, &r, q_tile + number * 128, number);
}

/* The shape of key boxes that covers the tile's union with the fewest. Called by one warp; a lane tries one shape. */
NBHD_FN int best_shape(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct place *t)
{
    int lane = threadIdx.x & 31, count = 1;
    const struct nbhd_key_box *k = &b->shape[nbhd_min(lane, b->shapes - 1)];
    for (int a = 0; a < 3; a++) {
        struct nbhd_range q = nbhd_range_of(t->origin[a], nbhd_min(t->origin[a] + b->q_box[a], t->size[a]));
        struct nbhd_range keys = nbhd_tile_any(p->axis[a], t->size[a], q);
        count *= (keys.end - keys.begin + k->extent[a] - 1) / k->extent[a];
    }
    int key = lane < b->shapes ? count * 32 + lane : 0x7fffffff;
    for (int step = 16; step > 0; step /= 2)
        key = nbhd_min(key, __shfl_xor_sync(~0u, key, step));
    return key & 31;
}

/* Barriers, and the tables that all roles read. */
NBHD_FN void prepare(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct place *t, struct tables *tab,
                     const struct nbhd_tensor_map *q_map, unsigned q_tile)
{
    int thread = threadIdx.x;
    if (thread < 32) {
        int shape = b->shapes > 1 ? best_shape(p, b, t) : 0;
        if (thread == 0)
            tab->shape = shape;
    }
    if (thread == 32) {
        mbar_init(smem_address(&tab->q_full), 1);
        for (int i = 0; i < NBHD_STAGES; i++)
            for (int v = 0; v < 2; v++) {
                mbar_init(smem_address(&tab->full[v][i]), 1);
                mbar_init(smem_address(&tab->empty[v][i]), 4 * NBHD_GROUPS); /* one lane of each consumer warp */
            }
        mbar_fence_init();
        for (int a = 0; a < 3; a++)
            tab->shift[a] = b->sliced ? 0 : t->group[a];
        if (!b->sliced)
            tab->shift[0] += t->batch; /* rank 3 with a batch is sliced, so one of the two is 0 */
        tab->place = *t;
        load_q_box(b, t, tab, q_map, q_tile);
    }
    for (int i = thread; i < Q_ROWS; i += THREADS)
        tab->row[i] = b->row[i];
    for (int a = 0, first = 0; a < 3; first += b->q_box[a++])
        for (int i = thread; i < b->q_box[a]; i += THREADS) {
            struct nbhd_range keys = nbhd_keys(p->axis[a], t->size[a], nbhd_min(t->origin[a] + i, t->size[a] - 1));
            tab->window[first + i] = make_int2(keys.begin, keys.end);
        }
}

/* The tile's union and the warpgroups' intersections, read off the windows by one thread per axis. */
NBHD_FN void prepare_bounds(const struct nbhd_boxes *b, struct tables *tab)
{
    int a = threadIdx.x;
    if (a >= 3)
        return;
    const int2 *window = tab->window + (a > 0) * b->q_box[0] + (a > 1) * b->q_box[1];
    tab->any[a] = make_int2(window[0].x, window[b->q_box[a] - 1].y);
    for (int g = 0; g < NBHD_GROUPS; g++)
        tab->all[g][a] = make_int2(window[coordinate(b->high[g], a)].x, window[coordinate(b->low[g], a)].y);
}

/* What depends on the shape that prepare chose. Rows past the box meet zero probabilities, so they must not be NaN. */
NBHD_FN void prepare_shape(const struct nbhd_boxes *b, struct tables *tab, unsigned k_tiles, unsigned mask_keys)
{
    const struct nbhd_key_box *k = &b->shape[tab->shape];
    int unused = (NBHD_N - k->tokens) * 8; /* 16-byte pieces per chunk */
    for (int i = threadIdx.x; i < unused * NBHD_STAGES * (QK_CHUNKS + PV_CHUNKS); i += THREADS)
        st_shared_v4(k_tiles + i / unused * (NBHD_N * 128) + k->tokens * 128 + i % unused * 16,
                     make_uint4(0, 0, 0, 0));
    write_mask_keys(k, mask_keys);
    fence_proxy_async();
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_fwd_sm90(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_boxes b,
                  const __grid_constant__ struct maps maps)
{
    extern __shared__ __align__(1024) char shared[];
    unsigned q_tile = smem_address(shared), k_tiles = q_tile + Q_BYTES, v_tiles = k_tiles + NBHD_STAGES * K_BYTES;
    unsigned mask_keys = v_tiles + NBHD_STAGES * V_BYTES;
    struct tables *tab = (struct tables *)(shared + Q_BYTES + NBHD_STAGES * (K_BYTES + V_BYTES) + MASK_BYTES);
    struct place t = tile_place(&p, &b);
    if (t.origin[0] >= t.size[0] || t.origin[1] >= t.size[1] || t.origin[2] >= t.size[2])
        return; /* a dilation group with fewer elements than the first */
    int slice = b.sliced ? blockIdx.z : 0;
    prepare(&p, &b, &t, tab, &maps.q[slice], q_tile);
    __syncthreads();
    prepare_bounds(&b, tab);
    prepare_shape(&b, tab, k_tiles, mask_keys);
    __syncthreads();

    if (threadIdx.x < 128) {
        NBHD_SET_REGISTERS_DOWN(NBHD_REGISTERS_LOAD);
        int v = threadIdx.x / 32;
        if (threadIdx.x == 0 || threadIdx.x == 32)
            load_boxes(&b, tab, v, v ? v_tiles : k_tiles, p.extra, &maps.kv[v][slice * b.shapes + tab->shape],
                       &maps.extra[v]);
    } else {
        NBHD_SET_REGISTERS_UP(NBHD_REGISTERS_MATH);
        consume(&p, &b, tab, q_tile, k_tiles, v_tiles, mask_keys);
    }
}
