/* What the Hopper kernels know of a warpgroup's scores in accumulator order, of 64 rows by a box of N columns: how they
 * are packed, and the words and numbers of which masks are made. NBHD_DTYPE, NBHD_N as in fwd_sm90.cu. */
#ifndef NBHD_DEVICE_SCORES_SM90_CUH
#define NBHD_DEVICE_SCORES_SM90_CUH

#include "device/tma_sm90.cuh"
#include "device/wgmma_sm90.cuh"

NBHD_FN unsigned pack(float low, float high)
{
    return NBHD_DTYPE == 2 ? cvt_rn_bf16x2_f32(low, high) : cvt_rn_f16x2_f32(low, high);
}

/* A place in a tile, as in struct nbhd_boxes and struct nbhd_bwd_boxes. */
NBHD_FN int coordinate(unsigned row, int axis) { return row >> 8 * axis & 0xff; }

/* ---- masks by bits ---- */

#define MASKED (-__int_as_float(0x7f800000))

/* A bit for each column of a row that a lane holds: bit 2j + c is column 8j + 2q + c. */
#if NBHD_N <= 128
typedef unsigned word;
#else
typedef unsigned long long word;
#endif

/* Bits of the columns below x where columns are consecutive tokens. */
NBHD_FN word bits_below(int x, int q)
{
    x = nbhd_max(0, nbhd_min(x, NBHD_N));
    int bits = 2 * (x >> 3) + nbhd_max(0, nbhd_min((x & 7) - 2 * q, 2));
    return sizeof(word) == 4 ? ~(word)shl_b32(~0u, bits) : ~(word)shl_b64(~0ull, bits);
}

/* Row by row: ptxas then moves a byte of the word to predicates at a time. */
NBHD_FN void apply_bits(float *s, word row0, word row1)
{
#pragma unroll
    for (int e = 0; e < NBHD_N / 4; e++)
        s[4 * (e / 2) + e % 2] = row0 >> e & 1 ? s[4 * (e / 2) + e % 2] : MASKED;
#pragma unroll
    for (int e = 0; e < NBHD_N / 4; e++)
        s[4 * (e / 2) + 2 + e % 2] = row1 >> e & 1 ? s[4 * (e / 2) + 2 + e % 2] : MASKED;
}

/* ---- masks by columns ---- */

/* Origins of boxes and bounds of windows, where masks compare them, count from the begin of the tile's union, plus
 * this: a window may begin a box's extent before it. */
#define MASK_BIAS 256

/* Times MASK_ONE, what is added to the score of a query and a key that it does not see: -2^100, or -2^30 where float16
 * allows no more. */
#define MASK_FAR (NBHD_DTYPE == 2 ? 0xf180f180u : 0xf800f800u)
#define MASK_ONE (NBHD_DTYPE == 2 ? 0x3f80u : 0x7800u)

/* Two words of the mask's A operand, for both rows of a thread: MASK_FAR where a column's bound is reached. unseen0,
 * unseen1: of two columns, the sign bit of row 0's half and of row 1's. */
NBHD_FN void mask_operands(unsigned *a, unsigned unseen0, unsigned unseen1)
{
    a[0] = prmt_b32(unseen0, unseen1, 0xdd99) & MASK_FAR; /* the sign of each lower half, 16 times */
    a[1] = prmt_b32(unseen0, unseen1, 0xffbb) & MASK_FAR; /* of each upper half */
}

#endif
