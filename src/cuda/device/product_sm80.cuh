/* Products of a warp on tensor cores: its rows against columns in shared memory, sums in registers.
 *
 * 16-bit types: m16n8k16. float32: m16n8k8, the operands rounded to TF32 (only where the problem allows it).
 * Fragments are those of mma_sm80.cuh, but for the sums of multiply_nn in float32: see there.
 * Parameters: those of rows_sm80.cuh, NBHD_PART (columns computed at once; all, unless it is defined). */
#ifndef NBHD_DEVICE_PRODUCT_SM80_CUH
#define NBHD_DEVICE_PRODUCT_SM80_CUH

#include "device/rows_sm80.cuh"

#define TILES        (WARP_ROWS / 16) /* of 16 rows that a warp owns */

#if NBHD_DTYPE == NBHD_F32
#define MMA mma_m16n8k8_tf32
#elif NBHD_DTYPE == NBHD_F16
#define MMA  mma_m16n8k16_f16
#define PACK cvt_rn_f16x2_f32
#else
#define MMA  mma_m16n8k16_bf16
#define PACK cvt_rn_bf16x2_f32
#endif

/* Columns of a box that are computed at once. */
#ifndef NBHD_PART
#define NBHD_PART NBHD_N
#endif

/* Of the warp's rows against these columns. */
typedef float scores[TILES][NBHD_PART / 8][4];

/* The number in the CTA of the calling lane's row i of the warp's tile m. */
NBHD_FN int row_number(int m, int i)
{
    return ((int)threadIdx.x >> 5) * WARP_ROWS + 16 * m + ((int)threadIdx.x >> 2 & 7) + 8 * i;
}

/* What the calling lane points ldmatrix_x4 at: 16 rows of 16 elements, as they are needed for A, or for B
 * transposed. */
NBHD_FN unsigned lane_rows(const char *tile, int pitch)
{
    int lane = (int)threadIdx.x & 31;
    return shared_address(tile) + (unsigned)((lane & 15) * pitch + (lane >> 4) * 16);
}

/* The same for B where rows are its columns. */
NBHD_FN unsigned lane_columns(const char *tile, int pitch)
{
    int lane = (int)threadIdx.x & 31;
    return shared_address(tile) + (unsigned)(((lane & 7) + (lane >> 4) * 8) * pitch + (lane >> 3 & 1) * 16);
}

/* float32 to TF32. Tensor cores cut off all but 11 bits; one multiplication before that adds what is lost on average,
 * where rounding to nearest would take two instructions. Of normal values the error has no bias; its root mean square
 * is 0.45 x 2^-11 of them (to nearest 0.42, cut off 0.85). A value of 11 bits stays as it is, and so do infinity and
 * NaN. */
NBHD_FN void round_operands(unsigned *x, int count)
{
#if NBHD_DTYPE == NBHD_F32
#pragma unroll
    for (int i = 0; i < count; i++)
        x[i] = __float_as_uint(__uint_as_float(x[i]) * (1 + 0.72f / 2048));
#endif
}

/* s = A B^T: the warp's rows of the CTA's `rows` by the box `columns`, over 16 x steps elements. */
NBHD_FN void multiply_nt(scores s, const char *rows, int row_pitch, const char *columns, int column_pitch, int steps)
{
    unsigned from = lane_rows(rows + (threadIdx.x >> 5) * (WARP_ROWS * row_pitch), row_pitch);
    unsigned box = lane_columns(columns, column_pitch);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int j = 0; j < NBHD_PART / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[m][j][i] = 0;
#pragma unroll
    for (int d = 0; d < steps * ELEMENT / 2; d++) { /* 32 bytes of each row */
        unsigned a[TILES][4], f[4];
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            ldmatrix_x4(a[m], from + m * 16 * row_pitch + d * 32);
            round_operands(a[m], 4);
        }
#pragma unroll
        for (int j = 0; j < NBHD_PART / 16; j++) {
            ldmatrix_x4(f, box + j * 16 * column_pitch + d * 32);
            round_operands(f, 4);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                MMA(s[m][2 * j], a[m], f[0], f[1]);
                MMA(s[m][2 * j + 1], a[m], f[2], f[3]);
            }
        }
    }
}

#if NBHD_DTYPE == NBHD_F32
/* sum += S B: the box `columns`, 16 x steps elements wide. sum: [TILES][2 x steps][4].
 * What a lane holds of S are columns 2 q and 2 q + 1, which A wants as its columns q and q + 4: so B's rows are taken
 * in that order too. A lane reads two neighbouring elements of them, for two products: x[2 (2 d) + c] of sum is column
 * 16 d + 4 q + 2 c, and that of 2 d + 1 is the next (stage_rows). */
NBHD_FN void multiply_nn(float *sum, scores s, const char *columns, int pitch, int steps)
{
    int lane = (int)threadIdx.x & 31;
    const char *box = columns + (lane & 3) * 2 * pitch + (lane >> 2) * 8;
#pragma unroll
    for (int j = 0; j < NBHD_PART / 8; j++) {
        unsigned a[TILES][4], f[4];
#pragma unroll
        for (int m = 0; m < TILES; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][i] = __float_as_uint(s[m][j][i / 2 + i % 2 * 2]);
            round_operands(a[m], 4);
        }
#pragma unroll
        for (int d = 0; d < steps; d++) {
            uint2 low = *(const uint2 *)(box + 8 * j * pitch + d * 64);
            uint2 high = *(const uint2 *)(box + (8 * j + 1) * pitch + d * 64);
            f[0] = low.x, f[1] = high.x, f[2] = low.y, f[3] = high.y;
            round_operands(f, 4);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                float *to = sum + 4 * (2 * steps * m + 2 * d);
                MMA(to, a[m], f[0], f[1]);
                MMA(to + 4, a[m], f[2], f[3]);
            }
        }
    }
}
#else
/* sum += S B: the box `columns`, 16 x steps elements wide. sum: [TILES][2 x steps][4]. */
NBHD_FN void multiply_nn(float *sum, scores s, const char *columns, int pitch, int steps)
{
    unsigned box = lane_rows(columns, pitch);
#pragma unroll
    for (int j = 0; j < NBHD_PART / 16; j++) {
        unsigned a[TILES][4], f[4];
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][i] = PACK(s[m][2 * j + i / 2][i % 2 * 2 + 1], s[m][2 * j + i / 2][i % 2 * 2]);
#pragma unroll
        for (int d = 0; d < steps; d++) {
            ldmatrix_x4_trans(f, box + j * 16 * pitch + d * 32);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                float *to = sum + 4 * (2 * steps * m + 2 * d);
                MMA(to, a[m], f[0], f[1]);
                MMA(to + 4, a[m], f[2], f[3]);
            }
        }
    }
}
#endif

/* Puts factor[m][i] times the warp's sums where its rows are in shared memory. */
NBHD_FN void stage_rows(const float *sum, float factor[TILES][2], char *rows, int pitch, int steps)
{
    unsigned thread = fresh_thread(), lane = thread & 31;
    /* A lane has ELEMENT neighbouring elements of 16. */
    char *to = rows + ((thread >> 5) * WARP_ROWS + (lane >> 2)) * pitch + (lane & 3) * (ELEMENT * ELEMENT);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int d = 0; d < steps; d++) {
                const float *x = sum + 4 * (2 * steps * m + 2 * d) + 2 * i;
                char *row = to + (16 * m + 8 * i) * pitch;
                float f = factor[m][i];
#if NBHD_DTYPE == NBHD_F32
                *(float4 *)(row + 64 * d) = make_float4(x[0] * f, x[4] * f, x[1] * f, x[5] * f);
#else
                *(unsigned *)(row + 32 * d) = PACK(x[1] * f, x[0] * f);
                *(unsigned *)(row + 32 * d + 16) = PACK(x[5] * f, x[4] * f);
#endif
            }
}

/* Puts value where a row does not see a column. first: of the box's columns, the one that s begins with. */
NBHD_FN void apply_mask(scores s, float value, const struct nbhd_boxes_sm80 *b, const struct tables *tab, int turn,
                        int first)
{
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unsigned word = row_word(b, tab, turn, row_number(m, i)) >> first / 4;
#pragma unroll
            for (int e = 0; e < NBHD_PART / 4; e++)
                if (!(word >> e & 1))
                    s[m][e / 2][2 * i + e % 2] = value;
        }
}

#endif
