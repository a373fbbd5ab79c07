/* nbhd info: the machine, as nbhd sees it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "args.h"
#include "device.h"
#include "json.h"
#include "parallel.h"
#include "tool.h"

struct cpu {
    char model[96];
    char features[160]; /* of those that a kernel could use */
    double memory_gib;
};

/* The value of "key : value" where line begins with key. */
static const char *value_of(const char *line, const char *key)
{
    size_t n = strlen(key);
    const char *colon = strncmp(line, key, n) ? NULL : strchr(line, ':');
    return colon && (line[n] == ' ' || line[n] == '\t' || line[n] == ':') ? colon + 1 + strspn(colon + 1, " \t") : NULL;
}

static bool has_word(const char *list, const char *word)
{
    size_t n = strlen(word);
    for (const char *at = list; (at = strstr(at, word)) != NULL; at += n)
        if ((at == list || at[-1] == ' ') && (at[n] == ' ' || at[n] == '\n' || !at[n]))
            return true;
    return false;
}

static void note_features(struct cpu *cpu, const char *flags)
{
    static const char *const wanted[] = {"avx2",     "fma",         "f16c",        "avx512f",  "avx512bw",
                                         "avx512vl", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
                                         "asimd",    "asimdhp",     "bf16",        "sve"};
    cpu->features[0] = 0;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if (has_word(flags, wanted[i])) {
            size_t n = strlen(cpu->features);
            snprintf(cpu->features + n, sizeof cpu->features - n, "%s%s", n ? " " : "", wanted[i]);
        }
}

static struct cpu look_at_cpu(void)
{
    struct cpu cpu = {"unknown", "", 0};
    char line[8192];
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(line, sizeof line, file)) {
        const char *value;
        if ((value = value_of(line, "model name")))
            snprintf(cpu.model, sizeof cpu.model, "%.*s", (int)strcspn(value, "\n"), value);
        else if ((value = value_of(line, "flags")) || (value = value_of(line, "Features")))
            note_features(&cpu, value);
    }
    if (file)
        fclose(file);
    file = fopen("/proc/meminfo", "r");
    while (file && fgets(line, sizeof line, file)) {
        const char *value = value_of(line, "MemTotal");
        if (value)
            cpu.memory_gib = strtod(value, NULL) / (1 << 20);
    }
    if (file)
        fclose(file);
    return cpu;
}

static void print(const struct cpu *cpu, const char *kernel, const struct device_about *gpu, const char *no_gpu)
{
    int version = nbhd_version();
    printf("nbhd      %d.%d.%d\n", version / 10000, version / 100 % 100, version % 100);
    printf("CPU       %s\n", cpu->model);
    printf("features  %s\n", *cpu->features ? cpu->features : "none that a kernel uses");
    printf("threads   %d\n", threads_of(0));
    printf("memory    %.1f GiB\n", cpu->memory_gib);
    printf("kernel    %s (for f32, forward)\n", kernel ? kernel : "none");
    if (no_gpu)
        printf("GPU       none: %s\n", no_gpu);
    else
        printf("GPU       %s, compute capability %d.%d, %d multiprocessors, %.1f GiB, driver for CUDA %s\n", gpu->name,
               gpu->major, gpu->minor, gpu->multiprocessors, gpu->memory_gib, gpu->driver);
}

static void print_json(const struct cpu *cpu, const char *kernel, const struct device_about *gpu, const char *no_gpu)
{
    struct json j = json_begin();
    json_real(&j, "version", nbhd_version());
    json_text(&j, "cpu", cpu->model);
    json_text(&j, "features", cpu->features);
    json_real(&j, "threads", threads_of(0));
    json_real(&j, "memory_gib", cpu->memory_gib);
    json_text(&j, "kernel", kernel);
    json_text(&j, "gpu", no_gpu ? NULL : gpu->name);
    json_text(&j, "no_gpu", no_gpu);
    if (!no_gpu) {
        json_real(&j, "compute_capability", 10.0 * gpu->major + gpu->minor);
        json_real(&j, "multiprocessors", gpu->multiprocessors);
        json_real(&j, "gpu_memory_gib", gpu->memory_gib);
        json_text(&j, "cuda", gpu->driver);
    }
    json_end(&j);
}

static int run(int argc, char **argv)
{
    bool json = false;
    const struct option table[] = {
        opt_flag("json", 0, &json, "as one JSON object"),
        opt_end(),
    };
    const struct usage usage = {
        .synopsis = "nbhd info [--json]",
        .about = "Tells the processor and its instruction sets, the threads and memory that this process may use, the\n"
                 "kernel that a plain problem gets, and the GPU, if the CUDA driver has one.",
        .options = table,
        .operands_name = "no operands",
    };
    int count;
    int status = args_parse(&usage, argc, argv, &count);
    if (status != ARGS_GO_ON)
        return status;
    struct cpu cpu = look_at_cpu();
    struct device_about gpu;
    char why[NBHD_TEXT];
    const char *no_gpu = device_about(&gpu, why) ? NULL : why;
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    if (nbhd_desc_parse(&desc, "fwd f32 d64 64x64 w7x7") == NBHD_OK)
        nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CPU, 0);
    const char *kernel = plan ? nbhd_plan_kernel(plan) : NULL;
    (json ? print_json : print)(&cpu, kernel, &gpu, no_gpu);
    nbhd_plan_destroy(&plan);
    return TOOL_DONE;
}

const struct command cmd_info = {"info", "the machine, as nbhd sees it", run};
