/* Counting tiles, per axis: see tiles.h. */
#include "core/tiles.h"

/* Tiles of the grid that starts at origin, and goes on before it where a periodic axis is unwrapped, which touch r. */
static int tiles_over(struct nbhd_range r, int tile, int origin)
{
    if (r.end <= r.begin)
        return 0;
    return (nbhd_image(tile, r.end - 1 - origin) - nbhd_image(tile, r.begin - origin)) / tile + 1;
}

/* Tiles of the grid that lie wholly inside r. */
static int tiles_inside(struct nbhd_range r, int tile, int origin)
{
    int first = nbhd_image(tile, r.begin - origin + tile - 1), end = nbhd_image(tile, r.end - origin);
    return r.end > r.begin && end > first ? (end - first) / tile : 0;
}

/* Who stays and who is visited: queries visit keys forward; keys visit queries where dK and dV are summed. */
enum roles { QUERIES_STAY, KEYS_STAY };

static int stay_count(struct nbhd_axis a, int g, enum roles roles)
{
    return roles == KEYS_STAY && a.keys != a.length ? a.keys : nbhd_group_size(a, g);
}

static struct nbhd_range union_of(struct nbhd_axis a, int n, struct nbhd_range r, enum roles roles)
{
    return roles == QUERIES_STAY ? nbhd_tile_any(a, n, r) : nbhd_tile_any_queries(a, n, r);
}

/* n: queries of the group; end: where those that stay end. */
static struct nbhd_tile tile_at(struct nbhd_axis a, int n, int end, int begin, int stay, int visit,
                                enum nbhd_tiling tiling, enum roles roles)
{
    struct nbhd_tile t;
    t.q = nbhd_range_of(begin, nbhd_min(begin + stay, end));
    t.any = union_of(a, n, t.q, roles);
    t.all = roles == QUERIES_STAY ? nbhd_tile_all(a, n, t.q) : nbhd_tile_all_queries(a, n, t.q);
    int origin = tiling == NBHD_TILING_STATIC ? 0 : t.any.begin;
    t.visited = tiles_over(t.any, visit, origin);
    t.full = tiles_inside(t.all, visit, origin);
    return t;
}

struct nbhd_tile nbhd_tile_at(struct nbhd_axis a, int n, int q, int q_tile, int k_tile, enum nbhd_tiling tiling)
{
    return tile_at(a, n, n, q, q_tile, k_tile, tiling, QUERIES_STAY);
}

struct nbhd_tile nbhd_tile_at_inverse(struct nbhd_axis a, int n, int k, int k_tile, int q_tile, enum nbhd_tiling tiling)
{
    int keys = a.keys != a.length ? a.keys : n;
    return tile_at(a, n, keys, k, k_tile, q_tile, tiling, KEYS_STAY);
}

static struct nbhd_tile_count count_tiles(struct nbhd_axis a, int stay, int visit, enum nbhd_tiling tiling,
                                          enum roles roles)
{
    struct nbhd_tile_count count = {0, 0, 0, 0, 0};
    for (int g = 0; g < a.dilation; g++) {
        int n = nbhd_group_size(a, g), end = stay_count(a, g, roles);
        for (int x = 0; x < end; x += stay) {
            struct nbhd_tile t = tile_at(a, n, end, x, stay, visit, tiling, roles);
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

struct nbhd_tile_count nbhd_tiles_count(struct nbhd_axis a, int q_tile, int k_tile, enum nbhd_tiling tiling)
{
    return count_tiles(a, q_tile, k_tile, tiling, QUERIES_STAY);
}

struct nbhd_tile_count nbhd_tiles_count_inverse(struct nbhd_axis a, int k_tile, int q_tile, enum nbhd_tiling tiling)
{
    return count_tiles(a, k_tile, q_tile, tiling, KEYS_STAY);
}

static double split_tiles(struct nbhd_axis a, int stay, int visit, enum nbhd_tiling tiling, int parts, enum roles roles)
{
    double touched = 0;
    const int part = stay / parts;
    for (int g = 0; g < a.dilation; g++) {
        int n = nbhd_group_size(a, g), end = stay_count(a, g, roles);
        for (int x = 0; x < end; x += stay) {
            struct nbhd_tile t = tile_at(a, n, end, x, stay, visit, tiling, roles);
            int origin = tiling == NBHD_TILING_STATIC ? 0 : t.any.begin;
            for (int p = t.q.begin; p < t.q.end; p += part)
                touched +=
                    tiles_over(union_of(a, n, nbhd_range_of(p, nbhd_min(p + part, t.q.end)), roles), visit, origin);
        }
    }
    return touched;
}

double nbhd_tiles_split(struct nbhd_axis a, int q_tile, int k_tile, enum nbhd_tiling tiling, int parts)
{
    return split_tiles(a, q_tile, k_tile, tiling, parts, QUERIES_STAY);
}

double nbhd_tiles_split_inverse(struct nbhd_axis a, int k_tile, int q_tile, enum nbhd_tiling tiling, int parts)
{
    return split_tiles(a, k_tile, q_tile, tiling, parts, KEYS_STAY);
}

double nbhd_axis_tiles(struct nbhd_axis a, int tile)
{
    double tiles = 0;
    for (int g = 0; g < a.dilation; g++)
        tiles += (nbhd_group_size(a, g) + tile - 1) / tile;
    return tiles;
}

/* The queries of a stride group share their leader, so over the group each end of the window stands still or moves by
 * one a query: its first and last query tell the sum. Away from the borders all stride groups are alike. */
static double group_pairs(struct nbhd_axis a, int n)
{
    double pairs = 0;
    for (int q = 0; q < n;) {
        const int last = nbhd_min(n - q, a.stride) + q - 1;
        const struct nbhd_range first_keys = nbhd_keys(a, n, q), last_keys = nbhd_keys(a, n, last);
        const double ends = (double)first_keys.end + last_keys.end - first_keys.begin - last_keys.begin;
        const int room = first_keys.begin > 0 ? n - q - a.window : 0; /* to where a window may reach the end */
        const int alike = nbhd_max(room / a.stride, 1);
        pairs += (last - q + 1) * ends / 2 * alike;
        q = alike > 1 ? q + alike * a.stride : last + 1;
    }
    return pairs;
}

double nbhd_axis_pairs(struct nbhd_axis a)
{
    if (a.keys != a.length)
        return (double)a.length * a.keys;
    if (a.edge == NBHD_EDGE_NEAREST || a.edge == NBHD_EDGE_PERIODIC)
        return (double)a.length * a.window;
    const int n = nbhd_group_size(a, 0), longs = a.length - (n - 1) * a.dilation; /* other groups are shorter by one */
    return longs * group_pairs(a, n) + (a.dilation - longs) * group_pairs(a, n - 1);
}
