/* The table of relative positional biases at the pairs of a box: where an entry lies is a sum of a part of the row, a
 * part of the box and a part of the column.
 * Parameters: those of product_sm80.cuh, NBHD_BIAS (1: there is a table), NBHD_SCALED (1: scores are scaled before what
 * follows, as they must be if a bias is added). */
#ifndef NBHD_DEVICE_BIAS_SM80_CUH
#define NBHD_DEVICE_BIAS_SM80_CUH

#include "device/product_sm80.cuh"

#define BIAS_SIGN (NBHD_INVERSE ? -1 : 1) /* an entry is of key - query: rows are queries and columns keys, or not */

/* In shared memory, where NBHD_BIAS is 1. */
struct biases {
    int row[NBHD_ROWS], column[NBHD_N];
};

/* Entries of one head, and from one coordinate to the next on each axis. */
NBHD_FN int bias_pitch(const struct nbhd_params *p, int axis)
{
    int pitch = 1;
#pragma unroll
    for (int a = 2; a > axis; a--)
        pitch *= 2 * p->axis[a].window - 1;
    return pitch;
}

NBHD_FN int bias_place(const struct nbhd_params *p, int x0, int x1, int x2)
{
    return x0 * bias_pitch(p, 0) + x1 * bias_pitch(p, 1) + x2;
}

NBHD_FN int bias_entries(const struct nbhd_params *p) { return bias_pitch(p, -1); }

#if NBHD_BIAS
#define NO_BIAS (-2147483647 - 1) /* out of the table wherever the box lies */

/* head: of the queries, the first of the packed ones. there: 0 for extra keys, which have no bias. After the tables of
 * rows and columns; a barrier must follow. */
NBHD_FN void fill_biases(const struct nbhd_params *p, const struct tables *tab, struct biases *biases, int head,
                         int there)
{
    const struct place *t = &tab->place;
    const struct nbhd_axis *a = p->axis;
#pragma unroll 1
    for (int i = (int)fresh_thread(); i < NBHD_ROWS; i += THREADS) {
        unsigned row = tab->row[i];
        int x = bias_place(p, t->origin[0] + byte_of(row, 0), t->origin[1] + byte_of(row, 1),
                           t->origin[2] + byte_of(row, 2));
        x = bias_place(p, a[0].window - 1, a[1].window - 1, a[2].window - 1) - BIAS_SIGN * x +
            (head + byte_of(row, 3)) * bias_entries(p);
        biases->row[i] = there ? x : NO_BIAS;
    }
#pragma unroll 1
    for (int i = (int)fresh_thread(); i < NBHD_N; i += THREADS) {
        unsigned c = tab->column[i];
        biases->column[i] = BIAS_SIGN * bias_place(p, byte_of(c, 0), byte_of(c, 1), byte_of(c, 2));
    }
}
#endif

#if NBHD_SCALED
/* The final scores of columns first, first + 1 ... of the box at `at`. Where a bias is out of the table, the score is
 * masked anyway. */
NBHD_FN void scale_scores(scores s, const struct nbhd_params *p, const struct biases *biases, const int *at, int first)
{
#if NBHD_BIAS
    int size = p->heads * bias_entries(p), box = BIAS_SIGN * bias_place(p, at[0], at[1], at[2]);
#endif
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
#if NBHD_BIAS
            int row = biases->row[row_number(m, i)] + box;
#endif
#pragma unroll
            for (int e = 0; e < NBHD_PART / 4; e++) {
                float *x = &s[m][e / 2][2 * i + e % 2];
                *x *= p->scale;
#if NBHD_BIAS
                int index = row + biases->column[first + e / 2 * 8 + ((int)threadIdx.x & 3) * 2 + e % 2];
                *x += (unsigned)index < (unsigned)size ? p->bias[index] : 0;
#endif
            }
        }
}
#endif

#endif
