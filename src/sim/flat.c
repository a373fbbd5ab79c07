/* 1-D tiles of flattened tokens. Axes do not separate here, so tiles are walked: a query tile is cut into runs along
 * the last axis, and each run marks the intervals of flattened keys that some, and that all, of its queries see. */
#include <stdlib.h>
#include <string.h>
#include "sim/sim.h"

#define MAX_STEPS 2147483648.0 /* marks of intervals: about ten seconds */

struct mark {
    int query_tile; /* the last query tile that visited this key tile, + 1 */
    int run;        /* the last run that covered part of it */
    int covered;    /* keys of it that all queries of that run see */
    int whole_runs; /* runs of the query tile that see it whole */
};

struct walk {
    const struct nbhd_axis *axis; /* [3] */
    int kv_tile, query_tile, run, runs;
    struct mark *marks; /* [key tiles] */
    int *visited;       /* key tiles of this query tile */
    int count;
};

static void visit(struct walk *w, long long begin, long long end)
{
    for (long long i = begin / w->kv_tile; i * w->kv_tile < end; i++) {
        struct mark *m = &w->marks[i];
        if (m->query_tile != w->query_tile) {
            m->query_tile = w->query_tile;
            m->whole_runs = 0;
            w->visited[w->count++] = (int)i;
        }
    }
}

static void cover(struct walk *w, long long begin, long long end)
{
    for (long long i = begin / w->kv_tile; i * w->kv_tile < end; i++) {
        struct mark *m = &w->marks[i];
        if (m->run != w->run) {
            m->run = w->run;
            m->covered = 0;
        }
        long long from = i * w->kv_tile, to = from + w->kv_tile;
        m->covered += (int)((end < to ? end : to) - (begin > from ? begin : from));
        m->whole_runs += m->covered == w->kv_tile;
    }
}

/* Tokens base + group + dilation * [r.begin, r.end). Without gaps longer than a tile they touch every tile between. */
static void visit_dilated(struct walk *w, long long base, int group, int dilation, struct nbhd_range r)
{
    if (r.end <= r.begin)
        return;
    long long first = base + group + (long long)dilation * r.begin;
    if (dilation <= w->kv_tile) {
        visit(w, first, first + (long long)dilation * (r.end - 1 - r.begin) + 1);
        return;
    }
    for (int e = r.begin; e < r.end; e++, first += dilation)
        visit(w, first, first + 1);
}

/* Queries [x0, x1) of one row, against one row of keys that starts at flattened token base. */
static void mark_row(struct walk *w, long long base, int x0, int x1)
{
    const struct nbhd_axis a = w->axis[2];
    const int d = a.dilation, groups = nbhd_min(d, x1 - x0);
    for (int i = 0; i < groups; i++) {
        int g = (x0 + i) % d, n = nbhd_group_size(a, g), first = (x0 + i) / d, last = first + (x1 - 1 - x0 - i) / d;
        struct nbhd_range q = nbhd_range_of(first, last + 1), all = nbhd_tile_all(a, n, q);
        visit_dilated(w, base, g, d, nbhd_tile_any(a, n, q));
        if (groups > 1)
            continue; /* no key is seen by queries of two groups */
        for (int e = all.begin; e < all.end && d > 1; e++)
            cover(w, base + g + (long long)d * e, base + g + (long long)d * e + 1);
        if (d == 1)
            cover(w, base + all.begin, base + all.end);
    }
}

static void mark_run(struct walk *w, long long row, int x0, int x1)
{
    const struct nbhd_axis a0 = w->axis[0], a1 = w->axis[1];
    const int i0 = (int)(row / a1.length), i1 = (int)(row % a1.length);
    const int g0 = i0 % a0.dilation, g1 = i1 % a1.dilation;
    struct nbhd_range r0 = nbhd_keys(a0, nbhd_group_size(a0, g0), i0 / a0.dilation);
    struct nbhd_range r1 = nbhd_keys(a1, nbhd_group_size(a1, g1), i1 / a1.dilation);
    w->run++;
    w->runs++;
    for (int k0 = r0.begin; k0 < r0.end; k0++)
        for (int k1 = r1.begin; k1 < r1.end; k1++) {
            long long key_row = (g0 + (long long)k0 * a0.dilation) * a1.keys + g1 + (long long)k1 * a1.dilation;
            mark_row(w, key_row * w->axis[2].keys, x0, x1);
        }
}

static void walk_tiles(struct walk *w, long long tokens, int q_tile, nbhd_sim_counts *counts, double *visited,
                       double *full)
{
    const int width = w->axis[2].length;
    for (long long t = 0; t < tokens; t += q_tile) {
        const long long end = t + q_tile < tokens ? t + q_tile : tokens;
        w->query_tile++;
        w->count = w->runs = 0;
        for (long long x = t; x < end;) {
            long long row = x / width, stop = (row + 1) * width < end ? (row + 1) * width : end;
            mark_run(w, row, (int)(x - row * width), (int)(stop - row * width));
            x = stop;
        }
        for (int i = 0; i < w->count; i++)
            *full += w->marks[w->visited[i]].whole_runs == w->runs;
        *visited += w->count;
        counts->tiles_outer += 1;
        if (w->count > counts->visited_max)
            counts->visited_max = w->count;
    }
}

static double steps_of(const struct nbhd_sim_case *c, double tokens)
{
    const struct nbhd_axis *a = c->problem.axis;
    double rows = (double)a[0].window * a[1].window;
    double runs = tokens / c->q_tile[2] + tokens / a[2].length;
    double marks = 2 + 2.0 * a[2].window * a[2].dilation / c->kv_tile[2];
    if (a[2].dilation > 1)
        marks = nbhd_min(a[2].dilation, c->q_tile[2]) * (2.0 + a[2].window);
    return runs * rows * marks;
}

nbhd_status nbhd_sim_flat_count(const struct nbhd_sim_case *c, nbhd_sim_counts *counts)
{
    const struct nbhd_axis *a = c->problem.axis;
    double tokens = 1, keys = 1;
    *counts = (nbhd_sim_counts){.size = sizeof *counts, .pairs = 1};
    for (int i = 0; i < 3; i++) {
        tokens *= a[i].length;
        keys *= a[i].keys;
        counts->pairs *= nbhd_axis_pairs(a[i]);
    }
    counts->pairs += tokens * c->problem.desc.extra;
    const int kv_tile = c->kv_tile[2];
    const double key_tiles = (double)(long long)((keys + kv_tile - 1) / kv_tile);
    if (steps_of(c, tokens) > MAX_STEPS || key_tiles > 1 << 26)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED,
                         "tiling is flat; %.0f queries with windows of %.3g keys would take %.1g steps to count, at "
                         "most %.1g",
                         tokens, counts->pairs / tokens, steps_of(c, tokens), MAX_STEPS);
    struct walk w = {.axis = a, .kv_tile = kv_tile};
    w.marks = calloc((size_t)key_tiles, sizeof *w.marks);
    w.visited = malloc((size_t)key_tiles * sizeof *w.visited);
    nbhd_status status = NBHD_OK;
    if (w.marks && w.visited) {
        double visited = 0, full = 0;
        counts->tiles_total = key_tiles;
        walk_tiles(&w, (long long)tokens, c->q_tile[2], counts, &visited, &full);
        nbhd_sim_finish_flat(c, visited, full, counts);
    } else {
        status = nbhd_fail(NBHD_ERROR_MEMORY, "no memory for the marks of %.0f key tiles", key_tiles);
    }
    free(w.marks);
    free(w.visited);
    return status;
}
