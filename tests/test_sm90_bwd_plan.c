/* Plans of bwd_sm90 without a GPU: the counts that they are ranked by against a walk over all tiles, that the boxes of
 * every tile cover each pair of a key and a query that sees it, and the ranges of what the kernel is told. */
#include <limits.h>
#include <math.h>
#include "cuda/sm90_bwd_plan.h"
#include "test.h"

enum { MULTIPROCESSORS = 132, SHARED = 232448, ROOM = 4, MOST_TILES = 4000, ROWS = NBHD_BWD_SM90_ROWS };

static const char *const lines[] = {
    "bwd bf16 h24 d128 30x48x80 w18x24x24",
    "bwd bf16 h24 d128 30x48x80 w18x24x24 s16x8x8",
    "bwd bf16 h24 d128 256x256 w80x80",
    "bwd bf16 h2 d128 10x18x20 w6x8x8",
    "bwd f16 b2 h4/2 d96 40x50 w23x29",
    "bwd bf16 h24 d64 256x256 w80x80 s16x16",
    "bwd bf16 h24 d128 32768 w2048",
    "bwd bf16 h2 d64 1000 w100 ec",
    "bwd f16 h24/8 d128 16x44x80 w16x24x16 s1x8x16",
    "bwd bf16 h8 d64 69x64x96 w3x5x5",
    "bwd bf16 b32 h2 d64 64x64 w7x7",
    "bwd bf16 h2 d128/64 37x45 w13x20",
    "bwd bf16 h2 d40 12x15x17 w5x6x7 etct",
    "bwd bf16 b2 h4 d32 28x28 w7x7 r4x4",
    "bwd bf16 b2 h2 d64 333 w15 r20",
    "bwd bf16 h2 d96 9x20x22 w4x8x9 s3x4x5 r1x2x2",
    "bwd bf16 h1 d8 1x1x1",
    "bwd bf16 h1 d64 5x3 w1x1",
    "bwd bf16 h2 d64 9x10 kv=9x31",
    "bwd bf16 h2 d64 50 kv=777",
    "bwd bf16 h2 d72 600x700 w33x9",
    "bwd bf16 h12 d256 16384",
    "bwd bf16 h2/1 d256 16x44x80 w16x24x16 s1x8x16",
    "bwd bf16 h2 d136/256 37x45 w13x20 r2x1 ecn",
    "bwd bf16 h2 d200/8 9x20x22 w4x8x9",
    "bwd bf16 d24 5x17 w4x5 s3x1 etn",
    "bwd bf16 h2 d72 22x5 w15x2 s3x1",
    "bwd bf16 h2 d64 40x37x29 w9x8x7 s9x3x2 r1x2x3 enct",
    "bwd bf16 h2 d128 1000 w101 s100 et",
    "bwd bf16 h2/1 d96/8 1x4x2 w1x1x1 r1x4x2",
};

/* One tile of keys, in the group of its axes' first elements. */
struct tile {
    int origin[3], keys[3], queries[3];
    struct nbhd_range any[3], all[3];
    const struct nbhd_query_box *q; /* the shape that covers it with the fewest boxes */
};

static void place(struct tile *t, const struct nbhd_problem *p, const struct nbhd_bwd_boxes *b, int x)
{
    for (int a = 0; a < 3; a++) {
        const struct nbhd_axis axis = p->axis[a];
        t->queries[a] = nbhd_group_size(axis, 0);
        t->keys[a] = axis.keys == axis.length ? t->queries[a] : axis.keys;
        t->origin[a] = x % b->tiles[a] * b->k_box[a];
        x /= b->tiles[a];
        const struct nbhd_range k = nbhd_range_of(t->origin[a], nbhd_min(t->origin[a] + b->k_box[a], t->keys[a]));
        t->any[a] = nbhd_tile_any_queries(axis, t->queries[a], k);
        t->all[a] = nbhd_tile_all_queries(axis, t->queries[a], k);
    }
}

static double boxes_in(const struct tile *t, double *full)
{
    double count = 1;
    *full = 1;
    for (int a = 0; a < 3; a++) {
        int visited = 0, inside = 0;
        for (int x = t->any[a].begin; x < t->any[a].end; x += t->q->extent[a]) {
            visited++;
            inside += x >= t->all[a].begin && x + t->q->extent[a] <= t->all[a].end;
        }
        count *= visited;
        *full *= inside;
    }
    return count;
}

/* One axis of a tile, all keys of its box against all queries: those that see the key lie in the union, those of the
 * intersection see it, and what masks compare fits their 15 bits. */
static int check_axis(const struct nbhd_problem *p, const struct nbhd_bwd_boxes *b, const struct tile *t, int a)
{
    int wrong = 0;
    for (int k = t->origin[a]; k < nbhd_min(t->origin[a] + b->k_box[a], t->keys[a]); k++)
        for (int q = 0; q < t->queries[a]; q++) {
            const struct nbhd_range keys = nbhd_keys(p->axis[a], t->queries[a], q);
            const int seen = k >= keys.begin && k < keys.end;
            wrong += seen && (q < t->any[a].begin || q >= t->any[a].end);
            wrong += !seen && q >= t->all[a].begin && q < t->all[a].end;
            wrong += seen && t->q->mask_at[a] >= 0 && q - t->any[a].begin + 256 + t->q->extent[a] >= 0x8000;
        }
    return wrong;
}

static void check_rows(const char *line, const struct nbhd_bwd_boxes *b)
{
    int wrong = 0;
    for (int r = 0; r < ROWS; r++) {
        const int at[3] = {(int)(b->row[r] & 255), (int)(b->row[r] >> 8 & 255), (int)(b->row[r] >> 16 & 255)};
        const int token = (at[0] * b->k_box[1] + at[1]) * b->k_box[2] + at[2];
        wrong += r < b->rows && token != r;
        for (int a = 0; a < 3; a++)
            wrong += at[a] < (int)(b->low[r / 64] >> 8 * a & 255) || at[a] > (int)(b->high[r / 64] >> 8 * a & 255);
    }
    CHECK(!wrong, "%s: %d rows are misplaced", line, wrong);
}

static void check_shape(const char *line, const struct nbhd_problem *p, const struct nbhd_sm90_bwd_plan *plan,
                        const struct nbhd_query_box *q)
{
    int columns = 0;
    CHECK(q->queries == q->extent[0] * q->extent[1] * q->extent[2] && q->queries <= plan->n, "%s: %d queries", line,
          q->queries);
    for (int a = 0; a < 3; a++) {
        const bool alone = nbhd_group_size(p->axis[a], 0) == 1 && p->axis[a].keys == p->axis[a].length;
        CHECK(plan->mask_bits || q->mask_at[a] == columns || alone,
              "%s: axis %d has its mask at %d", line, a, q->mask_at[a]);
        columns += q->mask_at[a] >= 0 ? q->extent[a] : 0;
    }
    CHECK(plan->mask_bits || columns, "%s: nothing masks the rows past a box of keys", line);
    CHECK(columns <= 16 * plan->mask_steps, "%s: %d mask columns in %d steps", line, columns, plan->mask_steps);
}

/* As the kernel does. */
static void take_shape(struct tile *t, const struct nbhd_bwd_boxes *b)
{
    int least = INT_MAX;
    t->q = NULL;
    for (int i = 0; i < b->shapes; i++) {
        int count = 1;
        for (int a = 0; a < 3; a++)
            count *= (t->any[a].end - t->any[a].begin + b->shape[i].extent[a] - 1) / b->shape[i].extent[a];
        if (count < least)
            t->q = &b->shape[i], least = count;
    }
}

static void check_plan(const char *line, const struct nbhd_problem *p, const struct nbhd_sm90_bwd_plan *plan)
{
    static struct nbhd_bwd_boxes b;
    nbhd_sm90_bwd_boxes(&b, p, plan);
    const double tiles = (double)b.tiles[0] * b.tiles[1] * b.tiles[2];
    double boxes = 0, full = 0, slices = 1;
    int wrong = 0;
    CHECK(b.rows == b.k_box[0] * b.k_box[1] * b.k_box[2] && b.rows <= ROWS, "%s: %d keys", line, b.rows);
    CHECK(b.shapes == 1 || (b.shapes <= NBHD_BWD_SM90_SHAPES && !plan->sliced), "%s: %d shapes", line, b.shapes);
    for (int i = 0; i < b.shapes; i++)
        check_shape(line, p, plan, &b.shape[i]);
    CHECK(nbhd_sm90_bwd_shared(p, plan) <= SHARED, "%s: %d bytes of shared memory", line,
          nbhd_sm90_bwd_shared(p, plan));
    check_rows(line, &b);
    for (int a = 0; a < 3; a++)
        slices *= p->axis[a].dilation;
    CHECK(plan->sliced || slices == 1, "%s: a dilated problem in one slice", line);
    for (int x = 0; x < (int)fmin(tiles, MOST_TILES); x++) {
        struct tile t;
        double inside;
        place(&t, p, &b, x);
        take_shape(&t, &b);
        boxes += boxes_in(&t, &inside);
        full += inside;
        for (int a = 0; a < 3 && x % 17 == 0; a++)
            wrong += check_axis(p, &b, &t, a);
    }
    CHECK(!wrong, "%s: %d pairs of key and query are wrong", line, wrong);
    if (slices > 1 || tiles > MOST_TILES) /* the plan counts all groups together */
        return;
    CHECK(fabs(boxes - plan->boxes) < 0.5, "%s: %.0f boxes, the plan says %.0f", line, boxes, plan->boxes);
    CHECK(full >= plan->full_boxes, "%s: %.0f boxes need no mask, the plan says %.0f", line, full, plan->full_boxes);
    CHECK(fabs(tiles - plan->tiles) < 0.5, "%s: %.0f tiles, the plan says %.0f", line, tiles, plan->tiles);
}

int main(void)
{
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
        for (int adds_dq = 0; adds_dq <= NBHD_DQ_INTEGERS; adds_dq++) {
            nbhd_desc desc;
            struct nbhd_problem problem;
            struct nbhd_sm90_bwd_plan plans[ROOM];
            if (!CHECK(!nbhd_desc_parse(&desc, lines[i]) && !nbhd_problem_init(&problem, &desc), "%s: %s", lines[i],
                       nbhd_last_error()))
                continue;
            const int count = nbhd_sm90_bwd_plans(&problem, adds_dq, MULTIPROCESSORS, SHARED, plans, ROOM);
            const bool wide = nbhd_max(desc.head_dim, desc.head_dim_v) > 128; /* dQ does not fit beside dK and dV */
            CHECK((count >= 1) == !(wide && adds_dq), "%s: %d plans, adds_dq %d", lines[i], count, adds_dq);
            for (int k = 0; k < count; k++) {
                CHECK(k == 0 || plans[k].ms >= plans[k - 1].ms, "%s: plan %d is faster than the one before", lines[i],
                      k);
                check_plan(lines[i], &problem, &plans[k]);
            }
        }
    return test_done();
}
