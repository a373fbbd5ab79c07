/* What CPU kernels, forward and backward, report to have visited, and what the Hopper planner counts, against the
 * simulator. */
#include <math.h>
#include "core/counters.h"
#include "core/kernel.h"
#include "core/tiles.h"
#include "cpu/bwd_plan.h"
#include "nbhd_sim.h"
#include "test.h"
#if NBHD_HAVE_CUDA
#include "cuda/sm90_plan.h"
#endif

static int broadcasts, permutes, scalars, bwd_broadcasts, bwd_permutes;
#if NBHD_HAVE_CUDA
static int planned;
#endif

struct visits {
    double visits, masked;
};

/* All tensors are zeros in one buffer that is large enough for any of them: only the walk matters. */
static bool execute(const nbhd_plan *plan, const nbhd_desc *d, struct visits *got)
{
    double elements = 1;
    for (int i = 0; i < d->rank; i++)
        elements *= d->kv_length[i] > d->length[i] ? d->kv_length[i] : d->length[i];
    const size_t bytes = ((size_t)elements + (size_t)d->extra) * (size_t)(d->batch * d->heads) * 64 * sizeof(double);
    char *in = calloc(1, bytes), *workspace = aligned_alloc(64, (nbhd_plan_workspace(plan) + 127) / 64 * 64);
    char *out[7];
    for (int i = 0; i < 7; i++)
        out[i] = calloc(1, bytes);
    nbhd_args args = NBHD_ARGS_INIT;
    args.q.data = args.k.data = args.v.data = args.extra_k.data = args.extra_v.data = args.dout.data = in;
    args.o.data = out[0], args.lse.data = out[1];
    if (d->pass == NBHD_BACKWARD) {
        args.dq.data = out[2], args.dk.data = out[3], args.dv.data = out[4];
        args.dextra_k.data = out[5], args.dextra_v.data = out[6];
    }
    struct nbhd_counters counters = {0, 0};
    nbhd_counters = &counters;
    const nbhd_status status = nbhd_execute(plan, &args, workspace, NULL);
    nbhd_counters = NULL;
    *got = (struct visits){(double)atomic_load(&counters.visits), (double)atomic_load(&counters.masked)};
    free(in);
    free(workspace);
    for (int i = 0; i < 7; i++)
        free(out[i]);
    return CHECK(!status, "%s", nbhd_last_error());
}

/* The simulator's figures for query tiles of these extents and keys one by one, per batch entry and head. */
static struct visits simulate(const nbhd_desc *d, const int extent[3])
{
    nbhd_sim_tiles tiles = NBHD_SIM_TILES_INIT;
    nbhd_sim_counts c = NBHD_SIM_COUNTS_INIT;
    nbhd_desc plain = *d;
    plain.extra = 0;
    for (int i = 0; i < d->rank; i++) {
        const int at = extent[i + 3 - d->rank];
        tiles.q_tile[i] = at < d->length[i] ? at : d->length[i]; /* the simulator wants no tile longer than its axis */
        tiles.kv_tile[i] = 1;
    }
    CHECK(!nbhd_sim_count(&plain, &tiles, &c), "%s", nbhd_last_error());
    const double visits = c.visited_mean * c.tiles_outer;
    return (struct visits){visits, visits * c.masked_fraction};
}

static struct visits times(struct visits v, double n) { return (struct visits){v.visits * n, v.masked * n}; }

/* Rows of keys against FWD_ROWS rows of queries: axes 0 and 1 alone; axis 2 is done in tiles of its own. */
static struct visits permuted(const struct nbhd_fwd *f)
{
    const struct nbhd_axis *a = f->axis;
    struct nbhd_tile_count c0 = nbhd_tiles_count(a[0], 1, 1, NBHD_TILING_DYNAMIC);
    struct nbhd_tile_count c1 = {0, 0, 0, 0, 0};
    for (int i = 0; i < f->grid[1].count; i++) { /* the tiles begin anew in each cell */
        const struct nbhd_cell cell = nbhd_grid_cell(&f->grid[1], i);
        for (int y = cell.q.begin; y < cell.q.end; y += FWD_ROWS) {
            struct nbhd_tile t =
                nbhd_tile_at(a[1], cell.size, y, nbhd_min(FWD_ROWS, cell.q.end - y), 1, NBHD_TILING_DYNAMIC);
            c1.visited += t.visited;
            c1.full += t.full;
        }
    }
    const double tasks = f->grid[2].count;
    return (struct visits){c0.visited * c1.visited * tasks, (c0.visited * c1.visited - c0.full * c1.full) * tasks};
}

static struct visits expected_forward(const struct nbhd_plan *plan, const nbhd_desc *d)
{
    const struct nbhd_fwd *f = plan->state;
    const int extent[3] = {f->grid[0].tile, f->grid[1].tile, f->grid[2].tile};
    if (f->variant == NBHD_FWD_PERMUTE) {
        permutes++;
        struct visits v = permuted(f);
        for (f = f->rest; f; f = f->rest) {
            const struct visits rest = permuted(f);
            v = (struct visits){v.visits + rest.visits, v.masked + rest.masked};
        }
        return times(v, (double)d->batch * d->heads);
    }
    broadcasts++;
    nbhd_sim_tiles tiles = NBHD_SIM_TILES_INIT;
    const bool told = !nbhd_sim_plan_tiles(plan, &tiles);
    CHECK(told == (f->head_tile == 1), "%s: %s", plan->describe, nbhd_last_error());
    for (int i = 0; i < d->rank && told; i++)
        CHECK(tiles.q_tile[i] == nbhd_min(extent[i + 3 - d->rank], d->length[i]) && tiles.kv_tile[i] == 1,
              "%s: axis %d is told as %d against %d", plan->describe, i, tiles.q_tile[i], tiles.kv_tile[i]);
    return times(simulate(d, extent), (double)d->batch * d->kv_heads * f->head_tiles);
}

/* Steps of FWD_ROWS query rows in the backward's boxes of an axis; rows of keys of each, and of these unmasked ones. */
static struct nbhd_tile_count count_steps(struct nbhd_axis a, const struct nbhd_rounds *r, int box)
{
    struct nbhd_tile_count c = {0, 0, 0, 0, 0};
    for (int i = 0; i < r->rounds * r->slots; i++) {
        struct nbhd_region region;
        if (!nbhd_rounds_at(r, a, i / r->slots, i % r->slots, &region))
            continue;
        for (int q = region.q.begin; q < region.q.end; q += box)
            for (int y = q, end = nbhd_min(q + box, region.q.end); y < end; y += FWD_ROWS) {
                struct nbhd_tile t =
                    nbhd_tile_at(a, region.size, y, nbhd_min(FWD_ROWS, end - y), 1, NBHD_TILING_DYNAMIC);
                c.q_tiles++;
                c.visited += t.visited;
                c.full += t.full;
            }
    }
    return c;
}

/* Boxes of an axis, over its regions. */
static double count_boxes(struct nbhd_axis a, const struct nbhd_rounds *r, int box)
{
    double boxes = 0;
    for (int i = 0; i < r->rounds * r->slots; i++) {
        struct nbhd_region region;
        if (nbhd_rounds_at(r, a, i / r->slots, i % r->slots, &region))
            boxes += (region.q.end - region.q.begin + box - 1) / box;
    }
    return boxes;
}

/* The rounds cut queries and keys up, but each query tile meets each of its keys in one of them: broadcast tiles visit
 * what the simulator says, whatever the cut. */
static struct visits expected_backward(const struct nbhd_plan *plan, const nbhd_desc *d)
{
    const struct nbhd_bwd *b = plan->state;
    const struct nbhd_axis *a = plan->problem.axis;
    if (b->variant != NBHD_FWD_PERMUTE) {
        bwd_broadcasts++;
        nbhd_desc by_queries = *d; /* the simulator takes a backward problem for one that walks over tiles of keys */
        by_queries.pass = NBHD_FORWARD;
        return times(simulate(&by_queries, b->tile), (double)d->batch * d->kv_heads * b->head_tiles);
    }
    bwd_permutes++;
    const struct nbhd_tile_count c0 = nbhd_tiles_count(a[0], 1, 1, NBHD_TILING_DYNAMIC);
    const struct nbhd_tile_count c1 = count_steps(a[1], &b->axis[1], b->tile[1]);
    const struct visits v = {c0.visited * c1.visited, c0.visited * c1.visited - c0.full * c1.full};
    return times(v, count_boxes(b->cut[2], &b->axis[2], b->tile[2]) * d->batch * d->heads);
}

static struct visits expected(const struct nbhd_plan *plan, const nbhd_desc *d)
{
    static const int one[3] = {1, 1, 1};
    const bool backward = d->pass == NBHD_BACKWARD;
    if (strstr(plan->kernel->name, "scalar")) {
        scalars++;
        return times(simulate(d, one), (double)d->batch * (backward ? d->kv_heads : d->heads));
    }
    return backward ? expected_backward(plan, d) : expected_forward(plan, d);
}

static void check(const char *line, const char *kernel)
{
    nbhd_desc desc = NBHD_DESC_INIT;
    nbhd_plan *plan = NULL;
    if (!CHECK(!nbhd_desc_parse(&desc, line), "%s: %s", line, nbhd_last_error()) ||
        nbhd_plan_create_with(&plan, &desc, NBHD_DEVICE_CPU, 0, kernel))
        return; /* refused, or not of this machine */
    const struct nbhd_problem *problem = &((const struct nbhd_plan *)plan)->problem;
    struct visits got;
    if (execute(plan, &problem->desc, &got)) {
        const struct visits want = expected(plan, &problem->desc);
        CHECK(fabs(got.visits - want.visits) < 0.5 && fabs(got.masked - want.masked) < 0.5,
              "%s, %s (%s): visited %.0f, the simulator says %.0f; masked %.0f of %.0f", line, kernel,
              nbhd_plan_describe(plan), got.visits, want.visits, got.masked, want.masked);
    }
    nbhd_plan_destroy(&plan);
}

#if NBHD_HAVE_CUDA
/* Tiles, boxes and boxes without a mask, as the planner of the Hopper forward reckons them. Plans of several key boxes
 * are no tiling of the simulator's: passed over. */
static void check_planner(const char *line)
{
    enum { ROOM = 6, MULTIPROCESSORS = 132, SHARED = 232448 };
    nbhd_desc desc = NBHD_DESC_INIT;
    struct nbhd_problem problem;
    struct nbhd_sm90_plan plans[ROOM];
    CHECK(!nbhd_desc_parse(&desc, line) && !nbhd_problem_init(&problem, &desc), "%s: %s", line, nbhd_last_error());
    const int count = nbhd_sm90_plans(&nbhd_sm90_forward, &problem, MULTIPROCESSORS, SHARED, plans, ROOM);
    CHECK(count > 0, "%s: no plan", line);
    for (int i = 0; i < count; i++) {
        if (plans[i].shapes != 1)
            continue;
        nbhd_sim_tiles tiles = NBHD_SIM_TILES_INIT;
        nbhd_sim_counts c = NBHD_SIM_COUNTS_INIT;
        tiles.tiling = NBHD_SIM_DYNAMIC;
        for (int a = 0; a < desc.rank; a++) {
            tiles.q_tile[a] = plans[i].q_box[a + 3 - desc.rank];
            tiles.kv_tile[a] = plans[i].k_box[0][a + 3 - desc.rank];
        }
        if (!CHECK(!nbhd_sim_count(&desc, &tiles, &c), "%s: %s", line, nbhd_last_error()))
            continue;
        const double boxes = c.visited_mean * c.tiles_outer, full = boxes * (1 - c.masked_fraction);
        CHECK(plans[i].tiles == c.tiles_outer && fabs(plans[i].boxes - boxes) < 0.5 &&
                  fabs(plans[i].full_boxes - full) < 0.5,
              "%s, plan %d: tiles %g of %g, boxes %g of %g, full %g of %g", line, i, plans[i].tiles, c.tiles_outer,
              plans[i].boxes, boxes, plans[i].full_boxes, full);
        planned++;
    }
}

static void check_planners(void)
{
    static const char *const lines[] = {
        "bf16 h24 d128 30x48x80 w18x24x24", "bf16 h24 d128 30x48x80 w18x24x24 s16x8x8", "bf16 h24 d128 256x256 w80x80",
        "bf16 h24 d128 256x256 w80x80 s16x16", "bf16 h24 d128 32768 w2048", "bf16 h24 d128 16x64x64 w7x15x15",
        "bf16 h32 d128 16x44x80 w16x24x16 s1x8x16", "f16 h4 d64 60x70 w13x20 ecn", "f16 h4 d64 1000 w200 et",
        "bf16 h4 d128 40x50 w16x9 s8x7", "bf16 h2 d128 4096"};
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
        check_planner(lines[i]);
    printf("%d plans of the Hopper forward\n", planned);
    CHECK(planned > 10, "only %d plans of one key box", planned);
}
#else
static void check_planners(void) { test_skip("built without CUDA: no Hopper planner"); }
#endif

int main(void)
{
    static const char *const lines[] = {
        "d16 h2 300 w64", "d8 b2 h2 257 w100 s16", "d8 200 w50 r3", "d8 150 w40 ec", "d8 150 w40 s8 ec",
        "d8 130 w60 et", "d16 h4/2 40x33 w17x15", "d8 24x24 w24x24", "d8 40x33 w12x15 s4x5", "d8 30x40 w9x13 r2x3",
        "d8 33x29 w15x14 enc", "d8 h2 20x20 w3x3", "d16 28x30 w7x7", "d8 h2 28x30 w5x7 r3x2", "d8 21x30 w5x5 s2x3",
        "d8 19x23 w7x5 ect", "d8 6x14x15 w3x7x9", "d8 8x9x17 w5x3x3", "d8 8x9x10 w4x4x4 s2x4x4",
        "d8 9x8x20 w3x3x5 r2x1x3", "d8 25 w6 extra=13", "d8 30x20 w9x8 extra=100", "d8 20 kv=33", "d8 12x10 kv=9x31",
        "d8 h2 1x1 w1x1", "d8 64 w64 s64", "d8 7x65 w1x9"};
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        char backward[NBHD_TEXT];
        snprintf(backward, sizeof backward, "bwd %s", lines[i]);
        for (int k = 0; nbhd_kernels[k].name; k++)
            if (nbhd_kernels[k].device == NBHD_DEVICE_CPU && nbhd_kernels[k].pass <= NBHD_BACKWARD)
                check(nbhd_kernels[k].pass == NBHD_FORWARD ? lines[i] : backward, nbhd_kernels[k].name);
    }
    printf("tiles of %d broadcast, %d permuted and %d scalar calls; backward %d and %d\n", broadcasts, permutes,
           scalars, bwd_broadcasts, bwd_permutes);
    CHECK(scalars > 0, "no scalar call was compared");
    if (broadcasts + permutes == 0)
        test_skip("this machine runs no vector kernel");
    else
        CHECK(broadcasts > 5 && permutes > 5 && bwd_broadcasts > 5 && bwd_permutes > 5,
              "%d broadcast, %d permuted; backward %d, %d", broadcasts, permutes, bwd_broadcasts, bwd_permutes);
    check_planners();
    return test_done();
}
