/* What the kernels of the sm80 backward have in common: a tile of rows in shared memory, the boxes of columns streamed
 * past it, and from their scores to the gradients of the scores.
 *
 * Rows and columns each have a long row of head_dim (Q or K) and a wide one of head_dim_v (dO or V). Where rows are
 * queries columns are keys, and the other way round: S and dP are the same two products.
 *     S = long rows x long columns^T     P = exp(S - logsumexp)
 *     dP = wide rows x wide columns^T    dS = P (dP - delta)
 * The logsumexp (times log2 e) and delta = rowsum(O dO) - dlse of every query stand in the workspace, as float2
 * [batch][heads][query tokens]; nbhd_bwd_sm80_dq, which is the first kernel, writes them. In shared memory they lie
 * beside the rows, or come with each box of columns.
 *
 *     shared memory:  | rows, later what they become: ROWS x pitch, long, wide | columns: 2 x N x pitch, long, wide |
 *                     | statistics | struct tables | struct biases, with a bias |
 *
 * A kernel defines struct sums, load_box and step, which walk calls. */
#ifndef NBHD_DEVICE_GRAD_SM80_CUH
#define NBHD_DEVICE_GRAD_SM80_CUH

#if !defined(NBHD_HEAD_DIM) || !defined(NBHD_HEAD_DIM_V) || !defined(NBHD_DTYPE)
#error "NBHD_HEAD_DIM, NBHD_HEAD_DIM_V: 1 to 256; NBHD_DTYPE: NBHD_BF16, NBHD_F16 or NBHD_F32"
#endif
#if !defined(NBHD_ROWS) || !defined(NBHD_WARPS) || !defined(NBHD_N) || !defined(NBHD_CTAS)
#error "NBHD_ROWS, NBHD_WARPS: rows of a tile, 16 or 32 a warp; NBHD_N: columns of a box; NBHD_CTAS: per multiprocessor"
#endif
#ifndef NBHD_PART
#error "NBHD_PART: columns of a box that are computed at once, a divisor of NBHD_N"
#endif
#ifndef NBHD_BIAS
#error "NBHD_BIAS: 1 adds the table of biases to the scores"
#endif

#define NBHD_SCALED NBHD_BIAS
#include "device/bias_sm80.cuh"

#define K_PITCH PITCH(NBHD_HEAD_DIM)
#define V_PITCH PITCH(NBHD_HEAD_DIM_V)
#define K_STEPS (PADDED(NBHD_HEAD_DIM) / 16)
#define V_STEPS (PADDED(NBHD_HEAD_DIM_V) / 16)
#define K_BYTES (NBHD_N * K_PITCH)
#define V_BYTES (NBHD_N * V_PITCH)

struct memory {
    char *long_rows, *wide_rows, *long_columns, *wide_columns;
    char *stats; /* float2 of each row; inverse: of each column, for two boxes in turn */
    struct tables *tab;
    struct biases *biases;
    char *rest;
};

NBHD_FN struct memory lay_out(char *shared)
{
    struct memory m;
    m.long_rows = shared;
    m.wide_rows = m.long_rows + NBHD_ROWS * K_PITCH;
    m.long_columns = m.wide_rows + NBHD_ROWS * V_PITCH;
    m.wide_columns = m.long_columns + 2 * K_BYTES;
    m.stats = m.wide_columns + 2 * V_BYTES;
    m.tab = (struct tables *)(m.stats + (NBHD_INVERSE ? 2 * 8 * NBHD_N : 8 * NBHD_ROWS));
    m.biases = (struct biases *)(m.tab + 1);
    m.rest = (char *)(m.biases + NBHD_BIAS);
    return m;
}

/* Bytes from the first query of a head to that at x, in the workspace. */
NBHD_FN long long stats_offset(const struct nbhd_params *p, int batch, int head, const int *x)
{
    long long row = (long long)batch * p->heads + head;
#pragma unroll
    for (int a = 0; a < 3; a++)
        row = row * p->axis[a].length + x[a];
    return 8 * row;
}

/* Logsumexp and delta of the query that element s[m][j][i] of the calling lane belongs to. stats: of the first
 * column. */
NBHD_FN float2 stats_of(const char *stats, int m, int j, int i)
{
#if NBHD_INVERSE
    float4 two = *(const float4 *)(stats + 64 * j + (threadIdx.x & 3) * 16); /* of columns 8 j + 2 q and the next */
    return i % 2 ? make_float2(two.z, two.w) : make_float2(two.x, two.y);
#else
    return *(const float2 *)(stats + 8 * row_number(m, i / 2));
#endif
}

/* A part of a box: columns first, first + 1 ... first + PART - 1 of the one at `at`. */
struct part {
    int turn, first, masked;
    const int *at;
};

NBHD_FN const char *part_stats(const struct memory *mem, const struct part *c)
{
    return mem->stats + (NBHD_INVERSE ? 8 * (c->turn * NBHD_N + c->first) : 0);
}

NBHD_FN const char *part_long(const struct memory *mem, const struct part *c)
{
    return mem->long_columns + c->turn * K_BYTES + c->first * K_PITCH;
}

NBHD_FN const char *part_wide(const struct memory *mem, const struct part *c)
{
    return mem->wide_columns + c->turn * V_BYTES + c->first * V_PITCH;
}

/* P of the warp's rows and the part's columns; 0 where they do not see each other. */
NBHD_FN void probabilities(scores s, const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b,
                           const struct memory *mem, const struct part *c)
{
    multiply_nt(s, mem->long_rows, K_PITCH, part_long(mem, c), K_PITCH, K_STEPS);
#if NBHD_BIAS
    scale_scores(s, p, mem->biases, c->at, c->first);
#endif
#pragma unroll
    for (int j = 0; j < NBHD_PART / 8; j++)
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float lse = stats_of(part_stats(mem, c), m, j, i).x;
                s[m][j][i] = ex2_approx_ftz_f32(fmaf(s[m][j][i], b->scale_log2, -lse));
            }
    if (c->masked)
        apply_mask(s, 0, b, mem->tab, c->turn, c->first);
}

/* dS, of the probabilities s. */
NBHD_FN void gradients(scores ds, scores s, const struct memory *mem, const struct part *c)
{
    multiply_nt(ds, mem->wide_rows, V_PITCH, part_wide(mem, c), V_PITCH, V_STEPS);
#pragma unroll
    for (int j = 0; j < NBHD_PART / 8; j++)
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                ds[m][j][i] = s[m][j][i] * (ds[m][j][i] - stats_of(part_stats(mem, c), m, j, i).y);
}

struct sums;
/* Begins to load the box at `at` into the columns of that turn. */
NBHD_FN void load_box(const struct nbhd_boxes_sm80 *b, const struct memory *mem, int turn, const int *at, int flags);
/* Adds what the box at `at` contributes, which lies in the columns of that turn. flags: BOX_SKIP, BOX_MASK. */
NBHD_FN void step(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct memory *mem,
                  struct sums *sums, int turn, const int *at, int flags);

/* All boxes of a grid. A round loads one and computes the one before. */
NBHD_FN void walk(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct memory *mem,
                  struct sums *sums)
{
    struct tables *tab = mem->tab;
    int at[3] = {tab->begin[0], tab->begin[1], tab->begin[2]}, here[3] = {0, 0, 0};
    int turn = 0, now = BOX_SKIP;
    int more = at[0] < tab->end[0] && at[1] < tab->end[1] && at[2] < tab->end[2];
    for (;;) {
        int flags = BOX_SKIP;
        cp_async_wait_all();
        __syncthreads(); /* the box is there, and no warp is at the one before */
        if (more) {
            flags = box_flags(tab, at);
            load_box(b, mem, !turn, at, flags);
            if (flags & BOX_WORDS)
                fill_words(b, tab, at, !turn);
        }
        step(p, b, mem, sums, turn, here, now);
        if (!more)
            break;
        here[0] = at[0], here[1] = at[1], here[2] = at[2];
        more = next_box(tab, at);
        now = flags;
        turn = !turn;
    }
}

/* Puts factor times the warp's sums into its rows in shared memory, which no product needs any more, and writes
 * them. */
NBHD_FN void store_sums(const struct nbhd_params *p, const struct nbhd_view *view, const struct tables *tab,
                        const float *sums, float scale, char *rows, int pitch, int width, int wide)
{
    float factor[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++)
        factor[m][0] = factor[m][1] = scale;
    __syncwarp();
    stage_rows(sums, factor, rows, pitch, PADDED(width) / 16);
    __syncwarp();
    store_warp_rows(p, view, &tab->place, tab, rows + (fresh_thread() >> 5) * (WARP_ROWS * pitch), pitch, width, wide);
}

#if !NBHD_INVERSE
/* ---- rows that are queries ---- */

/* As stats_offset, of a row. */
NBHD_FN long long row_stats_offset(const struct nbhd_params *p, const struct place *t, unsigned row)
{
    int x[3];
#pragma unroll
    for (int a = 0; a < 3; a++)
        x[a] = (t->origin[a] + byte_of(row, a)) * p->axis[a].dilation + t->group[a];
    return stats_offset(p, t->batch, t->head + byte_of(row, 3), x);
}

/* Begins to load Q and dO of a tile. Ends without a barrier, as enter_grid begins with one. */
NBHD_FN void load_queries(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct place *t,
                          const struct memory *mem)
{
    fill_rows(b, t, mem->tab);
    __syncthreads();
    load_rows(p, &p->q, t, mem->tab, mem->long_rows, K_PITCH, NBHD_HEAD_DIM, b->wide);
    load_rows(p, &p->dout, t, mem->tab, mem->wide_rows, V_PITCH, NBHD_HEAD_DIM_V, b->wide);
}

NBHD_FN void load_box(const struct nbhd_boxes_sm80 *b, const struct memory *mem, int turn, const int *at, int flags)
{
    const struct corner corner = corner_of(mem->tab, at);
    unsigned inside = columns_inside(mem->tab, at, flags);
    load_columns(mem->tab, 0, mem->long_columns + turn * K_BYTES, K_PITCH, NBHD_HEAD_DIM, &corner, inside, b->wide);
    load_columns(mem->tab, 1, mem->wide_columns + turn * V_BYTES, V_PITCH, NBHD_HEAD_DIM_V, &corner, inside, b->wide);
}
#endif

#endif
