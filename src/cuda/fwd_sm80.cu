/* Forward neighborhood attention with mma.sync and cp.async: Ampere and every GPU after it. Host half: fwd_sm80.c.
 *
 * One CTA computes one query tile: a box of tokens times the packed heads of one key/value head. Its warps own 16 or 32
 * rows each and hold their part of O; all of them load the boxes of K and V, then compute (stream_sm80.cuh says how
 * boxes are walked, masked and skipped). Extra keys are a second grid: one axis, seen whole.
 *
 *     NBHD_STAGES 2, one barrier a box:      wait K V(j) | issue K V(j+1) | S = Q K^T | softmax | O += P V
 *     NBHD_STAGES 1, two, half the memory:   wait K(j) | issue V(j) | S | wait V(j) | issue K(j+1) | softmax | O += P V
 *
 *     shared memory:  | Q, later O: ROWS x pitch | K: stages x N x pitch | V: the same | struct tables |
 *
 * A row's maximum is only raised when a score exceeds it by 2^8 (then O and the sum are scaled): until then
 * probabilities are at most 2^8, which neither bf16 nor f16 nor the float sums mind. Masked scores are -inf, and the
 * maximum starts at -1e30: rows whose first boxes are masked wholly need no test.
 *
 * Registers of a thread: O head_dim_v / 16 x rows of a warp, S N / 16 x rows of a warp: 128 + 64 at head_dim 128
 * with 32 rows and N 64. 32 rows a warp read K and V from shared memory half as often as 16. */
#if !defined(NBHD_HEAD_DIM) || !defined(NBHD_HEAD_DIM_V)
#error "NBHD_HEAD_DIM, NBHD_HEAD_DIM_V: of q and k, of v and o; 1 to 256"
#endif
#ifndef NBHD_DTYPE
#error "NBHD_DTYPE: NBHD_BF16, NBHD_F16, or NBHD_F32, multiplied as TF32"
#endif
#if !defined(NBHD_ROWS) || !defined(NBHD_WARPS)
#error "NBHD_ROWS, NBHD_WARPS: rows of a tile; 16 or 32 for each warp"
#endif
#ifndef NBHD_N
#error "NBHD_N: keys of a box, a multiple of 16 up to 128"
#endif
#if !defined(NBHD_STAGES) || !defined(NBHD_CTAS)
#error "NBHD_STAGES: 1 or 2; NBHD_CTAS: CTAs per multiprocessor"
#endif
#if !defined(NBHD_BIAS) || !defined(NBHD_SCALED)
#error \
    "NBHD_BIAS: 1 adds the table of biases; NBHD_SCALED: 1 scales scores before the maximum (bias, or a negative scale)"
#endif

#define NBHD_STREAMS 2
#define NBHD_INVERSE 0
#include "device/bias_sm80.cuh"

#define K_PITCH PITCH(NBHD_HEAD_DIM)
#define V_PITCH PITCH(NBHD_HEAD_DIM_V)
#define Q_PITCH PITCH(WIDEST) /* also O's */
#define K_STEPS (PADDED(NBHD_HEAD_DIM) / 16)
#define V_STEPS (PADDED(NBHD_HEAD_DIM_V) / 16)
#define K_BYTES (NBHD_N * K_PITCH)
#define V_BYTES (NBHD_N * V_PITCH)

/* Shared memory, and the calling lane's addresses in it. */
struct memory {
    char *q, *k, *v;
    struct tables *tab;
    struct biases *biases;
};

/* A thread's rows: their running maxima (of raw scores, unless NBHD_SCALED) and its part of their running sums. */
struct rows {
    float max[TILES][2], sum[TILES][2];
};

typedef float output[TILES][2 * V_STEPS][4];

#define NO_KEYS  -1e30f
#define RAISE_AT 8.0f

/* Raises the maxima of all rows of the warp to what they have seen, high of it in this box. */
NBHD_FN void raise_maxima(struct rows *r, output o, float high[TILES][2], float scale)
{
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x = high[m][i];
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
            x = fmaxf(x, r->max[m][i]);
            float factor = ex2_approx_ftz_f32((r->max[m][i] - x) * scale);
            r->max[m][i] = x;
            r->sum[m][i] *= factor;
#pragma unroll
            for (int d = 0; d < 2 * V_STEPS; d++) {
                o[m][d][2 * i] *= factor;
                o[m][d][2 * i + 1] *= factor;
            }
        }
}

/* Scores become probabilities relative to the maximum. scale: of scores, to powers of 2. */
NBHD_FN void softmax_step(scores s, struct rows *r, output o, float scale)
{
    float high[TILES][2];
    int raise = 0;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            high[m][i] = fmaxf(s[m][0][2 * i], s[m][0][2 * i + 1]);
#pragma unroll
            for (int j = 1; j < NBHD_N / 8; j++)
                high[m][i] = fmaxf(high[m][i], fmaxf(s[m][j][2 * i], s[m][j][2 * i + 1]));
            raise |= (high[m][i] - r->max[m][i]) * scale > RAISE_AT;
        }
    if (__any_sync(~0u, raise))
        raise_maxima(r, o, high, scale);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float offset = r->max[m][i] * scale, sum = 0;
#pragma unroll
            for (int e = 0; e < NBHD_N / 4; e++) {
                float *x = &s[m][e / 2][2 * i + e % 2];
                *x = ex2_approx_ftz_f32(fmaf(*x, scale, -offset));
                sum += *x;
            }
            r->sum[m][i] += sum;
        }
}

/* Normalises O and writes it, and the logsumexp. Q's place is the warp's own by now. */
NBHD_FN void finish(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct place *t,
                    const struct memory *mem, struct rows *r, output o)
{
    char *own = mem->q + ((int)threadIdx.x >> 5) * WARP_ROWS * Q_PITCH;
    float factor[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = r->sum[m][i];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            factor[m][i] = __fdividef(1, sum);
            unsigned row = mem->tab->row[row_number(m, i)];
            if (p->lse.data && !(threadIdx.x & 3) && !(row & NBHD_ROW_ABSENT))
                *(float *)row_address(p, &p->lse, t, row) = r->max[m][i] * (NBHD_SCALED ? 1 : p->scale) + logf(sum);
        }
    __syncwarp(); /* all lanes have read Q */
    stage_rows(&o[0][0][0], factor, mem->q, Q_PITCH, V_STEPS);
    __syncwarp();
    store_warp_rows(p, &p->o, t, mem->tab, own, Q_PITCH, NBHD_HEAD_DIM_V, b->wide);
}

/* Loads the part of a box that follows `at`: K, V or both. */
NBHD_FN void load_box(const struct memory *mem, const struct nbhd_boxes_sm80 *b, int stage, const int *at,
                      unsigned inside, int k, int v)
{
    const struct corner corner = corner_of(mem->tab, at);
    if (k)
        load_columns(mem->tab, 0, mem->k + stage * K_BYTES, K_PITCH, NBHD_HEAD_DIM, &corner, inside, b->wide);
    if (v)
        load_columns(mem->tab, 1, mem->v + stage * V_BYTES, V_PITCH, NBHD_HEAD_DIM_V, &corner, inside, b->wide);
}

/* All boxes of a grid. A round loads one and computes the one before. */
NBHD_FN void walk(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct memory *mem,
                  struct rows *r, output o)
{
    struct tables *tab = mem->tab;
    int at[3] = {tab->begin[0], tab->begin[1], tab->begin[2]};
    int turn = 0, now = BOX_SKIP, more = 1;
#if NBHD_SCALED
    int here[3] = {0, 0, 0}; /* the box that is computed */
#endif
#if NBHD_STAGES == 1
    unsigned inside = 0;
    int first = 1;
#endif
    for (;;) {
        scores s;
        int flags = BOX_SKIP;
        cp_async_wait_all();
        __syncthreads(); /* K (and V) is there, and no warp is at the box before */
#if NBHD_STAGES == 1
        if (!first) {
            load_box(mem, b, 0, at, inside, 0, 1);
            more = next_box(tab, at);
        }
        first = 0;
        if (!(now & BOX_SKIP))
            multiply_nt(s, mem->q, Q_PITCH, mem->k, K_PITCH, K_STEPS);
        cp_async_wait_all();
        __syncthreads(); /* V is there, and no warp needs K */
#endif
        if (more) {
            flags = box_flags(tab, at);
#if NBHD_STAGES == 2
            unsigned inside;
#endif
            inside = columns_inside(tab, at, flags);
            load_box(mem, b, NBHD_STAGES == 2 ? !turn : 0, at, inside, 1, NBHD_STAGES == 2);
            if (flags & BOX_WORDS)
                fill_words(b, tab, at, !turn);
        }
        if (!(now & BOX_SKIP)) {
#if NBHD_STAGES == 2
            multiply_nt(s, mem->q, Q_PITCH, mem->k + turn * K_BYTES, K_PITCH, K_STEPS);
#endif
#if NBHD_SCALED
            scale_scores(s, p, mem->biases, here, 0);
#endif
            if (now & BOX_MASK)
                apply_mask(s, -__int_as_float(0x7f800000), b, tab, turn, 0);
            softmax_step(s, r, o, b->scale_log2);
            multiply_nn(&o[0][0][0], s, mem->v + (NBHD_STAGES == 2 ? turn * V_BYTES : 0), V_PITCH, V_STEPS);
        }
        if (!more)
            break;
#if NBHD_SCALED
        here[0] = at[0], here[1] = at[1], here[2] = at[2];
#endif
#if NBHD_STAGES == 2
        more = next_box(tab, at);
#endif
        now = flags;
        turn = !turn;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_fwd_sm80(NBHD_LAUNCH, const __grid_constant__ struct nbhd_boxes_sm80 b)
{
    NBHD_ENTER
    extern __shared__ __align__(16) char shared[];
    struct memory mem;
    mem.q = shared;
    mem.k = mem.q + NBHD_ROWS * Q_PITCH;
    mem.v = mem.k + NBHD_STAGES * K_BYTES;
    mem.tab = (struct tables *)(mem.v + NBHD_STAGES * V_BYTES);
    mem.biases = (struct biases *)(mem.tab + 1);
    struct place t = row_place(&p, &b, turn, p.heads);
    if (is_past_end(&t))
        return;
    fill_rows(&b, &t, mem.tab);
    __syncthreads();
    load_rows(&p, &p.q, &t, mem.tab, mem.q, Q_PITCH, NBHD_HEAD_DIM, b.wide);

    output o;
    struct rows r;
#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int d = 0; d < 2 * V_STEPS; d++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                o[m][d][i] = 0;
        r.max[m][0] = r.max[m][1] = NO_KEYS;
        r.sum[m][0] = r.sum[m][1] = 0;
    }
#pragma unroll 1
    for (int extra = 0; extra <= (p.extra > 0); extra++) {
        enter_grid(&p, &b, mem.tab, extra);
#if NBHD_BIAS
        fill_biases(&p, mem.tab, mem.biases, mem.tab->place.head, !extra);
        __syncthreads();
#endif
        walk(&p, &b, &mem, &r, o);
    }
    finish(&p, &b, &mem.tab->place, &mem, &r, o);
}
