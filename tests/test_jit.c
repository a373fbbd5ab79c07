/* Run-time compilation, without a GPU: what is told of its log and of what is missing; with NVRTC, that kernels are
 * compiled once. */
#define _GNU_SOURCE
#include <pthread.h>
#include "cuda/driver.h"
#include "cuda/jit.h"
#include "folder.h"

/* ---- the log of ptxas, in the words of two versions ---- */
static void check_log(void)
{
    static const char log[] =
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
        "ptxas info    : Compiling entry function 'one' for 'sm_90a'\n"
        "ptxas info    : Function properties for one\n"
        "ptxas         .     24 bytes stack frame, 40 bytes spill stores, 64 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 39680 bytes smem\n"
        "ptxas info    : Compiling entry function 'two' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 32 registers, 612 bytes cmem[0]\n";
    struct nbhd_jit_entry e[2];
    CHECK(nbhd_jit_entries(log, e, 2) == 2, "two kernels");
    CHECK(!strcmp(e[0].name, "one") && e[0].registers == 168 && e[0].shared == 39680 && e[0].stack == 24 &&
              e[0].spills == 104,
          "%s: %d %d %d %d", e[0].name, e[0].registers, e[0].shared, e[0].stack, e[0].spills);
    CHECK(!strcmp(e[1].name, "two") && e[1].registers == 32 && e[1].shared == 0 && e[1].spills == 0, "%s: %d",
          e[1].name, e[1].registers);
    const char *complaint = nbhd_jit_complaint(log);
    CHECK(complaint && strstr(complaint, "C7510") && !strncmp(complaint, "ptxas", 5), "%s", complaint);
    CHECK(!nbhd_jit_complaint("ptxas info    : Used 32 registers\n"), "a complaint about nothing");
    CHECK(!nbhd_jit_complaint("ptxas info    : (C7519) warpgroup.arrive is injected\n"), "a complaint about a fence");
}

/* ---- the compiler ---- */
static const char kernel_text[] =
    "#include \"nbhd_params.h\"\n"
    "#include \"device/half.cuh\"\n"
    "extern \"C\" __global__ void tiny(float *x) { x[threadIdx.x] *= NBHD_HALF * FACTOR; }\n";

static void write_kernel(const char *factor)
{
    char text[256];
    snprintf(text, sizeof text, "#define NBHD_HALF %s\n", factor);
    write_text(in_root("kernels/tiny.cu"), kernel_text);
    write_text(in_root("kernels/device/half.cuh"), text);
    write_text(in_root("nbhd_params.h"), "");
}

static void missing_nvrtc(const void *context)
{
    (void)context;
    const struct nbhd_jit *code;
    setenv("NBHD_NVRTC", "/dev/null/libnvrtc.so", 1);
    CHECK(nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=3", "sm_80", 0) == NBHD_ERROR_COMPILE &&
              strstr(nbhd_last_error(), "/dev/null"),
          "%s", nbhd_last_error());
    CHECK(code == NULL, "code came from nowhere");
}

/* What another NVRTC compiled is taken where there is none, and where compiling is forbidden. */
static void cached_without_nvrtc(const void *context)
{
    (void)context;
    const struct nbhd_jit *code;
    setenv("NBHD_NVRTC", "/dev/null/libnvrtc.so", 1);
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=2", "sm_80", 0) && code && code->compile_ms == 0, "%s",
          nbhd_last_error());
    nbhd_jit_forget();
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=2", "sm_80", NBHD_PLAN_NO_JIT) && code, "%s",
          nbhd_last_error());
}

/* Fails, quietly, without NVRTC. */
static void compile_once(const void *context)
{
    (void)context;
    const struct nbhd_jit *code;
    if (nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=2", "sm_80", 0))
        test_failed++;
}

static void from_disk(const void *context)
{
    (void)context;
    const struct nbhd_jit *code;
    nbhd_jit_forget();
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=2", "sm_80", 0) && code->compile_ms == 0,
          "it was compiled again");
}

static void *compile_here(void *context)
{
    const struct nbhd_jit **code = context;
    nbhd_jit_compile(code, "tiny.cu", "-DFACTOR=5", "sm_80", 0);
    return NULL;
}

static void check_threads(void)
{
    pthread_t threads[8];
    const struct nbhd_jit *codes[8] = {NULL};
    for (int i = 0; i < 8; i++)
        pthread_create(&threads[i], NULL, compile_here, (void *)&codes[i]);
    for (int i = 0; i < 8; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 8; i++)
        CHECK(codes[i] && codes[i] == codes[0], "thread %d has its own copy", i);
}

static void check_compiler(void)
{
    const struct nbhd_jit *code, *again;
    struct nbhd_jit_entry entry;
    char *ptx;
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=2", "sm_80", 0), "%s", nbhd_last_error());
    CHECK(code && nbhd_jit_entries(code->log, &entry, 1) == 1 && !strcmp(entry.name, "tiny") && entry.registers > 0,
          "%s", code ? code->log : "");
    CHECK(code && !memcmp(code->cubin, "\177ELF", 4), "that is no machine code");
    CHECK(!nbhd_jit_compile(&again, "tiny.cu", "-DFACTOR=2", "sm_80", NBHD_PLAN_NO_JIT) && again == code,
          "not from memory");
    in_child(from_disk, NULL, "from the disk");
    CHECK(nbhd_jit_compile(&again, "tiny.cu", "-DFACTOR=9", "sm_80", NBHD_PLAN_NO_JIT) == NBHD_ERROR_COMPILE &&
              strstr(nbhd_last_error(), "NBHD_PLAN_NO_JIT"),
          "%s", nbhd_last_error());
    CHECK(nbhd_jit_compile(&again, "tiny.cu", "-DFACTOR=oops", "sm_80", 0) == NBHD_ERROR_COMPILE &&
              strstr(nbhd_last_error(), "tiny.cu(3)") && strstr(nbhd_last_error(), "oops"),
          "%s", nbhd_last_error());
    CHECK(nbhd_jit_compile(&again, "none.cu", "", "sm_80", 0) == NBHD_ERROR_COMPILE &&
              strstr(nbhd_last_error(), "none.cu"),
          "%s", nbhd_last_error());
    CHECK(nbhd_jit_compile(&again, "tiny.cu", "-DFACTOR=2", "sm_30", 0) == NBHD_ERROR_COMPILE &&
              strstr(nbhd_last_error(), "sm_30"),
          "%s", nbhd_last_error());
    CHECK(!nbhd_jit_ptx(&ptx, "tiny.cu", "-DFACTOR=2", "sm_80") && strstr(ptx, ".entry tiny"), "%s", nbhd_last_error());
    free(ptx);
    write_kernel("0.25f"); /* a header changed: another kernel */
    CHECK(!nbhd_jit_compile(&again, "tiny.cu", "-DFACTOR=2", "sm_80", 0) && again != code && again->compile_ms > 0,
          "an edited header was not seen");
    check_threads();
    nbhd_jit_forget();
}

static void check_damaged_cache(void)
{
    const struct nbhd_jit *code;
    char name[128];
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=7", "sm_80", 0) && code->compile_ms > 0, "%s",
          nbhd_last_error());
    snprintf(name, sizeof name, "%s", code->name);
    nbhd_jit_forget();
    write_text(in_cache(name), "rubbish");
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=7", "sm_80", 0) && code->compile_ms > 0, "rubbish was taken");
    nbhd_jit_forget();
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=7", "sm_80", 0) && code->compile_ms == 0,
          "rubbish was not replaced");
    nbhd_jit_forget();
    setenv("NBHD_CACHE_DIR", "/proc/self/nbhd", 1);
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=7", "sm_80", 0) && code->compile_ms > 0, "no cache, no kernel");
    use_cache();
    nbhd_jit_forget();
}

/* The embedded files are the repository's, whole. */
static void check_embedded(void)
{
    int count = 0;
    bool geom = false;
    for (const struct nbhd_source *s = nbhd_embedded; s->name; s++, count++) {
        CHECK(strlen(s->text) == s->size && s->size > 100, "%s has %zu bytes, its text %zu", s->name, s->size,
              strlen(s->text));
        geom |= !strcmp(s->name, "nbhd_geom.h");
    }
    CHECK(count >= 5 && geom, "%d embedded files", count);
}

int main(void)
{
    char why[NBHD_TEXT];
    const char *required = getenv("NBHD_REQUIRE");
    if (!folder_begin())
        return folder_end();
    use_cache();
    check_log();
    check_embedded();
    mkdir(in_root("kernels"), 0777);
    mkdir(in_root("kernels/device"), 0777);
    write_kernel("0.5f");
    setenv("NBHD_KERNEL_DIR", in_root("kernels"), 1);
    /* NVRTC is opened once in a process: what needs it absent runs in processes forked before this one opens it. */
    in_child(missing_nvrtc, NULL, "no NVRTC");
    if (passes_in_child(compile_once, NULL))
        in_child(cached_without_nvrtc, NULL, "a cache without NVRTC");
    if (nbhd_nvrtc(why)) {
        check_compiler();
        check_damaged_cache();
    } else if (required && strstr(required, "nvrtc")) {
        CHECK(false, "NBHD_REQUIRE=nvrtc: %s", why);
    } else {
        test_skip(why);
    }
    return folder_end();
}
