/* nbhd bench: how long a problem takes. Inputs rotate through more memory than the caches hold, as in a real program,
 * where the tensors were written long before; work is counted in visible pairs only. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "args.h"
#include "array.h"
#include "device.h"
#include "json.h"
#include "lines.h"
#include "parallel.h"
#include "rates.h"
#include "runner.h"
#include "sim_args.h"
#include "timing.h"
#include "tool.h"

enum { RUNS_MIN = 5, RUNS_MAX = 20000, ALIGN = 256 };

struct options {
    const char *kernel;
    double seconds;
    int device, threads, runs;
    bool all, hot, deterministic, json, csv;
    bool headed; /* the first result has been printed */
};

/* Copies of a problem's tensors, one after the other in one piece of memory. */
struct rotation {
    nbhd_device device;
    const struct problem *problem;
    nbhd_desc desc; /* whose tensors they are */
    size_t offset[SLOT_COUNT], bytes; /* of one copy */
    size_t copies;
    char *memory;
};

struct result {
    const char *line, *kernel, *describe;
    int runs, threads;
    struct spread ms;
    double plan_ms, pairs, gflops, share;
    const char *tiling; /* "" where the kernel's tiles are none of the simulator's */
    char q_tile[48], kv_tile[48];
};

/* Numbers of either sign between 1/4 and 1, by their bits: no conversion, whatever the type. */
static void fill(void *to, int dtype, size_t count, uint64_t *state)
{
    static const struct {
        uint64_t keep, set;
    } bits[] = {[NBHD_F32] = {0x80ffffff, 0x3e800000}, [NBHD_F16] = {0x87ff, 0x3400}, [NBHD_BF16] = {0x80ff, 0x3e80},
                [NBHD_F64] = {0x801fffffffffffff, 0x3fd0000000000000}};
    size_t size = dtype_size(dtype);
    for (size_t i = 0; i < count; i++) {
        uint64_t z = *state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        z = ((z ^ z >> 31) & bits[dtype].keep) | bits[dtype].set;
        memcpy((char *)to + i * size, &z, size); /* little-endian: the low bytes */
    }
}

static nbhd_args args_at(const struct rotation *r, char *base)
{
    nbhd_args args = NBHD_ARGS_INIT;
    for (int slot = 0; slot < SLOT_COUNT; slot++)
        if (slot_use(&r->desc, slot) != SLOT_UNUSED)
            slot_tensor(&args, slot)->data = base + r->offset[slot];
    return args;
}

/* The backward reads what the forward wrote: o and lse must be right, or exponentials run away. */
static int fill_forward(struct rotation *r, char *image)
{
    struct runner runner;
    nbhd_args args = args_at(r, image);
    int status = runner_open_problem(&runner, r->problem, NBHD_FORWARD, r->device, NULL);
    if (status)
        return status;
    status = runner_run(&runner, &args);
    runner_close(&runner);
    return status;
}

static size_t cache_bytes(void)
{
    long l3 = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    size_t twice = l3 > 0 ? 2 * (size_t)l3 : 0;
    return twice > (size_t)256 << 20 ? twice : (size_t)256 << 20;
}

static int rotation_open(struct rotation *r, const struct problem *problem, nbhd_device device, bool hot)
{
    const nbhd_desc tensors = problem_tensors(problem), *desc = &tensors;
    uint64_t state = 1;
    *r = (struct rotation){.device = device, .problem = problem, .desc = desc_whole(desc)};
    for (int slot = 0; slot < SLOT_COUNT; slot++) {
        if (slot_use(desc, slot) == SLOT_UNUSED)
            continue;
        size_t bytes = slot_bytes(desc, slot);
        r->offset[slot] = r->bytes;
        if (bytes > SIZE_MAX / 2 - r->bytes)
            return tool_fail(TOOL_FAILED, "out of memory: the tensors have more bytes than can be addressed");
        r->bytes += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    }
    r->copies = hot ? 1 : (cache_bytes() + r->bytes - 1) / r->bytes;
    void *image = NULL, *memory = NULL;
    int status = device_alloc(NBHD_DEVICE_CPU, r->bytes, &image);
    if (!status)
        status = device_alloc(device, r->bytes * r->copies, &memory);
    r->memory = memory;
    if (!status) {
        memset(image, 0, r->bytes);
        for (int slot = 0; slot < SLOT_COUNT; slot++)
            if (slot_use(desc, slot) == SLOT_READ)
                fill((char *)image + r->offset[slot], slot_dtype(desc, slot), slot_elements(desc, slot), &state);
        if (desc->pass == NBHD_BACKWARD)
            status = fill_forward(r, image);
    }
    for (size_t i = 0; !status && i < r->copies; i++)
        status = device_upload(device, r->memory + i * r->bytes, image, r->bytes);
    device_free(NBHD_DEVICE_CPU, image);
    return status;
}

static void rotation_close(struct rotation *r) { device_free(r->device, r->memory); }

static int run_once(struct runner *runner, const struct rotation *r, size_t turn, double *ms)
{
    nbhd_args args = args_at(r, r->memory + turn % r->copies * r->bytes);
    int status = device_mark(r->device, 0);
    if (!status)
        status = runner_execute(runner, &args);
    if (!status)
        status = device_mark(r->device, 1);
    return status ? status : device_elapsed(r->device, ms);
}

/* A tenth of the time warms up; then as many runs as fit in the time, and at least RUNS_MIN. */
static int measure(const struct options *o, struct runner *runner, const struct rotation *r, struct result *result)
{
    double *ms = malloc(RUNS_MAX * sizeof *ms), ignored;
    if (!ms)
        return tool_fail(TOOL_FAILED, "out of memory");
    size_t turn = 0;
    int status, runs = 0;
    double begun = now_ms(), span = o->seconds * 1e3;
    do
        status = run_once(runner, r, turn++, &ignored);
    while (!status && now_ms() - begun < span / 10);
    struct progress bar = progress_begin(result->line);
    struct share share;
    share_begin(&share, r->device, result->kernel, result->threads,
                problem_flops(r->problem) * (r->desc.dtype == NBHD_F64 ? 2 : 1)); /* the loop is of float32 */
    begun = now_ms();
    while (!status && runs < RUNS_MAX) {
        double gone = now_ms() - begun;
        if (o->runs ? runs >= o->runs : runs >= RUNS_MIN && gone >= span)
            break;
        double by_runs = (double)runs / (o->runs ? o->runs : RUNS_MIN);
        progress_at(&bar, o->runs || by_runs < gone / span ? by_runs : fmin(gone / span, 1));
        status = run_once(runner, r, turn++, &ms[runs]);
        share_run(&share, ms[runs++]);
    }
    progress_end(&bar);
    if (!status) {
        result->runs = runs;
        result->ms = spread_of(ms, runs);
        result->gflops = problem_flops(r->problem) / result->ms.median * 1e-6;
        result->share = share_end(&share);
    }
    free(ms);
    return status;
}

static void print_json(const struct options *o, const struct result *r)
{
    struct json j = json_begin();
    json_text(&j, "line", r->line);
    json_text(&j, "kernel", r->kernel);
    json_text(&j, "describe", r->describe);
    json_text(&j, "device", device_choices[o->device]);
    json_bool(&j, "deterministic", o->deterministic);
    json_real(&j, "threads", r->threads);
    json_real(&j, "runs", r->runs);
    json_real(&j, "ms_min", r->ms.min);
    json_real(&j, "ms_median", r->ms.median);
    json_real(&j, "ms_p90", r->ms.p90);
    json_real(&j, "plan_ms", r->plan_ms);
    json_real(&j, "pairs", r->pairs);
    json_real(&j, "gflops", r->gflops);
    json_real(&j, "peak_gflops", r->share > 0 ? r->gflops / r->share : (double)NAN);
    json_real(&j, "peak_fraction", r->share > 0 ? r->share : (double)NAN);
    json_text(&j, "tiling", *r->tiling ? r->tiling : NULL);
    json_text(&j, "q_tile", *r->tiling ? r->q_tile : NULL);
    json_text(&j, "kv_tile", *r->tiling ? r->kv_tile : NULL);
    json_end(&j);
}

static void print_csv(const struct options *o, const struct result *r)
{
    printf("\"%s\",%s,%s,%d,%d,%.6g,%.6g,%.6g,%.6g,%.0f,%.6g,", r->line, r->kernel, device_choices[o->device],
           r->threads, r->runs, r->ms.min, r->ms.median, r->ms.p90, r->plan_ms, r->pairs, r->gflops);
    if (r->share > 0)
        printf("%.6g,%.4f", r->gflops / r->share, r->share);
    else
        printf(",");
    printf(",%s,%s,%s", r->tiling, r->q_tile, r->kv_tile); /* for nbhd sim --fit */
    printf(",%s\n", o->deterministic ? "true" : "false");
}

static void print_text(const struct options *o, const struct result *r)
{
    char share[16] = "-";
    if (r->share > 0)
        snprintf(share, sizeof share, "%.1f%%", 100 * r->share);
    printf("%-20s %6d %10.4g %10.4g %10.4g %9.3g %10.4g %7s  %s%s\n", r->kernel, r->runs, r->ms.min, r->ms.median,
           r->ms.p90, r->plan_ms, r->gflops, share, r->line, o->deterministic ? "  deterministic" : "");
}

static void print_head(struct options *o)
{
    if (o->headed)
        return;
    o->headed = true;
    if (o->csv)
        puts("line,kernel,device,threads,runs,ms_min,ms_median,ms_p90,plan_ms,pairs,gflops,peak_gflops,peak_fraction,"
             "tiling,q_tile,kv_tile,deterministic");
    else if (!o->json)
        printf("%-20s %6s %10s %10s %10s %9s %10s %7s  %s\n", "kernel", "runs", "ms min", "ms median", "ms p90",
               "ms plan", "GFLOP/s", "of peak", "problem");
}

static void find_tiles(const nbhd_plan *plan, struct result *r)
{
    nbhd_sim_tiles tiles = NBHD_SIM_TILES_INIT;
    r->tiling = "";
    if (nbhd_sim_plan_tiles(plan, &tiles))
        return;
    r->tiling = nbhd_sim_tiling_name(tiles.tiling);
    sim_format_extents(tiles.q_tile, r->q_tile);
    sim_format_extents(tiles.kv_tile, r->kv_tile);
}

static int bench_kernel(struct options *o, const struct rotation *r, const char *kernel)
{
    struct runner runner;
    int status = runner_open_problem(&runner, r->problem, r->desc.pass, r->device, kernel);
    if (status)
        return status;
    struct result result = {.line = r->problem->line,
                            .kernel = nbhd_plan_kernel(runner.plan),
                            .plan_ms = runner.plan_ms,
                            .describe = nbhd_plan_describe(runner.plan)};
    result.threads = threads_of(r->desc.threads);
    result.pairs = problem_pairs(r->problem);
    find_tiles(runner.plan, &result);
    status = measure(o, &runner, r, &result);
    if (!status) {
        print_head(o);
        (o->json ? print_json(o, &result) : o->csv ? print_csv(o, &result) : print_text(o, &result));
        fflush(stdout);
    }
    runner_close(&runner);
    return status;
}

static int bench_line(const struct problem *problem, void *context)
{
    struct options *o = context;
    nbhd_device device = (nbhd_device)o->device;
    struct rotation rotation = {0};
    int status = device_open(device);
    if (!status)
        status = rotation_open(&rotation, problem, device, o->hot);
    bool any = false;
    for (int i = 0; !status && o->all && nbhd_kernel_name(i); i++) {
        char why[NBHD_TEXT];
        problem_refusal(problem, i, device, why);
        if (*why)
            continue;
        any = true;
        status = bench_kernel(o, &rotation, nbhd_kernel_name(i));
    }
    if (!status && !any)
        status = bench_kernel(o, &rotation, o->kernel);
    rotation_close(&rotation);
    return status;
}

static int run(int argc, char **argv)
{
    struct options o = {.seconds = 1};
    const struct option table[] = {
        opt_text("kernel", 'k', &o.kernel, "NAME", "this kernel, as `nbhd list` names it (the planner's choice)"),
        opt_flag("all", 'a', &o.all, "every kernel that takes the problem"),
        opt_choice("device", 'd', &o.device, device_choices, "NAME", "cpu or cuda (cpu)"),
        opt_int("threads", 't', &o.threads, 1, 4096, "N", "CPU threads (all)"),
        opt_real("seconds", 's', &o.seconds, 0.001, 3600, "S",
                 "how long to measure each problem, but 5 runs at least (1)"),
        opt_int("runs", 'n', &o.runs, 1, RUNS_MAX, "N", "exactly so many runs instead"),
        opt_deterministic(&o.deterministic),
        opt_flag("hot", 0, &o.hot, "the same tensors each time: caches stay warm"),
        opt_flag("csv", 0, &o.csv, "comma-separated values with a header"),
        opt_flag("json", 0, &o.json, "one JSON object a problem and kernel"),
        opt_end(),
    };
    const struct usage usage = {
        .synopsis = "nbhd bench LINE ... | @FILE [OPTIONS]",
        .about = "Times problems on random tensors: minimum, median and 90th percentile of the runs after a\n"
                 "warm-up, the time of planning, and useful GFLOP/s of the median run: work is counted for visible\n"
                 "pairs only. \"of peak\" is the share of what the same threads reach in a loop on registers: of\n"
                 "FMAs, or, for kernels on bfloat16 units (avx512bf16, amx), of their products. Bursts of that\n"
                 "loop come between the runs, every 10 ms; the share is the median over pairs of neighbours, on\n"
                 "one thread by time on the core, so that other programs disturb it little. peak_gflops (--json,\n"
                 "--csv) is the median run's GFLOP/s over that share.\n"
                 "Tensors rotate through 256 MiB or twice the last cache, so that each run finds them in memory.\n"
                 "LINE is a problem such as \"fwd f32 b2 h8 d64 56x56 w13x13\"; `nbhd --help` tells its fields.",
        .options = table,
        .operands_min = 1,
        .operands_max = 1 << 20,
        .operands_name = "at least one problem line or @FILE",
    };
    int count;
    int status = args_parse(&usage, argc, argv, &count);
    if (status != ARGS_GO_ON)
        return status;
    if (o.all && o.kernel)
        return tool_fail(TOOL_USAGE, "--all and --kernel cannot both be given");
    if (o.json && o.csv)
        return tool_fail(TOOL_USAGE, "--json and --csv cannot both be given");
    return problems_each(argv, count, o.threads, o.deterministic, bench_line, &o);
}

const struct command cmd_bench = {"bench", "how long problems take, and what share of the machine's peak", run};
