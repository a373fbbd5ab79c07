/* The sm80 backward, dQ. Host half: bwd_sm80.c. The other kernels, and what goes before: bwd_sm80.cu,
 * bwd_sm80_dbias.cu.
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
    nbhd_bwd_sm80_dq(NBHD_LAUNCH, const __grid_constant__ struct nbhd_boxes_sm80 b, const char *stats)
{
    NBHD_ENTER
    extern __shared__ __align__(16) char shared[];
    const struct memory mem = lay_out(shared);
    struct place t = row_place(&p, &b, turn, p.heads);
    if (is_past_end(&t))
        return;
    load_queries(&p, &b, &t, &mem, stats + 8 * turn.before * p.heads);

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
