/* nbhd check: kernels against the float64 oracle, by the same code as the tests. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "args.h"
#include "case.h"
#include "device.h"
#include "json.h"
#include "lines.h"
#include "slots.h"
#include "tool.h"

/* The oracle looks at every pair of tokens: this many take a minute or so. */
static const double pairs_max = 2e9;

struct options {
    const char *kernel;
    int device, threads, seed, layout;
    bool all, force, deterministic, json;
};

static void *gpu_alloc(size_t bytes)
{
    void *memory = NULL;
    return device_alloc(NBHD_DEVICE_CUDA, bytes, &memory) ? NULL : memory;
}
static void gpu_release(void *memory) { device_free(NBHD_DEVICE_CUDA, memory); }
static bool gpu_upload(void *to, const void *from, size_t bytes)
{
    return !device_upload(NBHD_DEVICE_CUDA, to, from, bytes);
}
static bool gpu_download(void *to, const void *from, size_t bytes)
{
    return !device_wait(NBHD_DEVICE_CUDA) && !device_download(NBHD_DEVICE_CUDA, to, from, bytes);
}

static void print(const struct options *o, const char *line, const struct case_result *r, bool ran)
{
    if (!o->json) {
        if (ran)
            printf("%-4s %-24s error %.3g of %.3g allowed (%s)  %s%s\n", r->ok ? "ok" : "BAD", r->kernel,
                   r->max_abs_error, r->allowed_error, r->worst ? r->worst : "-", line,
                   o->deterministic ? "  deterministic" : "");
        return;
    }
    struct json j = json_begin();
    json_text(&j, "line", line);
    json_text(&j, "kernel", *r->kernel ? r->kernel : NULL);
    json_text(&j, "device", device_choices[o->device]);
    json_bool(&j, "deterministic", o->deterministic);
    json_real(&j, "max_abs_error", ran ? r->max_abs_error : (double)NAN);
    json_real(&j, "allowed_error", ran ? r->allowed_error : (double)NAN);
    json_bool(&j, "ok", r->ok);
    json_text(&j, "worst", r->worst);
    json_text(&j, "why", r->ok ? NULL : r->why);
    json_end(&j);
}

/* What the oracle will look at, its plain computation in the problem's precision included. */
static double oracle_pairs(const struct problem *problem)
{
    double pairs = 0;
    for (int s = 0; s < problem_parts(problem); s++) {
        const nbhd_desc part = problem_part(problem, s), d = desc_whole(&part);
        double queries = (double)d.batch * d.heads, keys = 1;
        for (int i = 0; i < d.rank; i++) {
            queries *= d.length[i];
            keys *= d.kv_length[i];
        }
        pairs += queries * (keys + d.extra);
    }
    return pairs;
}

/* Whoever watches a terminal is told that the oracle is at work, where that takes more than two seconds or so. */
static void patience(double pairs, bool begin)
{
    if (pairs < 1e8 || !isatty(2))
        return;
    if (begin)
        fprintf(stderr, "the oracle looks at %.2g pairs ...", pairs);
    else
        fputs("\r\033[K", stderr);
}

static int check_kernel(const struct options *o, const struct problem *problem, const char *kernel)
{
    struct case_result result = {0};
    struct case_options options = {.kernel = kernel, .device = (nbhd_device)o->device, .seed = (unsigned)o->seed,
                                   .layout = (enum case_layout)o->layout, .threads = o->threads, .repeats = 1,
                                   .dlse = problem->desc.pass == NBHD_BACKWARD,
                                   .sequences = problem->sequences, .lengths = problem->lengths,
                                   .kv_lengths = problem->kv_lengths,
                                   .flags = problem->deterministic ? NBHD_PLAN_DETERMINISTIC : 0};
    if (o->device == NBHD_DEVICE_CUDA)
        options.memory = (struct case_memory){gpu_alloc, gpu_release, gpu_upload, gpu_download};
    double pairs = oracle_pairs(problem);
    patience(pairs, true);
    nbhd_status status = case_run(&problem->desc, &options, &result);
    patience(pairs, false);
    print(o, problem->line, &result, status == NBHD_OK);
    if (status != NBHD_OK)
        return tool_fail(status == NBHD_ERROR_INVALID ? TOOL_USAGE : TOOL_FAILED, "%s", result.why);
    return result.ok ? TOOL_DONE : tool_fail(TOOL_FAILED, "%s", result.why);
}

static int check_line(const struct problem *problem, void *context)
{
    const struct options *o = context;
    int status = device_open((nbhd_device)o->device);
    if (status)
        return status;
    double pairs = oracle_pairs(problem);
    if (pairs > pairs_max && !o->force)
        return tool_fail(TOOL_USAGE,
                         "%s: the oracle would look at %.3g pairs, and %.3g take minutes; a smaller problem, or "
                         "--force",
                         problem->line, pairs, pairs_max);
    if (!o->all)
        return check_kernel(o, problem, o->kernel);
    int ran = 0;
    for (int i = 0; nbhd_kernel_name(i); i++) {
        char why[NBHD_TEXT];
        problem_refusal(problem, i, (nbhd_device)o->device, why);
        if (*why)
            continue;
        int result = check_kernel(o, problem, nbhd_kernel_name(i));
        status = result ? result : status;
        ran++;
    }
    return ran ? status
               : tool_fail(TOOL_FAILED, "%s: every kernel refuses it; nbhd plan --explain tells why", problem->line);
}

static int run(int argc, char **argv)
{
    static const char *const layouts[] = {"contiguous", "packed", "strided", NULL};
    struct options o = {.seed = 1};
    const struct option table[] = {
        opt_text("kernel", 'k', &o.kernel, "NAME", "this kernel, as `nbhd list` names it (the planner's choice)"),
        opt_flag("all", 'a', &o.all, "every kernel that takes the problem"),
        opt_choice("device", 'd', &o.device, device_choices, "NAME", "cpu or cuda (cpu)"),
        opt_choice("layout", 'l', &o.layout, layouts, "NAME",
                   "contiguous, packed (one projection) or strided (contiguous)"),
        opt_int("seed", 0, &o.seed, 0, 0x7fffffff, "N", "of the random tensors (1)"),
        opt_int("threads", 't', &o.threads, 1, 4096, "N", "CPU threads (all)"),
        opt_deterministic(&o.deterministic),
        opt_flag("force", 'f', &o.force, "also problems that take the oracle minutes"),
        opt_flag("json", 0, &o.json, "one JSON object a problem and kernel"),
        opt_end(),
    };
    const struct usage usage = {
        .synopsis = "nbhd check LINE ... | @FILE [OPTIONS]",
        .about = "Runs problems on random tensors and compares every output with an oracle that computes in float64\n"
                 "by the definition. Allowed is twice the error of a plain computation in the problem's own\n"
                 "precision, plus a little.\n"
                 "Each kernel runs twice and must give the same bits, but for a dQ that it adds up in any order\n"
                 "(--deterministic). Exit status 1 if any is wrong.\n"
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
    return problems_each(argv, count, o.threads, o.deterministic, check_line, &o);
}

const struct command cmd_check = {"check", "kernels against a float64 oracle", run};
