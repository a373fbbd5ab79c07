/* The kernel cache: checksums, damaged, foreign, full and unwritable caches, processes that are killed while they
 * write. Kernels are made up, so neither a GPU nor NVRTC is needed. */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/resource.h>
#include <time.h>
#include "cuda/jit.h"
#include "cuda/sha256.h"
#include "folder.h"

static char *read_bytes(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    char *data = malloc(1 << 22);
    *bytes = file && data ? fread(data, 1, 1 << 22, file) : 0;
    if (file)
        fclose(file);
    return data;
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
    char *path = strdup(in_cache(code.name)), *data = read_bytes(path, &bytes);
    for (size_t i = 0; i < bytes; i += i < 300 ? 1 : 997) { /* every byte of the head, some of the rest */
        data[i] ^= 4;
        write_file(path, data, bytes);
        CHECK(!loads(code.name, code.identity, &code), "byte %zu of %zu was wrong and nobody saw it", i, bytes);
        data[i] ^= 4;
    }
    for (size_t length = 0; length < bytes; length += length < 300 ? 1 : 997) {
        write_file(path, data, length);
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
    write_text(in_cache("bad-sm_80-89ab-1205.nbhd"), "nbhd-jit 1\n");
    write_text(in_cache(".tmp-1-1-x.nbhd"), "half");
    write_text(in_cache("somebody-elses.txt"), "keep");
    CHECK(nbhd_cache_list(count_file, count) == 4 && count[1] == 2 && count[0] == 2, "%d good, %d bad", count[1],
          count[0]);
    CHECK(nbhd_cache_clear() == 4, "not all were removed");
    CHECK(files_in(in_root(CACHE)) == 1, "clearing removed what is not ours, or left something");
    unlink(in_cache("somebody-elses.txt"));
}

/* The cache's directory is a file; or may not be written (root may, so that is tried through a file system without
 * room). */
static void check_unwritable(void)
{
    const struct nbhd_jit code = made_up("three-sm_80-cdef-1205.nbhd", 3);
    char *file = strdup(in_root("a-file"));
    write_text(file, "x");
    setenv("NBHD_CACHE_DIR", file, 1);
    CHECK(!nbhd_cache_store(&code) && !loads(code.name, NULL, &code), "a file served as a directory");
    setenv("NBHD_CACHE_DIR", "/proc/self/nbhd", 1);
    CHECK(!nbhd_cache_store(&code) && !loads(code.name, NULL, &code), "/proc served as a cache");
    CHECK(nbhd_cache_clear() == 0, "there was something to clear");
    use_cache();
    free(file);
}

/* A full disk: a file may not grow past 4 KB. */
static void fill_disk(const void *context)
{
    (void)context;
    const struct nbhd_jit code = made_up("four-sm_80-cdef-1205.nbhd", 4);
    const struct rlimit little = {4096, 4096};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &little);
    CHECK(!nbhd_cache_store(&code), "a full disk took it");
    CHECK(!loads(code.name, NULL, &code) && files_in(in_root(CACHE)) == 0, "half a file is left");
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
        if (access(in_cache(code.name), F_OK) == 0) {
            CHECK(nbhd_cache_load(code.name, code.identity, &found), "round %d left a damaged file", round);
            drop(&found);
        }
    }
    CHECK(seen > 30, "only %d of 60 rounds saw the file", seen);
    CHECK(nbhd_cache_clear() >= 1 && files_in(in_root(CACHE)) == 0, "what killed processes left could not be removed");
}

int main(void)
{
    if (!folder_begin())
        return folder_end();
    use_cache();
    check_sha256();
    check_files();
    check_list_and_clear();
    check_unwritable();
    in_child(fill_disk, NULL, "a full disk");
    check_kills();
    return folder_end();
}
