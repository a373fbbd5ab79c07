/* Boxes of the sm80 and simt rows without a GPU. sm80: what the planner says that they make, against a walk over all
 * tiles, warps and rows. simt: that the grid has a block for each tile, and what its tiles see against the best that
 * there are. */
#include "core/kernel.h"
#include "cuda/simt.h"
#include "cuda/sm80.h"
#include "test.h"

static const char *const lines[] = {
    "bf16 h4/2 d64 56x56 w7x7",
    "bf16 h8/1 d128 10x18x20 w6x8x8 s2x8x4",
    "bf16 b2 h2 d64 64x64 w16x16 s16x16",
    "f16 h12/3 d96 40x50 w23x29 ecn",
    "bf16 d128 1000 w101 s100 et",
    "bf16 h2 d40 12x15x17 w5x6x7 etct",
    "bf16 b2 h4 d32 28x28 w7x7 r4x3",
    "bf16 b2 h2 d64 333 w15 r20",
    "bf16 h2 d96 9x20x22 w4x8x9 s3x4x5 r1x2x2",
    "bf16 h1 d8 1x1x1",
    "bf16 h4/1 d64 5x3 w1x1",
    "bf16 h2 d64 9x10 kv=9x31",
    "bf16 h2 d64 50 kv=777 extra=9",
    "bf16 h2 d32 8x30x60 w5x7x7 ennp extra=70",
    "f16 h4/2 d128 40x50 w13x14 epp",
    "bf16 h2 d64 40x37x29 w9x8x7 s9x3x2 r1x2x3 encp",
    "bf16 h8/2 d64 32x32 w8x8 s8x8",
};
enum { LINES = sizeof lines / sizeof *lines };

/* ---- sm80 ---- */

/* Shapes of the rows' own kernels: rows, warps, n, inverse, packs. */
static const struct nbhd_sm80_shape shapes[] = {
    {128, 4, 64, false, true, 2}, {64, 4, 32, false, true, 5}, {64, 4, 16, false, false, 1},
    {64, 4, 64, true, false, 2},  {128, 8, 32, true, false, 3},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

/* One dilation group: rows and columns that it has, on each axis. */
struct group {
    const struct nbhd_problem *problem;
    const struct nbhd_sm80_shape *shape;
    const struct nbhd_boxes_sm80 *boxes;
    int n[3], rows[3];
};

static struct nbhd_range sees(const struct group *g, int axis, int row)
{
    const struct nbhd_axis a = g->problem->axis[axis];
    return g->shape->inverse ? nbhd_queries(a, g->n[axis], row) : nbhd_keys(a, g->n[axis], row);
}

/* Adds whether a warp's rows, of the row box at `origin`, see some columns of the box at c, and whether all see all. */
static void visit(const struct group *g, const int origin[3], int warp, const int c[3], struct nbhd_sm80_work *work)
{
    const struct nbhd_boxes_sm80 *b = g->boxes;
    const int each = g->shape->rows / g->shape->warps, used = b->row_box[0] * b->row_box[1] * b->row_box[2] * b->pack;
    bool some = false, all = true;
    for (int r = warp * each; r < (warp + 1) * each && r < used; r++) {
        const int token = r / b->pack, slow = token / b->row_box[2];
        const int at[3] = {slow / b->row_box[1], slow % b->row_box[1], token % b->row_box[2]};
        bool here = true, any = true, whole = true;
        for (int a = 0; a < 3 && here; a++) {
            here = origin[a] + at[a] < g->rows[a];
            const struct nbhd_range seen = here ? sees(g, a, origin[a] + at[a]) : nbhd_range_of(0, 0);
            any &= nbhd_max(seen.begin, c[a]) < nbhd_min(seen.end, c[a] + b->column_box[a]);
            whole &= seen.begin <= c[a] && seen.end >= c[a] + b->column_box[a];
        }
        some |= here && any;
        all &= !here || whole;
    }
    work->visited += some;
    work->full += some && all && b->column_box[0] * b->column_box[1] * b->column_box[2] == g->shape->n;
}

/* Adds a row box: it walks from the corner of what its rows see. */
static void walk_box(const struct group *g, const int origin[3], struct nbhd_sm80_work *work)
{
    struct nbhd_range any[3];
    for (int a = 0; a < 3; a++) {
        any[a] = sees(g, a, origin[a]);
        any[a].end = sees(g, a, nbhd_min(origin[a] + g->boxes->row_box[a], g->rows[a]) - 1).end;
    }
    const int *box = g->boxes->column_box;
    work->ctas++;
    for (int c0 = any[0].begin; c0 < any[0].end; c0 += box[0])
        for (int c1 = any[1].begin; c1 < any[1].end; c1 += box[1])
            for (int c2 = any[2].begin; c2 < any[2].end; c2 += box[2]) {
                work->steps++;
                for (int warp = 0; warp < g->shape->warps; warp++)
                    visit(g, origin, warp, (const int[3]){c0, c1, c2}, work);
            }
}

static struct nbhd_sm80_work walk(const struct nbhd_problem *p, const struct nbhd_sm80_shape *shape,
                                  const struct nbhd_boxes_sm80 *boxes)
{
    struct nbhd_sm80_work work = {.ctas = 0};
    struct group g = {.problem = p, .shape = shape, .boxes = boxes};
    const int *r = boxes->row_box, d[3] = {p->axis[0].dilation, p->axis[1].dilation, p->axis[2].dilation};
    for (int number = 0; number < d[0] * d[1] * d[2]; number++) {
        const int group[3] = {number / d[2] / d[1], number / d[2] % d[1], number % d[2]};
        for (int a = 0; a < 3; a++) {
            const bool crosses = p->axis[a].keys != p->axis[a].length;
            g.n[a] = nbhd_group_size(p->axis[a], group[a]);
            g.rows[a] = crosses && shape->inverse ? p->axis[a].keys : g.n[a];
        }
        for (int x0 = 0; x0 < g.rows[0]; x0 += r[0])
            for (int x1 = 0; x1 < g.rows[1]; x1 += r[1])
                for (int x2 = 0; x2 < g.rows[2]; x2 += r[2])
                    walk_box(&g, (const int[3]){x0, x1, x2}, &work);
    }
    return work;
}

static bool is_power(int x) { return (x & (x - 1)) == 0; }

/* Returns whether the boxes are such that all counts are exact. */
static bool check_counts(const char *line, const struct nbhd_problem *p, const struct nbhd_sm80_shape *shape)
{
    struct nbhd_boxes_sm80 b = {.pack = 0};
    const struct nbhd_sm80_work said = nbhd_sm80_boxes(p, shape, &b), found = walk(p, shape, &b);
    const int heads = shape->inverse ? p->desc.kv_heads : p->desc.heads / b.pack;
    const double units = (double)p->desc.batch * heads;
    const bool exact = is_power(b.row_box[0]) && is_power(b.row_box[1]) && is_power(b.row_box[2]) && is_power(b.pack);
    CHECK(b.row_box[0] * b.row_box[1] * b.row_box[2] * b.pack <= shape->rows &&
              b.column_box[0] * b.column_box[1] * b.column_box[2] <= shape->n,
          "%s: rows %dx%dx%d, columns %dx%dx%d", line, b.row_box[0], b.row_box[1], b.row_box[2], b.column_box[0],
          b.column_box[1], b.column_box[2]);
    CHECK(said.ctas == units * found.ctas && said.steps == units * found.steps,
          "%s: %.0f CTAs, %.0f steps; there are %.0f, %.0f", line, said.ctas, said.steps, units * found.ctas,
          units * found.steps);
    if (exact)
        CHECK(said.visited == units * found.visited && said.full == units * found.full,
              "%s: %.0f visited, %.0f full; there are %.0f, %.0f", line, said.visited, said.full,
              units * found.visited, units * found.full);
    return exact;
}

/* ---- simt ---- */

/* Tiles of tokens, and how many tokens each of them sees, summed. */
struct load {
    double tiles, seen;
};

static struct load load_of(const struct nbhd_problem *p, const int extent[3], bool of_keys)
{
    struct load all = {1, 1};
    for (int i = 0; i < 3; i++) {
        const struct nbhd_axis a = p->axis[i];
        struct load here = {0, 0};
        for (int g = 0; g < a.dilation; g++) {
            const int n = nbhd_group_size(a, g), size = of_keys && a.keys != a.length ? a.keys : n;
            for (int x = 0; x < size; x += extent[i]) {
                const struct nbhd_range tile = nbhd_range_of(x, nbhd_min(x + extent[i], size));
                const struct nbhd_range any = of_keys ? nbhd_tile_any_queries(a, n, tile) : nbhd_tile_any(a, n, tile);
                here.tiles++;
                here.seen += nbhd_max(0, any.end - any.begin);
            }
        }
        all.tiles *= here.tiles;
        all.seen *= here.seen;
    }
    return all;
}

static void check_simt(const char *line, const struct nbhd_problem *p, bool of_keys)
{
    enum { TOKENS = 64 };
    const struct nbhd_simt_box box = nbhd_simt_box(p, TOKENS);
    const struct nbhd_cuda_grid grid = nbhd_simt_grid(p, &box, of_keys);
    const int *x = box.extent;
    const struct load load = load_of(p, x, of_keys);
    const double heads = (double)p->desc.batch * (of_keys ? p->desc.kv_heads : p->desc.heads);
    double most = 1, least = load.seen;
    for (int a = 0; a < 3; a++) /* smaller dilation groups may lack a tile that the largest has */
        most *= 1 + (p->axis[a].dilation - 1.0) / p->axis[a].dilation;
    CHECK(x[0] * x[1] * x[2] <= TOKENS, "%s: %dx%dx%d", line, x[0], x[1], x[2]);
    CHECK(grid.blocks[0] >= heads * load.tiles && grid.blocks[0] <= heads * load.tiles * most,
          "%s: %u blocks for %.0f tiles", line, grid.blocks[0], heads * load.tiles);
    for (int e0 = 1; e0 <= TOKENS; e0 *= 2)
        for (int e1 = 1; e0 * e1 <= TOKENS; e1 *= 2) {
            const struct load other = load_of(p, (const int[3]){e0, e1, TOKENS / e0 / e1}, of_keys);
            least = other.seen < least ? other.seen : least;
        }
    CHECK(load.seen <= 1.3 * least, "%s: tiles of %dx%dx%d see %.0f; the best see %.0f", line, x[0], x[1], x[2],
          load.seen, least);
}

int main(void)
{
    int exact = 0;
    for (int i = 0; i < LINES; i++) {
        nbhd_desc desc;
        struct nbhd_problem p;
        if (!CHECK(!nbhd_desc_parse(&desc, lines[i]) && !nbhd_problem_init(&p, &desc), "%s: %s", lines[i],
                   nbhd_last_error()))
            continue;
        for (int s = 0; s < SHAPES; s++)
            exact += check_counts(lines[i], &p, &shapes[s]);
        check_simt(lines[i], &p, false);
        check_simt(lines[i], &p, true);
    }
    CHECK(exact >= LINES, "only %d of %d choices of boxes could be counted whole", exact, LINES * SHAPES);
    printf("%d of %d choices of boxes counted whole\n", exact, LINES * SHAPES);
    return test_done();
}
