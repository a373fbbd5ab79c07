/* nbhd_geom.h against membership by definition: every group size up to a limit, every window, stride and edge,
all seven
 * functions; dilation through whole axes; periodic axes unwrapped; and windows drawn by hand, below. */
#include "nbhd_geom.h"
#include "oracle.h"
#include "test.h"

static const enum oracle_edge oracle_edges[] = {ORACLE_NEAREST, ORACLE_CAUSAL, ORACLE_TRUNCATED,
                                            ORACLE_PERIODIC};

struct table {
    int n;
    bool sees[64][64];
};

static void fill(struct table *t, const struct nbhd_axis *a)
{
    const struct oracle_axis o = {a->length, a->keys, a->window, a->stride, a->dilation, oracle_edges[a->edge]};
    t->n = a->length;
    for (int q = 0; q < t->n; q++)
        for (int k = 0; k < t->n; k++)
            t->sees[q][k] = oracle_sees(&o, q, k);
}

static bool inside(struct nbhd_range r, int x) { return r.begin <= x && x < r.end; }

/* Images of x among those that r holds: one where x is seen. */
static int images(struct nbhd_axis a, int n, struct nbhd_range r, int x)
{
    int count = 0;
    for (int i = r.begin; i < r.end; i++)
        count += nbhd_wrap(a, n, i) == x;
    return count;
}

/* Both directions, element by element. */
static bool rows_agree(const struct table *t, struct nbhd_axis a)
{
    bool ok = true;
    for (int q = 0; q < t->n; q++) {
        const struct nbhd_range keys = nbhd_keys(a, t->n, q);
        for (int k = 0; k < t->n; k++) {
            ok &= images(a, t->n, keys, k) == t->sees[q][k];
            ok &= images(a, t->n, nbhd_queries(a, t->n, k), q) == t->sees[q][k];
        }
    }
    return ok;
}

/* Union and intersection over every tile [begin, end) of queries, or of keys (transposed). */
static bool tiles_agree(const struct table *t, struct nbhd_axis a, bool of_keys)
{
    bool ok = true;
    for (int begin = 0; begin < t->n; begin++)
        for (int end = begin + 1; end <= t->n; end++) {
            const struct nbhd_range tile = nbhd_range_of(begin, end);
            const struct nbhd_range any = of_keys ? nbhd_tile_any_queries(a, t->n, tile) : nbhd_tile_any(a, t->n, tile);
            const struct nbhd_range all = of_keys ? nbhd_tile_all_queries(a, t->n, tile) : nbhd_tile_all(a, t->n, tile);
            ok &= any.begin <= any.end && all.begin <= all.end; /* empty, but never less than that */
            for (int x = 0; x < t->n; x++) {
                bool some = false, every = true;
                for (int y = begin; y < end; y++) {
                    const bool sees = of_keys ? t->sees[x][y] : t->sees[y][x];
                    some |= sees;
                    every &= sees;
                }
                ok &= (!some || inside(any, x)) && inside(all, x) == every;
                ok &= !(inside(any, x) && !some && (x == any.begin || x == any.end - 1)); /* tight at its ends */
            }
        }
    return ok;
}

static struct nbhd_range moved(struct nbhd_range r, int by) { return nbhd_range_of(r.begin + by, r.end + by); }

static bool same(struct nbhd_range x, struct nbhd_range y) { return x.begin == y.begin && x.end == y.end; }

/* A periodic axis: query x of an image and the key y of another see each other from either side; a step of n changes
 * nothing; ends never decrease; and intervals stay within an image of the middle one. */
static bool unwrapped_agrees(struct nbhd_axis a, int n)
{
    bool ok = true;
    struct nbhd_range before = nbhd_keys(a, n, -n - 1), before_queries = nbhd_queries(a, n, -n - 1);
    for (int x = -n; x < 2 * n; x++) {
        const struct nbhd_range keys = nbhd_keys(a, n, x), queries = nbhd_queries(a, n, x);
        ok &= same(nbhd_keys(a, n, x + n), moved(keys, n)) && same(nbhd_queries(a, n, x + n), moved(queries, n));
        ok &= keys.end - keys.begin == a.window && queries.begin <= queries.end;
        ok &= keys.begin >= before.begin && queries.begin >= before_queries.begin && queries.end >= before_queries.end;
        for (int y = -3 * n; y < 4 * n; y++)
            ok &= inside(keys, y) == inside(nbhd_queries(a, n, y), x);
        before = keys;
        before_queries = queries;
        if (x < 0 || x >= n)
            continue;
        ok &= keys.begin >= -n && keys.end <= 2 * n && queries.begin >= -n && queries.end <= 2 * n;
        for (int end = x; end <= 2 * n; end++) {
            const int many = nbhd_together(a, n, x, end);
            ok &= many == (end < n ? end : n) - x && nbhd_together(a, n, x - n, end - n) == many;
        }
    }
    return ok;
}

/* Union and intersection of tiles of [0, n), in unwrapped elements. */
static bool unwrapped_tiles_agree(struct nbhd_axis a, int n)
{
    bool ok = true;
    for (int begin = 0; begin < n; begin++)
        for (int end = begin + 1; end <= n; end++) {
            const struct nbhd_range tile = nbhd_range_of(begin, end), any = nbhd_tile_any(a, n, tile),
                                    all = nbhd_tile_all(a, n, tile), some = nbhd_tile_any_queries(a, n, tile),
                                    every = nbhd_tile_all_queries(a, n, tile);
            for (int y = -n; y < 2 * n; y++) {
                bool seen = false, by_all = true, sees = false, sees_all = true;
                for (int x = begin; x < end; x++) {
                    seen |= inside(nbhd_keys(a, n, x), y);
                    by_all &= inside(nbhd_keys(a, n, x), y);
                    sees |= inside(nbhd_queries(a, n, x), y);
                    sees_all &= inside(nbhd_queries(a, n, x), y);
                }
                ok &= inside(any, y) == seen && inside(all, y) == by_all;
                ok &= (!sees || inside(some, y)) && inside(every, y) == sees_all;
            }
        }
    return ok;
}

static void check_periodic(int most, int most_tiles)
{
    for (int n = 1; n <= most; n++)
        for (int w = 1; w <= n; w++)
            for (int s = 1; s <= w; s++) {
                const struct nbhd_axis a = {n, n, w, s, 1, NBHD_EDGE_PERIODIC};
                CHECK(unwrapped_agrees(a, n), "n %d window %d stride %d, periodic", n, w, s);
                if (n <= most_tiles)
                    CHECK(unwrapped_tiles_agree(a, n), "tiles of n %d window %d stride %d, periodic", n, w, s);
            }
}

static void check_groups(int most, int most_tiles)
{
    static struct table t;
    for (int edge = 0; edge < 4; edge++)
        for (int n = 1; n <= most; n++)
            for (int w = 1; w <= n; w++)
                for (int s = 1; s <= w; s++) {
                    const struct nbhd_axis a = {n, n, w, s, 1, edge};
                    fill(&t, &a);
                    CHECK(rows_agree(&t, a), "n %d window %d stride %d edge %d", n, w, s, edge);
                    if (n <= most_tiles && edge != NBHD_EDGE_PERIODIC) /* else check_periodic */
                        CHECK(tiles_agree(&t, a, false) && tiles_agree(&t, a, true),
                              "tiles of n %d window %d stride %d edge %d",
                              n, w, s, edge);
                }
}

/* Dilation: element p of group g is token p * dilation + g. */
static void check_dilation(int most)
{
    static struct table t;
    for (int edge = 0; edge < 4; edge++)
        for (int length = 1; length <= most; length++)
            for (int dilation = 1; dilation <= length; dilation++)
                for (int w = 1; w * dilation <= length; w++)
                    for (int s = 1; s <= w; s += 2) {
                        const struct nbhd_axis a = {length, length, w, s, dilation, edge};
                        fill(&t, &a);
                        bool ok = true;
                        for (int q = 0; q < length; q++) {
                            const int g = q % dilation, n = nbhd_group_size(a, g);
                            const struct nbhd_range keys = nbhd_keys(a, n, q / dilation);
                            for (int k = 0; k < length; k++)
                                ok &= t.sees[q][k] == (k % dilation == g && images(a, n, keys, k / dilation));
                        }
                        CHECK(ok, "length %d window %d stride %d dilation %d edge %d", length, w, s, dilation, edge);
                    }
}

static void check_cross(void)
{
    static const struct nbhd_axis axes[] = {{5, 9, 9, 1, 1, NBHD_EDGE_NEAREST}, {9, 5, 5, 1, 1, NBHD_EDGE_NEAREST}, {9,
    1, 1, 1, 1, 0}};
    for (int i = 0; i < 3; i++) {
        const struct nbhd_axis a = axes[i];
        for (int q = 0; q < a.length; q++) {
            const struct nbhd_range keys = nbhd_keys(a, a.length, q);
            CHECK(keys.begin == 0 && keys.end == a.keys, "query %d of %d: keys %d..%d", q, a.length, keys.begin,
                  keys.end);
        }
        for (int k = 0; k < a.keys; k++) {
            const struct nbhd_range queries = nbhd_queries(a, a.length, k);
            CHECK(queries.begin == 0 && queries.end == a.length, "key %d of %d: queries %d..%d", k, a.keys,
                  queries.begin, queries.end);
        }
    }
}

/* Drawn by hand from the definition: one row a query, # what it sees. The guard against one mistake made twice. */
static const struct {
    struct nbhd_axis axis;
    const char *rows[10];
} drawn[] = {
    {{6, 6, 3, 1, 1, 0}, {"###...", "###...", ".###..", "..###.", "...###", "...###"}},
    {{6, 6, 4, 1, 1, 0}, {"####..", "####..", "####..", ".####.", "..####", "..####"}},
    {{8, 8, 4, 2, 1, 0}, {"####....", "####....", ".####...", ".####...", "...####.", "...####.", "....####",
    "....####"}},
    {{8, 8, 4, 4, 1, 0}, {"####....", "####....", "####....", "####....", "....####", "....####", "....####",
    "....####"}},
    {{7, 7, 3, 3, 1, 0}, {"###....", "###....", "###....", "...###.", "...###.", "...###.", "....###"}},
    {{6, 6, 3, 1, 1, 1}, {"#.....", "##....", "###...", ".###..", "..###.", "...###"}},
    {{6, 6, 4, 2, 1, 1}, {"#.....", "##....", "###...", "####..", "..###.", "..####"}},
    {{6, 6, 3, 1, 1, 2}, {"##....", "###...", ".###..", "..###.", "...###", "....##"}},
    {{6, 6, 4, 1, 1, 2}, {"##....", "###...", "####..", ".####.", "..####", "...###"}},
    {{6, 6, 3, 1, 1, 3}, {"##...#", "###...", ".###..", "..###.", "...###", "#...##"}},
    {{6, 6, 4, 1, 1, 3}, {"##..##", "###..#", "####..", ".####.", "..####", "#..###"}},
    {{7, 7, 4, 3, 1, 3}, {"###...#", "###...#", "###...#", "..####.", "..####.", "..####.", "#...###"}},
    {{7, 7, 3, 1, 2, 3}, {"#.#...#", ".#.#.#.", "#.#.#..", ".#.#.#.", "..#.#.#", ".#.#.#.", "#...#.#"}},
    {{5, 5, 5, 1, 1, 3}, {"#####", "#####", "#####", "#####", "#####"}},
    {{7, 7, 3, 1, 2, 0}, {"#.#.#..", ".#.#.#.", "#.#.#..", ".#.#.#.", "..#.#.#", ".#.#.#.", "..#.#.#"}},
    {{7, 7, 2, 1, 2, 1}, {"#......", ".#.....", "#.#....", ".#.#...", "..#.#..", "...#.#.", "....#.#"}},
    {{5, 5, 5, 1, 1, 0}, {"#####", "#####", "#####", "#####", "#####"}},
    {{4, 4, 1, 1, 1, 0}, {"#...", ".#..", "..#.", "...#"}},
};

static void check_drawn(void)
{
    static struct table t;
    for (size_t i = 0; i < sizeof drawn / sizeof *drawn; i++) {
        const struct nbhd_axis a = drawn[i].axis;
        fill(&t, &a);
        for (int q = 0; q < a.length; q++) {
            const int g = q % a.dilation;
            const struct nbhd_range keys = nbhd_keys(a, nbhd_group_size(a, g), q / a.dilation);
            char row[16] = "";
            char oracle[16] = "";
            for (int k = 0; k < a.length; k++) {
                row[k] = k % a.dilation == g && images(a, nbhd_group_size(a, g), keys, k / a.dilation) ? '#' : '.';
                oracle[k] = t.sees[q][k] ? '#' : '.';
            }
            CHECK(!strcmp(row, drawn[i].rows[q]), "drawing %zu, query %d: %s, drawn %s", i, q, row, drawn[i].rows[q]);
            CHECK(!strcmp(oracle, drawn[i].rows[q]), "drawing %zu, query %d: the oracle has %s, drawn %s", i, q, oracle,
                  drawn[i].rows[q]);
        }
    }
}

int main(void)
{
    check_drawn();
    check_cross();
    check_groups(40, 24);
    check_periodic(16, 12);
    check_dilation(40);
    return test_done();
}
