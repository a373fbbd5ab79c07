/* The kernel cache and run-time compilation, without a GPU: checksums, damaged, foreign, full and unwritable caches,
 * processes that are killed while they write, the sentences of what is missing; with NVRTC, that kernels are compiled
 * once. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "cuda/driver.h"
#include "cuda/jit.h"
#include "cuda/sha256.h"
#include "test.h"

static char root[] = "/tmp/nbhd-test-jit-XXXXXX";
static char folder[256]; /* the cache */

static char *path_in(const char *directory, const char *name)
{
    static char path[1024];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static void write_text(const char *path, const void *text, size_t bytes)
{
    FILE *file = fopen(path, "wb");
    CHECK(file && fwrite(text, 1, bytes, file) == bytes, "%s could not be written", path);
    if (file)
        fclose(file);
}

static char *read_bytes(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    char *data = malloc(1 << 22);
    *bytes = file && data ? fread(data, 1, 1 << 22, file) : 0;
    if (file)
        fclose(file);
    return data;
}

/* Runs function in a process of its own, where the environment and NVRTC are fresh. Its failed checks count here,
 * unless it may fail; true if it did not. */
static bool in_child(void (*function)(void), bool may_fail)
{
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        test_failed = 0;
        function();
        fflush(NULL);
        _exit(test_failed ? 1 : 0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    const bool ok = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    return may_fail ? ok : CHECK(ok, "a child process ended with status %d", status);
}

/* ---- sha256: the standard's examples ---- */
static void check_sha256(void)
{
    static const struct {
        const char *text, *hex;
        int times;
    } known[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", 1},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", 1},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1", 1},
        {"a", "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0", 1000000},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        struct nbhd_sha256 sha;
        char hex[65];
        nbhd_sha256_begin(&sha);
        for (int j = 0; j < known[i].times; j++)
            nbhd_sha256_add(&sha, known[i].text, strlen(known[i].text));
        nbhd_sha256_end(&sha, hex);
        CHECK(!strcmp(hex, known[i].hex), "of '%.10s': %s", known[i].text, hex);
    }
}

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

/* ---- files ---- */
static struct nbhd_jit made_up(const char *name, unsigned seed)
{
    static char identity[64], cubin[20000];
    struct nbhd_jit code = {.identity = identity, .log = (char *)"log\n", .cubin = cubin, .cubin_bytes = sizeof cubin};
    snprintf(code.name, sizeof code.name, "%s", name);
    snprintf(identity, sizeof identity, "source %s\nnvrtc 1\n", name);
    for (size_t i = 0; i < sizeof cubin; i++)
        cubin[i] = (char)(seed + i * i);
    return code;
}

static void drop(struct nbhd_jit *code)
{
    free(code->identity);
    free(code->log);
    free(code->cubin);
}

/* Loads name; true if it is there and right. */
static bool loads(const char *name, const char *identity, const struct nbhd_jit *right)
{
    struct nbhd_jit code = {.log = NULL};
    if (!nbhd_cache_load(name, identity, &code))
        return false;
    CHECK(code.cubin_bytes == right->cubin_bytes && !memcmp(code.cubin, right->cubin, right->cubin_bytes) &&
              !strcmp(code.log, right->log),
          "%s came back changed", name);
    drop(&code);
    return true;
}

static void check_files(void)
{
    const struct nbhd_jit code = made_up("one-sm_80-0123-1205.nbhd", 1);
    CHECK(!loads(code.name, code.identity, &code), "an empty cache had it");
    CHECK(nbhd_cache_store(&code), "it could not be stored");
    CHECK(loads(code.name, code.identity, &code) && loads(code.name, NULL, &code), "it is not there");
    CHECK(loads("one-sm_80-0123-*", "source one-sm_80-0123-1205.nbhd\n", &code), "it is not found by its first part");
    CHECK(!loads("one-sm_80-01234*", NULL, &code), "it is found under another name");
    CHECK(!loads(code.name, "source other\n", &code), "another identity was taken");
    size_t bytes;
    char *path = strdup(path_in(folder, code.name)), *data = read_bytes(path, &bytes);
    for (size_t i = 0; i < bytes; i += i < 300 ? 1 : 997) { /* every byte of the head, some of the rest */
        data[i] ^= 4;
        write_text(path, data, bytes);
        CHECK(!loads(code.name, code.identity, &code), "byte %zu of %zu was wrong and nobody saw it", i, bytes);
        data[i] ^= 4;
    }
    for (size_t length = 0; length < bytes; length += length < 300 ? 1 : 997) {
        write_text(path, data, length);
        CHECK(!loads(code.name, code.identity, &code), "it was cut to %zu bytes and nobody saw it", length);
    }
    CHECK(nbhd_cache_store(&code) && loads(code.name, code.identity, &code), "a damaged file was not replaced");
    free(data);
    free(path);
}

static void count_file(const char *name, const struct nbhd_jit *code, void *context)
{
    (void)name;
    ((int *)context)[code != NULL]++;
}

static int files_in(const char *directory)
{
    char command[512], text[32] = "0";
    snprintf(command, sizeof command, "ls -A '%s' 2>/dev/null | wc -l", directory);
    FILE *pipe = popen(command, "r");
    if (pipe) {
        if (!fgets(text, sizeof text, pipe))
            text[0] = 0;
        pclose(pipe);
    }
    return atoi(text);
}

static void check_list_and_clear(void)
{
    int count[2] = {0, 0};
    const struct nbhd_jit code = made_up("two-sm_80-4567-1205.nbhd", 2);
    nbhd_cache_store(&code);
    write_text(path_in(folder, "bad-sm_80-89ab-1205.nbhd"), "nbhd-jit 1\n", 11);
    write_text(path_in(folder, ".tmp-1-1-x.nbhd"), "half", 4);
    write_text(path_in(folder, "somebody-elses.txt"), "keep", 4);
    CHECK(nbhd_cache_list(count_file, count) == 4 && count[1] == 2 && count[0] == 2, "%d good, %d bad", count[1],
          count[0]);
    CHECK(nbhd_cache_clear() == 4, "not all were removed");
    CHECK(files_in(folder) == 1, "clearing removed what is not ours, or left something");
    unlink(path_in(folder, "somebody-elses.txt"));
}

/* The cache's directory is a file; or may not be written (root may, so that is tried through a file system without
 * room). */
static void check_unwritable(void)
{
    const struct nbhd_jit code = made_up("three-sm_80-cdef-1205.nbhd", 3);
    char *file = strdup(path_in(root, "a-file"));
    write_text(file, "x", 1);
    setenv("NBHD_CACHE_DIR", file, 1);
    CHECK(!nbhd_cache_store(&code) && !loads(code.name, NULL, &code), "a file served as a directory");
    setenv("NBHD_CACHE_DIR", "/proc/self/nbhd", 1);
    CHECK(!nbhd_cache_store(&code) && !loads(code.name, NULL, &code), "/proc served as a cache");
    CHECK(nbhd_cache_clear() == 0, "there was something to clear");
    setenv("NBHD_CACHE_DIR", folder, 1);
    free(file);
}

/* A full disk: a file may not grow past 4 KB. */
static void fill_disk(void)
{
    const struct nbhd_jit code = made_up("four-sm_80-cdef-1205.nbhd", 4);
    const struct rlimit little = {4096, 4096};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &little);
    CHECK(!nbhd_cache_store(&code), "a full disk took it");
    CHECK(!loads(code.name, NULL, &code) && files_in(folder) == 0, "half a file is left");
}

/* Processes store and are killed at any time; readers never see anything but the whole file. */
static void check_kills(void)
{
    const struct nbhd_jit code = made_up("five-sm_80-cdef-1205.nbhd", 5);
    int seen = 0;
    for (int round = 0; round < 60; round++) {
        pid_t children[2];
        for (int i = 0; i < 2; i++)
            if ((children[i] = fork()) == 0)
                for (;;)
                    nbhd_cache_store(&code);
        const struct timespec pause = {0, 200000 + 37000L * round};
        nanosleep(&pause, NULL);
        seen += loads(code.name, code.identity, &code); /* while both write */
        for (int i = 0; i < 2; i++) {
            kill(children[i], SIGKILL);
            waitpid(children[i], NULL, 0);
        }
        struct nbhd_jit found = {.log = NULL};
        if (access(path_in(folder, code.name), F_OK) == 0) {
            CHECK(nbhd_cache_load(code.name, code.identity, &found), "round %d left a damaged file", round);
            drop(&found);
        }
    }
    CHECK(seen > 30, "only %d of 60 rounds saw the file", seen);
    CHECK(nbhd_cache_clear() >= 1 && files_in(folder) == 0, "what killed processes left could not be removed");
}

/* ---- the compiler ---- */
static const char kernel_text[] = "#include \"nbhd_params.h\"\n"
                                  "#include \"device/half.cuh\"\n"
                                  "extern \"C\" __global__ void tiny(float *x) { x[threadIdx.x] *= NBHD_HALF * FACTOR; }\n";

static void write_kernel(const char *factor)
{
    char text[256];
    snprintf(text, sizeof text, "#define NBHD_HALF %s\n", factor);
    write_text(path_in(root, "kernels/tiny.cu"), kernel_text, strlen(kernel_text));
    write_text(path_in(root, "kernels/device/half.cuh"), text, strlen(text));
    write_text(path_in(root, "nbhd_params.h"), "", 0);
}

static void missing_nvrtc(void)
{
    const struct nbhd_jit *code;
    setenv("NBHD_NVRTC", "/nonexistent/libnvrtc.so", 1);
    CHECK(nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=3", "sm_80", 0) == NBHD_ERROR_COMPILE &&
              strstr(nbhd_last_error(), "/nonexistent"),
          "%s", nbhd_last_error());
    CHECK(code == NULL, "code came from nowhere");
}

/* What another NVRTC compiled is taken where there is none, and where compiling is forbidden. */
static void cached_without_nvrtc(void)
{
    const struct nbhd_jit *code;
    setenv("NBHD_NVRTC", "/nonexistent/libnvrtc.so", 1);
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=2", "sm_80", 0) && code && code->compile_ms == 0, "%s",
          nbhd_last_error());
    nbhd_jit_forget();
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=2", "sm_80", NBHD_PLAN_NO_JIT) && code, "%s",
          nbhd_last_error());
}

/* Fails, quietly, without NVRTC. */
static void compile_once(void)
{
    const struct nbhd_jit *code;
    if (nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=2", "sm_80", 0))
        test_failed++;
}

static void from_disk(void)
{
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
    in_child(from_disk, false);
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
    write_text(path_in(folder, name), "rubbish", 7);
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=7", "sm_80", 0) && code->compile_ms > 0, "rubbish was taken");
    nbhd_jit_forget();
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=7", "sm_80", 0) && code->compile_ms == 0,
          "rubbish was not replaced");
    nbhd_jit_forget();
    setenv("NBHD_CACHE_DIR", "/proc/self/nbhd", 1);
    CHECK(!nbhd_jit_compile(&code, "tiny.cu", "-DFACTOR=7", "sm_80", 0) && code->compile_ms > 0, "no cache, no kernel");
    setenv("NBHD_CACHE_DIR", folder, 1);
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
    if (!mkdtemp(root))
        return 2;
    snprintf(folder, sizeof folder, "%s/cache/deep", root);
    setenv("NBHD_CACHE_DIR", folder, 1);
    check_sha256();
    check_log();
    check_embedded();
    check_files();
    check_list_and_clear();
    check_unwritable();
    in_child(fill_disk, false);
    check_kills();
    mkdir(path_in(root, "kernels"), 0777);
    mkdir(path_in(root, "kernels/device"), 0777);
    write_kernel("0.5f");
    setenv("NBHD_KERNEL_DIR", path_in(root, "kernels"), 1);
    /* NVRTC is opened once in a process: what needs it absent runs in processes forked before this one opens it. */
    in_child(missing_nvrtc, false);
    if (in_child(compile_once, true))
        in_child(cached_without_nvrtc, false);
    if (nbhd_nvrtc(why)) {
        check_compiler();
        check_damaged_cache();
    } else if (required && strstr(required, "nvrtc")) {
        CHECK(false, "NBHD_REQUIRE=nvrtc: %s", why);
    } else {
        test_skip(why);
    }
    char command[300];
    snprintf(command, sizeof command, "rm -rf '%s'", root);
    if (system(command))
        printf("note: %s could not be removed\n", root);
    return test_done();
}
