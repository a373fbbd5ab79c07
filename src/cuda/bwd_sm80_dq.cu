/* The sm80 backward, dQ. Host half: bwd_sm80.c. The other kernel, and what goes before both: bwd_sm80.cu.
 *
 * As the forward: one CTA holds a box of queries (Q and dO), streams the boxes of K and V that they see, and sums up
 *     S = Q K^T    P = exp(S - logsumexp)    dP = dO V^T    dS = P (dP - delta)    dQ += dS K
 * in registers. Nothing is shared between CTAs, so the sums have one order. Extra keys are a second grid.
 *
 *     per box, one barrier:   wait K V(j) | issue K V(j+1) | S | P | dP | dS | dQ
 *     shared memory:          | Q, later dQ: ROWS x pitch | dO | K: 2 x N x pitch | V | statistics | struct tables |
 *
 * Registers of a thread: dQ, S and dP: (head_dim + 2 PART) / 32 x rows of a warp. */
#if !defined(NBHD_HEAD_DIM) || !defined(NBHD_HEAD_DIM_V) || !defined(NBHD_BF16)
#error "NBHD_HEAD_DIM, NBHD_HEAD_DIM_V: 1 to 256; NBHD_BF16: 1 for bfloat16, 0 for float16"
#endif
#if !defined(NBHD_ROWS) || !defined(NBHD_WARPS) || !defined(NBHD_N) || !defined(NBHD_CTAS)
#error "NBHD_ROWS, NBHD_WARPS: rows of a tile, 16 or 32 a warp; NBHD_N: keys of a box; NBHD_CTAS: per multiprocessor"
#endif
#ifndef NBHD_PART
#error "NBHD_PART: keys of a box that are computed at once, a divisor of NBHD_N"
#endif

#define NBHD_STREAMS 2
#define NBHD_INVERSE 0
#define NBHD_PIECES  (((NBHD_HEAD_DIM > NBHD_HEAD_DIM_V ? NBHD_HEAD_DIM : NBHD_HEAD_DIM_V) + 15) / 16 * 2)
#include "device/grad_sm80.cuh"

#define K_PITCH PITCH(NBHD_HEAD_DIM)
#define V_PITCH PITCH(NBHD_HEAD_DIM_V)
#define K_STEPS ((NBHD_HEAD_DIM + 15) / 16)
#define V_STEPS ((NBHD_HEAD_DIM_V + 15) / 16)
#define K_BYTES (NBHD_N * K_PITCH)
#define V_BYTES (NBHD_N * V_PITCH)

struct memory {
    char *q, *dout, *k, *v;
    float2 *stats; /* of each row: logsumexp, delta */
    struct tables *tab;
};

NBHD_FN void load_stats(const struct nbhd_params *p, const struct memory *mem, const char *stats)
{
    const struct place *t = &mem->tab->place;
    for (int r = (int)threadIdx.x; r < NBHD_ROWS; r += THREADS) {
        unsigned row = mem->tab->row[r];
        int x[3];
#pragma unroll
        for (int a = 0; a < 3; a++)
            x[a] = (t->origin[a] + byte_of(row, a)) * p->axis[a].dilation + t->group[a];
        mem->stats[r] = make_float2(0, 0);
        if (!(row & NBHD_ROW_ABSENT))
            mem->stats[r] = *(const float2 *)(stats + stats_offset(p, t->batch, t->head + byte_of(row, 3), x));
    }
}

/* Adds what columns first, first + 1 ... first + PART - 1 of a box contribute to dQ. */
NBHD_FN void step(const struct memory *mem, const struct nbhd_boxes_sm80 *b, float *dq, int turn, int first, int masked)
{
    const char *k = mem->k + turn * K_BYTES + first * K_PITCH, *v = mem->v + turn * V_BYTES + first * V_PITCH;
    scores s, ds;
    multiply_nt(s, mem->q, K_PITCH, k, K_PITCH, K_STEPS);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float lse = mem->stats[row_number(m, i / 2)].x;
#pragma unroll
            for (int j = 0; j < NBHD_PART / 8; j++)
                s[m][j][i] = probability(s[m][j][i], b->scale_log2, lse);
        }
    if (masked)
        apply_mask(s, 0, b, mem->tab, turn, first);
    multiply_nt(ds, mem->dout, V_PITCH, v, V_PITCH, V_STEPS);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float delta = mem->stats[row_number(m, i / 2)].y;
#pragma unroll
            for (int j = 0; j < NBHD_PART / 8; j++)
                ds[m][j][i] = s[m][j][i] * (ds[m][j][i] - delta);
        }
    multiply_nn(dq, ds, k, K_PITCH, K_STEPS);
}

/* All boxes of a grid. A round loads one and computes the one before. */
NBHD_FN void walk(const struct nbhd_boxes_sm80 *b, const struct memory *mem, float *dq)
{
    struct tables *tab = mem->tab;
    int at[3] = {tab->begin[0], tab->begin[1], tab->begin[2]};
    int turn = 0, now = BOX_SKIP, more = 1;
    for (;;) {
        int flags = BOX_SKIP;
        cp_async_wait_all();
        __syncthreads(); /* the box is there, and no warp is at the one before */
        if (more) {
            flags = box_flags(tab, at);
            unsigned inside = columns_inside(tab, at, flags);
            load_columns(tab, 0, mem->k + !turn * K_BYTES, K_PITCH, NBHD_HEAD_DIM, at, inside, b->wide);
            load_columns(tab, 1, mem->v + !turn * V_BYTES, V_PITCH, NBHD_HEAD_DIM_V, at, inside, b->wide);
            if (flags & BOX_WORDS)
                fill_words(b, tab, at, !turn);
        }
#pragma unroll 1
        for (int first = 0; first < NBHD_N && !(now & BOX_SKIP); first += NBHD_PART)
            step(mem, b, dq, turn, first, now & BOX_MASK);
        if (!more)
            break;
        more = next_box(tab, at);
        now = flags;
        turn = !turn;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_bwd_sm80_dq(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_boxes_sm80 b,
                     const char *stats)
{
    extern __shared__ __align__(16) char shared[];
    struct memory mem;
    mem.q = shared;
    mem.dout = mem.q + NBHD_ROWS * K_PITCH;
    mem.k = mem.dout + NBHD_ROWS * V_PITCH;
    mem.v = mem.k + 2 * K_BYTES;
    mem.stats = (float2 *)(mem.v + 2 * V_BYTES);
    mem.tab = (struct tables *)(mem.stats + NBHD_ROWS);
    struct place t = row_place(&p, &b, p.heads);
    if (t.origin[0] >= t.size[0] || t.origin[1] >= t.size[1] || t.origin[2] >= t.size[2])
        return; /* a dilation group with fewer elements than the first */
    fill_rows(&b, &t, mem.tab);
    __syncthreads();
    load_rows(&p, &p.q, &t, mem.tab, shared_address(mem.q), K_PITCH, NBHD_HEAD_DIM, b.wide);
    load_rows(&p, &p.dout, &t, mem.tab, shared_address(mem.dout), V_PITCH, NBHD_HEAD_DIM_V, b.wide);

    float dq[TILES * 2 * K_STEPS * 4], factor[TILES][2];
    load_stats(&p, &mem, stats);
#pragma unroll
    for (int i = 0; i < TILES * 2 * K_STEPS * 4; i++)
        dq[i] = 0;
#pragma unroll 1
    for (int extra = 0; extra <= (p.extra > 0); extra++) {
        enter_grid(&p, &b, mem.tab, extra);
        walk(&b, &mem, dq);
    }
#pragma unroll
    for (int m = 0; m < TILES; m++)
        factor[m][0] = factor[m][1] = p.scale;
    __syncwarp(); /* the warp's rows of Q are no longer needed */
    stage_rows(dq, factor, mem.q, K_PITCH, K_STEPS);
    __syncwarp();
    store_warp_rows(&p, &p.dq, &mem.tab->place, mem.tab, mem.q + (fresh_thread() >> 5) * (WARP_ROWS * K_PITCH), K_PITCH,
                    NBHD_HEAD_DIM, b.wide);
}
