/* Compiles kernel files and remembers what was compiled. A kernel's identity is a few lines of text; its hash names the
 * file in the disk cache. Reading and compiling happen outside the lock: two threads that want the same new kernel both
 * make it, and the second finds the first's. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "cuda/driver.h"
#include "cuda/jit.h"
#include "cuda/sha256.h"
#include "cuda/source.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const struct nbhd_jit *compiled; /* newest first; under lock, entries are immutable */
static _Thread_local nbhd_jit_observer *observer;
static _Thread_local void *observer_context;

void nbhd_jit_observe(nbhd_jit_observer *function, void *context)
{
    observer = function;
    observer_context = context;
}

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static void drop(struct nbhd_jit *code)
{
    free(code->identity);
    free(code->log);
    free(code->cubin);
    free(code);
}

void nbhd_jit_forget(void)
{
    pthread_mutex_lock(&lock);
    while (compiled) {
        struct nbhd_jit *first = (struct nbhd_jit *)compiled;
        compiled = first->next;
        drop(first);
    }
    pthread_mutex_unlock(&lock);
}

/* ---- identity ---- */
struct wish {
    const char *source, *options, *arch;
    const struct nbhd_sources *sources;
    char *identity; /* without NVRTC's version, which is its last line */
    char stem[100]; /* name without NVRTC's version */
};

static bool identify(struct wish *wish)
{
    size_t room = strlen(wish->source) + strlen(wish->options) + strlen(wish->arch) + 200;
    wish->identity = malloc(room);
    if (!wish->identity)
        return false;
    snprintf(wish->identity, room, "source %s\narch %s\noptions %s\ntext %s\nnbhd %d\n", wish->source, wish->arch,
             wish->options, wish->sources->hash, NBHD_VERSION);
    char hex[65];
    struct nbhd_sha256 sha;
    nbhd_sha256_begin(&sha);
    nbhd_sha256_add(&sha, wish->identity, strlen(wish->identity));
    nbhd_sha256_end(&sha, hex);
    snprintf(wish->stem, sizeof wish->stem, "%.*s-%s-%.24s-", (int)strcspn(wish->source, "."), wish->source, wish->arch,
             hex);
    return true;
}

static char *with_compiler(const struct wish *wish, int version)
{
    size_t room = strlen(wish->identity) + 30;
    char *identity = malloc(room);
    if (identity)
        snprintf(identity, room, "%snvrtc %d\n", wish->identity, version);
    return identity;
}

/* ---- the compiler ---- */
enum { OPTIONS_MAX = 64 };

/* Cuts options at its spaces; leaves out what older compilers do not know and code does not depend on. */
static int split(char *options, const char **list, int count, int version)
{
    for (char *rest = options, *option; (option = strtok_r(rest, " ", &rest)) && count < OPTIONS_MAX;)
        if (version >= 1209 || strncmp(option, "--split-compile", 15))
            list[count++] = option;
    return count;
}

static nbhd_status create(struct _nvrtcProgram **program, const struct nbhd_nvrtc *n, const struct wish *wish)
{
    const struct nbhd_sources *s = wish->sources;
    const char *text = NULL, **headers = malloc(2 * (size_t)s->count * sizeof *headers), **names = headers + s->count;
    if (!headers)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a list of %d kernel files could not be allocated", s->count);
    for (int i = 0; i < s->count; i++) {
        headers[i] = s->list[i].text;
        names[i] = s->list[i].name;
        if (!strcmp(s->list[i].name, wish->source))
            text = s->list[i].text;
    }
    unsigned result = text ? n->nvrtcCreateProgram(program, text, wish->source, s->count, headers, names) : 0;
    free((void *)headers);
    if (!text)
        return nbhd_fail(NBHD_ERROR_COMPILE, "there is no kernel file '%s'", wish->source);
    return result ? nbhd_fail(NBHD_ERROR_COMPILE, "NVRTC could not take %s (error %u)", wish->source, result) : NBHD_OK;
}

static char *read_log(const struct nbhd_nvrtc *n, struct _nvrtcProgram *program)
{
    size_t bytes = 0;
    if (n->nvrtcGetProgramLogSize(program, &bytes))
        bytes = 0;
    char *log = calloc(1, bytes + 1);
    if (log && bytes && n->nvrtcGetProgramLog(program, log))
        log[0] = 0;
    return log;
}

/* The first line with an error in it, else the first line. */
static nbhd_status tell_error(const struct wish *wish, const char *log, unsigned result)
{
    nbhd_log(1, "%s for %s with %s:", wish->source, wish->arch, wish->options);
    const char *line = strstr(log, "error");
    while (line && line > log && line[-1] != '\n')
        line--;
    if (!line)
        line = log;
    return nbhd_fail(NBHD_ERROR_COMPILE, "%s could not be compiled for %s (NVRTC error %u): %.*s", wish->source,
                     wish->arch, result, (int)strcspn(line, "\n"), line);
}

static bool knows_arch(const struct nbhd_nvrtc *n, const char *arch)
{
    int wanted = atoi(arch + strcspn(arch, "0123456789"));
    for (int i = 0; i < n->arch_count; i++)
        if (n->archs[i] == wanted)
            return true;
    return false;
}

/* An NVRTC program of the wish, compiled; its log in *log, to be freed, also after a failure. */
static nbhd_status compile_program(struct _nvrtcProgram **program, char **log, const struct nbhd_nvrtc *n,
                                   const struct wish *wish)
{
    *log = NULL;
    if (!knows_arch(n, wish->arch))
        return nbhd_fail(NBHD_ERROR_COMPILE, "NVRTC %d.%d does not compile for %s, only for sm_%d to sm_%d (%s)",
                         n->version / 100, n->version % 100, wish->arch, n->arch_count ? n->archs[0] : 0,
                         n->arch_count ? n->archs[n->arch_count - 1] : 0, n->path);
    nbhd_status status = create(program, n, wish);
    if (status)
        return status;
    const char *list[OPTIONS_MAX + 4] = {NULL, "--std=c++17", "--ptxas-options=-v"};
    char arch[64], *options = malloc(strlen(wish->options) + 1);
    unsigned result = 0;
    if (options) {
        snprintf(arch, sizeof arch, "--gpu-architecture=%s", wish->arch);
        list[0] = arch;
        int count = split(strcpy(options, wish->options), list, 3, n->version);
        result = n->nvrtcCompileProgram(*program, count, list);
        *log = read_log(n, *program);
    }
    free(options);
    if (!*log)
        status = nbhd_fail(NBHD_ERROR_MEMORY, "the options or the log of a compilation could not be allocated");
    else if (result)
        status = tell_error(wish, *log, result);
    if (status)
        n->nvrtcDestroyProgram(program);
    return status;
}

static nbhd_status compile(struct nbhd_jit *code, const struct nbhd_nvrtc *n, const struct wish *wish)
{
    double start = now_ms();
    struct _nvrtcProgram *program;
    nbhd_status status = compile_program(&program, &code->log, n, wish);
    if (status)
        return status;
    unsigned result = n->nvrtcGetCUBINSize(program, &code->cubin_bytes);
    code->cubin = result ? NULL : malloc(code->cubin_bytes);
    if (code->cubin)
        result = n->nvrtcGetCUBIN(program, code->cubin);
    n->nvrtcDestroyProgram(&program);
    code->identity = with_compiler(wish, n->version);
    if (result || !code->cubin || !code->identity)
        return nbhd_fail(NBHD_ERROR_COMPILE, "the code of %s for %s could not be fetched (NVRTC error %u)",
                         wish->source, wish->arch, result);
    snprintf(code->name, sizeof code->name, "%s%d.nbhd", wish->stem, n->version);
    code->compile_ms = now_ms() - start;
    nbhd_log(2, "compiled %s for %s in %.0f ms: %s", wish->source, wish->arch, code->compile_ms, wish->options);
    return NBHD_OK;
}

/* ---- lookup ---- */
static const struct nbhd_jit *find(const char *identity)
{
    pthread_mutex_lock(&lock);
    const struct nbhd_jit *code = compiled;
    while (code && strncmp(code->identity, identity, strlen(identity)))
        code = code->next;
    pthread_mutex_unlock(&lock);
    return code;
}

static bool load(struct nbhd_jit *code, const struct nbhd_nvrtc *n, const struct wish *wish, bool any_compiler)
{
    char name[128];
    if (n) {
        char *identity = with_compiler(wish, n->version);
        snprintf(name, sizeof name, "%s%d.nbhd", wish->stem, n->version);
        bool found = identity && nbhd_cache_load(name, identity, code);
        free(identity);
        if (found || !any_compiler)
            return found;
    }
    snprintf(name, sizeof name, "%s*", wish->stem);
    return nbhd_cache_load(name, wish->identity, code);
}

static nbhd_status make(struct nbhd_jit *code, const struct wish *wish, unsigned flags)
{
    char why[NBHD_TEXT];
    const struct nbhd_nvrtc *n = nbhd_nvrtc(why);
    bool forbidden = flags & NBHD_PLAN_NO_JIT;
    if (load(code, n, wish, forbidden || !n))
        return NBHD_OK;
    if (forbidden)
        return nbhd_fail(NBHD_ERROR_COMPILE,
                         "%s for %s is not in the kernel cache, and NBHD_PLAN_NO_JIT forbids compiling it; 'nbhd jit' "
                         "fills the cache ahead of time",
                         wish->source, wish->arch);
    if (!n)
        return nbhd_fail(NBHD_ERROR_COMPILE, "%s", why);
    nbhd_status status = compile(code, n, wish);
    if (!status)
        nbhd_cache_store(code);
    return status;
}

/* Puts code into the list, unless another thread has put the same there. */
static const struct nbhd_jit *publish(struct nbhd_jit *code)
{
    pthread_mutex_lock(&lock);
    const struct nbhd_jit *other = compiled;
    while (other && strcmp(other->identity, code->identity))
        other = other->next;
    if (!other) {
        code->next = compiled;
        compiled = code;
    }
    pthread_mutex_unlock(&lock);
    if (other)
        drop(code);
    return other ? other : code;
}

/* ---- entry points ---- */
/* close_wish it afterwards, also where this fails. */
static nbhd_status open_wish(struct wish *wish, const char *source, const char *options, const char *arch)
{
    *wish = (struct wish){.source = source, .options = options, .arch = arch, .sources = nbhd_sources_acquire()};
    return wish->sources && identify(wish)
               ? NBHD_OK
               : nbhd_fail(NBHD_ERROR_MEMORY, "the kernel files could not be read into memory");
}

static void close_wish(struct wish *wish)
{
    free(wish->identity);
    nbhd_sources_release(wish->sources);
}

nbhd_status nbhd_jit_compile(const struct nbhd_jit **code, const char *source, const char *options, const char *arch,
                             unsigned flags)
{
    struct wish wish;
    *code = NULL;
    nbhd_status status = open_wish(&wish, source, options, arch);
    if (!status)
        *code = find(wish.identity);
    if (!status && !*code) {
        struct nbhd_jit *fresh = calloc(1, sizeof *fresh);
        status = fresh ? make(fresh, &wish, flags)
                       : nbhd_fail(NBHD_ERROR_MEMORY, "a kernel's record could not be allocated");
        if (!status)
            *code = publish(fresh);
        else if (fresh)
            drop(fresh);
    }
    if (!status && observer)
        observer(*code, observer_context);
    close_wish(&wish);
    return status;
}

bool nbhd_jit_is_there(const char *source, const char *options, const char *arch)
{
    char why[NBHD_TEXT];
    struct wish wish;
    bool there = !open_wish(&wish, source, options, arch) && find(wish.identity);
    struct nbhd_jit *fresh = wish.identity && !there ? calloc(1, sizeof *fresh) : NULL;
    if (fresh && load(fresh, nbhd_nvrtc(why), &wish, false))
        there = publish(fresh);
    else if (fresh)
        drop(fresh);
    close_wish(&wish);
    return there;
}

nbhd_status nbhd_jit_ptx(char **ptx, const char *source, const char *options, const char *arch)
{
    char why[NBHD_TEXT], *log = NULL;
    const struct nbhd_nvrtc *n = nbhd_nvrtc(why);
    *ptx = NULL;
    if (!n)
        return nbhd_fail(NBHD_ERROR_COMPILE, "%s", why);
    struct wish wish;
    struct _nvrtcProgram *program;
    nbhd_status status = open_wish(&wish, source, options, arch);
    if (!status)
        status = compile_program(&program, &log, n, &wish);
    if (!status) {
        size_t bytes = 0;
        if (n->nvrtcGetPTXSize(program, &bytes) || !(*ptx = malloc(bytes)) || n->nvrtcGetPTX(program, *ptx))
            status = nbhd_fail(NBHD_ERROR_COMPILE, "the PTX of %s could not be fetched", source);
        n->nvrtcDestroyProgram(&program);
    }
    free(log);
    close_wish(&wish);
    return status;
}

/* ---- the log ---- */
/* The number before (as in "16 bytes spill stores") or after a word of the line; 0 if the word is not there. */
static int number_before(const char *line, const char *end, const char *word)
{
    const char *at = strstr(line, word);
    if (!at || at >= end)
        return 0;
    while (at > line && at[-1] == ' ')
        at--;
    while (at > line && at[-1] >= '0' && at[-1] <= '9')
        at--;
    return atoi(at);
}

int nbhd_jit_entries(const char *log, struct nbhd_jit_entry *entries, int room)
{
    static const char start[] = "Compiling entry function '";
    int count = 0;
    for (const char *at = log; (at = strstr(at, start));) {
        at += sizeof start - 1;
        struct nbhd_jit_entry e = {.shared = 0};
        snprintf(e.name, sizeof e.name, "%.*s", (int)strcspn(at, "'"), at);
        const char *next = strstr(at, start);
        const char *end = next ? next : at + strlen(at);
        e.stack = number_before(at, end, "bytes stack frame");
        e.spills = number_before(at, end, "bytes spill stores") + number_before(at, end, "bytes spill loads");
        e.registers = number_before(at, end, "registers");
        e.shared = number_before(at, end, "bytes smem");
        if (count < room)
            entries[count] = e;
        count++;
    }
    return count;
}

/* C75xx: ptxas serialized wgmma or ignored setmaxnreg; but C7519 says that it added a fence, which does no harm. */
const char *nbhd_jit_complaint(const char *log)
{
    static const char *const words[] = {"warning", "C75", "serializ"};
    const char *first = NULL;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        const char *at = strstr(log, words[i]);
        while (at && !strncmp(at, "C7519", 5))
            at = strstr(at + 5, words[i]);
        if (at && (!first || at < first))
            first = at;
    }
    while (first && first > log && first[-1] != '\n')
        first--;
    return first;
}
