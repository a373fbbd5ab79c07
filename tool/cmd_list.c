/* nbhd list: every kernel, best first, and whether it runs here. */
#include <stdio.h>
#include <string.h>

#include "args.h"
#include "json.h"
#include "tool.h"

static const char *const passes[] = {
    [NBHD_FORWARD] = "fwd", [NBHD_BACKWARD] = "bwd", [NBHD_QK] = "qk",
    [NBHD_AV] = "av", [NBHD_QK_BACKWARD] = "qk_bwd", [NBHD_AV_BACKWARD] = "av_bwd"};
enum { PASSES = sizeof passes / sizeof *passes };

struct row {
    const char *name;
    char dtypes[64];     /* that it takes here: "f32 f64" */
    char why[NBHD_TEXT]; /* where it takes none */
};

/* A kernel's name is DEVICE.PASS_TARGET; the longest pass that fits is its own. */
static int pass_of(const char *name)
{
    const char *dot = strchr(name, '.');
    int found = NBHD_FORWARD;
    size_t longest = 0;
    for (int pass = 0; dot && pass < PASSES; pass++) {
        size_t n = strlen(passes[pass]);
        if (n > longest && !strncmp(dot + 1, passes[pass], n) && dot[1 + n] == '_')
            found = pass, longest = n;
    }
    return found;
}

static bool is_cuda(const char *name) { return !strncmp(name, "cuda.", 5); }

/* Asks for a plain problem of each type, of large windows, as some rows leave small ones to others. A refusal that
 * every type gets is the reason to tell. */
static struct row probe(int i)
{
    struct row row = {.name = nbhd_kernel_name(i)};
    /* The name of a type, and how a line says it. */
    static const char *const types[][2] = {
        {"bf16", "bf16"}, {"f16", "f16"}, {"f64", "f64"}, {"f32", "f32"}, {"tf32", "f32 tf32"}};
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        char why[NBHD_TEXT] = "", line[NBHD_TEXT], before[64];
        nbhd_desc desc;
        if (!strcmp(types[t][0], "tf32") && !strncmp(row.dtypes, "f32", 3))
            continue; /* what takes float32 need not round it */
        snprintf(line, sizeof line, "%s %s d64 64x64 w32x32", passes[pass_of(row.name)], types[t][1]);
        if (nbhd_desc_parse(&desc, line) != NBHD_OK ||
            nbhd_kernel_refusal(i, &desc, is_cuda(row.name) ? NBHD_DEVICE_CUDA : NBHD_DEVICE_CPU, why, sizeof why) !=
                NBHD_OK)
            snprintf(why, sizeof why, "%s", nbhd_last_error());
        snprintf(before, sizeof before, "%s", row.dtypes);
        if (*why)
            snprintf(row.why, sizeof row.why, "%s", why);
        else
            snprintf(row.dtypes, sizeof row.dtypes, "%s%s%.40s", types[t][0], *before ? " " : "", before);
    }
    return row;
}

static int run(int argc, char **argv)
{
    static const char *const devices[] = {"all", "cpu", "cuda", NULL};
    bool json = false;
    int device = 0;
    const struct option table[] = {
        opt_choice("device", 'd', &device, devices, "NAME", "only the kernels of the cpu or of cuda (all)"),
        opt_flag("json", 0, &json, "one JSON object a kernel"),
        opt_end(),
    };
    const struct usage usage = {
        .synopsis = "nbhd list [--device NAME] [--json]",
        .about = "Lists every kernel of this build, best first: its name, as --kernel takes it, and the types that it\n"
                 "takes on this machine, or why it takes none. `nbhd plan LINE` tells which is used for a problem.",
        .options = table,
        .operands_name = "no operands",
    };
    int count;
    int status = args_parse(&usage, argc, argv, &count);
    if (status != ARGS_GO_ON)
        return status;
    for (int i = 0; nbhd_kernel_name(i); i++) {
        if (device && (device == 2) != is_cuda(nbhd_kernel_name(i)))
            continue;
        struct row row = probe(i);
        if (json) {
            struct json j = json_begin();
            json_text(&j, "kernel", row.name);
            json_text(&j, "pass", passes[pass_of(row.name)]);
            json_bool(&j, "runs", *row.dtypes != 0);
            json_text(&j, "dtypes", row.dtypes);
            json_text(&j, "why", *row.dtypes ? NULL : row.why);
            json_end(&j);
        } else {
            printf("%-24s %s%s\n", row.name, *row.dtypes ? "runs: " : "no: ", *row.dtypes ? row.dtypes : row.why);
        }
    }
    return TOOL_DONE;
}

const struct command cmd_list = {"list", "every kernel, and whether it runs on this machine", run};
