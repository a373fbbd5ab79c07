/* The simulator's counts, against brute force over every pair of tokens. */
#include <math.h>
#include "nbhd_geom.h"
#include "nbhd_sim.h"
#include "oracle.h"
#include "test.h"

static nbhd_desc parse(const char *line)
{
    nbhd_desc desc = NBHD_DESC_INIT;
    CHECK(!nbhd_desc_parse(&desc, line), "%s: %s", line, nbhd_last_error());
    return desc;
}

/* ---- brute force ---- */

struct brute {
    int rank, tokens, keys;
    struct oracle_axis axis[3];
    bool *sees; /* [tokens][keys] */
};

static void split(const struct brute *b, int token, bool key, int at[3])
{
    for (int i = 2; i >= 0; i--) {
        const int length = key ? b->axis[i].keys : b->axis[i].length;
        at[i] = token % length;
        token /= length;
    }
}

static void brute_init(struct brute *b, const nbhd_desc *d)
{
    b->rank = d->rank;
    b->tokens = b->keys = 1;
    for (int i = 0; i < 3; i++) {
        const int from = i - (3 - d->rank);
        b->axis[i] = (struct oracle_axis){1, 1, 1, 1, 1, ORACLE_NEAREST};
        if (from >= 0)
            b->axis[i] = (struct oracle_axis){d->length[from],
                                              d->kv_length[from] ? d->kv_length[from] : d->length[from],
                                              d->window[from] ? d->window[from] : d->length[from],
                                              d->stride[from] ? d->stride[from] : 1,
                                              d->dilation[from] ? d->dilation[from] : 1,
                                              (enum oracle_edge)d->edge[from]};
        b->tokens *= b->axis[i].length;
        b->keys *= b->axis[i].keys;
    }
    b->sees = malloc((size_t)b->tokens * (size_t)b->keys);
    for (int q = 0; q < b->tokens; q++)
        for (int k = 0; k < b->keys; k++) {
            int x[3], y[3];
            split(b, q, false, x);
            split(b, k, true, y);
            b->sees[q * b->keys + k] = oracle_sees(&b->axis[0], x[0], y[0]) && oracle_sees(&b->axis[1], x[1], y[1]) &&
                                       oracle_sees(&b->axis[2], x[2], y[2]);
        }
}

/* A box tile of a token: its dilation group and its place on the grid of that group. Two tokens share a tile if
 * equal. */
struct place {
    int group[3], tile[3];
};

static struct place place_of(const struct brute *b, int token, bool key, const int extent[3], const int origin[3])
{
    struct place p;
    int at[3];
    split(b, token, key, at);
    for (int i = 0; i < 3; i++) {
        const int e = at[i] / b->axis[i].dilation - origin[i];
        p.group[i] = at[i] % b->axis[i].dilation;
        p.tile[i] = e < 0 ? -1 : e / extent[i];
    }
    return p;
}

struct sums {
    double outer, visited, worst, full, pairs;
};

/* One query tile: the box of tiles from the first to the last that it needs, on every axis; full tiles among them. */
static void brute_tile(const struct brute *b, const int *queries, int count, const int kv[3], bool dynamic,
                       struct sums *s)
{
    int low[3] = {1 << 30, 1 << 30, 1 << 30}, high[3] = {-1, -1, -1}, origin[3] = {0, 0, 0}, boxes = 1;
    for (int i = 0; i < count; i++)
        for (int k = 0; k < b->keys; k++)
            if (b->sees[queries[i] * b->keys + k]) {
                int at[3];
                split(b, k, true, at);
                s->pairs += 1;
                for (int a = 0; a < 3; a++) {
                    const int e = at[a] / b->axis[a].dilation;
                    low[a] = e < low[a] ? e : low[a];
                    high[a] = e > high[a] ? e : high[a];
                }
            }
    for (int a = 0; a < 3; a++) {
        origin[a] = dynamic ? low[a] : 0;
        boxes *= (high[a] - origin[a]) / kv[a] - (low[a] - origin[a]) / kv[a] + 1;
    }
    s->outer += 1;
    s->visited += boxes;
    s->worst = fmax(s->worst, boxes);
    /* full tiles: those all of whose places hold a key that every query sees */
    int *hits = calloc((size_t)b->keys + 1, sizeof *hits);
    const struct place mine = place_of(b, queries[0], false, kv, origin);
    for (int k = 0; k < b->keys; k++) {
        bool all = true;
        for (int i = 0; i < count; i++)
            all &= b->sees[queries[i] * b->keys + k];
        const struct place p = place_of(b, k, true, kv, origin);
        if (!all || (b->axis[2].keys == b->axis[2].length && memcmp(p.group, mine.group, sizeof p.group)))
            continue;
        const int id = (p.tile[0] * b->axis[1].keys + p.tile[1]) * b->axis[2].keys + p.tile[2];
        s->full += ++hits[id] == kv[0] * kv[1] * kv[2];
    }
    free(hits);
}

static struct sums brute_boxes(const struct brute *b, const int q[3], const int kv[3], bool dynamic)
{
    struct sums s = {0, 0, 0, 0, 0};
    static const int zero[3];
    bool *done = calloc((size_t)b->tokens, sizeof *done);
    int *queries = malloc((size_t)b->tokens * sizeof *queries);
    for (int first = 0; first < b->tokens; first++) {
        if (done[first])
            continue;
        const struct place p = place_of(b, first, false, q, zero);
        int count = 0;
        for (int t = first; t < b->tokens; t++) {
            const struct place o = place_of(b, t, false, q, zero);
            if (!memcmp(&o, &p, sizeof p)) {
                done[t] = true;
                queries[count++] = t;
            }
        }
        brute_tile(b, queries, count, kv, dynamic, &s);
    }
    free(queries);
    free(done);
    return s;
}

static struct sums brute_flat(const struct brute *b, int q, int kv)
{
    struct sums s = {0, 0, 0, 0, 0};
    for (int first = 0; first < b->tokens; first += q) {
        int visited = 0;
        for (int key = 0; key < b->keys; key += kv) {
            int seen = 0, pairs = 0;
            for (int t = first; t < first + q && t < b->tokens; t++)
                for (int k = key; k < key + kv; k++, pairs++)
                    seen += k < b->keys && b->sees[t * b->keys + k];
            visited += seen > 0;
            s.full += seen == pairs;
            s.pairs += seen;
        }
        s.outer += 1;
        s.visited += visited;
        s.worst = fmax(s.worst, visited);
    }
    return s;
}

static void compare(const char *line, const nbhd_sim_tiles *t, const nbhd_sim_counts *c, const struct sums *s,
                    double area)
{
    const bool same = c->tiles_outer == s->outer && fabs(c->visited_mean * s->outer - s->visited) < 1e-6 &&
                      c->visited_max == s->worst && fabs(c->masked_fraction - (1 - s->full / s->visited)) < 1e-12 &&
                      c->pairs == s->pairs && c->block_sparse == (s->full == s->visited) &&
                      fabs(c->work_ratio - s->visited * area / s->pairs) < 1e-9 &&
                      c->bound_mean <= c->bound_flop + 1e-9;
    CHECK(same,
          "%s, %s q %dx%dx%d kv %dx%dx%d: outer %g of %g, visited %g of %g, worst %g of %g, masked %g of %g, pairs "
          "%g of %g, block-sparse %d",
          line, nbhd_sim_tiling_name(t->tiling), t->q_tile[0], t->q_tile[1], t->q_tile[2], t->kv_tile[0], t->kv_tile[1],
          t->kv_tile[2], c->tiles_outer, s->outer, c->visited_mean * s->outer, s->visited, c->visited_max, s->worst,
          c->masked_fraction, 1 - s->full / s->visited, c->pairs, s->pairs, c->block_sparse);
}

/* The same problem with queries and keys exchanged: what a backward counts. */
static struct brute transposed(const struct brute *b)
{
    struct brute t = *b;
    t.tokens = b->keys;
    t.keys = b->tokens;
    for (int i = 0; i < 3; i++) {
        t.axis[i].length = b->axis[i].keys;
        t.axis[i].keys = b->axis[i].length;
    }
    t.sees = malloc((size_t)t.tokens * (size_t)t.keys);
    for (int k = 0; k < t.tokens; k++)
        for (int q = 0; q < t.keys; q++)
            t.sees[k * t.keys + q] = b->sees[q * b->keys + k];
    return t;
}

static void check_backward(const char *line, const struct brute *b, const nbhd_sim_tiles *t, const int q[3],
                           const int kv[3])
{
    nbhd_desc desc = parse(line);
    nbhd_sim_counts c = NBHD_SIM_COUNTS_INIT;
    desc.pass = NBHD_BACKWARD;
    if (!CHECK(!nbhd_sim_count(&desc, t, &c), "%s: %s", line, nbhd_last_error()))
        return;
    const struct sums s = brute_boxes(b, kv, q, t->tiling == NBHD_SIM_DYNAMIC);
    compare(line, t, &c, &s, (double)q[0] * q[1] * q[2] * kv[0] * kv[1] * kv[2]);
}

static void check_brute(const char *line, const int (*boxes)[3], int count)
{
    const nbhd_desc desc = parse(line);
    struct brute b;
    brute_init(&b, &desc);
    struct brute back = transposed(&b);
    for (int i = 0; i < count; i++)
        for (int j = 0; j < count; j++)
            for (int tiling = 0; tiling < NBHD_SIM_TILINGS; tiling++) {
                nbhd_sim_tiles t = NBHD_SIM_TILES_INIT;
                nbhd_sim_counts c = NBHD_SIM_COUNTS_INIT;
                int q[3] = {1, 1, 1}, kv[3] = {1, 1, 1};
                t.tiling = tiling;
                for (int a = 0; a < desc.rank; a++) {
                    t.q_tile[a] = q[a + 3 - desc.rank] = boxes[i][a];
                    t.kv_tile[a] = kv[a + 3 - desc.rank] = boxes[j][a];
                }
                if (tiling == NBHD_SIM_FLAT)
                    t.q_tile[1] = t.q_tile[2] = t.kv_tile[1] = t.kv_tile[2] = 0;
                if (!CHECK(!nbhd_sim_count(&desc, &t, &c), "%s: %s", line, nbhd_last_error()))
                    continue;
                const struct sums s = tiling == NBHD_SIM_FLAT ? brute_flat(&b, t.q_tile[0], t.kv_tile[0])
                                                              : brute_boxes(&b, q, kv, tiling == NBHD_SIM_DYNAMIC);
                const double area = tiling == NBHD_SIM_FLAT ? (double)t.q_tile[0] * t.kv_tile[0]
                                                            : (double)q[0] * q[1] * q[2] * kv[0] * kv[1] * kv[2];
                compare(line, &t, &c, &s, area);
                if (tiling != NBHD_SIM_FLAT)
                    check_backward(line, &back, &t, q, kv);
            }
    free(b.sees);
    free(back.sees);
}

static void check_counts(void)
{
    static const int one[][3] = {{1}, {4}, {7}, {16}}, two[][3] = {{1, 8}, {4, 4}, {3, 5}, {2, 1}},
                     three[][3] = {{1, 2, 4}, {2, 2, 2}, {3, 1, 2}};
    static const char *const lines1[] = {"d8 40 w13",   "d8 41 w12 s5", "d8 37 w9 r4", "d8 33 w10 s3 r2 ec",
                                         "d8 29 w8 et", "d8 24 w8 s8",  "d8 30 w30",   "d8 22 w1",
                                         "d8 20 kv=27", "d8 36 w2 r17"};
    static const char *const lines2[] = {"d8 13x17 w5x7",          "d8 12x16 w8x8 s4x4",    "d8 14x15 w3x4 r3x2",
                                         "d8 11x12 w6x5 s2x3 ecn", "d8 9x16 w4x4 s1x4 etc", "d8 8x8 w8x8",
                                         "d8 10x9 w3x9 s3x1 r2x1", "d8 8x21 w4x2 r1x9"};
    static const char *const lines3[] = {"d8 5x7x9 w3x4x5", "d8 4x8x8 w2x4x4 s2x2x2", "d8 6x5x8 w2x3x2 r2x1x3 s1x2x2",
                                         "d8 5x6x7 w4x3x5 ecnt s2x1x3"};
    for (size_t i = 0; i < sizeof lines1 / sizeof *lines1; i++)
        check_brute(lines1[i], one, 4);
    for (size_t i = 0; i < sizeof lines2 / sizeof *lines2; i++)
        check_brute(lines2[i], two, 4);
    for (size_t i = 0; i < sizeof lines3 / sizeof *lines3; i++)
        check_brute(lines3[i], three, 3);
}

/* Batch and heads multiply; extra keys are counted with their own tiles. */
static void check_extra(void)
{
    const nbhd_desc plain = parse("d8 64x64 w16x16 s16x16"), extra = parse("d8 b3 h5 64x64 w16x16 s16x16 extra=100");
    nbhd_sim_tiles t = {sizeof t, NBHD_SIM_STATIC, {8, 16, 0}, {8, 8, 0}, 1, 0, 0, 0, 0};
    nbhd_sim_counts a = NBHD_SIM_COUNTS_INIT, b = NBHD_SIM_COUNTS_INIT;
    CHECK(!nbhd_sim_count(&plain, &t, &a) && !nbhd_sim_count(&extra, &t, &b), "%s", nbhd_last_error());
    CHECK(a.block_sparse && a.visited_mean == 4 && a.bound_tile == 16 && a.work_ratio == 1, "%g", a.visited_mean);
    CHECK(b.visited_mean == 6 && b.visited_max == 6 && b.tiles_total == 66 && !b.block_sparse, "%g", b.visited_mean);
    CHECK(fabs(b.masked_fraction - 1.0 / 6) < 1e-12, "%g", b.masked_fraction);
    CHECK(b.pairs == 4096.0 * (256 + 100), "%g", b.pairs);
    CHECK(fabs(b.pairs * 15 - nbhd_desc_pairs(&extra)) < 1, "%g", nbhd_desc_pairs(&extra));
}

/* ---- pictures' geometry ---- */

static void check_tile_of(void)
{
    const nbhd_desc desc = parse("d8 20x31 w5x4 s1x2 r2x3");
    for (int tiling = 0; tiling < 2; tiling++)
        for (int query = 0; query < 31; query++) {
            nbhd_sim_tiles t = {sizeof t, tiling, {2, 4, 0}, {2, 3, 0}, 1, 0, 0, 0, 0};
            nbhd_sim_tile tile = NBHD_SIM_TILE_INIT;
            int first, count;
            CHECK(!nbhd_sim_tile_of(&desc, &t, 1, query, &tile), "%s", nbhd_last_error());
            CHECK(!nbhd_desc_keys(&desc, 1, query, &first, &count), "%s", nbhd_last_error());
            const int e = query / 3, begin = first / 3;
            CHECK(tile.group == query % 3 && tile.dilation == 3 && tile.q_begin <= e && e < tile.q_end, "%d", query);
            CHECK(tile.any_begin <= begin && begin + count <= tile.any_end, "query %d", query);
            CHECK(begin <= tile.all_begin && (tile.all_end <= begin + count), "query %d", query);
            CHECK(tile.grid_begin <= tile.any_begin && tile.grid_begin + tile.visited * 3 >= tile.any_end &&
                      tile.grid_begin + (tile.visited - 1) * 3 < tile.any_end && tile.any_begin < tile.grid_begin + 3,
                  "query %d: the grid from %d of %d tiles does not cover [%d, %d) tightly", query, tile.grid_begin,
                  tile.visited, tile.any_begin, tile.any_end);
        }
}

int main(void)
{
    check_counts();
    check_extra();
    check_tile_of();
    return test_done();
}
