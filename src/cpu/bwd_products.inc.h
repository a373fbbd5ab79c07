/* The products of the backward for large windows that sum over a tile's queries: dV += P dO and dK += dS Q, added to
 * rows that lie where the sums do. Included by bwd.inc.h. */

/* Q and dO of a tile in strips of as many columns as kv_micro takes: [strip][64][KV_STRIP], so that a strip is
 * contiguous. */
#define KV_STRIP (V_STRIP * VF)

static float *strip_at(float *x, int lane, int column)
{
    return x + (column / KV_STRIP * FWD_LANES + lane) * KV_STRIP + column % KV_STRIP;
}

/* rows[n][nv vectors from column on] += sum over lanes of p[row][lane] * x[lane][0..]; the last vector has `last`
 * columns. */
V_FN void kv_micro(const float *p, const float *x, int lanes, float *const *rows, int column, const int n, const int nv,
                   const int last, const struct next_rows next)
{
    vf acc[V_ROWS][V_STRIP];
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            acc[r][v] = load_up_to(rows[r] + column + v * VF, v + 1 < nv ? VF : last);
    for (int i = 0; i < lanes;) {
        const int stop = nbhd_min(i + LINE_FLOATS, lanes);
        if (i < nv * VF)
            ask_column(next, column + i);
        for (; i < stop; i++) {
            vf y[V_STRIP];
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                y[v] = v_load(x + i * KV_STRIP + v * VF);
#pragma GCC unroll 8
            for (int r = 0; r < n; r++) {
                vf weight = v_set1(p[r * FWD_LANES + i]);
#pragma GCC unroll 4
                for (int v = 0; v < nv; v++)
                    acc[r][v] = v_fma(weight, y[v], acc[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            store_up_to(rows[r] + column + v * VF, acc[r][v], v + 1 < nv ? VF : last);
}

V_FN void kv_panel(const float *p, const float *x, int lanes, float *const *rows, int keys, int column, const int nv,
                   const int last, struct rows_ahead *ahead)
{
    int i = 0;
    for (; i + V_ROWS <= keys; i += V_ROWS) {
        ask_rows(ahead);
        const struct next_rows next = {(const float *const *)rows + i + V_ROWS, nbhd_min(V_ROWS, keys - i - V_ROWS)};
        kv_micro(p + i * FWD_LANES, x, lanes, rows + i, column, V_ROWS, nv, last, next);
    }
    if (i + 4 <= keys) {
        kv_micro(p + i * FWD_LANES, x, lanes, rows + i, column, 4, nv, last, (struct next_rows){0});
        i += 4;
    }
    for (; i < keys; i++)
        kv_micro(p + i * FWD_LANES, x, lanes, rows + i, column, 1, nv, last, (struct next_rows){0});
}

/* rows[key][width] += sum over lanes of p[key][lane] * x[lane][width]; x in strips. */
static void block_gradient(const float *p, const float *x, int lanes, float *const *rows, int keys, int width,
                           struct rows_ahead *ahead)
{
    int column = 0;
    for (; column + KV_STRIP <= width; column += KV_STRIP, x += FWD_LANES * KV_STRIP)
        kv_panel(p, x, lanes, rows, keys, column, V_STRIP, VF, ahead);
    const int left = (width - column + VF - 1) / VF, last = width - column - (left - 1) * VF;
#if V_STRIP > 2
    if (left == 4)
        kv_panel(p, x, lanes, rows, keys, column, 4, last, ahead);
    if (left == 3)
        kv_panel(p, x, lanes, rows, keys, column, 3, last, ahead);
#endif
    if (left == 2)
        kv_panel(p, x, lanes, rows, keys, column, 2, last, ahead);
    if (left == 1)
        kv_panel(p, x, lanes, rows, keys, column, 1, last, ahead);
}
