/* The small products of the GEMM-based unfused passes, and the packing of what they multiply. A packed operand has
 * GEMM_LANES columns or rows of GEMM_RUN; results are whole vectors wide. Included by unfused_gemm.inc.h. */
#include "cpu/unfused_gemm.h"

/* ---- the product: C[m][nv vectors] (+)= A[m][k] B[k][nv vectors] ---- */

/* A's element (row r, k) is a[r * a_row + k * a_k]; one of the two steps is 1 and both are known when compiling. */
V_FN void micro(float *c, int ldc, const float *a, const float *b, long long ldb, int k, bool add, const int rows,
                const int nv, const int a_row, const int a_k)
{
    vf acc[12][V_STRIP];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            acc[r][v] = add ? v_load(c + r * ldc + v * VF) : v_zero();
    for (int i = 0; i < k; i++, b += ldb) {
        vf x[V_STRIP];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            x[v] = v_load(b + v * VF);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const vf s = v_set1(a[r * a_row + i * a_k]);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                acc[r][v] = v_fma(s, x[v], acc[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            v_store(c + r * ldc + v * VF, acc[r][v]);
}

/* All m rows of a panel of nv vectors: as many at once as the registers hold, then the rest at once too. */
V_FN void panel(float *c, int ldc, const float *a, const float *b, long long ldb, int m, int k, bool add, const int nv,
                const int a_row, const int a_k)
{
    const int most = 2 * nv <= V_STRIP ? 2 * V_ROWS : V_ROWS;
    for (; m >= most; m -= most, c += most * ldc, a += most * a_row)
        micro(c, ldc, a, b, ldb, k, add, most, nv, a_row, a_k);
    if (most > 8 && m >= 8) {
        micro(c, ldc, a, b, ldb, k, add, 8, nv, a_row, a_k);
        m -= 8, c += 8 * ldc, a += 8 * a_row;
    }
    switch (m) {
    case 7: micro(c, ldc, a, b, ldb, k, add, 7, nv, a_row, a_k); return;
    case 6: micro(c, ldc, a, b, ldb, k, add, 6, nv, a_row, a_k); return;
    case 5: micro(c, ldc, a, b, ldb, k, add, 5, nv, a_row, a_k); return;
    case 4: micro(c, ldc, a, b, ldb, k, add, 4, nv, a_row, a_k); return;
    case 3: micro(c, ldc, a, b, ldb, k, add, 3, nv, a_row, a_k); return;
    case 2: micro(c, ldc, a, b, ldb, k, add, 2, nv, a_row, a_k); return;
    case 1: micro(c, ldc, a, b, ldb, k, add, 1, nv, a_row, a_k); return;
    default: return;
    }
}

V_FN void multiply(float *c, int ldc, const float *a, const float *b, long long ldb, int m, int nv, int k, bool add,
                   const int a_row, const int a_k)
{
    for (; nv >= V_STRIP; nv -= V_STRIP, c += V_STRIP * VF, b += V_STRIP * VF)
        panel(c, ldc, a, b, ldb, m, k, add, V_STRIP, a_row, a_k);
    if (V_STRIP > 3 && nv == 3)
        panel(c, ldc, a, b, ldb, m, k, add, 3, a_row, a_k);
    else if (V_STRIP > 2 && nv == 2)
        panel(c, ldc, a, b, ldb, m, k, add, 2, a_row, a_k);
    else if (nv == 1)
        panel(c, ldc, a, b, ldb, m, k, add, 1, a_row, a_k);
}

/* A packed by columns: [k][GEMM_LANES]. */
static void multiply_columns(float *c, int ldc, const float *a, const float *b, long long ldb, int m, int nv, int k,
                             bool add)
{
    multiply(c, ldc, a, b, ldb, m, nv, k, add, 1, GEMM_LANES);
}

/* A packed by rows: [m][GEMM_RUN]. */
static void multiply_rows(float *c, int ldc, const float *a, const float *b, long long ldb, int m, int nv, int k,
                          bool add)
{
    multiply(c, ldc, a, b, ldb, m, nv, k, add, GEMM_RUN, 1);
}

/* ---- packing ---- */

/* out[i][ld]: out[i][j] = scale * row j's element i; rows past n are 0, up to a multiple of VF. */
V_FN void pack_transposed(float *out, int ld, const char *const *rows, int n, int width, int dtype, float scale)
{
    for (int j = 0; j < n; j += VF)
        for (int i = 0; i < width; i += VF) {
            const int part = nbhd_min(width - i, VF);
            vf x[VF];
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++)
                x[l] = j + l < n ? v_mul(v_set1(scale), row_load(rows[j + l], dtype, i, part)) : v_zero();
            v_transpose(x);
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++)
                if (l < part)
                    v_store(out + (i + l) * ld + j, x[l]);
        }
}

/* out[j][pad] = row j, n rows step bytes apart, padded with zeros to whole vectors. */
V_FN void pack_rows(float *out, int pad, const char *row, long long step, int n, int width, int dtype)
{
    for (int j = 0; j < n; j++, row += step, out += pad)
        for (int i = 0; i < width; i += VF)
            v_store(out + i, row_load(row, dtype, i, nbhd_min(width - i, VF)));
}
