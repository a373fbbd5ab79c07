/* Forward neighborhood attention on Hopper: wgmma and TMA. Host half: fwd_sm90.c; box shapes: sm90_plan.c.
 *
 * A query tile is a box of tokens x the packed heads of one key/value head = 64 rows per consumer warpgroup. It visits
 * the union of its queries' windows in boxes of N keys, starting at the union's own corner. TMA reads all boxes
 * straight from [batch, axes, heads, head_dim]; tokens outside the tensor arrive as zeros, and the window masks them. A
 * row of shared memory is one token of a 64-column chunk (128 bytes, 128-byte swizzle), the row's number its row-major
 * place in the box: the layout wgmma reads, K k-major and V mn-major.
 *
 * A CTA computes several tiles (struct nbhd_boxes), and all its roles run through them without a pause:
 *
 *     warpgroup 0      warp 0: K boxes, and what each box needs of a mask            NBHD_REGISTERS_LOAD
 *                      warp 1: V boxes
 *                      warp 2: the tables of the next tiles, and their Q
 *     warpgroups 1..   64 rows each: S = Q K^T, softmax, O += P V                    NBHD_REGISTERS_MATH
 *
 *     shared memory, from a multiple of 1024:
 *     | Q: stages x chunks x 64 G rows x 128 | K: stages x chunks x N x 128 | V: the same | mask keys | struct tables |
 *
 * A consumer's step j, with two products in flight while the softmax runs:
 *     issue S(j) = Q K(j)^T + mask | issue O += P(j-1) V(j-1) | wait S | max, exp | wait O | exp, pack P(j)
 * Probabilities are relative to a reference that moves to the row's maximum only when a score is 2^8 times above it,
 * which is rare after a tile's first boxes; only then is O scaled. If j is the first box of a tile, O is then complete
 * for the tile before: it is normalised, and stored from registers. The loop is written once, as machine code takes
 * long to compile: step 0 has a P(-1) and V(-1) too, which are whatever lies there, and begins no tile's O.
 * Step j takes K and V from the same stage: V's ring is one box ahead, its box -1 is there from the start.
 *
 * In device/: tiles_sm90.cuh, which tiles a CTA takes and what all roles know of one; setup_sm90.cuh, how a CTA begins;
 * loaders_sm90.cuh, warpgroup 0; mask_sm90.cuh, softmax_sm90.cuh, output_sm90.cuh, parts of a consumer's step.
 *
 * Only boxes that reach past what all rows of a warpgroup see are masked at all. The reference starts at -1e30: what a
 * row sums over boxes that are all masked, its first seen key scales by 0. NaN or infinite keys reach all queries of
 * the tiles that load them, not only those that see them.
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
#ifndef NBHD_Q_STAGES
#error "NBHD_Q_STAGES: 2 loads a tile's Q while the tile before still needs its own, else 1"
#endif
#ifndef NBHD_TILES
#error "NBHD_TILES: how many tiles have their tables in shared memory, 2 or 4: so many less one are prepared ahead"
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
#ifndef NBHD_SHAPES
#error "NBHD_SHAPES: shapes of key boxes, 1 to NBHD_SM90_SHAPES"
#endif
#if !defined(NBHD_EXTRA) || !defined(NBHD_DILATED)
#error "NBHD_EXTRA, NBHD_DILATED: 1 where there are extra keys; where an axis is dilated"
#endif
#ifndef NBHD_MANY
#define NBHD_MANY 0 /* 1: sequences of a ragged batch, struct nbhd_boxes_many */
#endif
#if !defined(NBHD_REGISTERS_LOAD) || !defined(NBHD_REGISTERS_MATH)
#error "NBHD_REGISTERS_LOAD, NBHD_REGISTERS_MATH: per thread of the loading and of the consumer warpgroups"
#endif

#include "nbhd_params.h"
#include "device/boxes_sm90.cuh"
#include "device/ptx.cuh"
#include "device/scores_sm90.cuh"
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
#include "device/loaders_sm90.cuh"
#include "device/softmax_sm90.cuh"
#include "device/output_sm90.cuh"
#include "device/setup_sm90.cuh"

/* ---- the consumer warpgroups ---- */

/* Probabilities as the A operands of P V. */
NBHD_FN void pack_probabilities(unsigned *p, const float *s)
{
#pragma unroll
    for (int i = 0; i < NBHD_N / 4; i++)
        p[i] = pack(s[2 * i], s[2 * i + 1]);
}

NBHD_FN void scale_output(float *o, const struct rows *r)
{
#pragma unroll
    for (int i = 0; i < NBHD_HEAD_DIM_V / 2; i++)
        o[i] *= r->scale[i >> 1 & 1];
}

/* Issues S = Q K^T. q, k: lower words of the tiles' descriptors. */
NBHD_FN void issue_qk(float *s, unsigned q, unsigned k)
{
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < QK_STEPS; i++)
        NBHD_QK(s, wgmma_descriptor(q + i / 4 * (Q_ROWS * 8) + i % 4 * 2),
                wgmma_descriptor(k + i / 4 * (NBHD_N * 8) + i % 4 * 2), i > 0);
    wgmma_commit();
}

/* Issues O += P V, or O = P V where keep is 0. v: the lower word of the tile's descriptor. */
NBHD_FN void issue_pv(float *o, const unsigned *p, unsigned v, int keep)
{
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++)
        NBHD_PV(o, p + 4 * i, wgmma_descriptor(v + 128 * i), i > 0 || keep);
    wgmma_commit();
}

/* So many of a box's blocks of 8 keys become probabilities before the wait for O, the others after it, beside the
 * packing, which would otherwise stand alone between that wait and the next products. At head_dim 64 two warpgroups
 * keep the exponentials' pipe busy: there they lose more by waiting early. */
#define BEFORE (NBHD_GROUPS == 1 || NBHD_HEAD_DIM + NBHD_HEAD_DIM_V >= 256 ? NBHD_N / 16 : NBHD_N / 8)

/* The barriers of a stage, from K's `full` on, as they lie in struct tables. */
#define FULL_V (8 * NBHD_STAGES)
#define EMPTY_K (16 * NBHD_STAGES)
#define EMPTY_V (24 * NBHD_STAGES)

/* What a consumer knows besides its scores, probabilities and output. */
struct consumer {
    const struct nbhd_params *p;
    const struct nbhd_boxes *b;
    struct tables *tab;
    unsigned q_tiles, k_tiles, v_tiles, mask_keys;
    int group;            /* uniform: else descriptors live in vector registers */
    int number;           /* the warp's first row */
    int stage, phase;     /* of this step's K and V */
    unsigned full;        /* their stage's barriers: K's `full`; the others are FULL_V, EMPTY_K, EMPTY_V further */
    unsigned q, k, v;     /* lower words of the descriptors that this step's products begin with */
    int k_ready, v_ready; /* whether K and V were there when the step before ended */
    int keep;             /* 0: the probabilities are of a tile's first box */
    unsigned tile;        /* of the CTA, that of the box whose scores are computed; before the first -1 */
    struct box box;       /* that box */
    int flags, how;       /* its flags, and how it is masked; uniform */
    struct rows rows;
    struct probes probes;
};

/* Of a thread's row i of 2: as in struct nbhd_boxes. */
NBHD_FN unsigned row_of(const struct consumer *c, int i)
{
    int first = c->number + (threadIdx.x >> 2 & 7);
    NBHD_PIN_R(&first, 1); /* else the rows' places have registers all along */
    return c->tab->row[first + 8 * i];
}

/* Issues the masked scores of the box in K's stage. */
NBHD_FN void issue_scores(struct consumer *c, float *s, int is_first)
{
    struct tables *tab = c->tab;
    int slot = c->tile % NBHD_TILES, q_stage = c->tile % NBHD_Q_STAGES, stage = c->stage;
    if (!c->k_ready)
        mbar_wait(c->full, c->phase);
    if (is_first)
        mbar_wait(smem_address(tab->q_full) + 8 * q_stage, c->tile / NBHD_Q_STAGES & 1);
    issue_qk(s, c->q, c->k);
    c->box = tab->box[stage];
    c->flags = __shfl_sync(~0u, c->box.flags, 0);
    c->how = how_masked(c->flags, c->group);
    if (NBHD_MASK_STEPS && is_first)
        find_probes(&c->probes, &tab->tile[slot], windows_of(c->b, tab, slot), row_of(c, 0), row_of(c, 1),
                    threadIdx.x & 3);
    if (NBHD_MASK_STEPS && c->how & BY_COLUMNS)
        issue_mask(s, &c->probes, tab->origin[stage], c->mask_keys + slot % MASK_SLOTS * MASK_BYTES, c->how);
}

/* After the wait for scores: K's stage is free, and after a tile's last Q's. */
NBHD_FN void free_scores(const struct consumer *c)
{
    if ((threadIdx.x & 31) != 0)
        return;
    mbar_arrive(c->full + EMPTY_K);
    if (c->flags & NBHD_SM90_LAST)
        mbar_arrive(smem_address(c->tab->q_empty) + 8 * (c->tile % NBHD_Q_STAGES));
}

/* Masks that are no columns, and references where they must move. Returns whether one did. scale_log2: of scores. */
NBHD_FN int finish_scores(struct consumer *c, float *s, float scale_log2)
{
    int q = threadIdx.x & 3;
    if (NBHD_MASK_BITS && c->how & BY_BITS) {
        const int2 *window = windows_of(c->b, c->tab, c->tile % NBHD_TILES);
        apply_bits(s, row_bits(c->b, window, c->box, c->p->extra, row_of(c, 0), q),
                   row_bits(c->b, window, c->box, c->p->extra, row_of(c, 1), q));
    }
    if (NBHD_PAD)
        mask_padding(s, c->box.keys, q);
    int moved = must_move(s, &c->rows, scale_log2);
    if (moved)
        move_references(s, &c->rows, scale_log2);
    return moved;
}

/* Stores O of tile `tile` of the CTA, which is normalised. */
NBHD_FN void store_output(const struct consumer *c, const float *o, unsigned tile)
{
    store_rows(c->p, c->b, c->tab, &c->tab->tile[tile % NBHD_TILES], o, c->number);
}

/* The same, of a tile that is not the last: its tables are free then. */
NBHD_FN void end_tile(const struct consumer *c, const float *o, unsigned tile)
{
    store_output(c, o, tile);
    __syncwarp();
    if ((threadIdx.x & 31) == 0)
        mbar_arrive(smem_address(c->tab->tile_empty) + 8 * (tile % NBHD_TILES));
}

/* All that the next step's products begin with. It is found before the wait for O, after which nothing of it should be
 * left to do, and pinned, else NVVM works it out again there. */
NBHD_FN void find_next(struct consumer *c)
{
    unsigned tile = c->tile + (c->flags & NBHD_SM90_LAST ? 1 : 0);
    c->stage = c->stage + 1 == NBHD_STAGES ? 0 : c->stage + 1;
    c->phase ^= c->stage == 0;
    c->full = smem_address(c->tab->full[0]) + 8 * c->stage;
    c->q = wgmma_k_low(c->q_tiles + tile % NBHD_Q_STAGES * Q_BYTES + c->group * 64 * 128);
    c->k = wgmma_k_low(c->k_tiles + c->stage * K_BYTES);
    c->v = wgmma_mn_low(c->v_tiles + c->stage * V_BYTES, NBHD_N);
    NBHD_PIN_R(&c->full, 1);
    c->k_ready = mbar_test_wait(c->full, c->phase);
    c->v_ready = mbar_test_wait(c->full + FULL_V, c->phase);
    NBHD_PIN_R(&c->stage, 1);
    NBHD_PIN_R(&c->phase, 1);
    NBHD_PIN_R(&c->q, 1);
    NBHD_PIN_R(&c->k, 1);
    NBHD_PIN_R(&c->v, 1);
}

/* Issues the products of the probabilities of the box before. */
NBHD_FN void issue_output(const struct consumer *c, float *o, const unsigned *p)
{
    if (!c->v_ready)
        mbar_wait(c->full + FULL_V, c->phase);
    issue_pv(o, p, c->v, c->keep);
}

/* A step: a box's scores beside the products of the probabilities before, which are in p; leaves its own there. */
NBHD_FN void consume_box(struct consumer *c, float *s, float *o, unsigned *p)
{
    struct tables *tab = c->tab;
    int is_first = c->flags & NBHD_SM90_LAST; /* a new tile begins */
    unsigned v_empty = c->full + EMPTY_V;
    c->tile += is_first != 0;
    issue_scores(c, s, is_first);
    issue_output(c, o, p);
    wgmma_wait_1();
    NBHD_PIN_F(s, NBHD_N / 2);
    free_scores(c);
    if (is_first) {
        finish_rows(tab, &c->rows, c->p->scale, c->number);
        begin_rows(&c->rows);
    }
    float scale_log2 = c->p->scale * 1.44269504f, sum[2] = {0, 0};
    int moved = finish_scores(c, s, scale_log2);
    exponentials(s, &c->rows, scale_log2, sum, 0, BEFORE);
    find_next(c);
    wgmma_wait_0_after(sum[0] + sum[1] + c->rows.sum[0], smem_address(&tab->scratch));
    NBHD_PIN_F(o, NBHD_HEAD_DIM_V / 2);
    NBHD_PIN_R(p, NBHD_N / 4);
    if ((threadIdx.x & 31) == 0)
        mbar_arrive(v_empty);
    exponentials(s, &c->rows, scale_log2, sum, BEFORE, NBHD_N / 8);
    c->rows.sum[0] += sum[0];
    c->rows.sum[1] += sum[1];
    pack_probabilities(p, s);
    if (is_first) /* O of the tile before is normalised, and nothing else */
        read_scale(&c->rows, tab, c->number);
    if (is_first || moved)
        scale_output(o, &c->rows);
    if (is_first && c->tile > 0)
        end_tile(c, o, c->tile - 1);
    c->keep = !is_first;
}

/* One consumer warpgroup: all boxes of all tiles. What step 0 makes of whatever lies in p, o and V's first stage,
 * perhaps NaN, is not kept. */
NBHD_FN void consume(struct consumer *c)
{
    float s[NBHD_N / 2], o[NBHD_HEAD_DIM_V / 2];
    unsigned p[NBHD_N / 4];
    NBHD_ANY_F(o, NBHD_HEAD_DIM_V / 2);
    NBHD_ANY_R(p, NBHD_N / 4);
    begin_rows(&c->rows);
    c->flags = NBHD_SM90_LAST, c->keep = 0;
    c->tile = ~0u, c->stage = NBHD_STAGES - 1, c->phase = 1; /* a step before the first */
    find_next(c);
    do
        consume_box(c, s, o, p);
    while (!(c->flags & NBHD_SM90_FINAL));
    issue_output(c, o, p);
    wgmma_wait_0();
    NBHD_PIN_F(o, NBHD_HEAD_DIM_V / 2);
    finish_rows(c->tab, &c->rows, c->p->scale, c->number);
    read_scale(&c->rows, c->tab, c->number);
    scale_output(o, &c->rows);
    store_output(c, o, c->tile);
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_fwd_sm90(const __grid_constant__ struct nbhd_params p, const __grid_constant__ boxes_argument boxes,
                  const __grid_constant__ struct maps maps)
{
    const struct nbhd_boxes *b = (const struct nbhd_boxes *)&boxes;
    extern __shared__ __align__(1024) char shared[];
    unsigned q_tiles = smem_address(shared), k_tiles = q_tiles + NBHD_Q_STAGES * Q_BYTES;
    unsigned v_tiles = k_tiles + NBHD_STAGES * K_BYTES, mask_keys = v_tiles + NBHD_STAGES * V_BYTES;
    struct tables *tab = (struct tables *)(shared + (mask_keys - q_tiles) + MASK_SLOTS * MASK_BYTES);
    if (!begin_cta(&p, b, &maps, tab, q_tiles, mask_keys))
        return;

    if (threadIdx.x < 128) {
        NBHD_SET_REGISTERS_DOWN(NBHD_REGISTERS_LOAD);
        int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
        if (warp < 2)
            load_boxes(&p, b, &maps, tab, warp, warp ? v_tiles : k_tiles);
        else if (warp == 2)
            prepare_tiles(&p, b, tab, maps.q, q_tiles, mask_keys);
    } else {
        NBHD_SET_REGISTERS_UP(NBHD_REGISTERS_MATH);
        struct consumer c = {&p, b, tab, q_tiles, k_tiles, v_tiles, mask_keys};
        c.group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
        c.number = c.group * 64 + (threadIdx.x / 32 & 3) * 16;
        consume(&c);
    }
}
