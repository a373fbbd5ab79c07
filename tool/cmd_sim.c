/* nbhd sim: what tilings of a problem visit, and the speedup that they allow; a search for settings that waste nothing;
 * a model of time, and pictures. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "args.h"
#include "json.h"
#include "lines.h"
#include "sim_args.h"
#include "sim_plot.h"
#include "sim_table.h"
#include "tool.h"

struct options {
    int drawn; /* plots so far */
    struct sim_args tiles;
    struct extents window_min, window_max;
    int q_tokens, kv_tokens, top, steps, dense_steps;
    double share, sparsity, tolerance, efficiency;
    const char *model_text, *fit, *plot, *measured;
    bool find, perfect, json;
    nbhd_sim_device model;
    nbhd_sim_sample *samples;
    int sample_count;
};

enum { MOST_ROWS = 4096 };

/* ---- rows ---- */

static double end_to_end(const struct options *o, double speedup)
{
    return o->steps ? nbhd_sim_end_to_end(o->share, o->steps, o->dense_steps, speedup) : 0;
}

static void print_json(const struct options *o, const nbhd_sim_setting *s)
{
    char line[NBHD_TEXT], q[48], kv[48];
    const nbhd_sim_counts *c = &s->counts;
    nbhd_desc_format(&s->desc, line, sizeof line);
    sim_format_extents(s->tiles.q_tile, q);
    sim_format_extents(s->tiles.kv_tile, kv);
    struct json j = json_begin();
    json_text(&j, "line", line);
    json_text(&j, "tiling", nbhd_sim_tiling_name(s->tiles.tiling));
    json_text(&j, "q_tile", q);
    json_text(&j, "kv_tile", kv);
    json_real(&j, "visited_mean", c->visited_mean);
    json_real(&j, "visited_max", c->visited_max);
    json_real(&j, "tiles_total", c->tiles_total);
    json_real(&j, "masked_fraction", c->masked_fraction);
    json_real(&j, "work_ratio", c->work_ratio);
    json_real(&j, "bound_flop", c->bound_flop);
    json_real(&j, "bound_tile", c->bound_tile);
    json_bool(&j, "block_sparse", c->block_sparse);
    json_real(&j, "bound_mean", c->bound_mean);
    json_real(&j, "tiles_outer", c->tiles_outer);
    json_real(&j, "computed_mean", c->computed_mean);
    json_real(&j, "computed_ratio", c->computed_ratio);
    json_real(&j, "pairs", c->pairs);
    if (o->steps) {
        json_real(&j, "end_to_end_flop", end_to_end(o, c->bound_flop));
        json_real(&j, "end_to_end_tile", end_to_end(o, c->bound_tile));
    }
    if (s->ms > 0)
        json_real(&j, "predicted_ms", s->ms);
    json_end(&j);
}

static void print_head(const struct options *o, bool settings)
{
    printf("  %-8s %-10s %-10s %9s %7s %7s %7s %6s %7s %7s", "tiling", "q tile", "kv tile", "visited", "worst",
           "of", "masked", "work", "bound", "mean");
    if (o->steps)
        printf(" %7s", "model");
    if (o->model_text && !settings)
        printf(" %9s", "ms");
    puts(settings ? "  setting" : "");
}

static void print_row(const struct options *o, const nbhd_sim_setting *s, bool settings)
{
    char q[48], kv[48], window[48], stride[48];
    const nbhd_sim_counts *c = &s->counts;
    sim_format_extents(s->tiles.q_tile, q);
    sim_format_extents(s->tiles.kv_tile, kv);
    printf("  %-8s %-10s %-10s %9.2f %7.0f %7.0f %6.1f%% %6.3f %7.4g %7.4g", nbhd_sim_tiling_name(s->tiles.tiling),
           q, kv, c->visited_mean, c->visited_max, c->tiles_total, 100 * c->masked_fraction, c->computed_ratio,
           c->bound_tile, c->bound_mean);
    if (o->steps)
        printf(" %7.2f", end_to_end(o, c->bound_tile));
    if (s->ms > 0)
        printf(" %9.4g", s->ms);
    if (settings) {
        sim_format_extents(s->desc.window, window);
        sim_format_extents(s->desc.stride, stride);
        printf("  w%s s%s%s", window, stride, c->block_sparse ? " block-sparse" : "");
    } else if (c->block_sparse) {
        printf("  block-sparse");
    }
    putchar('\n');
}

static void print_all(const struct options *o, const char *line, const nbhd_sim_setting *rows, int count, bool settings)
{
    if (o->json) {
        for (int i = 0; i < count; i++)
            print_json(o, &rows[i]);
        return;
    }
    puts(line);
    if (!settings && count) {
        printf("  by FLOPs alone %.5g times faster than self attention", rows[0].counts.bound_flop);
        if (o->steps)
            printf("; the model, with %d of %d steps dense, %.2f times", o->dense_steps, o->steps,
                   end_to_end(o, rows[0].counts.bound_flop));
        puts(rows[0].desc.pass == NBHD_BACKWARD ? "; key tiles visit query tiles" : "");
    }
    print_head(o, settings);
    for (int i = 0; i < count; i++)
        print_row(o, &rows[i], settings);
}

/* ---- counting and searching ---- */

static int product(const struct extents *e, int otherwise)
{
    double volume = 1;
    for (int i = 0; i < e->count; i++)
        volume *= e->at[i];
    return e->count && volume <= 65536 ? (int)volume : otherwise;
}

static int by_tiling(const void *a, const void *b)
{
    return ((const nbhd_sim_setting *)a)->tiles.tiling - ((const nbhd_sim_setting *)b)->tiles.tiling;
}

static int count_one(const struct options *o, const nbhd_desc *desc, const char *line, nbhd_sim_setting *rows)
{
    nbhd_sim_tiles tiles;
    int count = 0, status = sim_args_tiles(&o->tiles, desc, &tiles);
    if (status)
        return status;
    const bool given = o->tiles.q_tile.count && o->tiles.kv_tile.count;
    const unsigned tilings = sim_args_tilings(&o->tiles, 1u << NBHD_SIM_STATIC | 1u << NBHD_SIM_DYNAMIC);
    if (tilings == 1u << NBHD_SIM_FLAT) /* one number, which is no box of the axes */
        memset(tiles.q_tile, 0, sizeof tiles.q_tile), memset(tiles.kv_tile, 0, sizeof tiles.kv_tile);
    nbhd_status result = nbhd_sim_rank(desc, &tiles, tilings, product(&o->tiles.q_tile, o->q_tokens),
                                       product(&o->tiles.kv_tile, o->kv_tokens), o->model_text ? &o->model : NULL, rows,
                                       given ? MOST_ROWS : o->top, &count);
    if (result)
        return tool_fail_library(result);
    if (given)
        qsort(rows, (size_t)count, sizeof *rows, by_tiling);
    print_all(o, line, rows, count, false);
    return TOOL_DONE;
}

static int find_one(const struct options *o, const nbhd_desc *desc, nbhd_sim_setting *rows)
{
    nbhd_sim_tiles tiles;
    nbhd_sim_search search = NBHD_SIM_SEARCH_INIT;
    int count = 0, status = sim_args_tiles(&o->tiles, desc, &tiles);
    if (status || (status = sim_args_extents("window-min", &o->window_min, desc->rank, search.window_min)) ||
        (status = sim_args_extents("window-max", &o->window_max, desc->rank, search.window_max)))
        return status;
    search.sparsity = o->sparsity;
    search.tolerance = o->tolerance;
    search.efficiency = o->perfect ? 1 : o->efficiency;
    search.q_tokens = o->q_tokens;
    search.kv_tokens = o->kv_tokens;
    double considered = 0;
    const unsigned tilings = sim_args_tilings(&o->tiles, 1u << NBHD_SIM_STATIC | 1u << NBHD_SIM_DYNAMIC);
    nbhd_status result = nbhd_sim_find(desc, &tiles, tilings, &search, rows, o->top, &count, &considered);
    if (result)
        return tool_fail_library(result);
    char line[NBHD_TEXT];
    nbhd_desc axes = *desc;
    for (int i = 0; i < desc->rank; i++)
        axes.window[i] = axes.stride[i] = 0;
    nbhd_desc_format(&axes, line, sizeof line);
    print_all(o, line, rows, count, true);
    if (!count)
        tool_note("no setting wastes as little as asked; --efficiency, --tolerance or the window range may allow more");
    else if (!o->json)
        printf("  %d of the settings found, of %.0f looked at\n", count, considered);
    return TOOL_DONE;
}

static int one(const nbhd_desc *desc, const char *line, void *context)
{
    struct options *o = context;
    if (o->plot) {
        nbhd_sim_tiles tiles;
        if (o->drawn++)
            return tool_fail(TOOL_USAGE, "--plot %s: one picture holds one problem, here are more", o->plot);
        int status = sim_args_one_tiling(&o->tiles);
        if (!status)
            status = sim_args_tiles(&o->tiles, desc, &tiles);
        return status ? status : sim_plot(desc, &tiles, o->samples, o->sample_count, o->plot);
    }
    nbhd_sim_setting *rows = malloc(MOST_ROWS * sizeof *rows);
    if (!rows)
        return tool_fail(TOOL_FAILED, "out of memory");
    int status = o->find ? find_one(o, desc, rows) : count_one(o, desc, line, rows);
    free(rows);
    return status;
}

/* ---- fitting ---- */

/* Kernels whose tiles are none of the simulator's have measurements too; they say nothing about prices. */
static int drop_without_tiles(nbhd_sim_sample *samples, int count)
{
    int kept = 0;
    for (int i = 0; i < count; i++)
        if (samples[i].tiles.q_tile[0] && samples[i].tiles.kv_tile[0])
            samples[kept++] = samples[i];
    if (kept && kept < count)
        tool_note("%d of %d measurements have no tiles, and are left out", count - kept, count);
    return kept ? kept : count;
}

static int fit(struct options *o)
{
    double median, worst;
    if (!o->model_text)
        return tool_fail(TOOL_USAGE, "--fit needs --model to start from, such as h200");
    int status = sim_table_read(o->fit, &o->samples, &o->sample_count);
    if (status)
        return status;
    o->sample_count = drop_without_tiles(o->samples, o->sample_count);
    if (nbhd_sim_fit(&o->model, o->samples, o->sample_count, &median, &worst))
        return tool_fail(TOOL_USAGE, "%s: %s", o->fit, nbhd_last_error());
    for (int i = 0; i < o->sample_count; i++) {
        const nbhd_sim_sample *s = &o->samples[i];
        char line[NBHD_TEXT], q[48], kv[48];
        double ms = 0;
        nbhd_desc_format(&s->desc, line, sizeof line);
        sim_format_extents(s->tiles.q_tile, q);
        sim_format_extents(s->tiles.kv_tile, kv);
        nbhd_status result = nbhd_sim_predict(&o->model, &s->desc, &s->tiles, &ms);
        if (result)
            return tool_fail_library(result);
        if (o->json) {
            struct json j = json_begin();
            json_text(&j, "line", line);
            json_text(&j, "tiling", nbhd_sim_tiling_name(s->tiles.tiling));
            json_text(&j, "q_tile", q);
            json_text(&j, "kv_tile", kv);
            json_real(&j, "measured_ms", s->ms);
            json_real(&j, "predicted_ms", ms);
            json_end(&j);
        } else {
            printf("%10.4g ms measured, %10.4g predicted, %+6.1f%%  %-9s%-11s%-11s%s\n", s->ms, ms,
                   100 * (ms / s->ms - 1), nbhd_sim_tiling_name(s->tiles.tiling), q, kv, line);
        }
    }
    if (!o->json) {
        printf("median error %.1f %%, worst %.1f %%; for --model:\n", 100 * median, 100 * worst);
        sim_model_print(&o->model);
    }
    return TOOL_DONE;
}

/* ---- the command ---- */

/* What an option is for, and whether that was asked for: none is passed over in silence. */
static int check_together(const struct options *o)
{
    const bool counts = !o->fit && !o->plot;
    const struct {
        bool given, fits;
        const char *name, *use;
    } options[] = {
        {o->sparsity > 0, o->find, "sparsity", "--find"},
        {o->tolerance > 0, o->find, "tolerance", "--find"},
        {o->efficiency > 0, o->find, "efficiency", "--find"},
        {o->perfect, o->find, "perfect", "--find"},
        {o->window_min.count > 0, o->find, "window-min", "--find"},
        {o->window_max.count > 0, o->find, "window-max", "--find"},
        {o->measured != NULL, o->plot != NULL, "measured", "--plot"},
        {o->model_text != NULL, !o->find && !o->plot, "model", "counts of tiles and --fit"},
        {!isnan(o->share), counts, "share", "counts of tiles and --find"},
        {o->json, !o->plot, "json", "what is printed, and --plot prints nothing"},
    };
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        if (options[i].given && !options[i].fits)
            return tool_fail(TOOL_USAGE, "--%s is for %s", options[i].name, options[i].use);
    return TOOL_DONE;
}

static int check(struct options *o, int operands)
{
    int status;
    if (o->fit && operands)
        return tool_fail(TOOL_USAGE, "--fit takes its problems from the table, not from the command line");
    if (!o->fit && !operands)
        return tool_fail(TOOL_USAGE, "needs a problem line or @FILE");
    if (o->find + (o->fit != NULL) + (o->plot != NULL) > 1)
        return tool_fail(TOOL_USAGE, "--find, --fit and --plot are three things; ask for one");
    if ((status = check_together(o)))
        return status;
    if ((o->steps != 0) == (isnan(o->share) != 0))
        return tool_fail(TOOL_USAGE, "--share and --steps go together");
    if (o->dense_steps && !o->steps)
        return tool_fail(TOOL_USAGE, "--dense-steps needs --steps, how many there are in all");
    if (o->dense_steps > o->steps)
        return tool_fail(TOOL_USAGE, "--dense-steps is %d; there are only %d steps", o->dense_steps, o->steps);
    if (o->model_text && (status = sim_model_read(o->model_text, &o->model)))
        return status;
    return o->measured ? sim_table_read(o->measured, &o->samples, &o->sample_count) : TOOL_DONE;
}

static int run(int argc, char **argv)
{
    struct options o = {.top = 10, .share = NAN};
    const struct option table[] = {
        SIM_TILE_OPTIONS(&o.tiles),
        opt_int("q-tokens", 0, &o.q_tokens, 1, 65536, "N", "all query tiles of N tokens (128)"),
        opt_int("kv-tokens", 0, &o.kv_tokens, 1, 65536, "N", "all key tiles of N tokens (128)"),
        opt_int("top", 'n', &o.top, 1, MOST_ROWS, "N", "rows to print (10)"),
        opt_real("share", 0, &o.share, 0, 1, "X", "attention's share of a model's time, for its end-to-end bound"),
        opt_int("steps", 0, &o.steps, 1, 1 << 30, "N", "of the model, with --share"),
        opt_int("dense-steps", 0, &o.dense_steps, 0, 1 << 30, "N", "of these with self attention (0)"),
        opt_text("model", 'm', &o.model_text, "NAME",
                 "predict times: h200, h200-sm80, h200-bwd, or prices as --fit prints them"),
        opt_flag("find", 0, &o.find, "search windows, strides and tiles that waste little, for the axes of LINE"),
        opt_real("sparsity", 0, &o.sparsity, 0, 0.999999, "X", "--find: share of the pairs to leave out (any)"),
        opt_real("tolerance", 0, &o.tolerance, 0, 1, "X", "--find: of --sparsity (0.02)"),
        opt_real("efficiency", 0, &o.efficiency, 0, 1, "X", "--find: least useful share of visited tiles (0.9)"),
        opt_flag("perfect", 0, &o.perfect, "--find: perfectly block-sparse settings only"),
        opt_extents("window-min", 0, &o.window_min, "AxB", "--find: smallest window"),
        opt_extents("window-max", 0, &o.window_max, "AxB", "--find: largest window"),
        opt_text("fit", 0, &o.fit, "CSV", "fit --model to measurements: columns line, ms, q_tile, kv_tile, tiling"),
        opt_text("plot", 0, &o.plot, "FILE", "draw speedup against stride and window, .svg or .png"),
        opt_text("measured", 0, &o.measured, "CSV", "--plot: points from `nbhd bench --csv`"),
        opt_flag("json", 0, &o.json, "one JSON object a tiling"),
        opt_end(),
    };
    const struct usage usage = {
        .synopsis = "nbhd sim LINE ... | @FILE [OPTIONS]",
        .about = "Counts the key tiles that each query tile visits, without running anything: mean and worst, the\n"
                 "share that needs a mask, pairs computed over pairs wanted (work), and the speedup over self\n"
                 "attention that the worst (bound) and the mean tile allow. Without tiles: all of 128 tokens, best\n"
                 "first.",
        .options = table,
        .operands_min = 0,
        .operands_max = 1 << 20,
        .operands_name = "problem lines or @FILE",
    };
    int count;
    int status = args_parse(&usage, argc, argv, &count);
    if (status != ARGS_GO_ON)
        return status;
    status = check(&o, count);
    if (!status)
        status = o.fit ? fit(&o) : lines_each(argv, count, one, &o);
    free(o.samples);
    return status;
}

const struct command cmd_sim = {"sim", "tiles that a tiling visits, and the speedup that it allows", run};
