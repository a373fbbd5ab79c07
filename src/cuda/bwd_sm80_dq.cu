/* The sm80 backward, dQ, and the statistics of queries for the kernels that follow, bwd_sm80.cu and bwd_sm80_dbias.cu.
 * Host half: bwd_sm80.c.
 *
 * As the forward: one CTA holds a box of queries (Q and dO), streams the boxes of K and V that they see, and sums up
 *     S = Q K^T    P = exp(S - logsumexp)    dP = dO V^T    dS = P (dP - delta)    dQ += dS K
 * in registers. Nothing is shared between CTAs, so the sums have one order. Extra keys are a second grid.
 *
 *     per box, one barrier:   wait K V(j) | issue K V(j+1) | S | P | dP | dS | dQ
 *
 * Shared memory, and what a box goes through: device/grad_sm80.cuh. Registers of a thread: dQ, S and dP:
 * (head_dim + 2 PART) / 32 x rows of a warp. */
#define NBHD_STREAMS 2
#define NBHD_INVERSE 0
#include "device/grad_sm80.cuh"

struct sums {
    float dq[TILES * 2 * K_STEPS * 4];
};

/* ---- statistics: LANES lanes a query ---- */

NBHD_FN float dot_piece(uint4 x, uint4 y)
{
    unsigned a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
#if NBHD_DTYPE == NBHD_F32
        sum += __uint_as_float(a[i]) * __uint_as_float(b[i]);
#elif NBHD_DTYPE == NBHD_F16
        sum += cvt_f32_f16((unsigned short)a[i]) * cvt_f32_f16((unsigned short)b[i]) +
               cvt_f32_f16((unsigned short)(a[i] >> 16)) * cvt_f32_f16((unsigned short)(b[i] >> 16));
#else
        sum += cvt_f32_bf16((unsigned short)a[i]) * cvt_f32_bf16((unsigned short)b[i]) +
               cvt_f32_bf16((unsigned short)(a[i] >> 16)) * cvt_f32_bf16((unsigned short)(b[i] >> 16));
#endif
    return sum;
}

/* The part of a query's O dO that a lane sums. */
NBHD_FN float dot_row(const struct nbhd_params *p, const struct place *t, unsigned row, int wide)
{
    const char *o = row_address(p, &p->o, t, row), *dout = row_address(p, &p->dout, t, row);
    float sum = 0;
    for (int round = 0; round < ROUNDS; round++) {
        int at = 16 * ((int)threadIdx.x % LANES + round * LANES);
        int elements = nbhd_min(PIECE, NBHD_HEAD_DIM_V - at / ELEMENT);
        if (wide && elements > 0)
            sum += dot_piece(*(const uint4 *)(o + at), *(const uint4 *)(dout + at));
        else
            sum += dot_piece(gather_piece(o + at, elements), gather_piece(dout + at, elements));
    }
    return sum;
}

/* Logsumexp and delta of the tile's queries, into shared memory and the workspace. */
NBHD_FN void find_stats(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct memory *mem,
                        char *stats)
{
    const struct place *t = &mem->tab->place;
#pragma unroll 1
    for (int first = 0; first < NBHD_ROWS; first += ROW_STEP) {
        int r = first + (int)threadIdx.x / LANES;
        unsigned row = r < NBHD_ROWS ? mem->tab->row[r] : NBHD_ROW_ABSENT;
        int there = !(row & NBHD_ROW_ABSENT);
        float2 both = make_float2(0, there ? dot_row(p, t, row, b->wide) : 0);
#pragma unroll
        for (int i = 1; i < LANES; i *= 2)
            both.y += __shfl_xor_sync(~0u, both.y, i);
        if (r >= NBHD_ROWS || threadIdx.x % LANES)
            continue;
        if (there) {
            both.x = *(const float *)row_address(p, &p->lse, t, row) * 1.44269504f;
            if (p->dlse.data)
                both.y -= *(const float *)row_address(p, &p->dlse, t, row);
            *(float2 *)(stats + row_stats_offset(p, t, row)) = both;
        }
        *(float2 *)(mem->stats + 8 * r) = both;
    }
}

NBHD_FN void step(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct memory *mem,
                  struct sums *sums, int turn, const int *at, int flags)
{
#pragma unroll 1
    for (int first = 0; first < NBHD_N && !(flags & BOX_SKIP); first += NBHD_PART) {
        const struct part c = {turn, first, flags & BOX_MASK, at};
        scores s, ds;
        probabilities(s, p, b, mem, &c);
        gradients(ds, s, mem, &c);
        multiply_nn(sums->dq, ds, part_long(mem, &c), K_PITCH, K_STEPS);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_bwd_sm80_dq(NBHD_LAUNCH, const __grid_constant__ struct nbhd_boxes_sm80 b, char *stats)
{
    NBHD_ENTER
    extern __shared__ __align__(16) char shared[];
    const struct memory mem = lay_out(shared);
    struct place t = row_place(&p, &b, turn, p.heads);
    if (is_past_end(&t))
        return;
    load_queries(&p, &b, &t, &mem);
    find_stats(&p, &b, &mem, stats + 8 * turn.before * p.heads);

    struct sums sums;
#pragma unroll
    for (int i = 0; i < TILES * 2 * K_STEPS * 4; i++)
        sums.dq[i] = 0;
#pragma unroll 1
    for (int extra = 0; extra <= (p.extra > 0); extra++) {
        enter_grid(&p, &b, mem.tab, extra);
#if NBHD_BIAS
        fill_biases(&p, mem.tab, mem.biases, mem.tab->place.head, !extra);
        __syncthreads();
#endif
        walk(&p, &b, &mem, &sums);
    }
    store_sums(&p, &p.dq, mem.tab, sums.dq, p.scale, mem.long_rows, K_PITCH, NBHD_HEAD_DIM, b.wide);
}
