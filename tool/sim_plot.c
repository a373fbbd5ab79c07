/* Two panels: speedup against stride, a curve per window; and against window, a curve per stride. Speedups on a
 * logarithmic axis. Dashed: by FLOPs alone. Curves: what the mean tile allows. Rings: measured. */
#include "sim_plot.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "canvas.h"
#include "tool.h"

enum { INK = 0x333333, FAINT = 0xdddddd, SERIES = 4, POINTS = 512 };
static const int series_colours[SERIES] = {0x2b6ca3, 0xd4760a, 0x1a7f37, 0x7b3294};

struct point {
    double x, y;
    int series; /* -1: of none that is drawn */
};

struct panel {
    double left, top, width, height;
    double x0, x1, y0, y1; /* log2 of the axes' ends */
};

struct plot {
    nbhd_desc desc;
    nbhd_sim_tiles tiles;
    const nbhd_sim_sample *samples;
    int count;
    double dense_ms; /* 0: nothing measured */
};

/* ---- numbers ---- */

static double axis_product(const int *values, int rank)
{
    double p = 1;
    for (int i = 0; i < rank; i++)
        p *= values[i];
    return p;
}

static int bound(const struct plot *p, const int *window, const int *stride, nbhd_sim_counts *c)
{
    nbhd_desc d = p->desc;
    for (int i = 0; i < d.rank; i++) {
        d.window[i] = window[i];
        d.stride[i] = stride[i] > window[i] ? window[i] : stride[i];
    }
    *c = (nbhd_sim_counts)NBHD_SIM_COUNTS_INIT;
    nbhd_status status = nbhd_sim_count(&d, &p->tiles, c);
    return status ? tool_fail_library(status) : TOOL_DONE;
}

/* Windows of the left panel: the problem's, half, three quarters and half as much again, on the key tile's grid. */
static void series_window(const struct plot *p, int series, int window[3])
{
    static const int parts[SERIES] = {4, 2, 3, 6};
    for (int i = 0; i < p->desc.rank; i++) {
        const int longest = p->desc.length[i] / (p->desc.dilation[i] ? p->desc.dilation[i] : 1);
        const int own = p->desc.window[i] ? p->desc.window[i] : longest, tile = p->tiles.kv_tile[i];
        int w = own * parts[series] / 4;
        if (series && w > tile)
            w = w / tile * tile;
        window[i] = w < 1 ? 1 : w > longest ? longest : w;
    }
}

static int by_x(const void *a, const void *b)
{
    const struct point *p = a, *q = b;
    return p->x != q->x ? p->x < q->x ? -1 : 1 : (p->y > q->y) - (p->y < q->y);
}

/* All strides that are powers of two or the window, on each axis. */
static int stride_points(const struct plot *p, const int window[3], struct point points[POINTS], int *count)
{
    int steps[3] = {1, 1, 1}, status;
    for (int i = 0; i < p->desc.rank; i++)
        for (int s = 1; s < window[i]; s *= 2)
            steps[i]++;
    *count = 0;
    for (int a = 0; a < steps[0]; a++)
        for (int b = 0; b < steps[1]; b++)
            for (int c = 0; c < steps[2] && *count < POINTS; c++) {
                int stride[3] = {1 << a, 1 << b, 1 << c};
                nbhd_sim_counts counts;
                if ((status = bound(p, window, stride, &counts)))
                    return status;
                for (int i = 0; i < p->desc.rank; i++)
                    stride[i] = stride[i] > window[i] ? window[i] : stride[i];
                points[(*count)++] =
                    (struct point){log2(axis_product(stride, p->desc.rank)), log2(counts.bound_mean), 0};
            }
    qsort(points, (size_t)*count, sizeof *points, by_x);
    return TOOL_DONE;
}

static bool same_problem(const nbhd_desc *a, const nbhd_desc *b)
{
    const int dv_a = a->head_dim_v ? a->head_dim_v : a->head_dim, dv_b = b->head_dim_v ? b->head_dim_v : b->head_dim;
    return a->pass == b->pass && a->dtype == b->dtype && a->rank == b->rank && a->head_dim == b->head_dim &&
           dv_a == dv_b && (a->heads ? a->heads : 1) == (b->heads ? b->heads : 1) &&
           (a->batch ? a->batch : 1) == (b->batch ? b->batch : 1) && a->extra == b->extra &&
           !memcmp(a->length, b->length, sizeof a->length);
}

/* Self attention over the same tokens: whole windows, or one axis of as many tokens. */
static bool is_dense(const nbhd_desc *own, const nbhd_desc *d)
{
    nbhd_desc flat = *d;
    for (int i = 0; i < d->rank; i++)
        if (d->window[i] && d->window[i] != d->length[i])
            return false;
    if (axis_product(d->length, d->rank) != axis_product(own->length, own->rank))
        return false;
    flat.rank = own->rank;
    memcpy(flat.length, own->length, sizeof flat.length);
    return same_problem(own, &flat);
}

static int find_dense(struct plot *p)
{
    for (int i = 0; i < p->count; i++)
        if (is_dense(&p->desc, &p->samples[i].desc))
            if (!(p->dense_ms > 0) || p->samples[i].ms < p->dense_ms)
                p->dense_ms = p->samples[i].ms;
    if (p->count && !(p->dense_ms > 0))
        return tool_fail(TOOL_USAGE, "--measured has no row of self attention over these tokens to compare with");
    return TOOL_DONE;
}

/* ---- drawing ---- */

static double place_x(const struct panel *a, double x) { return a->left + (x - a->x0) / (a->x1 - a->x0) * a->width; }
static double place_y(const struct panel *a, double y) { return a->top + (a->y1 - y) / (a->y1 - a->y0) * a->height; }

static void draw_frame(struct canvas *c, const struct panel *a, const char *name, const char *x_name, bool percent)
{
    canvas_words(c, a->left, a->top - 10, 14, INK, CANVAS_LEFT, "%s", name);
    const int skip = a->x1 - a->x0 > (percent ? 7 : 12) ? 2 : 1;
    for (int x = (int)ceil(a->x0); x <= a->x1; x += skip) {
        const double at = place_x(a, x);
        canvas_line(c, at, a->top, at, a->top + a->height, FAINT, 1, false);
        if (percent)
            canvas_words(c, at, a->top + a->height + 16, 12, INK, CANVAS_MIDDLE, x < -3 ? "%.2g%%" : "%.3g%%",
                         100 * exp2(x));
        else
            canvas_words(c, at, a->top + a->height + 16, 12, INK, CANVAS_MIDDLE, "%.0f", exp2(x));
    }
    for (int y = (int)ceil(a->y0); y <= a->y1; y++) {
        const double at = place_y(a, y);
        canvas_line(c, a->left, at, a->left + a->width, at, FAINT, 1, false);
        canvas_words(c, a->left - 6, at + 4, 12, INK, CANVAS_RIGHT, "%.3gx", exp2(y));
    }
    canvas_box(c, a->left, a->top, a->width, a->height, CANVAS_NONE, INK, 1);
    canvas_words(c, a->left + a->width / 2, a->top + a->height + 36, 13, INK, CANVAS_MIDDLE, "%s", x_name);
}

static void draw_measured(struct canvas *c, const struct panel *a, const struct point *points, int count)
{
    for (int i = 0; i < count; i++)
        if (points[i].x >= a->x0 && points[i].x <= a->x1 && points[i].y >= a->y0 && points[i].y <= a->y1) {
            const int colour = points[i].series < 0 ? INK : series_colours[points[i].series];
            canvas_disc(c, place_x(a, points[i].x), place_y(a, points[i].y), 5, 0xffffff, colour);
            canvas_disc(c, place_x(a, points[i].x), place_y(a, points[i].y), 3, colour, CANVAS_NONE);
        }
}

static void draw_key(struct canvas *c, const struct panel *a, int series, const char *text)
{
    const double y = a->top + a->height + 62 + 18 * series;
    canvas_line(c, a->left, y - 4, a->left + 24, y - 4, series_colours[series], 2, false);
    canvas_words(c, a->left + 32, y, 12, INK, CANVAS_LEFT, "%s", text);
}

static void format_axes(const char *prefix, const int *values, int rank, char *text, size_t room)
{
    int length = snprintf(text, room, "%s%d", prefix, values[0]);
    for (int i = 1; i < rank; i++)
        length += snprintf(text + length, room - (size_t)length, "x%d", values[i]);
}

/* ---- left: against stride ---- */

static int measured_by_stride(const struct plot *p, struct point *points)
{
    int count = 0;
    for (int i = 0; i < p->count && count < POINTS; i++) {
        const nbhd_desc *d = &p->samples[i].desc;
        if (!same_problem(&p->desc, d) || is_dense(&p->desc, d))
            continue;
        int stride[3] = {1, 1, 1}, window[3] = {0, 0, 0};
        for (int a = 0; a < d->rank; a++)
            stride[a] = d->stride[a] ? d->stride[a] : 1;
        for (int s = 0; s < SERIES; s++) {
            series_window(p, s, window);
            if (memcmp(window, d->window, sizeof(int) * (size_t)d->rank))
                continue;
            points[count++] =
                (struct point){log2(axis_product(stride, d->rank)), log2(p->dense_ms / p->samples[i].ms), s};
            break;
        }
    }
    return count;
}

static int draw_strides(struct canvas *c, const struct plot *p, const struct panel *a)
{
    struct point points[POINTS];
    char name[96], text[192];
    int count, status;
    draw_frame(c, a, "speedup over self attention against stride", "queries that share a window (product of strides)",
               false);
    for (int s = 0; s < SERIES; s++) {
        int window[3] = {0, 0, 0};
        nbhd_sim_counts counts;
        series_window(p, s, window);
        if ((status = bound(p, window, (int[3]){1, 1, 1}, &counts)) ||
            (status = stride_points(p, window, points, &count)))
            return status;
        const double flop = place_y(a, log2(counts.bound_flop));
        canvas_line(c, a->left, flop, a->left + a->width, flop, series_colours[s], 1, true);
        double best = points[0].y, last_x = place_x(a, points[0].x);
        for (int i = 0; i < count; i++) { /* dots: every stride; the curve: the best of no larger product */
            const double x = place_x(a, points[i].x);
            canvas_disc(c, x, place_y(a, points[i].y), 1.2, series_colours[s], CANVAS_NONE);
            if (points[i].y <= best && i)
                continue;
            canvas_line(c, last_x, place_y(a, best), x, place_y(a, best), series_colours[s], 2, false);
            canvas_line(c, x, place_y(a, best), x, place_y(a, points[i].y), series_colours[s], 2, false);
            best = points[i].y;
            last_x = x;
        }
        canvas_line(c, last_x, place_y(a, best), a->left + a->width, place_y(a, best), series_colours[s], 2, false);
        format_axes("w", window, p->desc.rank, name, sizeof name);
        snprintf(text, sizeof text, "%s: %.3gx by FLOPs, %.3gx at stride 1", name, counts.bound_flop,
                 counts.bound_mean);
        draw_key(c, a, s, text);
    }
    draw_measured(c, a, points, measured_by_stride(p, points));
    return TOOL_DONE;
}

/* ---- right: against window ---- */

static int measured_by_window(const struct plot *p, struct point *points)
{
    int count = 0;
    for (int i = 0; i < p->count && count < POINTS; i++) {
        const nbhd_desc *d = &p->samples[i].desc;
        if (!same_problem(&p->desc, d) || is_dense(&p->desc, d))
            continue;
        double share = 1, stride = 1;
        for (int a = 0; a < d->rank; a++) {
            share *= (double)(d->window[a] ? d->window[a] : d->length[a]) / d->length[a];
            stride *= d->stride[a] ? d->stride[a] : 1;
        }
        points[count++] = (struct point){log2(share), log2(p->dense_ms / p->samples[i].ms), stride > 1 ? 1 : 0};
    }
    return count;
}

static int draw_windows(struct canvas *c, const struct plot *p, const struct panel *a)
{
    static const char *const names[] = {"stride 1: sliding", "stride of the query tile",
                                        "stride of the window: blocked"};
    struct point points[POINTS];
    draw_frame(c, a, "and against window", "share of the pairs that is left", true);
    for (int s = 0; s < 3; s++) {
        double last_x = 0, last_y = 0;
        for (int k = 1; k <= 48; k++) {
            int window[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, status;
            double share = 1;
            nbhd_sim_counts counts;
            for (int i = 0; i < p->desc.rank; i++) {
                const int longest = p->desc.length[i] / (p->desc.dilation[i] ? p->desc.dilation[i] : 1);
                window[i] = longest * k / 48 > 0 ? longest * k / 48 : 1;
                stride[i] = s == 0 ? 1 : s == 1 ? p->tiles.q_tile[i] : window[i];
                share *= (double)window[i] / p->desc.length[i];
            }
            if ((status = bound(p, window, stride, &counts)))
                return status;
            const double x = place_x(a, log2(share)), y = place_y(a, log2(counts.bound_mean));
            const bool inside =
                log2(share) >= a->x0 && log2(counts.bound_mean) <= a->y1 && log2(counts.bound_mean) >= a->y0;
            if (inside && last_x > 0)
                canvas_line(c, last_x, last_y, x, y, series_colours[s], 2, false);
            last_x = inside ? x : 0, last_y = y;
        }
        draw_key(c, a, s, names[s]);
    }
    canvas_line(c, place_x(a, fmax(a->x0, -a->y1)), place_y(a, fmin(a->y1, -a->x0)), place_x(a, 0), place_y(a, 0), INK,
                1, true);
    draw_measured(c, a, points, measured_by_window(p, points));
    return TOOL_DONE;
}

/* ---- the picture ---- */

/* The ends of both panels' axes: speedups from a half to the best bound drawn on the left. */
static int scale(const struct plot *p, struct panel *strides, struct panel *windows)
{
    double best = 2, product = 2;
    for (int s = 0; s < SERIES; s++) {
        int window[3] = {0, 0, 0}, status;
        nbhd_sim_counts counts;
        series_window(p, s, window);
        if ((status = bound(p, window, (int[3]){1, 1, 1}, &counts)))
            return status;
        best = fmax(best, counts.bound_flop);
        product = fmax(product, axis_product(window, p->desc.rank));
    }
    strides->x0 = 0, strides->x1 = log2(product);
    strides->y0 = windows->y0 = -1, strides->y1 = windows->y1 = ceil(log2(best) + 0.2);
    windows->x0 = -strides->y1 - 1, windows->x1 = 0;
    return TOOL_DONE;
}

static int choose_tiles(struct plot *p)
{
    nbhd_sim_setting best;
    int found = 0;
    if (p->tiles.q_tile[0] && p->tiles.kv_tile[0])
        return TOOL_DONE;
    nbhd_status status = nbhd_sim_rank(&p->desc, &p->tiles, 1u << p->tiles.tiling, 0, 0, NULL, &best, 1, &found);
    if (status)
        return tool_fail_library(status);
    p->tiles = best.tiles;
    return TOOL_DONE;
}

int sim_plot(const nbhd_desc *desc, const nbhd_sim_tiles *tiles, const nbhd_sim_sample *samples, int count,
             const char *path)
{
    struct plot p = {*desc, *tiles, samples, count, 0};
    struct panel left = {70, 76, 440, 340, 0, 0, 0, 0}, right = {590, 76, 440, 340, 0, 0, 0, 0};
    struct canvas c;
    char line[NBHD_TEXT], q[64], kv[64];
    if (desc->kv_length[0])
        return tool_fail(TOOL_USAGE, "--plot: cross attention has no window or stride to draw against");
    if (tiles->tiling == NBHD_SIM_FLAT)
        return tool_fail(TOOL_USAGE, "--plot draws boxes, not flat tiles");
    int status = find_dense(&p);
    if (status || (status = choose_tiles(&p)) || (status = scale(&p, &left, &right)))
        return status;
    canvas_begin(&c, 1060, 560);
    nbhd_desc_format(desc, line, sizeof line);
    format_axes("q tile ", p.tiles.q_tile, desc->rank, q, sizeof q);
    format_axes("kv tile ", p.tiles.kv_tile, desc->rank, kv, sizeof kv);
    canvas_words(&c, 16, 24, 14, INK, CANVAS_LEFT, "%.90s", line);
    canvas_words(&c, 16, 44, 12, INK, CANVAS_LEFT,
                 "%s, %s, %s. Curves: bound by tiles visited. Dashed: by FLOPs alone.%s",
                 nbhd_sim_tiling_name(p.tiles.tiling), q, kv, count ? " Rings: measured." : "");
    if (!(status = draw_strides(&c, &p, &left)) && !(status = draw_windows(&c, &p, &right)))
        status = canvas_write(&c, path);
    canvas_end(&c);
    return status;
}
