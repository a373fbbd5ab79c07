/* Tile counts of one axis against membership by definition: every tile of queries, and of keys, is looked at pair by
 * pair. */
#include <math.h>
#include "core/tiles.h"
#include "oracle.h"
#include "test.h"

enum { MOST = 48 };

/* One group of an axis as a table; transposed where keys stay. */
struct table {
    int stay, visit; /* elements */
    bool sees[MOST][MOST];
};

struct sums {
    double tiles, visited, full, worst, split;
};

static void fill(struct table *t, const struct nbhd_axis *a, int group, bool inverse)
{
    static const enum oracle_edge edges[] = {ORACLE_NEAREST, ORACLE_CAUSAL, ORACLE_TRUNCATED,
                                            ORACLE_PERIODIC};
    const struct oracle_axis o = {a->length, a->keys, a->window, a->stride, a->dilation, edges[a->edge]};
    const int queries = (a->length - group + a->dilation - 1) / a->dilation;
    const int keys = a->keys != a->length ? a->keys : queries;
    t->stay = inverse ? keys : queries;
    t->visit = inverse ? queries : keys;
    for (int q = 0; q < queries; q++)
        for (int k = 0; k < keys; k++)
            *(inverse ? &t->sees[k][q] : &t->sees[q][k]) =
                oracle_sees(&o, q * a->dilation + group, k * a->dilation + group);
}

static bool some(const struct table *t, int begin, int end, int x)
{
    for (int y = begin; y < end; y++)
        if (t->sees[y][x])
            return true;
    return false;
}

static bool every(const struct table *t, int begin, int end, int x)
{
    for (int y = begin; y < end; y++)
        if (!t->sees[y][x])
            return false;
    return true;
}

/* Tiles of the grid from `origin` that lie between the first and the last element that [begin, end) sees. */
static int touched(const struct table *t, int begin, int end, int tile, int origin)
{
    int count = 0;
    for (int at = origin; at < t->visit; at += tile) {
        bool before = false, after = false; /* or within */
        for (int x = 0; x < t->visit; x++)
            if (some(t, begin, end, x)) {
                before |= x < at + tile;
                after |= x >= at;
            }
        count += before && after;
    }
    return count;
}

static int full(const struct table *t, int begin, int end, int tile, int origin)
{
    int count = 0;
    for (int at = origin; at + tile <= t->visit; at += tile) {
        bool whole = true;
        for (int x = at; x < at + tile; x++)
            whole &= every(t, begin, end, x);
        count += whole;
    }
    return count;
}

static void add_group(const struct table *t, int stay, int visit, bool dynamic, int parts, struct sums *s)
{
    for (int begin = 0; begin < t->stay; begin += stay) {
        const int end = begin + stay < t->stay ? begin + stay : t->stay;
        int origin = 0;
        while (dynamic && !some(t, begin, end, origin))
            origin++;
        const int visited = touched(t, begin, end, visit, origin);
        s->tiles += 1;
        s->visited += visited;
        s->worst = fmax(s->worst, visited);
        s->full += full(t, begin, end, visit, origin);
        for (int p = begin; p < end; p += stay / parts)
            s->split += touched(t, p, p + stay / parts < end ? p + stay / parts : end, visit, origin);
    }
}

static void check_axis(struct nbhd_axis a, int stay, int visit, bool dynamic, bool inverse, int parts)
{
    const enum nbhd_tiling tiling = dynamic ? NBHD_TILING_DYNAMIC : NBHD_TILING_STATIC;
    struct sums s = {0, 0, 0, 0, 0};
    for (int g = 0; g < a.dilation; g++) {
        struct table t;
        fill(&t, &a, g, inverse);
        add_group(&t, stay, visit, dynamic, parts, &s);
    }
    const struct nbhd_tile_count c = inverse ? nbhd_tiles_count_inverse(a, stay, visit, tiling)
                                             : nbhd_tiles_count(a, stay, visit, tiling);
    const double split = inverse ? nbhd_tiles_split_inverse(a, stay, visit, tiling, parts)
                                 : nbhd_tiles_split(a, stay, visit, tiling, parts);
    const bool same = c.q_tiles == s.tiles && c.visited == s.visited && c.full == s.full && c.visited_max == s.worst &&
                      split == s.split;
    CHECK(same,
          "length %d keys %d window %d stride %d dilation %d edge %d, %s tile %d visits %d, %s, %d parts: "
          "tiles %g of %g, visited %g of %g, full %g of %g, worst %g of %g, split %g of %g",
          a.length, a.keys, a.window, a.stride, a.dilation, a.edge, inverse ? "key" : "query", stay, visit,
          dynamic ? "dynamic" : "static", parts, c.q_tiles, s.tiles, c.visited, s.visited, c.full, s.full,
          c.visited_max, s.worst, split, s.split);
    if (!inverse)
        CHECK(nbhd_axis_tiles(a, stay) == s.tiles, "%g of %g", nbhd_axis_tiles(a, stay), s.tiles);
}

static void check_tiles(struct nbhd_axis a)
{
    static const int stays[] = {1, 2, 4, 6}, visits[] = {1, 3, 4, 8};
    for (int i = 0; i < 16; i++)
        for (int way = 0; way < 4; way++) {
            const int stay = stays[i % 4], visit = visits[i / 4];
            check_axis(a, stay, visit, way & 1, way & 2, stay % 2 ? 1 : 2);
            if (stay % 3 == 0)
                check_axis(a, stay, visit, way & 1, way & 2, 3);
        }
}

static void check_pairs(struct nbhd_axis a)
{
    double pairs = 0;
    for (int g = 0; g < a.dilation; g++) {
        struct table t;
        fill(&t, &a, g, false);
        for (int q = 0; q < t.stay; q++)
            for (int k = 0; k < t.visit; k++)
                pairs += t.sees[q][k];
    }
    CHECK(nbhd_axis_pairs(a) == pairs, "length %d window %d: %g of %g", a.length, a.window, nbhd_axis_pairs(a), pairs);
}

/* A periodic axis is the middle third of a truncated one, where strides meet the seams. */
static void check_periodic(int length, int window, int stride)
{
    const struct nbhd_axis a = {length, length, window, stride, 1, NBHD_EDGE_PERIODIC};
    const struct nbhd_axis thrice = {3 * length, 3 * length, window, stride, 1, NBHD_EDGE_TRUNCATED};
    for (int i = 0; i < 16; i++)
        for (int x = 0; x < length; x++) {
            const int stay = 1 + i % 4, visit = i / 4 ? i / 4 + 1 : 1;
            const enum nbhd_tiling tiling = length % visit ? NBHD_TILING_DYNAMIC : (enum nbhd_tiling)(x % 2);
            if (x + stay > length)
                continue;
            const struct nbhd_tile t = nbhd_tile_at(a, length, x, stay, visit, tiling),
                                   u = nbhd_tile_at(thrice, 3 * length, x + length, stay, visit, tiling),
                                   v = nbhd_tile_at_inverse(a, length, x, stay, visit, tiling),
                                   w = nbhd_tile_at_inverse(thrice, 3 * length, x + length, stay, visit, tiling);
            CHECK(t.any.begin + length == u.any.begin && t.visited == u.visited && t.full == u.full &&
                      v.any.begin + length == w.any.begin && v.visited == w.visited && v.full == w.full,
                  "length %d window %d stride %d periodic, tile %d from %d visits %d: %d and %d tiles of %d and %d",
                  length, window, stride, stay, x, visit, t.visited, v.visited, u.visited, w.visited);
        }
    CHECK(nbhd_axis_pairs(a) == (double)length * window, "%g pairs", nbhd_axis_pairs(a));
}

int main(void)
{
    const int longest = test_full() ? 23 : 13;
    for (int length = 1; length <= longest; length += 1 + (length > 8))
        for (int dilation = 1; dilation <= 3 && dilation <= length; dilation++)
            for (int window = 1; window * dilation <= length; window++)
                for (int stride = 1; stride <= window; stride++)
                    for (int edge = NBHD_EDGE_NEAREST; edge <= NBHD_EDGE_TRUNCATED; edge++) {
                        const struct nbhd_axis a = {length, length, window, stride, dilation, edge};
                        check_tiles(a);
                        check_pairs(a);
                    }
    for (int length = 1; length <= longest; length++)
        for (int window = 1; window <= length; window++)
            for (int stride = 1; stride <= window; stride++)
                if (length % stride == 0)
                    check_periodic(length, window, stride);
    const struct nbhd_axis cross = {11, 17, 17, 1, 1, NBHD_EDGE_NEAREST};
    check_tiles(cross);
    check_pairs(cross);
    return test_done();
}
