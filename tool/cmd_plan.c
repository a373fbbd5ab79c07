/* nbhd plan: which kernel a problem gets, what is expected of it, and why the rows above were passed over. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "arch.h"
#include "args.h"
#include "device.h"
#include "json.h"
#include "lines.h"
#include "timing.h"
#include "tool.h"

struct options {
    const char *kernel, *archs;
    int device, threads;
    bool explain, deterministic, json;
    char **operands; /* the problem lines */
    int count;
    const char *arch; /* of --arch, the one that is being planned for; NULL: this machine's GPU */
};

struct planned {
    const struct problem *problem;
    const nbhd_plan *plan; /* NULL: it failed */
    double ms;
};

/* The refusals, a row of the table each. As text, or as members of a JSON list. */
static void refusals(const struct options *o, const struct planned *p, struct json *j)
{
    const char *chosen = p->plan ? nbhd_plan_kernel(p->plan) : "", *others = p->plan ? "and stands further up" : NULL;
    for (int i = 0; nbhd_kernel_name(i); i++) {
        const char *name = nbhd_kernel_name(i);
        char why[NBHD_TEXT];
        problem_refusal(p->problem, i, (nbhd_device)o->device, why);
        if (*why && j) {
            json_object(j);
            json_text(j, "kernel", name);
            json_text(j, "why", why);
            json_object_end(j);
        } else if (!strcmp(name, chosen)) {
            others = "but stands further down";
            snprintf(why, sizeof why, "chosen");
        } else if (!*why) {
            snprintf(why, sizeof why, "would do%s%s", others ? ", " : "", others ? others : "");
        }
        if (!j)
            printf("  %-24s %s\n", name, why);
    }
}

static void print(const struct options *o, const struct planned *p)
{
    printf("%s%s%s%s\n", p->problem->line, o->arch ? "  on " : "", o->arch ? o->arch : "",
           o->deterministic ? "  deterministic" : "");
    if (p->plan) {
        printf("  %s: %s\n", nbhd_plan_kernel(p->plan), nbhd_plan_describe(p->plan));
        printf("  %.4g visible pairs, %.4g useful GFLOP, workspace %.1f KiB, planned in %.0f us",
               problem_pairs(p->problem), problem_flops(p->problem) * 1e-9,
               (double)nbhd_plan_workspace(p->plan) / 1024, p->ms * 1e3);
        if (nbhd_plan_predicted_ms(p->plan) > 0)
            printf(", expected to run %.3g ms", nbhd_plan_predicted_ms(p->plan));
        putchar('\n');
    }
    if (o->explain)
        refusals(o, p, NULL);
}

static void print_json(const struct options *o, const struct planned *p)
{
    struct json j = json_begin();
    json_text(&j, "line", p->problem->line);
    json_text(&j, "kernel", p->plan ? nbhd_plan_kernel(p->plan) : NULL);
    json_text(&j, "describe", p->plan ? nbhd_plan_describe(p->plan) : NULL);
    json_text(&j, "device", device_choices[o->device]);
    json_text(&j, "arch", o->arch);
    json_bool(&j, "deterministic", o->deterministic);
    double predicted = p->plan ? nbhd_plan_predicted_ms(p->plan) : 0;
    json_real(&j, "predicted_ms", predicted > 0 ? predicted : (double)NAN);
    json_real(&j, "plan_ms", p->ms);
    json_real(&j, "workspace", p->plan ? (double)nbhd_plan_workspace(p->plan) : 0);
    json_real(&j, "pairs", problem_pairs(p->problem));
    json_real(&j, "gflop", problem_flops(p->problem) * 1e-9);
    json_list(&j, "refused");
    refusals(o, p, &j);
    json_list_end(&j);
    json_end(&j);
}

static int plan_one(const struct problem *problem, void *context)
{
    const struct options *o = context;
    const nbhd_device device = (nbhd_device)o->device;
    nbhd_plan *plan = NULL;
    int status = o->arch ? TOOL_DONE : device_open(device);
    if (status) {
        tool_note("--arch, e.g. sm_90, plans for a GPU that is not here");
        return status;
    }
    double begun = now_ms();
    nbhd_status result = problem_plan(&plan, problem, problem->desc.pass, device, o->kernel);
    const struct planned planned = {problem, plan, now_ms() - begun};
    if (result != NBHD_OK)
        status = tool_fail_library(result);
    if (o->json)
        print_json(o, &planned);
    else if (plan || o->explain)
        print(o, &planned);
    nbhd_plan_destroy(&plan);
    return status;
}

static int plan_lines(const char *arch, void *context)
{
    struct options *o = context;
    o->arch = arch;
    return problems_each(o->operands, o->count, o->threads, o->deterministic, plan_one, o);
}

static int run(int argc, char **argv)
{
    struct options o = {.operands = argv, .device = -1};
    const struct option table[] = {
        opt_flag("explain", 'x', &o.explain, "tell of every kernel whether it was chosen, or why not"),
        opt_choice("device", 'd', &o.device, device_choices, "NAME", "cpu or cuda (cpu; with --arch cuda)"),
        opt_arch(&o.archs, "for these GPUs, e.g. sm_80,sm_90, here or not; compiles what they need"),
        opt_text("kernel", 'k', &o.kernel, "NAME", "this kernel, as `nbhd list` names it, and no other"),
        opt_int("threads", 't', &o.threads, 1, 4096, "N", "CPU threads (all)"),
        opt_deterministic(&o.deterministic),
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
    int status = args_parse(&usage, argc, argv, &o.count);
    if (status != ARGS_GO_ON)
        return status;
    if (o.archs && o.device == NBHD_DEVICE_CPU)
        return tool_fail(TOOL_USAGE, "--arch is of GPUs, and --device is cpu");
    if (o.device < 0)
        o.device = o.archs ? NBHD_DEVICE_CUDA : NBHD_DEVICE_CPU;
    return o.archs ? arch_each(o.archs, plan_lines, &o) : plan_lines(NULL, &o);
}

const struct command cmd_plan = {"plan", "which kernel a problem gets, and why", run};
