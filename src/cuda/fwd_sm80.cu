/* Forward neighborhood attention with mma.sync and cp.async: Ampere and every GPU after it. Host half: fwd_sm80.c.
 *
 * One CTA computes one query tile: a box of tokens times the packed heads of one key/value head. Its warps own 16 or 32
 * rows each and hold their part of O; all of them load the boxes of K and V, then compute (stream_sm80.cuh says how boxes
 * are walked, masked and skipped). Extra keys are a second grid: one axis, seen whole.
 *
 *     NBHD_STAGES 2, one barrier a box:      wait K V(j) | issue K V(j+1) | S = Q K^T | softmax | O += P V
 *     NBHD_STAGES 1, two, half the memory:   wait K(j) | issue V(j) | S | wait V(j) | issue K(j+1) | softmax | O += P V
 *
 *     shared memory:  | Q, later O: ROWS x pitch | K: stages x N x pitch | V: the same | struct tables |
 *
 * A row's maximum is only raised when a score exceeds it by 2^8 (then O and the sum are scaled): until then probabilities
 * are at most 2^8, which neither bf16 nor f16 nor the float sums mind. Masked scores are -inf, and the maximum starts at
 * -1e30: rows whose first boxes are masked wholly need no test.
 *
 * Registers of a thread: O head_dim_v / 16 x rows of a warp, S N / 16 x rows of a warp: 128 + 64 at head_dim 128 with 32
 * rows and N 64. 32 rows a warp read K and V from shared memory half as often as 16. */
#if !defined(NBHD_HEAD_DIM) || !defined(NBHD_HEAD_DIM_V)
#error "NBHD_HEAD_DIM, NBHD_HEAD_DIM_V: of q and k, of v and o; 1 to 256"
#endif
#ifndef NBHD_BF16
#error "NBHD_BF16: 1 for bfloat16, 0 for float16"
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
#error "NBHD_BIAS: 1 adds the table of biases; NBHD_SCALED: 1 scales scores before the maximum (bias, or a negative scale)"
#endif

#define NBHD_STREAMS 2
#define NBHD_INVERSE 0
#define NBHD_PIECES (((NBHD_HEAD_DIM > NBHD_HEAD_DIM_V ? NBHD_HEAD_DIM : NBHD_HEAD_DIM_V) + 15) / 16 * 2)
#include "device/stream_sm80.cuh"

#define TILES (NBHD_ROWS / NBHD_WARPS / 16) /* of 16 rows that a warp owns */
#define K_PITCH PITCH(NBHD_HEAD_DIM)
#define V_PITCH PITCH(NBHD_HEAD_DIM_V)
#define Q_PITCH (16 * NBHD_PIECES + 16)     /* also O's */
#define K_STEPS ((NBHD_HEAD_DIM + 15) / 16)
#define V_STEPS ((NBHD_HEAD_DIM_V + 15) / 16)
#define K_BYTES (NBHD_N * K_PITCH)
#define V_BYTES (NBHD_N * V_PITCH)

/* Shared memory, and the calling lane's addresses in it. */
struct memory {
    char *q, *k, *v;
    struct tables *tab;
#if NBHD_BIAS
    int *row_bias, *column_bias; /* of each row and column: its part of the index into the table of biases */
#endif
};

/* A thread's rows: their running maxima (of raw scores, unless NBHD_SCALED) and its part of their running sums. */
struct rows {
    float max[TILES][2], sum[TILES][2];
};

typedef float scores[TILES][NBHD_N / 8][4];
typedef float output[TILES][2 * V_STEPS][4];

#define NO_KEYS -1e30f
#define RAISE_AT 8.0f

NBHD_FN void set_grid(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct place *t,
                      struct tables *tab, int extra)
{
    int kv_head = t->head / (p->heads / p->kv_heads);
#pragma unroll
    for (int s = 0; s < 2; s++) {
        const struct nbhd_view *view = extra ? s ? &p->extra_v : &p->extra_k : s ? &p->v : &p->k;
        const char *base = view->data + t->batch * view->batch + kv_head * view->head;
#pragma unroll
        for (int a = 0; a < 3; a++) {
            base += extra ? 0 : t->group[a] * view->axis[a];
            tab->step[s][a] = extra ? (a == 2 ? view->axis[2] : 0) : p->axis[a].dilation * view->axis[a];
        }
        tab->base[s] = base;
    }
#pragma unroll
    for (int a = 0; a < 3; a++) {
        tab->box[a] = extra ? (a == 2 ? NBHD_N : 1) : b->column_box[a];
        const int2 *window = tab->window + row_first(b, a);
        tab->begin[a] = window[0].x;
        tab->end[a] = window[b->row_box[a] - 1].y;
    }
}

#if NBHD_BIAS
NBHD_FN void fill_bias(const struct nbhd_params *p, const struct place *t, const struct memory *m)
{
    const struct nbhd_axis *axis = p->axis;
    int pitch1 = 2 * axis[2].window - 1, pitch0 = pitch1 * (2 * axis[1].window - 1);
    for (int i = (int)threadIdx.x; i < NBHD_ROWS; i += THREADS) {
        unsigned row = m->tab->row[i];
        int head = t->head + byte_of(row, 3);
        m->row_bias[i] = (axis[0].window - 1 - t->origin[0] - byte_of(row, 0)) * pitch0 +
                         (axis[1].window - 1 - t->origin[1] - byte_of(row, 1)) * pitch1 +
                         (axis[2].window - 1 - t->origin[2] - byte_of(row, 2)) +
                         head * pitch0 * (2 * axis[0].window - 1);
    }
    for (int i = (int)threadIdx.x; i < NBHD_N; i += THREADS) {
        unsigned c = m->tab->column[i];
        m->column_bias[i] = byte_of(c, 0) * pitch0 + byte_of(c, 1) * pitch1 + byte_of(c, 2);
    }
}
#endif

/* Tables of a grid: 0 the windows, 1 the extra keys. Between barriers. */
NBHD_FN void enter_grid(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct place *t,
                        const struct memory *m, int extra)
{
    __syncthreads();
    fill_windows(p, b, t, m->tab, extra);
    __syncthreads();
    if (threadIdx.x == 0)
        set_grid(p, b, t, m->tab, extra);
    fill_limits(b, t, m->tab);
    __syncthreads();
    fill_columns(m->tab);
    __syncthreads();
    fill_prefix(m->tab);
#if NBHD_BIAS
    if (!extra)
        fill_bias(p, t, m);
#endif
    __syncthreads();
}

/* S = Q K^T. q, k: all of Q, the box of K. */
NBHD_FN void multiply_qk(scores s, const char *q_tile, const char *k_tile)
{
    unsigned q = lane_a(shared_address(q_tile) + (fresh_thread() >> 5) * (WARP_ROWS * Q_PITCH), Q_PITCH);
    unsigned k = lane_b(shared_address(k_tile), K_PITCH);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int j = 0; j < NBHD_N / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[m][j][i] = 0;
#pragma unroll
    for (int d = 0; d < K_STEPS; d++) {
        unsigned a[TILES][4], f[4];
#pragma unroll
        for (int m = 0; m < TILES; m++)
            ldmatrix_x4(a[m], q + m * 16 * Q_PITCH + d * 32);
#pragma unroll
        for (int j = 0; j < NBHD_N / 16; j++) {
            ldmatrix_x4(f, k + j * 16 * K_PITCH + d * 32);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                MMA(s[m][2 * j], a[m], f[0], f[1]);
                MMA(s[m][2 * j + 1], a[m], f[2], f[3]);
            }
        }
    }
}

/* O += P V. */
NBHD_FN void multiply_pv(output o, scores s, const char *v_tile)
{
    unsigned v = lane_b_trans(shared_address(v_tile), V_PITCH);
#pragma unroll
    for (int j = 0; j < NBHD_N / 16; j++) {
        unsigned a[TILES][4], f[4];
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][i] = PACK(s[m][2 * j + i / 2][i % 2 * 2 + 1], s[m][2 * j + i / 2][i % 2 * 2]);
#pragma unroll
        for (int d = 0; d < V_STEPS; d++) {
            ldmatrix_x4_trans(f, v + j * 16 * V_PITCH + d * 32);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                MMA(o[m][2 * d], a[m], f[0], f[1]);
                MMA(o[m][2 * d + 1], a[m], f[2], f[3]);
            }
        }
    }
}

/* The number in the tile of the calling lane's row i of its 16-row tile m. */
NBHD_FN int row_number(int m, int i)
{
    return ((int)threadIdx.x >> 5) * WARP_ROWS + 16 * m + ((int)threadIdx.x >> 2 & 7) + 8 * i;
}

NBHD_FN void apply_mask(scores s, const struct nbhd_boxes_sm80 *b, const struct tables *tab, int turn)
{
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unsigned word = row_word(b, tab, turn, row_number(m, i));
#pragma unroll
            for (int e = 0; e < NBHD_N / 4; e++)
                if (!(word >> e & 1))
                    s[m][e / 2][2 * i + e % 2] = -__int_as_float(0x7f800000);
        }
}

#if NBHD_SCALED
/* The final scores. Where a bias is out of the table, the score is masked anyway. at: the box; extra keys have no bias. */
NBHD_FN void scale_scores(scores s, const struct nbhd_params *p, const struct memory *mem, const int *at, int extra)
{
#if NBHD_BIAS
    const struct nbhd_axis *axis = p->axis;
    int pitch1 = 2 * axis[2].window - 1, pitch0 = pitch1 * (2 * axis[1].window - 1);
    int size = p->heads * pitch0 * (2 * axis[0].window - 1);
#endif
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
#if NBHD_BIAS
            int row = mem->row_bias[row_number(m, i)] + at[0] * pitch0 + at[1] * pitch1 + at[2];
#endif
#pragma unroll
            for (int e = 0; e < NBHD_N / 4; e++) {
                float *x = &s[m][e / 2][2 * i + e % 2];
                *x *= p->scale;
#if NBHD_BIAS
                if (!extra) {
                    int index = row + mem->column_bias[e / 2 * 8 + ((int)threadIdx.x & 3) * 2 + e % 2];
                    *x += (unsigned)index < (unsigned)size ? p->bias[index] : 0;
                }
#endif
            }
        }
}
#endif

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
    int lane = (int)threadIdx.x & 31;
    char *own = mem->q + ((int)threadIdx.x >> 5) * WARP_ROWS * Q_PITCH;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = r->sum[m][i];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            float scale = __fdividef(1, sum);
            char *to = own + (16 * m + (lane >> 2) + 8 * i) * Q_PITCH + (lane & 3) * 4;
#pragma unroll
            for (int d = 0; d < 2 * V_STEPS; d++)
                *(unsigned *)(to + 16 * d) = PACK(o[m][d][2 * i + 1] * scale, o[m][d][2 * i] * scale);
            unsigned row = mem->tab->row[row_number(m, i)];
            if (p->lse.data && !(lane & 3) && !(row & NBHD_ROW_ABSENT))
                *(float *)row_address(p, &p->lse, t, row) = r->max[m][i] * (NBHD_SCALED ? 1 : p->scale) + logf(sum);
        }
    __syncwarp();
    store_warp_rows(p, &p->o, t, mem->tab, own, Q_PITCH, NBHD_HEAD_DIM_V, b->wide);
}

/* Loads the part of a box that follows `at`: K, V or both. */
NBHD_FN void load_box(const struct memory *mem, const struct nbhd_boxes_sm80 *b, int stage, const int *at, unsigned inside,
                      int k, int v)
{
    if (k)
        load_columns(mem->tab, 0, mem->k + stage * K_BYTES, K_PITCH, NBHD_HEAD_DIM, at, inside, b->wide);
    if (v)
        load_columns(mem->tab, 1, mem->v + stage * V_BYTES, V_PITCH, NBHD_HEAD_DIM_V, at, inside, b->wide);
}

/* All boxes of a grid. A round loads one and computes the one before. */
NBHD_FN void walk(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct memory *mem,
                  struct rows *r, output o, int extra)
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
            multiply_qk(s, mem->q, mem->k);
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
            multiply_qk(s, mem->q, mem->k + turn * K_BYTES);
#endif
#if NBHD_SCALED
            scale_scores(s, p, mem, here, extra);
#endif
            if (now & BOX_MASK)
                apply_mask(s, b, tab, turn);
            softmax_step(s, r, o, b->scale_log2);
            multiply_pv(o, s, mem->v + (NBHD_STAGES == 2 ? turn * V_BYTES : 0));
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
    nbhd_fwd_sm80(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_boxes_sm80 b)
{
    extern __shared__ __align__(16) char shared[];
    struct memory mem;
    mem.q = shared;
    mem.k = mem.q + NBHD_ROWS * Q_PITCH;
    mem.v = mem.k + NBHD_STAGES * K_BYTES;
    mem.tab = (struct tables *)(mem.v + NBHD_STAGES * V_BYTES);
#if NBHD_BIAS
    mem.row_bias = (int *)(mem.tab + 1);
    mem.column_bias = mem.row_bias + NBHD_ROWS;
#endif
    struct place t = row_place(&p, &b, p.heads);
    if (t.origin[0] >= t.size[0] || t.origin[1] >= t.size[1] || t.origin[2] >= t.size[2])
        return; /* a dilation group with fewer elements than the first */
    fill_rows(&b, &t, mem.tab);
    __syncthreads();
    load_rows(&p, &p.q, &t, mem.tab, shared_address(mem.q), Q_PITCH, NBHD_HEAD_DIM, b.wide);

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
        enter_grid(&p, &b, &mem.tab->place, &mem, extra ? p.extra : 0);
        walk(&p, &b, &mem, &r, o, extra);
    }
    finish(&p, &b, &mem.tab->place, &mem, &r, o);
}
