/* nbhd jit: the cache of compiled CUDA kernels: lists it, fills it ahead of time (no GPU is needed), empties it. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "arch.h"
#include "args.h"
#include "json.h"
#include "lines.h"
#include "tool.h"

#ifdef NBHD_HAVE_CUDA
#include "cuda/cuda.h"

struct options {
    const char *arch, *kernel, *dump;
    bool deterministic, clear, json;
};

/* The value of a line "field value" of a kernel's identity. */
static void field(const struct nbhd_jit *code, const char *name, char *value, size_t capacity)
{
    size_t length = strlen(name);
    value[0] = 0;
    for (const char *line = code->identity; *line; line += strcspn(line, "\n"), line += *line == '\n')
        if (!strncmp(line, name, length) && line[length] == ' ')
            snprintf(value, capacity, "%.*s", (int)strcspn(line + length + 1, "\n"), line + length + 1);
}

struct shown {
    char source[64], arch[16], nvrtc[24], options[1024];
    struct nbhd_jit_entry entries[8];
    int count;
};

static struct shown read_code(const struct nbhd_jit *code)
{
    struct shown s;
    field(code, "source", s.source, sizeof s.source);
    field(code, "arch", s.arch, sizeof s.arch);
    char version[16];
    field(code, "nvrtc", version, sizeof version);
    snprintf(s.nvrtc, sizeof s.nvrtc, "%d.%d", atoi(version) / 100, atoi(version) % 100);
    field(code, "options", s.options, sizeof s.options);
    s.count = nbhd_jit_entries(code->log, s.entries, 8);
    s.count = s.count < 8 ? s.count : 8;
    return s;
}

static void show_json(const char *file, const struct nbhd_jit *code)
{
    struct json j = json_begin();
    json_text(&j, "file", file);
    json_bool(&j, "ok", code != NULL);
    if (code) {
        const struct shown s = read_code(code);
        json_text(&j, "source", s.source);
        json_text(&j, "arch", s.arch);
        json_text(&j, "nvrtc", s.nvrtc);
        json_text(&j, "options", s.options);
        json_real(&j, "bytes", (double)code->cubin_bytes);
        json_real(&j, "compile_ms", code->compile_ms);
        json_list(&j, "kernels");
        for (int i = 0; i < s.count; i++) {
            json_object(&j);
            json_text(&j, "name", s.entries[i].name);
            json_real(&j, "registers", s.entries[i].registers);
            json_real(&j, "spill_bytes", s.entries[i].spills);
            json_real(&j, "shared_bytes", s.entries[i].shared);
            json_object_end(&j);
        }
        json_list_end(&j);
    }
    json_end(&j);
}

static void show(const char *file, const struct nbhd_jit *code, void *context)
{
    const struct options *o = context;
    if (o->json) {
        show_json(file, code);
        return;
    }
    if (!code) {
        printf("%s  damaged or left by a killed process; not used\n", file);
        return;
    }
    const struct shown s = read_code(code);
    printf("%-14s %-8s NVRTC %-5s %6zu bytes", s.source, s.arch, s.nvrtc, code->cubin_bytes);
    if (code->compile_ms > 0)
        printf("  compiled in %.0f ms", code->compile_ms);
    printf("\n    %s\n", s.options);
    for (int i = 0; i < s.count; i++)
        printf("    %-24s %3d registers, %d bytes spilled, %d bytes of shared memory\n", s.entries[i].name,
               s.entries[i].registers, s.entries[i].spills, s.entries[i].shared);
}

/* ---- filling ---- */
struct fill {
    const struct options *o;
    int count, status;
};

static int write_file(const char *directory, const char *name, const char *ending, const void *data, size_t bytes)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%.*s%s", directory, (int)strcspn(name, "."), name, ending);
    FILE *file = fopen(path, "wb");
    bool ok = file && fwrite(data, 1, bytes, file) == bytes;
    ok = file && fclose(file) == 0 && ok;
    return ok ? TOOL_DONE : tool_fail(TOOL_FAILED, "--dump: %s cannot be written: %s", path, strerror(errno));
}

static int dump(const char *directory, const struct nbhd_jit *code)
{
    const struct shown s = read_code(code);
    char *ptx = NULL;
    nbhd_status result = nbhd_jit_ptx(&ptx, s.source, s.options, s.arch);
    if (result)
        return tool_fail_library(result);
    int status = write_file(directory, code->name, ".ptx", ptx, strlen(ptx));
    free(ptx);
    if (!status)
        status = write_file(directory, code->name, ".cubin", code->cubin, code->cubin_bytes);
    return status ? status : write_file(directory, code->name, ".log", code->log, strlen(code->log));
}

static void filled(const struct nbhd_jit *code, void *context)
{
    struct fill *f = context;
    struct nbhd_jit stored = {.log = NULL};
    f->count++;
    show(code->name, code, (void *)f->o);
    if (f->o->dump && !f->status)
        f->status = dump(f->o->dump, code);
    if (nbhd_cache_load(code->name, code->identity, &stored)) {
        free(stored.identity);
        free(stored.log);
        free(stored.cubin);
    } else {
        char path[4096] = "NBHD_CACHE_DIR, XDG_CACHE_HOME and HOME name none";
        nbhd_cache_directory(path, sizeof path);
        f->status = tool_fail(TOOL_FAILED, "the kernel is not in the cache; can it be written? (%s)", path);
    }
}

static int fill_one(const struct problem *problem, void *context)
{
    struct fill fill = {context, 0, TOOL_DONE};
    nbhd_plan *plan = NULL;
    if (!fill.o->json)
        printf("%s\n", problem->line);
    nbhd_jit_observe(filled, &fill);
    nbhd_status result = problem_plan(&plan, problem, problem->desc.pass, NBHD_DEVICE_CUDA, fill.o->kernel);
    nbhd_jit_observe(NULL, NULL);
    if (result)
        return tool_fail_library(result);
    if (!fill.count)
        fill.status = tool_fail(TOOL_FAILED, "%s compiled nothing", nbhd_plan_kernel(plan));
    nbhd_plan_destroy(&plan);
    return fill.status;
}

/* The problem lines of the command line, for the architecture that is being planned for. */
struct lines {
    const struct options *o;
    char **operands;
    int count;
};

static int fill_lines(const char *arch, void *context)
{
    const struct lines *lines = context;
    (void)arch;
    return problems_each(lines->operands, lines->count, 0, lines->o->deterministic, fill_one, (void *)lines->o);
}

/* Without --arch for the GPU of this machine. */
static int fill(const struct options *o, char **operands, int count)
{
    struct lines lines = {o, operands, count};
    struct nbhd_cuda_machine machine;
    if (o->dump && mkdir(o->dump, 0777) && errno != EEXIST)
        return tool_fail(TOOL_USAGE, "--dump: the directory %s cannot be made: %s", o->dump, strerror(errno));
    if (o->arch)
        return arch_each(o->arch, fill_lines, &lines);
    if (nbhd_cuda_machine(&machine))
        return tool_fail(TOOL_FAILED, "%s; --arch, e.g. sm_90, compiles for a GPU that is not here", nbhd_last_error());
    return fill_lines(NULL, &lines);
}

static int list(const struct options *o)
{
    char path[4096];
    if (!nbhd_cache_directory(path, sizeof path))
        return tool_fail(TOOL_FAILED, "there is no cache: NBHD_CACHE_DIR, XDG_CACHE_HOME and HOME are not set");
    int count = nbhd_cache_list(show, (void *)o);
    if (!o->json)
        printf("%d kernel files in %s\n", count, path);
    return TOOL_DONE;
}

static int clear(void)
{
    int count = nbhd_cache_clear();
    if (count < 0)
        return tool_fail(TOOL_FAILED, "some files of the cache could not be removed");
    printf("%d kernel files removed\n", count);
    return TOOL_DONE;
}

static int run(int argc, char **argv)
{
    struct options o = {0};
    const struct option table[] = {
        opt_arch(&o.arch, "compile for these, e.g. sm_80,sm_90 (the GPU of this machine)"),
        opt_text("kernel", 'k', &o.kernel, "NAME", "this kernel, as `nbhd list` names it (the planner's choice)"),
        opt_deterministic(&o.deterministic),
        opt_text("dump", 0, &o.dump, "DIR", "also write PTX, machine code and the compiler's log to this directory"),
        opt_flag("clear", 0, &o.clear, "empty the cache"),
        opt_flag("json", 0, &o.json, "one JSON object a kernel file"),
        opt_end(),
    };
    const struct usage usage = {
        .synopsis = "nbhd jit [LINE ... | @FILE] [OPTIONS]",
        .about = "Without a problem, lists the cache of compiled CUDA kernels. With problems, compiles what they\n"
                 "need into it: ahead of time, and on a machine without a GPU if --arch tells for which. LINE is a\n"
                 "problem such as \"bwd bf16 h8 d64 256x256 w13x13\". The cache is $NBHD_CACHE_DIR, else\n"
                 "$XDG_CACHE_HOME/nbhd, else ~/.cache/nbhd; NVRTC, the compiler, is searched for in $NBHD_NVRTC,\n"
                 "where libraries are, in /usr/local/cuda*, and among the Python packages of NVIDIA.",
        .options = table,
        .operands_min = 0,
        .operands_max = 1 << 20,
        .operands_name = "problem lines or @FILE, or nothing",
    };
    int count;
    int status = args_parse(&usage, argc, argv, &count);
    if (status != ARGS_GO_ON)
        return status;
    if (o.clear && count)
        return tool_fail(TOOL_USAGE, "--clear takes no problem");
    if (!count && (o.arch || o.kernel || o.deterministic || o.dump))
        return tool_fail(TOOL_USAGE, "--%s is for compiling, and no problem is given",
                         o.arch ? "arch" : o.kernel ? "kernel" : o.deterministic ? "deterministic" : "dump");
    return o.clear ? clear() : count ? fill(&o, argv, count) : list(&o);
}

#else

static int run(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    return tool_fail(TOOL_FAILED, "this build has no CUDA backend");
}

#endif

const struct command cmd_jit = {"jit", "list, fill or empty the cache of compiled CUDA kernels", run};
