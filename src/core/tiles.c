/* Counting tiles, per axis: see tiles.h. */
#include "core/tiles.h"

static int tiles_over(struct nbhd_range r, int tile, int origin)
{
    if (r.end <= r.begin)
        return 0;
    return (r.end - 1 - origin) / tile - (r.begin - origin) / tile + 1;
}

/* Tiles of the grid that lie wholly inside r. */
static int tiles_inside(struct nbhd_range r, int tile, int origin)
{
    int first = (r.begin - origin + tile - 1) / tile, end = (r.end - origin) / tile;
    return r.end > r.begin && end > first ? end - first : 0;
}

struct nbhd_tile nbhd_tile_at(struct nbhd_axis a, int n, int q, int q_tile, int k_tile, enum nbhd_tiling tiling)
{
    struct nbhd_tile t;
    t.q = nbhd_range_of(q, nbhd_min(q + q_tile, n));
    t.any = nbhd_tile_any(a, n, t.q);
    t.all = nbhd_tile_all(a, n, t.q);
    int origin = tiling == NBHD_TILING_STATIC ? 0 : t.any.begin;
    t.visited = tiles_over(t.any, k_tile, origin);
    t.full = tiles_inside(t.all, k_tile, origin);
    return t;
}

struct nbhd_tile_count nbhd_tiles_count(struct nbhd_axis a, int q_tile, int k_tile, enum nbhd_tiling tiling)
{
    struct nbhd_tile_count count = {0, 0, 0, 0, 0};
    for (int g = 0; g < a.dilation; g++) {
        int n = nbhd_group_size(a, g);
        for (int q = 0; q < n; q += q_tile) {
            struct nbhd_tile t = nbhd_tile_at(a, n, q, q_tile, k_tile, tiling);
            count.q_tiles += 1;
            count.visited += t.visited;
            count.full += t.full;
            if (t.visited > count.visited_max)
                count.visited_max = t.visited;
        }
    }
    count.pairs = nbhd_axis_pairs(a);
    return count;
}

double nbhd_axis_pairs(struct nbhd_axis a)
{
    double pairs = 0;
    if (a.keys != a.length)
        return (double)a.length * a.keys;
    if (a.edge == NBHD_EDGE_NEAREST)
        return (double)a.length * a.window;
    for (int g = 0; g < a.dilation; g++) {
        int n = nbhd_group_size(a, g);
        for (int q = 0; q < n; q++) {
            struct nbhd_range keys = nbhd_keys(a, n, q);
            pairs += keys.end - keys.begin;
        }
    }
    return pairs;
}
