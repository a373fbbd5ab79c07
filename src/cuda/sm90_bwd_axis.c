/* Tiles of keys of one axis, by what they need of query boxes: see sm90_bwd_search.h. Counts are exact. */
#include <stdlib.h>
#include "core/tiles.h"
#include "cuda/sm90_bwd_search.h"

static int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* Adds tiles to their class: neighbours are alike. Where there are very many classes, some may stand twice. */
static void add_tiles(struct nbhd_bwd_tiles *t, struct nbhd_bwd_class c)
{
    for (int i = t->classes; i-- > nbhd_max(0, t->classes - NBHD_SM90_BWD_CLASSES - 1);)
        if (t->class[i].length == c.length && t->class[i].begin == c.begin && t->class[i].end == c.end) {
            t->class[i].tiles += c.tiles;
            return;
        }
    t->class[t->classes++] = c;
}

/* The tiles of so many dilation groups of n queries, all alike. */
static void classify(struct nbhd_bwd_tiles *t, struct nbhd_axis axis, int n, int k_extent, int groups)
{
    const int keys = axis.keys == axis.length ? n : axis.keys;
    for (int k = 0; k < keys && groups; k += k_extent) {
        const struct nbhd_range tile = nbhd_range_of(k, nbhd_min(k + k_extent, keys));
        const struct nbhd_range any = nbhd_tile_any_queries(axis, n, tile), all = nbhd_tile_all_queries(axis, n, tile);
        const int length = any.end - any.begin;
        add_tiles(t, (struct nbhd_bwd_class){length, all.begin - any.begin, all.end - any.begin, groups});
        t->tiles += groups;
        t->queries += (double)groups * length;
        t->inner += (double)groups * (all.end - all.begin);
    }
}

struct nbhd_bwd_tiles *nbhd_sm90_bwd_tiles(struct nbhd_bwd_axis *m, int k)
{
    struct nbhd_bwd_tiles *t = m->tiles[k];
    if (t)
        return t;
    t = m->tiles[k] = calloc(1, sizeof *t + 2 * (size_t)ceil_div(m->keys, k) * sizeof *t->class);
    if (t) {
        t->of = m;
        t->extent = k;
        const int n = m->queries, longs = m->axis.length - (n - 1) * m->axis.dilation; /* others are shorter by one */
        classify(t, m->axis, n, k, longs);
        classify(t, m->axis, n - 1, k, m->axis.dilation - longs);
    }
    return t;
}

void nbhd_sm90_bwd_count_boxes(struct nbhd_bwd_tiles *t, int q)
{
    for (int i = 0; i < t->classes; i++) {
        const struct nbhd_bwd_class *c = &t->class[i];
        t->count[q].boxes += c->tiles * nbhd_sm90_bwd_visited(c, q);
        t->count[q].full += c->tiles * nbhd_sm90_bwd_full(c, q);
    }
    t->is_counted[q] = true;
}

/* Boxes of q queries from `begin` on that some query of seen lies in. */
static int boxes_seen(struct nbhd_range seen, int begin, int q)
{
    return seen.end > seen.begin ? (seen.end - 1 - begin) / q - (seen.begin - begin) / q + 1 : 0;
}

/* Of the first dilation group, and of 64 tiles where there are many. */
static double share_seen(const struct nbhd_bwd_axis *m, int k, int q)
{
    const int tiles = ceil_div(m->keys, k), step = nbhd_max(1, tiles / 64);
    double all = 0, halves = 0;
    for (int i = 0; i < tiles; i += step) {
        const int begin = i * k, middle = begin + k / 2, end = nbhd_min(begin + k, m->keys);
        const struct nbhd_range tile = nbhd_range_of(begin, end), low = nbhd_range_of(begin, nbhd_min(middle, end));
        const struct nbhd_range any = nbhd_tile_any_queries(m->axis, m->queries, tile);
        all += 2 * boxes_seen(any, any.begin, q);
        halves += boxes_seen(nbhd_tile_any_queries(m->axis, m->queries, low), any.begin, q);
        if (middle < end)
            halves += boxes_seen(nbhd_tile_any_queries(m->axis, m->queries, nbhd_range_of(middle, end)), any.begin, q);
    }
    return all > 0 ? halves / all : 1;
}

double nbhd_sm90_bwd_seen(struct nbhd_bwd_axis *m, int k, int q)
{
    double *seen = &m->tiles[k]->seen[q];
    if (*seen <= 0)
        *seen = share_seen(m, k, q);
    return *seen;
}

void nbhd_sm90_bwd_drop_tiles(struct nbhd_bwd_axis *m)
{
    for (int k = 0; k <= NBHD_BWD_SM90_ROWS; k++)
        free(m->tiles[k]);
}
