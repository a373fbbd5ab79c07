/* The sm80 backward, dK and dV. Host half: bwd_sm80.c. dQ and the statistics, which come first: bwd_sm80_dq.cu.
 *
 * One CTA holds a box of keys (K and V), streams the boxes of queries that see them (Q, dO and their statistics),
 * for every query head of the key/value head, and sums up
 *     S = K Q^T    P = exp(S - logsumexp)    dV += P dO    dP = V dO^T    dS = P (dP - delta)    dK += dS Q
 * (rows are keys: P and dS are the transposes of the forward's) in registers, so the sums have one order. The
 * gradients of extra keys are a launch of their own, in which they are an axis that every query sees whole.
 *
 *     per box, one barrier:   wait Q dO(j) | issue Q dO(j+1) | S | P | dV | dP | dS | dK
 *
 * Shared memory, and what a box goes through: device/grad_sm80.cuh. Registers of a thread: dK, dV, S and dP:
 * (head_dim + head_dim_v + 2 PART) / 32 x rows of a warp. Where that is too much, NBHD_DK and NBHD_DV make kernels that
 * compute only one of them. */
#if !defined(NBHD_DK) || !defined(NBHD_DV)
#error "NBHD_DK, NBHD_DV: 1 computes dK, dV"
#endif

#define NBHD_STREAMS 3
#define NBHD_INVERSE 1
#include "device/grad_sm80.cuh"

enum { QUERIES, GRADIENTS, STATISTICS }; /* streams */

/* The sums of a warp. */
struct sums {
#if NBHD_DK
    float dk[TILES * 2 * K_STEPS * 4];
#endif
#if NBHD_DV
    float dv[TILES * 2 * V_STEPS * 4];
#endif
};

/* ---- the grid of queries that see the CTA's keys ---- */

NBHD_FN const char *query_address(const struct nbhd_view *view, int batch, const int *x, int head)
{
    return view->data + batch * view->batch + x[0] * view->axis[0] + x[1] * view->axis[1] + x[2] * view->axis[2] +
           head * view->head;
}

/* Twelve threads: for each stream, steps on three axes and the base. */
NBHD_FN void set_grid(const struct nbhd_params *p, struct tables *tab, const char *stats, int head)
{
    const struct place *t = &tab->place;
    int i = (int)fresh_thread(), s = i >> 2, a = i & 3;
    if (i >= 12)
        return;
    const struct nbhd_view *view = s == QUERIES ? &p->q : &p->dout;
    if (a == 3) {
        tab->base[s] = s == STATISTICS ? stats + stats_offset(p, t->batch, head, t->group)
                                       : query_address(view, t->batch, t->group, head);
        return;
    }
    long long pitch = s == STATISTICS ? 8 : view->axis[a];
    for (int x = 2; x > a && s == STATISTICS; x--)
        pitch *= p->axis[x].length;
    tab->step[s][a] = p->axis[a].dilation * pitch;
    set_circle(p, tab, a, 0);
}

/* Fills the tables. Begins and ends with a barrier. */
NBHD_FN void enter_grid(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct memory *mem,
                        const char *stats, int head)
{
    struct tables *tab = mem->tab;
    __syncthreads();
    fill_windows(p, b, &tab->place, tab, 0);
    fill_columns(tab, b->column_box[0], b->column_box[1], b->column_box[2]);
    set_grid(p, tab, stats, head);
    finish_grid(b, tab);
#if NBHD_BIAS
    fill_biases(p, tab, mem->biases, head, p->bias != 0);
    __syncthreads();
#endif
}

NBHD_FN void load_stats(const struct tables *tab, char *to, const struct corner *corner, const int *at, int flags)
{
    unsigned last = last_inside(tab, at);
    const char *from = corner_address(tab, STATISTICS, corner);
    for (int i = (int)threadIdx.x; i < NBHD_N; i += THREADS)
        cp_async_8(shared_address(to + 8 * i),
                   from + tab->offset[STATISTICS][i] - column_back(tab, STATISTICS, corner, i),
                   !(flags & BOX_EDGE) || column_inside(tab, last, i) ? 8 : 0);
}

NBHD_FN void load_box(const struct nbhd_boxes_sm80 *b, const struct memory *mem, int turn, const int *at, int flags)
{
    const struct tables *tab = mem->tab;
    const struct corner corner = corner_of(tab, at);
    unsigned inside = columns_inside(tab, at, flags);
    load_columns(tab, QUERIES, mem->long_columns + turn * K_BYTES, K_PITCH, NBHD_HEAD_DIM, &corner, inside, b->wide);
    load_columns(tab, GRADIENTS, mem->wide_columns + turn * V_BYTES, V_PITCH, NBHD_HEAD_DIM_V, &corner, inside,
                 b->wide);
    load_stats(tab, mem->stats + turn * 8 * NBHD_N, &corner, at, flags);
}

NBHD_FN void step(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct memory *mem,
                  struct sums *sums, int turn, const int *at, int flags)
{
#pragma unroll 1
    for (int first = 0; first < NBHD_N && !(flags & BOX_SKIP); first += NBHD_PART) {
        const struct part c = {turn, first, flags & BOX_MASK, at};
        scores s;
        probabilities(s, p, b, mem, &c);
#if NBHD_DV
        multiply_nn(sums->dv, s, part_wide(mem, &c), V_PITCH, V_STEPS);
#endif
#if NBHD_DK
        scores ds;
        gradients(ds, s, mem, &c);
        multiply_nn(sums->dk, ds, part_long(mem, &c), K_PITCH, K_STEPS);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_bwd_sm80_dkdv(NBHD_LAUNCH, const __grid_constant__ struct nbhd_boxes_sm80 b, const char *stats)
{
    NBHD_ENTER
    extern __shared__ __align__(16) char shared[];
    const struct memory mem = lay_out(shared);
    struct place t = row_place(&p, &b, turn, p.kv_heads);
    if (is_past_end(&t))
        return;
    fill_rows(&b, &t, mem.tab);
    __syncthreads();
    load_rows(&p, &p.k, &t, mem.tab, mem.long_rows, K_PITCH, NBHD_HEAD_DIM, b.wide);
#if NBHD_DK
    load_rows(&p, &p.v, &t, mem.tab, mem.wide_rows, V_PITCH, NBHD_HEAD_DIM_V, b.wide);
#endif

    struct sums sums;
#if NBHD_DK
#pragma unroll
    for (int i = 0; i < TILES * 2 * K_STEPS * 4; i++)
        sums.dk[i] = 0;
#endif
#if NBHD_DV
#pragma unroll
    for (int i = 0; i < TILES * 2 * V_STEPS * 4; i++)
        sums.dv[i] = 0;
#endif
#pragma unroll 1
    for (int head = 0; head < b.group; head++) {
        enter_grid(&p, &b, &mem, stats + 8 * turn.before * p.heads, mem.tab->place.head * b.group + head);
        walk(&p, &b, &mem, &sums);
    }
#if NBHD_DK
    store_sums(&p, &p.dk, mem.tab, sums.dk, p.scale, mem.long_rows, K_PITCH, NBHD_HEAD_DIM, b.wide);
#endif
#if NBHD_DV
    store_sums(&p, &p.dv, mem.tab, sums.dv, 1, mem.wide_rows, V_PITCH, NBHD_HEAD_DIM_V, b.wide);
#endif
}
