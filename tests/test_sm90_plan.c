/* Plans of fwd_sm90 and bwd_sm90_dq without a GPU: the counts that they are ranked by against a walk over all tiles,
 * and the mask columns that the kernels are told of against the windows, key by key. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/sm90.h"
#include "test.h"

enum { MULTIPROCESSORS = 132, SHARED = 232448, ROOM = 4, MOST_TILES = 4000 };

static const char *const lines[] = {
    "fwd bf16 h24 d128 30x48x80 w18x24x24",
    "fwd bf16 h24 d128 30x48x80 w18x24x24 s16x8x8",
    "fwd bf16 h24 d128 256x256 w80x80",
    "fwd bf16 h24 d128 256x256 w80x80 s16x16 extra=512",
    "fwd bf16 h24 d128 32768 w2048",
    "fwd bf16 h2 d64 1000 ec",
    "fwd f16 h24/8 d128 30x48x80 w18x24x24",
    "fwd bf16 h8 d64 69x64x96 w3x5x5",
    "fwd bf16 b32 h2 d64 64x64 w7x7",
    "fwd bf16 h2 d256 37x45 w13x20",
    "fwd bf16 h2 d192/64 37x45 w13x20",
    "fwd bf16 h2 d40 12x15x17 w5x6x7 etct",
    "fwd bf16 b2 h4 d32 28x28 w7x7 r4x4",
    "fwd bf16 b2 h2 d64 333 w15 r20",
    "fwd bf16 h2 d64 9x20x22 w4x8x9 s3x4x5 r1x2x2",
    "fwd bf16 h71/1 d64 20x30 w5x5",
    "fwd bf16 h1 d8 1x1x1",
    "fwd bf16 h1 d64 5x3 w1x1",
    "fwd bf16 h2 d128 16x44x80 w16x24x16 s1x8x16",
};

/* One query tile, in the group of its axes' first elements. */
struct tile {
    int origin[3], n[3];
    struct nbhd_range any[3], all[3];
};

static void place(struct tile *t, const struct nbhd_problem *p, const struct nbhd_boxes *b, int x)
{
    for (int a = 0; a < 3; a++) {
        t->n[a] = nbhd_group_size(p->axis[a], 0);
        t->origin[a] = x % b->tiles[a] * b->q_box[a];
        x /= b->tiles[a];
        struct nbhd_range q = nbhd_range_of(t->origin[a], nbhd_min(t->origin[a] + b->q_box[a], t->n[a]));
        t->any[a] = nbhd_tile_any(p->axis[a], t->n[a], q);
        t->all[a] = nbhd_tile_all(p->axis[a], t->n[a], q);
    }
}

static int boxes_in(const struct tile *t, const int *extent)
{
    int count = 1;
    for (int a = 0; a < 3; a++)
        count *= (t->any[a].end - t->any[a].begin + extent[a] - 1) / extent[a];
    return count;
}

/* As the kernel chooses. */
static const struct nbhd_key_box *shape_of(const struct tile *t, const struct nbhd_boxes *b)
{
    const struct nbhd_key_box *best = &b->shape[0];
    for (int i = 1; i < b->shapes; i++)
        if (boxes_in(t, b->shape[i].extent) < boxes_in(t, best->extent))
            best = &b->shape[i];
    return best;
}

static int full_boxes(const struct tile *t, const struct nbhd_key_box *k, int n)
{
    int count = k->tokens >= n;
    for (int a = 0; a < 3; a++) {
        int inside = 0;
        for (int x = t->any[a].begin; x < t->any[a].end; x += k->extent[a])
            inside += x >= t->all[a].begin && x + k->extent[a] <= t->all[a].end;
        count *= inside;
    }
    return count;
}

/* The mask of one axis of a tile: every coordinate of the query box and every key of every box. */
static int check_axis(const struct nbhd_problem *p, const struct nbhd_boxes *b, const struct tile *t,
                      const struct nbhd_key_box *k, int a)
{
    int wrong = 0;
    for (int i = 0; i < b->q_box[a]; i++) {
        struct nbhd_range keys = nbhd_keys(p->axis[a], t->n[a], nbhd_min(t->origin[a] + i, t->n[a] - 1));
        for (int x = t->any[a].begin; x < t->any[a].end; x += k->extent[a])
            for (int e = 0; e < k->extent[a]; e++) {
                int seen = x + e >= keys.begin && x + e < keys.end;
                int relative = x + e - t->any[a].begin + 256; /* find_probes: 15 bits, row and origin apart */
                wrong += k->mask_at[a] < 0 ? !seen : relative - e < 0 || relative >= 0x8000;
            }
    }
    return wrong;
}

/* Each tile is somebody's, once: as the kernel walks them (device/tiles_sm90.cuh). */
static void check_share(const char *line, struct nbhd_boxes *b, const struct nbhd_sm90_plan *plan, int slices,
                        int resident, int most)
{
    const int work = b->tiles[0] * b->tiles[1] * b->tiles[2] * b->head_blocks * slices;
    const int ctas = nbhd_sm90_share(b, plan, most, work, resident);
    unsigned char *seen = calloc((size_t)work, 1);
    int wrong = seen == NULL;
    for (int cta = 0; cta < ctas && seen; cta++) {
        int row = 0, block = cta, kind = 0, left = 1;
        for (; kind < NBHD_SM90_RUNS - 1 && block >= b->rounds[kind] * resident; kind++) {
            block -= b->rounds[kind] * resident;
            row += b->rounds[kind] * resident * (NBHD_SM90_MOST >> kind);
        }
        left = NBHD_SM90_MOST >> kind;
        wrong += left > most && left > 1;
        row += block / resident * resident * left;
        for (int place = block % resident; left-- > 0; row += resident, place = (place + NBHD_SM90_STEP) % resident)
            wrong += row + place >= work || seen[row + place]++;
    }
    for (int i = 0; i < work && seen; i++)
        wrong += !seen[i];
    CHECK(NBHD_SM90_MOST >> (NBHD_SM90_RUNS - 1) == 1, "the last kind of round takes single tiles");
    CHECK(wrong == 0, "%s: %d of %d tiles are not computed once, with %d CTAs", line, wrong, work, resident);
    free(seen);
}

/* So is each place of a tile: as place_of walks them. */
static void check_strip(const char *line, const struct nbhd_problem *p, const struct nbhd_boxes *b, int resident)
{
    const int *n = b->tiles, tiles = n[0] * n[1] * n[2], strip = nbhd_sm90_strip(p, b, resident);
    unsigned char *seen = calloc((size_t)tiles, 1);
    int wrong = seen == NULL || strip < 1;
    for (int i = 0; i < tiles && !wrong; i++) {
        int x = i / n[0], first = x / (n[2] * strip) * strip, rows = nbhd_min(strip, n[1] - first);
        x -= first * n[2];
        const int at[3] = {i % n[0], first + x % rows, x / rows};
        wrong += at[1] >= n[1] || at[2] >= n[2] || seen[(at[0] * n[1] + at[1]) * n[2] + at[2]]++;
    }
    CHECK(wrong == 0, "%s: strips of %d do not cover the tiles", line, strip);
    free(seen);
}

static void check_boxes(const char *line, const struct nbhd_problem *p, const struct nbhd_sm90_kernel *kernel,
                        const struct nbhd_sm90_plan *plan)
{
    static struct nbhd_boxes b;
    nbhd_sm90_boxes(&b, p, plan);
    double tiles = (double)b.tiles[0] * b.tiles[1] * b.tiles[2], boxes = 0, full = 0;
    int tokens = b.q_box[0] * b.q_box[1] * b.q_box[2], wrong = 0;
    CHECK(b.rows == tokens * b.pack && b.rows <= 64 * plan->variant.groups, "%s: %d rows", line, b.rows);
    CHECK(p->desc.heads / p->desc.kv_heads % b.pack == 0, "%s: %d heads in a tile", line, b.pack);
    for (int r = 0; r < b.rows; r++) {
        int at[3] = {(int)(b.row[r] & 255), (int)(b.row[r] >> 8 & 255), (int)(b.row[r] >> 16 & 255)};
        int token = (at[0] * b.q_box[1] + at[1]) * b.q_box[2] + at[2];
        wrong += token * b.pack + (int)(b.row[r] >> 24) != r;
        for (int a = 0; a < 3; a++)
            wrong += at[a] < (int)(b.low[r / 64] >> 8 * a & 255) || at[a] > (int)(b.high[r / 64] >> 8 * a & 255);
    }
    CHECK(wrong == 0, "%s: %d rows are not where they should be", line, wrong);
    static const int resident[] = {1, 7, 132, 264};
    for (int i = 0; i < 4; i++) {
        check_share(line, &b, plan, 1 + i, resident[i], i == 2 ? 2 : NBHD_SM90_MOST);
        check_strip(line, p, &b, resident[i]);
    }
    int step = tiles > MOST_TILES ? (int)(tiles / MOST_TILES) | 1 : 1;
    int one_axis = p->axis[0].length * p->axis[1].length == 1; /* masked by bits */
    for (int x = 0; x < (int)tiles; x += step) {
        struct tile t;
        place(&t, p, &b, x);
        const struct nbhd_key_box *k = shape_of(&t, &b);
        boxes += boxes_in(&t, k->extent);
        full += full_boxes(&t, k, kernel->pad_columns ? plan->variant.n : 0);
        for (int a = 0; a < 3 && !one_axis; a++)
            wrong += check_axis(p, &b, &t, k, a);
    }
    CHECK(wrong == 0, "%s: %d keys are not masked as they should be", line, wrong);
    if (step > 1)
        return;
    int dilated = p->axis[0].dilation * p->axis[1].dilation * p->axis[2].dilation > 1;
    CHECK(dilated || (plan->tiles == tiles && fabs(plan->boxes - boxes) < 0.5), "%s: %g boxes planned, %g visited",
          line, plan->boxes, boxes);
    CHECK(dilated || fabs(plan->full_boxes - full) < 0.5, "%s: %g boxes without a mask planned, %g visited", line,
          plan->full_boxes, full);
}

static void check_columns(const char *line, const struct nbhd_sm90_kernel *kernel, const struct nbhd_sm90_plan *plan)
{
    for (int i = 0; i < plan->shapes; i++) {
        const int *k = plan->k_box[i];
        int used[NBHD_SM90_MASK] = {0}, tokens = k[0] * k[1] * k[2];
        CHECK(tokens <= plan->variant.n, "%s: box of %d keys for N=%d", line, tokens, plan->variant.n);
        for (int a = 0; a < 4; a++)
            for (int x = 0; plan->mask_at[i][a] >= 0 && x < (a < 3 ? k[a] : 1); x++)
                if (CHECK(plan->mask_at[i][a] + x < 16 * plan->mask_steps, "%s: column past the steps", line))
                    CHECK(used[plan->mask_at[i][a] + x]++ == 0, "%s: column used twice", line);
        CHECK(kernel->pad_columns ? plan->mask_bits || tokens == plan->variant.n || plan->mask_at[i][3] >= 0
                                  : tokens >= plan->variant.n - 8 * plan->pad,
              "%s: keys past a box of %d are not masked", line, tokens);
    }
}

static void check_plans(const char *line, const struct nbhd_problem *problem, const struct nbhd_sm90_kernel *kernel)
{
    struct nbhd_sm90_plan plans[ROOM];
    int count = nbhd_sm90_plans(kernel, problem, MULTIPROCESSORS, SHARED, plans, ROOM);
    CHECK(count >= 1, "%s: no plan", line);
    for (int k = 0; k < count; k++) {
        CHECK(k == 0 || plans[k].ms >= plans[k - 1].ms * (1 - 1e-5), "%s: plan %d is faster than the one before", line,
              k);
        CHECK(kernel->shared(problem, &plans[k]) <= SHARED, "%s: %d bytes of shared memory", line,
              kernel->shared(problem, &plans[k]));
        check_boxes(line, problem, kernel, &plans[k]);
        check_columns(line, kernel, &plans[k]);
    }
}

/* A plan for many sequences must do for any of their lengths: all axes of the rank are masked, with one shape. */
static void check_many(const char *line, struct nbhd_problem *problem)
{
    struct nbhd_sm90_plan plans[ROOM];
    problem->flags = NBHD_PROBLEM_MANY;
    const int rank = problem->desc.rank;
    const int count = nbhd_sm90_plans(&nbhd_sm90_forward, problem, MULTIPROCESSORS, SHARED, plans, ROOM);
    for (int k = 0; k < count; k++) {
        int masked = rank == 1 ? plans[k].mask_bits : 1;
        for (int a = 3 - rank; a < 3 && rank > 1; a++)
            masked &= plans[k].mask_at[0][a] >= 0;
        CHECK(masked && plans[k].many && !plans[k].sliced && plans[k].shapes == 1, "%s: plan %d is not for many", line,
              k);
        CHECK(nbhd_sm90_shared(problem, &plans[k]) <= SHARED, "%s: plan %d has too much shared memory", line, k);
        check_columns(line, &nbhd_sm90_forward, &plans[k]);
    }
    CHECK(count > 0, "%s: no plan for many", line);
}

/* ---- the model of time against bench/results/h200-forward-plans.csv ---- */

/* A record's problem and plan; false at the end. Lines that begin with # and the header are skipped. */
static bool read_plan(FILE *in, char line[NBHD_TEXT], struct nbhd_problem *problem, struct nbhd_sm90_plan *p,
                      double *ms)
{
    char text[1024], shapes[256];
    nbhd_desc desc;
    int *q = p->q_box;
    do
        if (!fgets(text, sizeof text, in))
            return false;
    while (text[0] != '"');
    memset(p, 0, sizeof *p);
    p->variant.stages = 2;
    const int found = sscanf(text, "\"%511[^\"]\",%d,%d,%d,%d,%dx%dx%d,%255[^,],%d,%d,%d,%d,%*d,%lf,%lf,%lf,%lf,%d,%lf",
                             line, &p->variant.groups, &p->variant.n, &p->variant.ctas, &p->pack, &q[0], &q[1], &q[2],
                             shapes, &p->mask_steps, &p->mask_bits, &p->pad, &p->q_stages, &p->tiles, &p->boxes,
                             &p->full_boxes, &p->longest, &p->slots, ms);
    if (!CHECK(found == 19 && !nbhd_desc_parse(&desc, line) && !nbhd_problem_init(problem, &desc), "%s", text))
        return false;
    for (const char *at = shapes; at; at = strchr(at, '/') ? strchr(at, '/') + 1 : NULL)
        p->shapes++;
    const double slices = nbhd_sm90_slices(problem, p);
    p->tiles /= slices, p->boxes /= slices, p->full_boxes /= slices;
    return true;
}

/* What the prices promise: times within 7 % in the mean, and of a problem's plans one of the fastest, at a loss of
 * 1 %. */
static void check_measured(void)
{
    char path[1024], line[NBHD_TEXT], last[NBHD_TEXT] = "";
    struct nbhd_problem problem;
    struct nbhd_sm90_plan plan;
    double ms, error = 0, chosen = INFINITY, chosen_ms = 0, fastest = INFINITY, lost = 0;
    int plans = 0, problems = 0;
    snprintf(path, sizeof path - 64, "%s", __FILE__);
    strcpy(strrchr(path, '/') + 1, "../bench/results/h200-forward-plans.csv");
    FILE *in = fopen(path, "r");
    CHECK(in != NULL, "%s cannot be read", path);
    for (bool more = in != NULL; more; plans += more) {
        more = read_plan(in, line, &problem, &plan, &ms);
        if ((!more || strcmp(line, last)) && last[0]) {
            CHECK(chosen_ms < 1.2 * fastest, "%s: of the measured plans the model takes one of %g ms, the best: %g",
                  last, chosen_ms, fastest);
            lost += chosen_ms / fastest - 1;
            problems++;
            chosen = fastest = INFINITY;
        }
        if (!more)
            break;
        strcpy(last, line);
        const double predicted = nbhd_sm90_forward.ms(&problem, &plan, MULTIPROCESSORS);
        CHECK(fabs(predicted / ms - 1) < 0.35, "%s: predicted %g ms, measured %g", line, predicted, ms);
        error += fabs(predicted / ms - 1);
        chosen_ms = predicted < chosen ? ms : chosen_ms;
        chosen = fmin(chosen, predicted);
        fastest = fmin(fastest, ms);
    }
    if (in)
        fclose(in);
    CHECK(error < 0.07 * plans && lost < 0.01 * problems, "%d plans of %d problems: mean error %.1f %%, lost %.1f %%",
          plans, problems, 100 * error / plans, 100 * lost / problems);
    printf("%d measured plans of %d problems: mean error %.1f %%, lost by choosing %.1f %%\n", plans, problems,
           100 * error / plans, 100 * lost / problems);
}

int main(void)
{
    check_measured();
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        nbhd_desc desc;
        struct nbhd_problem problem;
        if (!CHECK(!nbhd_desc_parse(&desc, lines[i]) && !nbhd_problem_init(&problem, &desc), "%s: %s", lines[i],
                   nbhd_last_error()))
            continue;
        check_plans(lines[i], &problem, &nbhd_sm90_forward);
        check_plans(lines[i], &problem, &nbhd_sm90_dq);
        check_many(lines[i], &problem);
    }
    return test_done();
}
