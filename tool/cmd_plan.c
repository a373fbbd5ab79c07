/* nbhd plan: which kernel a problem gets, what is expected of it, and why the rows above were passed over. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "args.h"
#include "device.h"
#include "json.h"
#include "lines.h"
#include "timing.h"
#include "tool.h"

struct options {
    const char *kernel;
    int device, threads;
    bool explain, json;
};

/* The refusals, a row of the table each. As text, or as members of a JSON list. */
static void refusals(const struct options *o, const struct problem *problem, const char *chosen, struct json *j)
{
    for (int i = 0; nbhd_kernel_name(i); i++) {
        const char *name = nbhd_kernel_name(i);
        char why[NBHD_TEXT];
        problem_refusal(problem, i, (nbhd_device)o->device, why);
        bool is_chosen = chosen && !strcmp(name, chosen);
        if (!j) {
            printf("  %-24s %s\n", name, is_chosen ? "chosen" : *why ? why : "would do, but stands further down");
        } else if (*why) {
            json_object(j);
            json_text(j, "kernel", name);
            json_text(j, "why", why);
            json_object_end(j);
        }
    }
}

static void print(const struct options *o, const struct problem *problem, const nbhd_plan *plan, double ms)
{
    printf("%s\n", problem->line);
    if (plan) {
        printf("  %s: %s\n", nbhd_plan_kernel(plan), nbhd_plan_describe(plan));
        printf("  %.4g visible pairs, %.4g useful GFLOP, workspace %.1f KiB, planned in %.0f us",
               problem_pairs(problem), problem_flops(problem) * 1e-9, (double)nbhd_plan_workspace(plan) / 1024,
               ms * 1e3);
        if (nbhd_plan_predicted_ms(plan) > 0)
            printf(", expected to run %.3g ms", nbhd_plan_predicted_ms(plan));
        putchar('\n');
    }
    if (o->explain)
        refusals(o, problem, plan ? nbhd_plan_kernel(plan) : NULL, NULL);
}

static void print_json(const struct options *o, const struct problem *problem, const nbhd_plan *plan, double ms)
{
    struct json j = json_begin();
    json_text(&j, "line", problem->line);
    json_text(&j, "kernel", plan ? nbhd_plan_kernel(plan) : NULL);
    json_text(&j, "describe", plan ? nbhd_plan_describe(plan) : NULL);
    json_text(&j, "device", device_choices[o->device]);
    double predicted = plan ? nbhd_plan_predicted_ms(plan) : 0;
    json_real(&j, "predicted_ms", predicted > 0 ? predicted : (double)NAN);
    json_real(&j, "plan_ms", ms);
    json_real(&j, "workspace", plan ? (double)nbhd_plan_workspace(plan) : 0);
    json_real(&j, "pairs", problem_pairs(problem));
    json_real(&j, "gflop", problem_flops(problem) * 1e-9);
    json_list(&j, "refused");
    refusals(o, problem, plan ? nbhd_plan_kernel(plan) : NULL, &j);
    json_list_end(&j);
    json_end(&j);
}

static int plan_one(const struct problem *problem, void *context)
{
    const struct options *o = context;
    nbhd_plan *plan = NULL;
    int status = device_open((nbhd_device)o->device);
    if (status)
        return status;
    double begun = now_ms();
    nbhd_status result = problem_plan(&plan, problem, problem->desc.pass, (nbhd_device)o->device, o->kernel);
    double ms = now_ms() - begun;
    if (result != NBHD_OK)
        status = tool_fail_library(result);
    if (o->json)
        print_json(o, problem, plan, ms);
    else if (plan || o->explain)
        print(o, problem, plan, ms);
    nbhd_plan_destroy(&plan);
    return status;
}

static int run(int argc, char **argv)
{
    struct options o = {0};
    const struct option table[] = {
        opt_flag("explain", 'x', &o.explain, "tell of every kernel whether it was chosen, or why not"),
        opt_choice("device", 'd', &o.device, device_choices, "NAME", "cpu or cuda (cpu)"),
        opt_text("kernel", 'k', &o.kernel, "NAME", "this kernel, as `nbhd list` names it, and no other"),
        opt_int("threads", 't', &o.threads, 1, 4096, "N", "CPU threads (all)"),
        opt_flag("json", 0, &o.json, "one JSON object a problem"),
        opt_end(),
    };
    const struct usage usage = {
        .synopsis = "nbhd plan LINE ... | @FILE [OPTIONS]",
        .about = "Plans problems and tells the kernel that was chosen, without running it.\n"
                 "LINE is a problem such as \"fwd f32 b2 h8 d64 56x56 w13x13\"; `nbhd --help` tells its fields.\n"
                 "@FILE has one a line, with comments after #; @- is the standard input.",
        .options = table,
        .operands_min = 1,
        .operands_max = 1 << 20,
        .operands_name = "at least one problem line or @FILE",
    };
    int count;
    int status = args_parse(&usage, argc, argv, &count);
    return status == ARGS_GO_ON ? problems_each(argv, count, o.threads, plan_one, &o) : status;
}

const struct command cmd_plan = {"plan", "which kernel a problem gets, and why", run};
