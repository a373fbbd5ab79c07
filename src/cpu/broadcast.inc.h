/* What the forward and the backward for large windows share. A tile is a box of up to 64 queries of one head (or of
 * several heads that share keys), one a lane. Keys and values are read in place, in the caller's strides: a scalar of a
 * key is broadcast to all lanes. Here are the two products with lanes of queries. */

#include "cpu/tiles.inc.h"
#include "cpu/rows_ahead.inc.h"

/* ---- products ---- */

/* PRODUCT_STEP(a, b, sum) is sum + a b: of floats, or of what an including file takes for one, as pairs of bfloat16. */
#ifndef PRODUCT_STEP
#define PRODUCT_STEP v_fma
#endif

/* Rows that the next call of a microkernel works on. The first-level cache is asked for them a few cache lines at a
 * time: a core can wait for 16, and stands still when more are asked for in a row. */
struct next_rows {
    const float *const *row;
    int count;
};

enum { LINE_FLOATS = CACHE_LINE / 4 };

/* The cache line of each at this column. */
V_FN void ask_column(const struct next_rows next, int column)
{
    for (int r = 0; r < next.count; r++)
        __builtin_prefetch(next.row[r] + column);
}

/* s[n keys][nv vectors] (+)= sum over begin <= i < end of qt[i][nv vectors] * k[key][i]; rows of s and qt are `width`
 * floats apart. begin 0 sets, others add. */
V_FN void qk_micro(const float *qt, int begin, int end, const float *const *k, float *s, const int width, const int n,
                   const int nv, const struct next_rows next)
{
    vf acc[V_ROWS][V_STRIP];
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            acc[r][v] = begin ? v_load(s + r * width + v * VF) : v_zero();
    for (int i = begin; i < end;) {
        const int stop = nbhd_min(i + LINE_FLOATS, end);
        ask_column(next, i);
        for (; i < stop; i++) {
            vf q[V_STRIP];
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                q[v] = v_load(qt + i * width + v * VF);
#pragma GCC unroll 8
            for (int r = 0; r < n; r++) {
                vf key = v_set1(k[r][i]);
#pragma GCC unroll 4
                for (int v = 0; v < nv; v++)
                    acc[r][v] = PRODUCT_STEP(q[v], key, acc[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            v_store(s + r * width + v * VF, acc[r][v]);
}

/* The microkernel of whole strips, a function of its own: inside a large one the compiler runs out of registers for the
 * keys' addresses, and loads them anew for every product. */
static __attribute__((noinline)) void qk_whole(const float *qt, int begin, int end, const float *const *k, float *s,
                                               int width, struct next_rows next)
{
    qk_micro(qt, begin, end, k, s, width, V_ROWS, V_STRIP, next);
}

/* Of qt, so many floats at once as leave half of a first-level cache of 32 KiB to the rest. Sums are the same in
 * whatever panels. */
enum { PANEL_FLOATS = 4096 };

/* floats: of qt, at once. far: the keys are read for the first time. */
V_FN void qk_panel(const float *qt, int d, const float *const *k, int keys, float *s, const int width, const int nv,
                   int floats, bool far, struct rows_ahead *ahead)
{
    const int panel = floats / width;
    for (int begin = 0; begin < d; begin += panel) {
        const int end = nbhd_min(begin + panel, d);
        int i = 0;
        for (; i + V_ROWS <= keys; i += V_ROWS) {
            if (ahead && begin == 0)
                ask_rows(ahead);
            const struct next_rows next = {k + i + V_ROWS, far ? nbhd_min(V_ROWS, keys - i - V_ROWS) : 0};
            if (nv == V_STRIP)
                qk_whole(qt, begin, end, k + i, s + i * width, width, next);
            else
                qk_micro(qt, begin, end, k + i, s + i * width, width, V_ROWS, nv, next);
        }
        if (i + 4 <= keys) {
            qk_micro(qt, begin, end, k + i, s + i * width, width, 4, nv, (struct next_rows){0});
            i += 4;
        }
        for (; i < keys; i++)
            qk_micro(qt, begin, end, k + i, s + i * width, width, 1, nv, (struct next_rows){0});
    }
}

/* ot[n columns][nv vectors] = alpha * ot + sum over keys of p[key][nv vectors] * v[key][column]; rows of p and ot are
 * `width` floats apart. */
V_FN void pv_micro(const float *p, const float *const *value, int column, int keys, const float *alpha, float *ot,
                   const int width, const int n, const int nv)
{
    vf acc[V_ROWS][V_STRIP];
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) {
        vf a = v_load(alpha + v * VF);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++)
            acc[r][v] = v_mul(a, v_load(ot + r * width + v * VF));
    }
    for (int i = 0; i < keys; i++) {
        const float *row = value[i] + column;
        vf x[V_STRIP];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            x[v] = v_load(p + i * width + v * VF);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) {
            vf y = v_set1(row[r]);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                acc[r][v] = PRODUCT_STEP(x[v], y, acc[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            v_store(ot + r * width + v * VF, acc[r][v]);
}

/* As qk_whole. */
static __attribute__((noinline)) void pv_whole(const float *p, const float *const *value, int column, int keys,
                                               const float *alpha, float *ot, int width)
{
    pv_micro(p, value, column, keys, alpha, ot, width, V_ROWS, V_STRIP);
}

V_FN void pv_panel(const float *p, const float *const *value, int columns, int keys, const float *alpha, float *ot,
                   const int width, const int nv, struct rows_ahead *ahead)
{
    int c = 0;
    for (; c + V_ROWS <= columns && c + 8 != columns; c += V_ROWS) { /* the last 8 as 4 and 4: 2 alone are slow */
        if (ahead)
            ask_rows(ahead);
        if (nv == V_STRIP)
            pv_whole(p, value, c, keys, alpha, ot + c * width, width);
        else
            pv_micro(p, value, c, keys, alpha, ot + c * width, width, V_ROWS, nv);
    }
    for (; c + 4 <= columns; c += 4)
        pv_micro(p, value, c, keys, alpha, ot + c * width, width, 4, nv);
    if (c + 2 <= columns) {
        pv_micro(p, value, c, keys, alpha, ot + c * width, width, 2, nv);
        c += 2;
    }
    if (c < columns)
        pv_micro(p, value, c, keys, alpha, ot + c * width, width, 1, nv);
}

/* The two products of a strip of nv <= V_STRIP vectors of lanes, whose rows are `width` floats apart. */
static inline void qk_strip(const float *qt, int d, const float *const *k, int keys, float *s, const int width, int nv,
                                int floats, bool far, struct rows_ahead *ahead)
{
    switch (nv) {
    case 1: qk_panel(qt, d, k, keys, s, width, 1, floats, far, ahead); return;
#if V_STRIP > 2
    case 2: qk_panel(qt, d, k, keys, s, width, 2, floats, far, ahead); return;
    case 3: qk_panel(qt, d, k, keys, s, width, 3, floats, far, ahead); return;
#endif
    default: qk_panel(qt, d, k, keys, s, width, V_STRIP, floats, far, ahead); return;
    }
}

static inline void pv_strip(const float *p, const float *const *value, int keys, int columns, const float *alpha,
                                float *ot, const int width, int nv, struct rows_ahead *ahead)
{
    switch (nv) {
    case 1: pv_panel(p, value, columns, keys, alpha, ot, width, 1, ahead); return;
#if V_STRIP > 2
    case 2: pv_panel(p, value, columns, keys, alpha, ot, width, 2, ahead); return;
    case 3: pv_panel(p, value, columns, keys, alpha, ot, width, 3, ahead); return;
#endif
    default: pv_panel(p, value, columns, keys, alpha, ot, width, V_STRIP, ahead); return;
    }
}

/* Both over all of a tile's vectors, whose rows are FWD_LANES floats apart. */
static inline void block_scores(const float *qt, int d, const float *const *k, int keys, int vectors, float *s,
                                int floats, struct rows_ahead *ahead)
{
    for (int v = 0; v < vectors; v += V_STRIP)
        qk_strip(qt + v * VF, d, k, keys, s + v * VF, FWD_LANES, nbhd_min(V_STRIP, vectors - v), floats, v == 0, ahead);
}

static inline void block_output(const float *p, const float *const *value, int keys, int columns, int vectors,
                                const float *alpha, float *ot, struct rows_ahead *ahead)
{
    for (int v = 0; v < vectors; v += V_STRIP)
        pv_strip(p + v * VF, value, keys, columns, alpha + v * VF, ot + v * VF, FWD_LANES,
                 nbhd_min(V_STRIP, vectors - v), ahead);
}

/* m[nv vectors] = the largest of the keys' scores, whose rows are `width` floats apart. */
V_FN void strip_maximum(const float *s, int width, int keys, vf *m, const int nv)
{
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++)
        m[v] = v_set1(-INFINITY);
    for (int i = 0; i < keys; i++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            m[v] = v_max(v_load(s + i * width + v * VF), m[v]);
}

/* Of keys [begin, end) of a block, whose scores are s: s = factor * s + log2(e) * bias, of n vectors of lanes from the
 * tile's vector `first` on, which begins at s. */
static inline void strip_bias(const struct key_block *b, int begin, int end, const struct tile *t, float factor,
                              float *s, int width, int first, int n)
{
    for (int i = begin; i < end; i++)
        for (int v = 0; v < n; v++) {
            float *x = s + (i - begin) * width + v * VF;
            unsigned bits = b->bias[i] ? (unsigned)(b->bits[i] >> ((first + v) * VF)) & V_ALL : 0;
            vf bias = v_gather(b->bias[i], v_iload(t->bias + (first + v) * VF), bits);
            v_store(x, v_fma(v_load(x), v_set1(factor), v_mul(bias, v_set1(LOG2E))));
        }
}

/* Likewise: lanes that do not see a key: -infinity. */
static inline void strip_mask(const struct key_block *b, int begin, int end, uint64_t everyone, float *s, int width,
                              int first, int n)
{
    for (int i = begin; i < end; i++)
        if (b->bits[i] != everyone)
            for (int v = 0; v < n; v++) {
                float *x = s + (i - begin) * width + v * VF;
                v_store(x, v_select((unsigned)(b->bits[i] >> ((first + v) * VF)), v_load(x), v_set1(-INFINITY)));
            }
}
