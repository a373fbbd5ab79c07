/* The simulator's choices: ranking tilings, searching settings, the model of time; and bad input to all of its
 * functions. */
#include <math.h>
#include <time.h>
#include "core/model.h"
#include "nbhd_sim.h"
#include "test.h"

static nbhd_desc parse(const char *line)
{
    nbhd_desc desc = NBHD_DESC_INIT;
    CHECK(!nbhd_desc_parse(&desc, line), "%s: %s", line, nbhd_last_error());
    return desc;
}

/* ---- ranking and search ---- */

enum { ROOM = 5000 };
static nbhd_sim_setting settings[ROOM];

static double seconds(void)
{
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void check_rank(void)
{
    const nbhd_desc desc = parse("bf16 h24 d128 30x48x80 w18x24x24");
    const nbhd_sim_tiles any = NBHD_SIM_TILES_INIT;
    int count = 0;
    CHECK(!nbhd_sim_rank(&desc, &any, 3, 128, 128, NULL, settings, ROOM, &count), "%s", nbhd_last_error());
    CHECK(count > 1000, "%d tilings", count);
    for (int i = 0; i < count; i++) {
        nbhd_sim_counts again = NBHD_SIM_COUNTS_INIT;
        CHECK(!nbhd_sim_count(&desc, &settings[i].tiles, &again), "%s", nbhd_last_error());
        CHECK(again.visited_mean == settings[i].counts.visited_mean, "%g", again.visited_mean);
        CHECK(!i || settings[i - 1].counts.bound_mean >= settings[i].counts.bound_mean, "setting %d is out of order",
              i);
    }
    nbhd_sim_device h200 = NBHD_SIM_DEVICE_INIT;
    CHECK(!nbhd_sim_device_get(&h200, "h200"), "%s", nbhd_last_error());
    CHECK(!nbhd_sim_rank(&desc, &any, 15, 128, 128, &h200, settings, ROOM, &count), "%s", nbhd_last_error());
    for (int i = 1; i < count; i++)
        CHECK(settings[i - 1].ms <= settings[i].ms && settings[i].ms > 0, "setting %d is out of order", i);
    const nbhd_desc small = parse("d32 7x7 w3x3"); /* fewer tokens than a tile */
    CHECK(!nbhd_sim_rank(&small, &any, 15, 0, 0, NULL, settings, ROOM, &count) && count > 0, "%s", nbhd_last_error());
}

static bool holds(int count, const char *line, int *index)
{
    const nbhd_desc wanted = parse(line);
    for (*index = 0; *index < count; ++*index)
        if (!memcmp(settings[*index].desc.window, wanted.window, sizeof wanted.window) &&
            !memcmp(settings[*index].desc.stride, wanted.stride, sizeof wanted.stride))
            return true;
    return false;
}

static void check_find(void)
{
    const nbhd_desc desc = parse("bf16 h24 d128 30x48x80");
    nbhd_sim_tiles tiles = {sizeof tiles, 0, {4, 8, 8}, {2, 8, 8}, 1, 0, 0, 0, 0};
    nbhd_sim_search search = NBHD_SIM_SEARCH_INIT;
    int count = 0, at;
    double considered = 0;
    search.sparsity = 0.91;
    search.efficiency = 1;
    CHECK(!nbhd_sim_find(&desc, &tiles, 1, &search, settings, ROOM, &count, &considered), "%s", nbhd_last_error());
    /* The published block-sparse setting is found, in its smallest stride. */
    CHECK(holds(count, "bf16 h24 d128 30x48x80 w18x24x24 s16x8x8", &at), "%d settings, 18x24x24 s16x8x8 not among them",
          count);
    for (int i = 0; i < count; i++) {
        CHECK(settings[i].counts.block_sparse, "setting %d", i);
        CHECK(fabs(1 - 1 / settings[i].counts.bound_flop - 0.91) <= 0.02 + 1e-9, "setting %d: %g", i,
              settings[i].counts.bound_flop);
        CHECK(!i || settings[i - 1].counts.bound_mean >= settings[i].counts.bound_mean - 1e-9,
              "setting %d is out of order", i);
    }
    search = (nbhd_sim_search)NBHD_SIM_SEARCH_INIT;
    const nbhd_sim_tiles any = NBHD_SIM_TILES_INIT;
    const double start = seconds();
    CHECK(!nbhd_sim_find(&desc, &any, 3, &search, settings, ROOM, &count, &considered), "%s", nbhd_last_error());
    const double took = seconds() - start;
    printf("search of all tiles: %d settings of %.0f looked at, %.0f ms\n", count, considered, 1e3 * took);
    CHECK(considered > 10000 && count > 1000, "only %g looked at, %d found", considered, count);
    /* well under a second on an idle machine; generous under sanitizers */
    CHECK(took < 5, "the search took %g s", took);
    for (int i = 0; i < count; i++)
        CHECK(settings[i].counts.computed_mean > 0 && settings[i].counts.bound_mean > 0, "setting %d", i);
}

/* Extra keys count in the bounds that settings are sorted by, and the last tile of theirs may need a mask. */
static void check_find_with_extra(void)
{
    static const char *const lines[] = {"d64 32x6 epn extra=10", "bwd d64 48x40 extra=100", "d64 30x31 r2x1 extra=128",
                                        "d64 600 extra=1000"};
    const nbhd_sim_tiles any = NBHD_SIM_TILES_INIT;
    for (int l = 0; l < 4; l++)
        for (int perfect = 0; perfect < 2; perfect++) {
            const nbhd_desc desc = parse(lines[l]);
            nbhd_sim_search search = NBHD_SIM_SEARCH_INIT;
            int count = 0;
            search.efficiency = perfect ? 1 : 0.3;
            CHECK(!nbhd_sim_find(&desc, &any, 3, &search, settings, ROOM, &count, NULL), "%s", nbhd_last_error());
            CHECK(count || perfect, "'%s': nothing found", lines[l]);
            for (int i = 0; i < count; i++) {
                const nbhd_sim_counts *c = &settings[i].counts;
                const double before = i ? settings[i - 1].counts.bound_mean : INFINITY;
                CHECK(before >= c->bound_mean - 1e-9, "'%s': setting %d, %g after %g", lines[l], i, c->bound_mean,
                      before);
                CHECK(c->block_sparse || !perfect, "'%s': setting %d needs masks", lines[l], i);
            }
        }
}

/* What the search says of its best settings, nothing beats: every stride of every window in range, one by one. */
static void check_find_exhaustively(void)
{
    const nbhd_desc desc = parse("d64 24x32");
    const nbhd_sim_tiles tiles = {sizeof tiles, 1, {4, 4, 0}, {4, 8, 0}, 1, 0, 0, 0, 0};
    nbhd_sim_search search = NBHD_SIM_SEARCH_INIT;
    int count = 0;
    search.window_min[0] = search.window_max[0] = 12;
    search.window_min[1] = 8, search.window_max[1] = 20;
    search.efficiency = 0.5;
    CHECK(!nbhd_sim_find(&desc, &tiles, 2, &search, settings, ROOM, &count, NULL) && count, "%s", nbhd_last_error());
    double best = 0;
    for (int w = 8; w <= 20; w++)
        for (int s0 = 1; s0 <= 12; s0++)
            for (int s1 = 1; s1 <= w; s1++) {
                nbhd_desc d = desc;
                d.window[0] = 12, d.window[1] = w, d.stride[0] = s0, d.stride[1] = s1;
                nbhd_sim_counts c = NBHD_SIM_COUNTS_INIT;
                CHECK(!nbhd_sim_count(&d, &tiles, &c), "%s", nbhd_last_error());
                best = fmax(best, c.bound_mean);
            }
    CHECK(fabs(settings[0].counts.bound_mean - best) < 1e-9, "found %g, the best is %g", settings[0].counts.bound_mean,
          best);
}

/* ---- the model of time ---- */

static char *read_text(const char *name)
{
    char path[1024];
    snprintf(path, sizeof path, "%s", __FILE__);
    char *slash = strrchr(path, '/');
    snprintf(slash ? slash + 1 : path, sizeof path - (size_t)(slash ? slash + 1 - path : 0), "../bench/results/%s",
             name);
    FILE *file = fopen(path, "rb");
    char *text = calloc(1, 1 << 16);
    if (file && text) {
        size_t length = fread(text, 1, (1 << 16) - 1, file);
        text[length] = '\0';
    }
    CHECK(file != NULL, "cannot read %s", path);
    if (file)
        fclose(file);
    return text;
}

enum { MOST_SAMPLES = 64 };

/* The committed prices against the committed measurements; and a fit that starts elsewhere comes to the same times. */
static void check_model(const char *file, const char *name)
{
    static nbhd_sim_sample samples[MOST_SAMPLES];
    int count = 0;
    char *text = read_text(file);
    CHECK(!nbhd_sim_samples_parse(text, samples, MOST_SAMPLES, &count) && count > 5, "%s: %s", file, nbhd_last_error());
    free(text);
    nbhd_sim_device device = NBHD_SIM_DEVICE_INIT;
    CHECK(!nbhd_sim_device_get(&device, name), "%s", nbhd_last_error());
    double known[MOST_SAMPLES], errors[MOST_SAMPLES], median = 1, worst = 1;
    for (int i = 0; i < count; i++) {
        CHECK(!nbhd_sim_predict(&device, &samples[i].desc, &samples[i].tiles, &known[i]), "%s", nbhd_last_error());
        errors[i] = fabs(known[i] / samples[i].ms - 1);
        CHECK(errors[i] < 0.15, "%s, sample %d: predicted %g ms, measured %g", file, i, known[i], samples[i].ms);
    }
    nbhd_sim_device other = device;
    other.matrix *= 0.8, other.softmax *= 1.2, other.mask *= 1.3;
    CHECK(!nbhd_sim_fit(&other, samples, count, &median, &worst), "%s", nbhd_last_error());
    CHECK(median < 0.06 && worst < 0.15, "%s: median error %g, worst %g", file, median, worst);
    printf("%s: median error %.1f %%, worst %.1f %%\n", file, 100 * median, 100 * worst);
    /* Times made by the model itself are found again. */
    for (int i = 0; i < count; i++)
        samples[i].ms = known[i];
    other = device;
    other.matrix *= 0.8, other.softmax *= 1.2, other.mask *= 1.3, other.tile *= 0.5;
    CHECK(!nbhd_sim_fit(&other, samples, count, &median, &worst), "%s", nbhd_last_error());
    CHECK(worst < 0.03, "%s: made times are missed by %g", file, worst);
}

/* A kernel whose times went into no fit: the prototype of the one that was measured, its last rows
 * not at burst clocks. */
static void check_prediction(const char *file, const char *name)
{
    static nbhd_sim_sample samples[MOST_SAMPLES];
    int count = 0;
    char *text = read_text(file);
    nbhd_sim_device device = NBHD_SIM_DEVICE_INIT;
    CHECK(!nbhd_sim_samples_parse(text, samples, MOST_SAMPLES, &count) && !nbhd_sim_device_get(&device, name) &&
              count > 2,
          "%s: %s", file, nbhd_last_error());
    free(text);
    for (int i = 0; i < count; i++) {
        double ms = 0;
        CHECK(!nbhd_sim_predict(&device, &samples[i].desc, &samples[i].tiles, &ms) &&
                  fabs(ms / samples[i].ms - 1) < 0.2,
              "%s, sample %d: predicted %g ms, measured %g", file, i, ms, samples[i].ms);
    }
}

/* What must follow from the prices: more work never costs less. */
static void check_model_order(void)
{
    nbhd_sim_device device = NBHD_SIM_DEVICE_INIT;
    const nbhd_sim_tiles t = {sizeof t, NBHD_SIM_DYNAMIC, {16, 8, 0}, {16, 8, 0}, 1, 0, 0, 0, 0};
    nbhd_sim_tiles permuted = t, fixed = t;
    permuted.tiling = NBHD_SIM_PERMUTED;
    fixed.tiling = NBHD_SIM_STATIC;
    CHECK(!nbhd_sim_device_get(&device, "h200"), "%s", nbhd_last_error());
    static const char *const lines[] = {"bf16 h4 d128 128x128 w16x16 s16x16", "bf16 h4 d128 128x128 w16x16",
                                        "bf16 h4 d128 128x128 w48x48", "bf16 h8 d128 128x128 w48x48",
                                        "bf16 h8 d128 128x128 w48x48 extra=512",
                                        "bf16 b2 h8 d128 128x128 w48x48 extra=512"};
    double last = 0, ms = 0, a = 0, b = 0;
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        const nbhd_desc desc = parse(lines[i]);
        CHECK(!nbhd_sim_predict(&device, &desc, &t, &ms) && ms > last, "%s: %g ms, before %g", lines[i], ms, last);
        CHECK(!nbhd_sim_predict(&device, &desc, &permuted, &a) && !nbhd_sim_predict(&device, &desc, &fixed, &b) &&
                  a > b,
              "%s: permuted %g, static %g", lines[i], a, b);
        last = ms;
    }
    nbhd_desc bad = parse("bf16 d128 128x128 w16x16");
    bad.dtype = NBHD_F32;
    CHECK(nbhd_sim_predict(&device, &bad, &t, &ms) == NBHD_ERROR_UNSUPPORTED, "h200 prices 16-bit kernels");
    bad.dtype = NBHD_BF16, bad.pass = NBHD_QK;
    CHECK(nbhd_sim_predict(&device, &bad, &t, &ms) == NBHD_ERROR_UNSUPPORTED, "qk has no model");
}

/* Workers are as many as there are; the longest tile is some worker's, however few tiles there are. */
static void check_longest(void)
{
    nbhd_sim_device device = NBHD_SIM_DEVICE_INIT;
    struct nbhd_model_call few = {.tiles = 10, .visited = 5, .longest = 50, .pairs = 16384, .flops = 512, .tile = 1};
    struct nbhd_model_call one = few, even = few;
    one.tiles = 1, one.visited = 50;
    even.longest = 5;
    nbhd_sim_device_get(&device, "h200");
    const double us = nbhd_model_us(&device, &few), alone = nbhd_model_us(&device, &one);
    CHECK(us == alone && us > 5 * nbhd_model_us(&device, &even), "%g us where the longest tile takes %g", us, alone);
}

/* ---- bad input ---- */

static void refused(nbhd_status status, nbhd_status wanted, const char *mentions)
{
    CHECK(status == wanted && strstr(nbhd_last_error(), mentions), "status %d of %d, \"%s\" without %s", status, wanted,
          nbhd_last_error(), mentions);
}

static void check_bad_tiles(void)
{
    const nbhd_desc desc = parse("d64 30x48x80 w18x24x24"), back = parse("bwd d64 48x80 w24x24");
    const nbhd_sim_tiles good = {sizeof good, 0, {4, 8, 8}, {2, 8, 8}, 1, 0, 0, 0, 0};
    nbhd_sim_counts c = NBHD_SIM_COUNTS_INIT;
    nbhd_sim_tiles t = good;
    t.q_tile[1] = 0;
    refused(nbhd_sim_count(&desc, &t, &c), NBHD_ERROR_INVALID, "q_tile[1] is 0");
    t.q_tile[1] = -8;
    refused(nbhd_sim_count(&desc, &t, &c), NBHD_ERROR_INVALID, "q_tile[1] is -8");
    t = good, t.kv_tile[2] = 81;
    refused(nbhd_sim_count(&desc, &t, &c), NBHD_ERROR_INVALID, "kv_tile[2] is 81");
    t = good, t.q_tile[0] = 30, t.q_tile[1] = 48, t.q_tile[2] = 80;
    refused(nbhd_sim_count(&desc, &t, &c), NBHD_ERROR_INVALID, "115200 tokens");
    t = good, t.tiling = 4;
    refused(nbhd_sim_count(&desc, &t, &c), NBHD_ERROR_INVALID, "tiling is 4");
    t = good, t.warpgroups = 3;
    refused(nbhd_sim_count(&desc, &t, &c), NBHD_ERROR_INVALID, "warpgroups is 3");
    t = good, t.size = 0;
    refused(nbhd_sim_count(&desc, &t, &c), NBHD_ERROR_INVALID, "nbhd_sim_tiles.size");
    refused(nbhd_sim_count(&back, &good, &c), NBHD_ERROR_INVALID, "q_tile[2] is 8");
    t = good, t.tiling = NBHD_SIM_FLAT, t.q_tile[1] = t.q_tile[2] = t.kv_tile[1] = t.kv_tile[2] = 0;
    refused(nbhd_sim_count(&back, &t, &c), NBHD_ERROR_UNSUPPORTED, "flat");
    const nbhd_desc wide = parse("d64 300x300x300 w200x200x200");
    refused(nbhd_sim_count(&wide, &t, &c), NBHD_ERROR_UNSUPPORTED, "steps");
    c.size = 0;
    refused(nbhd_sim_count(&desc, &good, &c), NBHD_ERROR_INVALID, "nbhd_sim_counts.size");
    nbhd_sim_tile tile = NBHD_SIM_TILE_INIT;
    refused(nbhd_sim_tile_of(&desc, &good, 3, 0, &tile), NBHD_ERROR_INVALID, "axis is 3");
    refused(nbhd_sim_tile_of(&desc, &good, 1, 48, &tile), NBHD_ERROR_INVALID, "query[1] is 48");
}

static void check_bad_requests(void)
{
    const nbhd_desc desc = parse("d64 48x80");
    nbhd_sim_tiles any = NBHD_SIM_TILES_INIT;
    nbhd_sim_search s = NBHD_SIM_SEARCH_INIT;
    int count = 7;
    s.window_min[0] = 49;
    refused(nbhd_sim_find(&desc, &any, 3, &s, settings, ROOM, &count, NULL), NBHD_ERROR_INVALID, "window_min[0]");
    s.window_min[0] = 20, s.window_max[0] = 10;
    refused(nbhd_sim_find(&desc, &any, 3, &s, settings, ROOM, &count, NULL), NBHD_ERROR_INVALID, "window_min[0]");
    s = (nbhd_sim_search)NBHD_SIM_SEARCH_INIT, s.sparsity = 1.5;
    refused(nbhd_sim_find(&desc, &any, 3, &s, settings, ROOM, &count, NULL), NBHD_ERROR_INVALID, "sparsity is 1.5");
    s = (nbhd_sim_search)NBHD_SIM_SEARCH_INIT, s.efficiency = -1;
    refused(nbhd_sim_find(&desc, &any, 3, &s, settings, ROOM, &count, NULL), NBHD_ERROR_INVALID, "efficiency is -1");
    s = (nbhd_sim_search)NBHD_SIM_SEARCH_INIT, s.q_tokens = -3;
    refused(nbhd_sim_find(&desc, &any, 3, &s, settings, ROOM, &count, NULL), NBHD_ERROR_INVALID, "q_tokens");
    s.q_tokens = 0;
    refused(nbhd_sim_find(&desc, &any, 8, &s, settings, ROOM, &count, NULL), NBHD_ERROR_INVALID, "box tilings");
    any.warpgroups = 2;
    refused(nbhd_sim_find(&desc, &any, 3, &s, settings, ROOM, &count, NULL), NBHD_ERROR_INVALID, "warpgroups is 2");
    any.warpgroups = 0;
    any.q_tile[1] = 4;
    refused(nbhd_sim_find(&desc, &any, 3, &s, settings, ROOM, &count, NULL), NBHD_ERROR_INVALID, "q_tile[0] is 0");
    CHECK(count == 0, "%d settings after a failure", count);
    CHECK(nbhd_sim_end_to_end(1.2, 10, 0, 2) == 0 && nbhd_sim_end_to_end(0.5, 0, 0, 2) == 0 &&
              nbhd_sim_end_to_end(0.5, 10, 11, 2) == 0 && nbhd_sim_end_to_end(0.5, 10, 0, -1) == 0,
          "out of range");
    CHECK(fabs(nbhd_sim_end_to_end(0.5, 10, 0, 2) - 4.0 / 3) < 1e-12, "half of the time, twice as fast");
    nbhd_sim_device d = NBHD_SIM_DEVICE_INIT;
    double ms;
    any.q_tile[1] = 0;
    refused(nbhd_sim_rank(&desc, &any, 1, 0, 0, &d, settings, ROOM, &count), NBHD_ERROR_INVALID,
            "device.processors is 0");
    refused(nbhd_sim_rank(&desc, &any, 0, 0, 0, NULL, settings, ROOM, &count), NBHD_ERROR_INVALID, "tilings is 0x0");
    refused(nbhd_sim_device_get(&d, "abacus"), NBHD_ERROR_INVALID, "h200");
    refused(nbhd_sim_predict(&d, &desc, &any, &ms), NBHD_ERROR_INVALID, "device.processors is 0");
}

static void check_bad_tables(void)
{
    nbhd_sim_sample s[2];
    int count;
    refused(nbhd_sim_samples_parse("", s, 2, &count), NBHD_ERROR_INVALID, "no row");
    refused(nbhd_sim_samples_parse("what,ms\nd8 9,1\n", s, 2, &count), NBHD_ERROR_INVALID, "lack line");
    refused(nbhd_sim_samples_parse("line,ms\n", s, 2, &count), NBHD_ERROR_INVALID, "no row");
    refused(nbhd_sim_samples_parse("line,ms\nd64 9x9 w3x3,fast\n", s, 2, &count), NBHD_ERROR_INVALID, "row 2: 'fast'");
    refused(nbhd_sim_samples_parse("line,ms\n\nd64 9x9 w3x3,-1\n", s, 2, &count), NBHD_ERROR_INVALID, "row 3");
    refused(nbhd_sim_samples_parse("line,ms\nd64 9x9 w30x3,1\n", s, 2, &count), NBHD_ERROR_INVALID, "window[0]");
    refused(nbhd_sim_samples_parse("line,ms,q_tile\nd64 9 w3,1,4y\n", s, 2, &count), NBHD_ERROR_INVALID, "q_tile");
    refused(nbhd_sim_samples_parse("line,ms,tiling\nd64 9 w3,1,odd\n", s, 2, &count), NBHD_ERROR_INVALID, "tiling");
    refused(nbhd_sim_samples_parse("line,ms\nd8 9,1\nd8 9,1\nd8 9,1\n", s, 2, &count), NBHD_ERROR_INVALID,
            "more than 2");
    CHECK(!nbhd_sim_samples_parse("# c\nx, ms_min ,\"line\"\r\n1, 2.5 ,\"d8 9 w3\"\r\n", s, 2, &count) && count == 1 &&
              s[0].ms > 2.4 && s[0].ms < 2.6 && s[0].desc.window[0] == 3 && s[0].tiles.q_tile[0] == 0,
          "%s", nbhd_last_error());
}

int main(void)
{
    check_rank();
    check_find();
    check_find_with_extra();
    check_find_exhaustively();
    check_model("h200-forward-sm90.csv", "h200");
    check_model("h200-backward-prototype.csv", "h200-bwd");
    check_model("h200-forward-sm80.csv", "h200-sm80");
    check_prediction("h200-forward-prototype.csv", "h200");
    check_model_order();
    check_longest();
    check_bad_tiles();
    check_bad_requests();
    check_bad_tables();
    return test_done();
}
