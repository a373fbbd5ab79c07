/* What the loader says and takes where the driver or NVRTC is absent, is not what its name says, is too old, or fails;
 * and that a kernel cache which cannot be had costs compilations and nothing else. Libraries are loader_stub.c's, so no
 * GPU and no NVRTC are needed. Each case is a process: both are opened once in one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sched.h>
#include <sys/mount.h>
#include "cuda/cuda.h"
#include "folder.h"

static void link_to(const char *target, const char *name)
{
    CHECK(!symlink(target, in_root(name)), "the link %s could not be made", name);
}

/* A library that is none of those looked for. */
static const char *libc_path(void)
{
    Dl_info where = {.dli_fname = ""};
    void *symbol = dlsym(RTLD_DEFAULT, "getenv");
    CHECK(symbol && dladdr(symbol, &where), "libc is not found");
    return where.dli_fname;
}

/* ---- NVRTC ---- */
struct nvrtc_case {
    const char *path, *setting, *value; /* of NBHD_NVRTC, under root; and one more variable */
    int version;                        /* 0: it is refused */
    const char *words[2];               /* in the sentence then */
};

static const struct nvrtc_case nvrtc_cases[] = {
    {"absent", NULL, NULL, 0, {"NBHD_NVRTC is '", "absent"}},
    {"empty", NULL, NULL, 0, {"empty'", "no libnvrtc.so"}},
    {"text", NULL, NULL, 0, {"text'", "libnvrtc.so.13"}},
    {"text/libnvrtc.so.13", NULL, NULL, 0, {"libnvrtc.so.13'", "invalid ELF header"}},
    {"loop", NULL, NULL, 0, {"loop'", "loop"}},
    {"dangling", NULL, NULL, 0, {"dangling'", "libnvrtc.so.12"}},
    {"other", NULL, NULL, 0, {"other'", "lacks nvrtc"}},
    {"good", "STUB_VERSION", "11.8", 0, {"is NVRTC 11.8", "12.0 or later is needed"}},
    {"good", "STUB_VERSION", "none", 0, {"good'", "is NVRTC 0.0"}},
    {"good", "STUB_ARCHS", "0", 0, {"good'", "does not tell what it compiles for"}},
    {"good", "STUB_ARCHS", "65", 0, {"good'", "does not tell what it compiles for"}},
    {"good", NULL, NULL, 1300, {NULL}},
    {"good/libnvrtc.so.13", "STUB_VERSION", "12.4", 1204, {NULL}},
    {"mixed", "STUB_VERSION", "12.9", 1209, {NULL}}, /* the newer name is no library: the older one is taken */
};

static void try_nvrtc(const void *context)
{
    const struct nvrtc_case *c = context;
    char why[NBHD_TEXT] = "";
    setenv("NBHD_NVRTC", in_root(c->path), 1);
    if (c->setting)
        setenv(c->setting, c->value, 1);
    const struct nbhd_nvrtc *nvrtc = nbhd_nvrtc(why);
    CHECK((nvrtc ? nvrtc->version : 0) == c->version, "%s %s: version %d, '%s'", c->path, c->value ? c->value : "",
          nvrtc ? nvrtc->version : 0, why);
    for (int i = 0; i < 2 && c->words[i]; i++)
        CHECK(strstr(why, c->words[i]), "%s %s: '%s' is not in '%s'", c->path, c->value ? c->value : "", c->words[i],
              why);
}

static void check_nvrtc(const char *stub)
{
    static const char *const folders[] = {"empty", "text", "loop-folder", "dangling", "other", "good", "mixed"};
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
        CHECK(!mkdir(in_root(folders[i]), 0777), "%s", folders[i]);
    write_text(in_root("text/libnvrtc.so.13"),
               "no library, but long enough to have the head of one: 64 bytes and some more\n");
    write_text(in_root("mixed/libnvrtc.so.13"), "");
    link_to("loop", "loop");
    link_to("/nonexistent", "dangling/libnvrtc.so.12");
    link_to(libc_path(), "other/libnvrtc.so.13");
    link_to(stub, "good/libnvrtc.so.13");
    link_to(stub, "mixed/libnvrtc.so.12");
    for (size_t i = 0; i < sizeof nvrtc_cases / sizeof *nvrtc_cases; i++)
        in_child(try_nvrtc, &nvrtc_cases[i], nvrtc_cases[i].path);
}

/* ---- the driver ---- */
struct driver_case {
    const char *folder, *setting, *value; /* where libcuda.so.1 is; one more variable */
    const char *word;                     /* of what the driver's absence, or else NVRTC's, is told with */
};

static const struct driver_case driver_cases[] = {
    {"text-driver", NULL, NULL, "libcuda.so.1"},
    {"other-driver", NULL, NULL, "it lacks cu"},
    {"driver", "STUB_INIT", "100", "finds no GPU"},
    {"driver", "STUB_INIT", "999", "could not be initialized: no description (error 999)"},
    {"driver", "STUB_DRIVER", "12040", "pip install nvidia-cuda-nvrtc-cu12"},
    {"driver", "STUB_DRIVER", "13000", "pip install nvidia-cuda-nvrtc'"},
};

static void try_driver(const struct driver_case *c)
{
    char why[NBHD_TEXT] = "";
    if (nbhd_driver_open(why) && nbhd_nvrtc(why))
        printf("note: this machine has an NVRTC, so its absence is not tried\n");
    else
        CHECK(strstr(why, c->word), "%s %s: '%s' is not in '%s'", c->folder, c->value ? c->value : "", c->word, why);
}

/* The linker reads LD_LIBRARY_PATH when a process starts, so this program runs itself. */
static void start_driver(const void *context)
{
    const struct driver_case *c = context;
    char number[20];
    snprintf(number, sizeof number, "%d", (int)(c - driver_cases));
    setenv("LD_LIBRARY_PATH", in_root(c->folder), 1);
    setenv("PATH", in_root(c->folder), 1); /* no Python's NVRTC is found */
    unsetenv("NBHD_NVRTC");
    if (c->setting)
        setenv(c->setting, c->value, 1);
    execl("/proc/self/exe", "test_loader", number, (char *)NULL);
    CHECK(false, "the program could not start itself");
}

static void check_driver(const char *stub)
{
    CHECK(!mkdir(in_root("driver"), 0777) && !mkdir(in_root("other-driver"), 0777) &&
              !mkdir(in_root("text-driver"), 0777),
          "directories");
    link_to(stub, "driver/libcuda.so.1");
    link_to(libc_path(), "other-driver/libcuda.so.1");
    write_text(in_root("text-driver/libcuda.so.1"), "no library\n");
    for (size_t i = 0; i < sizeof driver_cases / sizeof *driver_cases; i++)
        in_child(start_driver, &driver_cases[i], driver_cases[i].word);
}

/* ---- compiling where there is no cache ---- */
struct place {
    const char *name;
    void (*enter)(void);
};

static void use(const char *name) { setenv("NBHD_CACHE_DIR", in_root(name), 1); }

static void nowhere(void)
{
    unsetenv("NBHD_CACHE_DIR");
    unsetenv("XDG_CACHE_HOME");
    unsetenv("HOME");
}

/* By its standard a path that is not absolute does not count. */
static void relative(void)
{
    nowhere();
    setenv("XDG_CACHE_HOME", "here", 1);
}

static void a_file(void)
{
    write_text(in_root("file"), "x");
    use("file");
}

static void below_a_file(void)
{
    write_text(in_root("file"), "x");
    use("file/cache");
}

static void a_loop(void) { use("loop"); }

static void a_dangling_link(void)
{
    link_to("/nonexistent/cache", "dangling-cache");
    use("dangling-cache");
}

static void too_long(void)
{
    char path[6000];
    memset(path, 'x', sizeof path - 1);
    path[0] = '/';
    path[sizeof path - 1] = 0;
    setenv("NBHD_CACHE_DIR", path, 1);
}

static void not_ours(void)
{
    CHECK(!mkdir(in_root("not-ours"), 0500), "a directory");
    use("not-ours");
    if (geteuid() == 0 && setuid(65534))
        nowhere();
}

static bool tell(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");
    return file && fputs(text, file) >= 0 && !fclose(file);
}

/* In a name space of its own a process may mount. */
static bool may_mount(void)
{
    char user[40], group[40];
    snprintf(user, sizeof user, "0 %u 1", geteuid());
    snprintf(group, sizeof group, "0 %u 1", getegid());
    return !unshare(CLONE_NEWUSER | CLONE_NEWNS) && tell("/proc/self/setgroups", "deny") &&
           tell("/proc/self/uid_map", user) && tell("/proc/self/gid_map", group);
}

static void full_disk(void)
{
    CHECK(!mkdir(in_root("tiny"), 0777), "a directory");
    if (!may_mount() || mount("none", in_root("tiny"), "tmpfs", 0, "size=4k,mode=777")) {
        printf("note: a file system may not be mounted here\n");
        nowhere();
        return;
    }
    write_text(in_root("tiny/filler"), "x");
    use("tiny");
}

static const struct place places[] = {
    {"no directory is named", nowhere}, {"a relative XDG_CACHE_HOME", relative}, {"a file", a_file},
    {"below a file", below_a_file},     {"a loop of links", a_loop},             {"a dangling link", a_dangling_link},
    {"too long a path", too_long},      {"not ours", not_ours},                  {"a full disk", full_disk},
};

/* Compiles in every process, and nothing of it is left. */
static void try_place(const void *context)
{
    const struct place *place = context;
    const struct nbhd_jit *code;
    place->enter();
    for (int i = 0; i < 2; i++) {
        const nbhd_status status = nbhd_jit_compile(&code, "fwd_simt.cu", "-DX=1", "sm_80", 0);
        if (CHECK(!status, "%s: %s", place->name, nbhd_last_error())) {
            CHECK(code->compile_ms > 0 && !memcmp(code->cubin, "code", 4), "%s: not compiled", place->name);
            CHECK(!nbhd_cache_store(code), "%s: it was stored", place->name);
        }
        nbhd_jit_forget();
    }
    CHECK(nbhd_jit_compile(&code, "fwd_simt.cu", "-DX=1", "sm_80", NBHD_PLAN_NO_JIT) == NBHD_ERROR_COMPILE &&
              strstr(nbhd_last_error(), "not in the kernel cache"),
          "%s: %s", place->name, nbhd_last_error());
    CHECK(access("here", F_OK), "%s: it is in the working directory", place->name);
}

/* What has a kernel's name but is no file is not read, and not waited for. */
static void try_odd_files(const void *context)
{
    const struct nbhd_jit *code;
    char path[1024];
    (void)context;
    use("odd");
    CHECK(!nbhd_jit_compile(&code, "fwd_simt.cu", "-DX=2", "sm_80", 0), "%s", nbhd_last_error());
    snprintf(path, sizeof path, "%s/%s", in_root("odd"), code->name);
    for (int kind = 0; kind < 3; kind++) {
        nbhd_jit_forget();
        CHECK(!unlink(path), "it was not stored");
        CHECK(!(kind == 0 ? mkfifo(path, 0666) : kind == 1 ? symlink(path, path) : mkdir(path, 0777)), "kind %d", kind);
        CHECK(!nbhd_jit_compile(&code, "fwd_simt.cu", "-DX=2", "sm_80", 0) && code->compile_ms > 0, "kind %d was read",
              kind);
    }
    CHECK(!rmdir(path), "the directory is gone");
}

static void try_failure(const void *context)
{
    const struct nbhd_jit *code;
    (void)context;
    setenv("STUB_RESULT", "6", 1);
    nowhere();
    CHECK(nbhd_jit_compile(&code, "fwd_simt.cu", "-DX=3", "sm_80", 0) == NBHD_ERROR_COMPILE && !code &&
              strstr(nbhd_last_error(), "fwd_simt.cu could not be compiled for sm_80 (NVRTC error 6)"),
          "%s", nbhd_last_error());
}

/* ---- kernels side by side ---- */
static void try_ahead(const void *context)
{
    const struct nbhd_jit *code;
    char options[40];
    (void)context;
    use("ahead");
    CHECK(!nbhd_ahead("fwd_simt.cu", "-DX=0", "sm_80", 0), "nobody gathers");
    nbhd_ahead_begin();
    CHECK(!nbhd_ahead("fwd_simt.cu", "-DX=0", "sm_80", NBHD_PLAN_NO_JIT), "it may not be compiled");
    for (int i = 0; i < 40; i++) { /* more than there are threads; each twice */
        snprintf(options, sizeof options, "-DX=%d", i / 2);
        if (!nbhd_ahead("fwd_simt.cu", options, "sm_80", 0))
            CHECK(i >= 32 && !nbhd_jit_compile(&code, "fwd_simt.cu", options, "sm_80", 0), "%d: %s", i,
                  nbhd_last_error());
    }
    CHECK(nbhd_ahead_end() && !nbhd_ahead_end(), "something was begun, once");
    for (int i = 0; i < 20; i++) {
        snprintf(options, sizeof options, "-DX=%d", i);
        CHECK(!nbhd_jit_compile(&code, "fwd_simt.cu", options, "sm_80", NBHD_PLAN_NO_JIT), "%s", nbhd_last_error());
    }
    nbhd_jit_forget();
    nbhd_ahead_begin();
    CHECK(!nbhd_ahead("fwd_simt.cu", "-DX=1", "sm_80", 0), "it lies on the disk");
    setenv("STUB_RESULT", "6", 1);
    CHECK(nbhd_ahead("fwd_simt.cu", "-DX=99", "sm_80", 0) && nbhd_ahead_end(), "it was not begun");
    CHECK(nbhd_jit_compile(&code, "fwd_simt.cu", "-DX=99", "sm_80", 0) == NBHD_ERROR_COMPILE, "its failure was lost");
}

/* Plans whose kernels compile only if they do so at once: a backward of two files; a kernel and the one beside it for
 * unaligned tensors; a ragged batch's. */
struct plan_case {
    const char *line, *together;
    int chip;
    bool ragged;
};

static const struct plan_case plan_cases[] = {
    {"bwd bf16 d64 8x16 w3x3", "2", 80, false},
    {"bwd bf16 d64 8x16 w3x3 bias", "3", 80, false},
    {"fwd bf16 d64 8x16 w3x3", "2", 90, false},
    {"bwd bf16 d64 8x16 w3x3", "2", 80, true},
};

static void try_plan(const void *context)
{
    static const int lengths[] = {8, 16, 16, 8};
    const struct plan_case *c = context;
    nbhd_ragged ragged = NBHD_RAGGED_INIT;
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    nowhere();
    setenv("STUB_ARCHS", "11", 1);
    setenv("STUB_TOGETHER", c->together, 1);
    CHECK(!nbhd_cuda_set_target(c->chip) && !nbhd_desc_parse(&desc, c->line), "%s", nbhd_last_error());
    ragged.sequences = 2;
    ragged.lengths = lengths;
    if (c->ragged)
        desc.length[0] = desc.length[1] = 0;
    const nbhd_status status = c->ragged
                                   ? nbhd_plan_create_ragged(&plan, &desc, &ragged, NBHD_DEVICE_CUDA, 0, NULL)
                                   : nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CUDA, 0);
    CHECK(!status, "'%s': %s", c->line, nbhd_last_error());
    nbhd_plan_destroy(&plan);
}

int main(int argc, char **argv)
{
    if (argc == 2) { /* started by start_driver */
        try_driver(&driver_cases[atoi(argv[1])]);
        return test_failed != 0;
    }
    if (!folder_begin())
        return folder_end();
    unsetenv("NBHD_KERNEL_DIR");
    check_nvrtc(TEST_STUB);
    check_driver(TEST_STUB);
    setenv("NBHD_NVRTC", in_root("good"), 1);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        in_child(try_place, &places[i], places[i].name);
    in_child(try_odd_files, NULL, "odd files");
    in_child(try_failure, NULL, "a failure");
    in_child(try_ahead, NULL, "side by side");
    for (size_t i = 0; i < sizeof plan_cases / sizeof *plan_cases; i++)
        in_child(try_plan, &plan_cases[i], plan_cases[i].line);
    return folder_end();
}
