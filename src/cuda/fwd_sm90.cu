/* Forward neighborhood attention on Hopper: wgmma and TMA. Host half: fwd_sm90.c; box shapes: sm90_plan.c.
 *
 * A query tile is a box of tokens x the packed heads of one key/value head = 64 rows per consumer warpgroup. It visits
 * the union of its queries' windows in boxes of N keys, starting at the union's own corner. TMA reads all boxes straight
 * from [batch, axes, heads, head_dim]; tokens outside the tensor arrive as zeros, and the window masks them. A row of
 * shared memory is one token of a 64-column chunk (128 bytes, 128-byte swizzle), the row's number its row-major place in
 * the box: the layout wgmma reads, K k-major and V mn-major.
 *
 * A CTA computes several tiles (struct nbhd_boxes), and all its roles run through them without a pause:
 *
 *     warpgroup 0      warp 0: K boxes, and what each box needs of a mask            NBHD_REGISTERS_LOAD
 *                      warp 1: V boxes
 *                      warp 2: the tables of the next tile, and its Q
 *     warpgroups 1..   64 rows each: S = Q K^T, softmax, O += P V                    NBHD_REGISTERS_MATH
 *
 *     shared memory, from a multiple of 1024:
 *     | Q: stages x chunks x 64 G rows x 128 | K: stages x chunks x N x 128 | V: the same | mask keys | struct tables |
 *
 * A consumer's step j, with two products in flight while the softmax runs:
 *     issue S(j) = Q K(j)^T + mask | issue O += P(j-1) V(j-1) | wait S | max, exp, sum, pack P(j) | wait O
 * Probabilities are relative to a reference that moves to the row's maximum only when a score is 2^8 times above it, which
 * is rare after a tile's first boxes; only then is O scaled. Of P(j) as much as there are registers for is packed before the
 * wait for O, while P(j-1) is still read: so that little is left to do between that wait and the next products.
 * If j is the first box of a tile, O is then complete for the tile before: it is normalised, and stored from registers.
 *
 * Masks: device/mask_sm90.cuh. Only boxes that reach past what all rows of a warpgroup see are masked at all. The reference
 * starts at -1e30: what a row sums over boxes that are all masked, its first seen key scales by 0.
 * NaN or infinite keys reach all queries of the tiles that load them, not only those that see them.
 *
 * Registers of a consumer thread: S N/2, P N/4 and 4 per step packed early, O head_dim_v/2. */
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
#ifndef NBHD_Q_STAGES
#error "NBHD_Q_STAGES: 2 loads a tile's Q while the tile before still needs its own, else 1"
#endif
#ifndef NBHD_EARLY
#error "NBHD_EARLY: 16ths of a box's keys whose probabilities have a second set of registers, 0 to N / 16"
#endif
#ifndef NBHD_MASK_STEPS
#error "NBHD_MASK_STEPS: masks of boxes as more columns of the product: their number / 16, 0 to 2"
#endif
#ifndef NBHD_MASK
#error "NBHD_MASK: the instruction of those columns, wgmma_rs_n<N>"
#endif
#ifndef NBHD_MASK_BITS
#error "NBHD_MASK_BITS: 1 where keys are masked by their number: boxes of 1 x 1 x N, the tail of extra keys"
#endif
#ifndef NBHD_PAD
#error "NBHD_PAD: the last blocks of 8 of a box's N keys that may hold none"
#endif
#ifndef NBHD_MAPS
#error "NBHD_MAPS: room for maps in the arguments: slices x shapes of key boxes"
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
#define Q_BYTES (QK_CHUNKS * Q_ROWS * 128)
#define K_BYTES (QK_CHUNKS * NBHD_N * 128)
#define V_BYTES (PV_CHUNKS * NBHD_N * 128)
#define THREADS (128 * (NBHD_GROUPS + 1))

#include "device/tiles_sm90.cuh"
#include "device/mask_sm90.cuh"

struct maps {
    struct nbhd_tensor_map q[NBHD_MAPS], kv[2][NBHD_MAPS], extra[2]; /* kv, extra: of K, of V; kv[slice][shape] */
};

/* ---- the preparing warp ---- */

/* The shape of key boxes that covers the tile's union with the fewest; a lane tries one shape. */
NBHD_FN int best_shape(const struct nbhd_boxes *b, const struct tile *t)
{
    int lane = threadIdx.x & 31, count = 1;
    const struct nbhd_key_box *k = &b->shape[nbhd_min(lane, b->shapes - 1)];
    for (int a = 0; a < 3; a++)
        count *= (t->any[a].y - t->any[a].x + k->extent[a] - 1) / k->extent[a];
    int key = lane < b->shapes ? count * 32 + lane : 0x7fffffff;
    for (int step = 16; step > 0; step /= 2)
        key = nbhd_min(key, __shfl_xor_sync(~0u, key, step));
    return key & 31;
}

/* What follows from where a tile lies, but for what is read off the windows. By `threads` threads. */
NBHD_FN void write_place(const struct nbhd_params *p, const struct nbhd_boxes *b, struct tables *tab, int slot,
                         const struct place *at, int thread, int threads)
{
    struct tile *t = &tab->tile[slot];
    int2 *window = windows_of(b, tab, slot);
    for (int a = 0; a < 3; window += b->q_box[a++])
        for (int i = thread; i < b->q_box[a]; i += threads) {
            struct nbhd_range keys = nbhd_keys(p->axis[a], at->size[a], nbhd_min(at->origin[a] + i, at->size[a] - 1));
            window[i] = make_int2(keys.begin, keys.end);
        }
    if (thread != 0)
        return;
    t->place = *at;
    for (int a = 0; a < 3; a++)
        t->shift[a] = shift_of(b, at, a);
}

/* The tile's union and the warpgroups' intersections, read off the windows by one lane per axis. */
NBHD_FN void write_bounds(const struct nbhd_boxes *b, struct tile *t, const int2 *window)
{
    int a = threadIdx.x & 31;
    if (a >= 3)
        return;
    window += (a > 0) * b->q_box[0] + (a > 1) * b->q_box[1];
    t->any[a] = make_int2(window[0].x, window[b->q_box[a] - 1].y);
    for (int g = 0; g < NBHD_GROUPS; g++)
        t->all[g][a] = make_int2(window[coordinate(b->high[g], a)].x, window[coordinate(b->low[g], a)].y);
}

NBHD_FN void load_q_box(const struct nbhd_boxes *b, struct tables *tab, const struct place *at,
                        const struct nbhd_tensor_map *maps, unsigned q_tiles, int stage)
{
    unsigned full = smem_address(&tab->q_full[stage]), tile = q_tiles + stage * Q_BYTES;
    int x[3];
    for (int a = 0; a < 3; a++)
        x[a] = at->origin[a] * b->step[a] + shift_of(b, at, a);
    mbar_arrive_expect(full, QK_CHUNKS * b->rows * 128);
    for (int c = 0; c < QK_CHUNKS; c++)
        tma_load_5d(tile + c * (Q_ROWS * 128), maps + (b->sliced ? at->slice : 0), full, 64 * c, at->head, x[2], x[1],
                    x[0]);
}

/* For each tile of the CTA its tables, then its Q, which may have to wait for the tile before. Of the first tile, which
 * nothing overlaps, all threads have written the place, and Q is on its way: begin_cta. */
NBHD_FN void prepare_tiles(const struct nbhd_params *p, const struct nbhd_boxes *b, struct tables *tab,
                           const struct nbhd_tensor_map *q_maps, unsigned q_tiles, unsigned mask_keys,
                           struct share share)
{
    int lane = threadIdx.x & 31, last_shape = -1, shape = -1; /* of the two tiles before */
    for (int n = 0, more = 1; more; n++) {
        struct tile *t = &tab->tile[n & 1];
        int next = next_work(p, b, &share);
        more = next >= 0;
        if (lane == 0)
            t->more = more;
        write_bounds(b, t, windows_of(b, tab, n & 1));
        __syncwarp();
        int here = last_shape; /* whose mask keys this slot holds */
        last_shape = shape;
        shape = b->shapes > 1 ? best_shape(b, t) : 0;
        if (lane == 0)
            t->shape = shape;
        if (b->shapes > 1 && shape != here)
            write_mask_keys(&b->shape[shape], mask_keys + (n & 1) * MASK_BYTES, lane, 32);
        __syncwarp();
        write_columns(b, t, windows_of(b, tab, n & 1));
        __syncwarp();
        if (lane == 0)
            mbar_arrive(smem_address(&tab->tile_full[n & 1]));
        if (n > 0) {
            mbar_wait(smem_address(&tab->q_empty[n % NBHD_Q_STAGES]), ~(n / NBHD_Q_STAGES) & 1);
            if (lane == 0)
                load_q_box(b, tab, &t->place, q_maps, q_tiles, n % NBHD_Q_STAGES);
        }
        if (!more)
            return;
        struct place at = place_of(p, b, next);
        mbar_wait(smem_address(&tab->tile_empty[~n & 1]), ~((n + 1) >> 1) & 1);
        write_place(p, b, tab, ~n & 1, &at, lane, 32);
        __syncwarp();
    }
}

/* ---- the loading warps ---- */

/* Moves origin to the next box of the union. */
NBHD_FN void next_box(const struct nbhd_key_box *k, const struct tile *t, int *origin)
{
#pragma unroll
    for (int a = 2; a >= 0; a--) {
        origin[a] += k->extent[a];
        if (origin[a] < t->any[a].y)
            return;
        origin[a] = t->any[a].x;
    }
}

NBHD_FN int is_last_box(const struct nbhd_key_box *k, const struct tile *t, const int *origin)
{
    return origin[0] + k->extent[0] >= t->any[0].y && origin[1] + k->extent[1] >= t->any[1].y &&
           origin[2] + k->extent[2] >= t->any[2].y;
}

/* Where a loading warp stands in its ring of stages. v: 0 for K, 1 for V; tiles: the first stage. */
struct ring {
    unsigned tiles;
    int v, stage, phase;
};

/* Waits until the ring's stage is free for a box of `keys`. Rows past the box meet zero probabilities, so they must not be
 * NaN: they are zeroed, where a larger box was here before. */
NBHD_FN void open_stage(const struct ring *r, struct tables *tab, int keys)
{
    int chunks = r->v ? PV_CHUNKS : QK_CHUNKS, lane = threadIdx.x & 31;
    mbar_wait(smem_address(&tab->empty[r->v][r->stage]), r->phase);
    if (!NBHD_PAD)
        return;
    int stale = (tab->filled[r->v][r->stage] - keys) * 8; /* 16-byte pieces per chunk */
    __syncwarp();
    if (stale == 0)
        return;
    unsigned stage = r->tiles + r->stage * chunks * (NBHD_N * 128) + keys * 128;
    for (int c = 0; c < chunks; c++)
        for (int i = lane; i < stale; i += 32)
            st_shared_v4(stage + c * (NBHD_N * 128) + 16 * i, make_uint4(0, 0, 0, 0));
    fence_proxy_async();
    if (lane == 0)
        tab->filled[r->v][r->stage] = keys;
    __syncwarp();
}

NBHD_FN void next_stage(struct ring *r)
{
    if (++r->stage == NBHD_STAGES)
        r->stage = 0, r->phase ^= 1;
}

/* By one lane: the box of `keys` at coordinates x0..x3 of the map. */
NBHD_FN void load_box(const struct ring *r, struct tables *tab, const struct nbhd_tensor_map *map, int keys, int head,
                      int x0, int x1, int x2)
{
    int chunks = r->v ? PV_CHUNKS : QK_CHUNKS;
    unsigned full = smem_address(&tab->full[r->v][r->stage]), to = r->tiles + r->stage * chunks * (NBHD_N * 128);
    mbar_arrive_expect(full, chunks * keys * 128);
    for (int c = 0; c < chunks; c++)
        tma_load_5d(to + c * NBHD_N * 128, map, full, 64 * c, head, x0, x1, x2);
}

/* A tile's extra keys. */
NBHD_FN void load_extra(struct ring *r, const struct tile *t, struct tables *tab, const struct nbhd_tensor_map *map,
                        int extra)
{
    for (int at = 0; at < extra; at += NBHD_N) {
        open_stage(r, tab, NBHD_N);
        if ((threadIdx.x & 31) == 0) {
            struct box box = {at, NBHD_N, extra_flags(extra - at)};
            if (!r->v)
                tab->box[r->stage] = box;
            load_box(r, tab, map, NBHD_N, t->place.kv_head, at, t->place.batch, 0);
        }
        next_stage(r);
    }
}

/* A tile's boxes of keys on the grid; last: flags of the last. All that a box needs is worked out before its stage is
 * free: the consumers wait for what comes after. */
NBHD_FN void load_grid(struct ring *r, const struct nbhd_boxes *b, const struct tile *t, struct tables *tab,
                       const struct nbhd_tensor_map *map, int last)
{
    const struct nbhd_key_box *k = &b->shape[t->shape];
    int origin[3] = {t->any[0].x, t->any[1].x, t->any[2].x}, kv_head = t->place.kv_head, is_last, axis, from;
    int lane = threadIdx.x & 31;
    find_column(t, &axis, &from);
    do {
        unsigned column = column_origin(origin, axis, from);
        int x0 = map_coordinate(b, t, origin, 0), x1 = map_coordinate(b, t, origin, 1),
            x2 = map_coordinate(b, t, origin, 2);
        is_last = is_last_box(k, t, origin);
        struct box box = {origin[2], k->tokens, 0};
        if (!r->v)
            box.flags = (is_last ? last : 0) | mask_flags(k, t, origin);
        next_box(k, t, origin);
        open_stage(r, tab, k->tokens);
        if (!r->v && lane < MASK_COLUMNS)
            tab->origin[r->stage][lane] = column;
        __syncwarp();
        if (lane == 0) {
            if (!r->v)
                tab->box[r->stage] = box;
            load_box(r, tab, map, k->tokens, kv_head, x2, x1, x0);
        }
        next_stage(r);
    } while (!is_last);
}

/* One loading warp: all boxes of K (v = 0) or V (v = 1) that the CTA's tiles need, extra keys first. K's also tells the
 * consumers where each box lies and what mask it needs. */
NBHD_FN void load_boxes(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct maps *maps,
                        struct tables *tab, int v, unsigned tiles)
{
    struct ring r = {tiles, v, 0, 1};
    for (int n = 0, more = 1; more; n++) {
        const struct tile *t = &tab->tile[n & 1];
        mbar_wait(smem_address(&tab->tile_full[n & 1]), n >> 1 & 1);
        more = t->more;
        if (p->extra)
            load_extra(&r, t, tab, &maps->extra[v], p->extra);
        load_grid(&r, b, t, tab, &maps->kv[v][(b->sliced ? t->place.slice * b->shapes : 0) + t->shape],
                  NBHD_SM90_LAST | (more ? 0 : NBHD_SM90_FINAL));
    }
}

/* ---- the consumer warpgroups ---- */

/* How far above the reference, as a power of 2, a score may be: probabilities up to 2^8 lose nothing in 16 bits. */
#define SLACK 8.0f

/* State of a thread's two rows: the score that probabilities are relative to, the thread's part of the running sum, and the
 * factor that scales what was summed before when the reference moves. */
struct rows {
    float reference[2], sum[2], scale[2];
};

NBHD_FN void begin_rows(struct rows *r)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        r->reference[i] = -1e30f;
        r->sum[i] = 0;
    }
}

/* Whether the reference of one of the warp's rows must move. Compares bits, since integers have a maximum of three: it is
 * right for limits that are not negative. A row whose limit would be has one that all scores are above. */
NBHD_FN int must_move(const float *s, const struct rows *r, float scale_log2)
{
    float slack = __fdividef(SLACK, scale_log2);
    int above = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int high = nbhd_max(__float_as_int(s[2 * i]), __float_as_int(s[2 * i + 1]));
#pragma unroll
        for (int j = 1; j < NBHD_N / 8; j++)
            high = nbhd_max(nbhd_max(high, __float_as_int(s[4 * j + 2 * i])), __float_as_int(s[4 * j + 2 * i + 1]));
        float limit = r->reference[i] + slack;
        above |= high > (limit >= 0 ? __float_as_int(limit) : (int)0x80000000);
    }
    return __any_sync(~0u, above);
}

/* Moves the references to the rows' maxima. */
NBHD_FN void move_references(const float *s, struct rows *r, float scale_log2)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float high = s[2 * i];
#pragma unroll
        for (int j = 0; j < NBHD_N / 8; j++)
            high = fmaxf(high, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        high = fmaxf(high, r->reference[i]);
        r->scale[i] = ex2_approx_ftz_f32((r->reference[i] - high) * scale_log2);
        r->reference[i] = high;
        r->sum[i] *= r->scale[i];
    }
}

/* Scores become probabilities relative to the references. Returns whether one moved. */
NBHD_FN int softmax_step(float *s, struct rows *r, float scale_log2)
{
    int moved = must_move(s, r, scale_log2);
    if (moved)
        move_references(s, r, scale_log2);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float offset = r->reference[i] * scale_log2, sum = 0;
#pragma unroll
        for (int j = 0; j < NBHD_N / 8; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float *x = &s[4 * j + 2 * i + c];
                *x = ex2_approx_ftz_f32(fmaf(*x, scale_log2, -offset));
                sum += *x;
            }
        r->sum[i] += sum;
    }
    return moved;
}

NBHD_FN unsigned pack(float low, float high)
{
    return NBHD_DTYPE == 2 ? cvt_rn_bf16x2_f32(low, high) : cvt_rn_f16x2_f32(low, high);
}

/* Probabilities as the A operands of P V: of the first steps of 16 keys, and of those from `EARLY` on. Of the first there are
 * two sets, which the boxes use in turn. */
#define EARLY (4 * NBHD_EARLY)
NBHD_FN void pack_first(unsigned *first, const float *s)
{
#pragma unroll
    for (int i = 0; i < EARLY; i++)
        first[i] = pack(s[2 * i], s[2 * i + 1]);
}

NBHD_FN void pack_rest(unsigned *rest, const float *s)
{
#pragma unroll
    for (int i = EARLY; i < NBHD_N / 4; i++)
        rest[i - EARLY] = pack(s[2 * i], s[2 * i + 1]);
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
NBHD_FN void issue_pv(float *o, const unsigned *first, const unsigned *rest, unsigned tile)
{
    unsigned long long v = wgmma_mn_major(tile, NBHD_N);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++)
        NBHD_PV(o, i < NBHD_EARLY ? first + 4 * i : rest + 4 * i - EARLY, wgmma_advance(v, 128 * i), 1);
    wgmma_commit();
}

/* Ends a tile's sums: what normalises O, and the logsumexp, for the warp's rows from `number` on. To shared memory: there
 * are no registers to keep them in until O is complete. */
NBHD_FN void finish_rows(struct tables *tab, const struct rows *r, float scale, int number)
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = r->sum[i];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if ((lane & 3) == 0)
            tab->finished[number + (lane >> 2) + 8 * i] = make_float2(1 / sum, r->reference[i] * scale + logf(sum));
    }
    __syncwarp();
}

NBHD_FN void read_scale(struct rows *r, const struct tables *tab, int number)
{
    int lane = threadIdx.x & 31;
    r->scale[0] = tab->finished[number + (lane >> 2)].x;
    r->scale[1] = tab->finished[number + (lane >> 2) + 8].x;
}

/* Transposes the 4 x 4 words of four neighbouring lanes: word j of lane q goes to word q of lane j. */
NBHD_FN void transpose_quad(unsigned *w)
{
    int lane = threadIdx.x;
#pragma unroll
    for (int step = 1; step <= 2; step *= 2)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (!(j & step)) {
                unsigned got = __shfl_xor_sync(~0u, lane & step ? w[j] : w[j + step], step);
                w[j + step] = lane & step ? w[j + step] : got;
                w[j] = lane & step ? got : w[j];
            }
}

/* Writes a warp's 16 rows of O, 64 bytes of eight rows at a time, and their logsumexp. number: of the first row. */
NBHD_FN void store_rows(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct tables *tab,
                        const struct tile *t, const float *o, int number)
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        long long x[3];
        int at = number + (lane >> 2) + 8 * i;
        unsigned row = tab->row[at];
        int inside = row_token(p, b, &t->place, row, at, x);
        char *to = row_address(&p->o, &t->place, row, x) + 16 * (lane & 3);
        if (p->lse.data && inside && (lane & 3) == 0)
            *(float *)row_address(&p->lse, &t->place, row, x) = tab->finished[at].y;
#pragma unroll
        for (int m = 0; m < (NBHD_HEAD_DIM_V + 31) / 32; m++) {
            unsigned w[4];
#pragma unroll
            for (int j = 0; j < 4; j++) /* columns 8 (4m + j) + 2q and the next */
                w[j] = 4 * m + j < NBHD_HEAD_DIM_V / 8
                           ? pack(o[16 * m + 4 * j + 2 * i], o[16 * m + 4 * j + 2 * i + 1])
                           : 0;
            transpose_quad(w);
            if (inside && 32 * m + 8 * (lane & 3) < NBHD_HEAD_DIM_V)
                *(uint4 *)(to + 64 * m) = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}

NBHD_FN void clear(float *o)
{
#pragma unroll
    for (int i = 0; i < NBHD_HEAD_DIM_V / 2; i++)
        o[i] = 0;
}

/* What a consumer knows besides its scores, probabilities and output. */
struct consumer {
    const struct nbhd_params *p;
    const struct nbhd_boxes *b;
    struct tables *tab;
    unsigned q_tiles, k_tiles, v_tiles, mask_keys;
    int group;          /* uniform: else descriptors live in vector registers */
    int number;         /* the warp's first row */
    int stage, phase;   /* of the box whose probabilities are packed */
    int tile;           /* of the CTA, that of the box whose scores are computed */
    struct box box;     /* that box */
    int flags, how;     /* its flags, and how it is masked; uniform */
    struct rows rows;
    struct probes probes;
};

/* Of a thread's row i of 2: as in struct nbhd_boxes. */
NBHD_FN unsigned row_of(const struct consumer *c, int i) { return c->tab->row[c->number + (threadIdx.x >> 2 & 7) + 8 * i]; }

/* Issues the masked scores of the box in K's stage. */
NBHD_FN void issue_scores(struct consumer *c, float *s, int stage, int is_first)
{
    struct tables *tab = c->tab;
    int slot = c->tile & 1, q_stage = c->tile % NBHD_Q_STAGES;
    if (is_first)
        mbar_wait(smem_address(tab->q_full) + 8 * q_stage, c->tile / NBHD_Q_STAGES & 1);
    issue_qk(s, wgmma_advance(wgmma_k_major(c->q_tiles + c->group * 64 * 128), q_stage * (Q_BYTES >> 4)),
             c->k_tiles + stage * K_BYTES);
    c->box = tab->box[stage];
    c->flags = __shfl_sync(~0u, c->box.flags, 0);
    c->how = how_masked(c->flags, c->group);
    if (NBHD_MASK_STEPS && is_first)
        find_probes(&c->probes, &tab->tile[slot], windows_of(c->b, tab, slot), row_of(c, 0), row_of(c, 1),
                    threadIdx.x & 3);
    if (NBHD_MASK_STEPS && c->how & BY_COLUMNS)
        issue_mask(s, &c->probes, tab->origin[stage], c->mask_keys + slot * (c->b->shapes > 1 ? MASK_BYTES : 0));
}

/* After the wait for scores: K's stage is free, and after a tile's last Q's. */
NBHD_FN void free_scores(const struct consumer *c, int stage)
{
    if ((threadIdx.x & 31) != 0)
        return;
    mbar_arrive(smem_address(c->tab->empty[0]) + 8 * stage);
    if (c->flags & NBHD_SM90_LAST)
        mbar_arrive(smem_address(c->tab->q_empty) + 8 * (c->tile % NBHD_Q_STAGES));
}

/* Scores become probabilities. Returns whether a reference moved. */
NBHD_FN int finish_scores(struct consumer *c, float *s)
{
    int q = threadIdx.x & 3;
    if (NBHD_MASK_BITS && c->how & BY_BITS) {
        const int2 *window = windows_of(c->b, c->tab, c->tile & 1);
        apply_bits(s, row_bits(c->b, window, c->box, c->p->extra, row_of(c, 0), q),
                   row_bits(c->b, window, c->box, c->p->extra, row_of(c, 1), q));
    }
    if (NBHD_PAD)
        mask_padding(s, c->box.keys, q);
    return softmax_step(s, &c->rows, c->p->scale * 1.44269504f);
}

/* O is complete but for its scale: stores it. slot: of its tile. */
NBHD_FN void finish_output(struct consumer *c, float *o, int slot)
{
    read_scale(&c->rows, c->tab, c->number);
    scale_output(o, &c->rows);
    store_rows(c->p, c->b, c->tab, &c->tab->tile[slot], o, c->number);
}

/* A box's scores beside the products of the probabilities before, which are in first and rest; leaves its own in next_first
 * and rest. */
NBHD_FN void consume_box(struct consumer *c, float *s, float *o, unsigned *first, unsigned *next_first, unsigned *rest)
{
    struct tables *tab = c->tab;
    int next = c->stage + 1 == NBHD_STAGES ? 0 : c->stage + 1, next_phase = c->phase ^ (next == 0);
    int is_first = c->flags & NBHD_SM90_LAST; /* a new tile begins */
    c->tile += is_first != 0;
    mbar_wait(smem_address(tab->full[0]) + 8 * next, next_phase);
    issue_scores(c, s, next, is_first);
    mbar_wait(smem_address(tab->full[1]) + 8 * c->stage, c->phase);
    issue_pv(o, first, rest, c->v_tiles + c->stage * V_BYTES);
    wgmma_wait_1();
    NBHD_PIN_F(s, NBHD_N / 2);
    free_scores(c, next);
    if (is_first) {
        finish_rows(tab, &c->rows, c->p->scale, c->number);
        begin_rows(&c->rows);
    }
    int moved = finish_scores(c, s);
    pack_first(next_first, s);
    wgmma_wait_0_after(c->rows.sum[0] + c->rows.sum[1], smem_address(&tab->scratch));
    NBHD_PIN_F(o, NBHD_HEAD_DIM_V / 2);
    NBHD_PIN_R(first, EARLY);
    NBHD_PIN_R(rest, NBHD_N / 4 - EARLY);
    if ((threadIdx.x & 31) == 0)
        mbar_arrive(smem_address(tab->empty[1]) + 8 * c->stage);
    if (is_first) {
        finish_output(c, o, ~c->tile & 1);
        clear(o);
        __syncwarp();
        if ((threadIdx.x & 31) == 0)
            mbar_arrive(smem_address(tab->tile_empty) + 8 * (~c->tile & 1));
    } else if (moved) {
        scale_output(o, &c->rows);
    }
    pack_rest(rest, s);
    c->stage = next, c->phase = next_phase;
}

/* The last products of the last tile. */
NBHD_FN void consume_last(struct consumer *c, float *o, const unsigned *first, const unsigned *rest)
{
    mbar_wait(smem_address(c->tab->full[1]) + 8 * c->stage, c->phase);
    issue_pv(o, first, rest, c->v_tiles + c->stage * V_BYTES);
    finish_rows(c->tab, &c->rows, c->p->scale, c->number);
    wgmma_wait_0();
    NBHD_PIN_F(o, NBHD_HEAD_DIM_V / 2);
    finish_output(c, o, c->tile & 1);
}

/* One consumer warpgroup: all boxes of all tiles. */
NBHD_FN void consume(struct consumer *c)
{
    float s[NBHD_N / 2], o[NBHD_HEAD_DIM_V / 2];
    unsigned first[2][EARLY + !EARLY], rest[NBHD_N / 4 - EARLY + (EARLY == NBHD_N / 4)];
    clear(o);
    begin_rows(&c->rows);
    mbar_wait(smem_address(c->tab->tile_full), 0);
    mbar_wait(smem_address(c->tab->full[0]), 0);
    issue_scores(c, s, 0, 1);
    wgmma_wait_0();
    NBHD_PIN_F(s, NBHD_N / 2);
    free_scores(c, 0);
    finish_scores(c, s);
    pack_first(first[0], s);
    pack_rest(rest, s);
    for (;;) { /* written out for both sets: registers have no index */
        if (c->flags & NBHD_SM90_FINAL)
            return consume_last(c, o, first[0], rest);
        consume_box(c, s, o, first[0], first[1], rest);
        if (EARLY == 0)
            continue;
        if (c->flags & NBHD_SM90_FINAL)
            return consume_last(c, o, first[1], rest);
        consume_box(c, s, o, first[1], first[0], rest);
    }
}

/* ---- all ---- */

/* Zeros in the rows of Q past the tile's, which no copy fills: a warp moves its references together, so that what lies there
 * by chance would decide over bits of the rows beside it. */
NBHD_FN void clear_padding_rows(const struct nbhd_boxes *b, unsigned q_tiles)
{
    int pieces = (Q_ROWS - b->rows) * 8; /* of 16 bytes, in each chunk */
    if (pieces == 0)
        return;
    for (int c = 0; c < NBHD_Q_STAGES * QK_CHUNKS; c++)
        for (int i = threadIdx.x; i < pieces; i += THREADS)
            st_shared_v4(q_tiles + (c * Q_ROWS + b->rows) * 128 + 16 * i, make_uint4(0, 0, 0, 0));
    fence_proxy_async();
}

/* Barriers, the first tile's Q and place, and what all tiles share. */
NBHD_FN void begin_cta(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct maps *maps,
                       struct tables *tab, unsigned q_tiles, unsigned mask_keys, int work)
{
    struct place at = place_of(p, b, work);
    if (threadIdx.x == 64) {
        for (int i = 0; i < 2; i++) {
            mbar_init(smem_address(&tab->q_full[i]), 1);
            mbar_init(smem_address(&tab->q_empty[i]), 4 * NBHD_GROUPS); /* one lane of each consumer warp */
            mbar_init(smem_address(&tab->tile_full[i]), 1);
            mbar_init(smem_address(&tab->tile_empty[i]), 4 * NBHD_GROUPS);
            for (int stage = 0; stage < NBHD_STAGES; stage++) {
                mbar_init(smem_address(&tab->full[i][stage]), 1);
                mbar_init(smem_address(&tab->empty[i][stage]), 4 * NBHD_GROUPS);
                tab->filled[i][stage] = NBHD_N;
            }
        }
        mbar_fence_init();
        load_q_box(b, tab, &at, maps->q, q_tiles, 0);
    }
    clear_padding_rows(b, q_tiles);
    write_place(p, b, tab, 0, &at, threadIdx.x, THREADS);
    for (int i = threadIdx.x; i < Q_ROWS; i += THREADS)
        tab->row[i] = b->row[i];
    if (b->shapes == 1)
        write_mask_keys(&b->shape[0], mask_keys, threadIdx.x, THREADS);
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_fwd_sm90(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_boxes b,
                  const __grid_constant__ struct maps maps)
{
    extern __shared__ __align__(1024) char shared[];
    unsigned q_tiles = smem_address(shared), k_tiles = q_tiles + NBHD_Q_STAGES * Q_BYTES;
    unsigned v_tiles = k_tiles + NBHD_STAGES * K_BYTES, mask_keys = v_tiles + NBHD_STAGES * V_BYTES;
    struct tables *tab = (struct tables *)(shared + (mask_keys - q_tiles) + (b.shapes > 1 ? 2 : 1) * MASK_BYTES);
    struct share share = share_of_cta(&b);
    int work = next_work(&p, &b, &share);
    if (work < 0)
        return;
    begin_cta(&p, &b, &maps, tab, q_tiles, mask_keys, work);
    __syncthreads();

    if (threadIdx.x < 128) {
        NBHD_SET_REGISTERS_DOWN(NBHD_REGISTERS_LOAD);
        int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
        if (warp < 2)
            load_boxes(&p, &b, &maps, tab, warp, warp ? v_tiles : k_tiles);
        else if (warp == 2)
            prepare_tiles(&p, &b, tab, maps.q, q_tiles, mask_keys, share);
    } else {
        NBHD_SET_REGISTERS_UP(NBHD_REGISTERS_MATH);
        struct consumer c = {&p, &b, tab, q_tiles, k_tiles, v_tiles, mask_keys};
        c.group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
        c.number = c.group * 64 + (threadIdx.x / 32 & 3) * 16;
        c.stage = c.phase = c.tile = 0;
        consume(&c);
    }
}
