/* What tests on a GPU share: device memory, whole problems on the device, and a main that runs the parts asked for.
 * Skipped without a GPU or NVRTC, unless NBHD_REQUIRE=cuda. A process that crashes or is ended names the problem at
 * hand. */
#ifndef NBHD_TESTS_GPU_H
#define NBHD_TESTS_GPU_H

#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include "case.h"
#include "core/kernel.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "test.h"

static struct nbhd_cuda_machine gpu_machine;

/* ---- work that processes share ---- */
static _Atomic long long *taken_pieces; /* in the file NBHD_TEST_SHARE: how many are taken */

static bool open_share(void)
{
    const char *path = getenv("NBHD_TEST_SHARE");
    if (!path)
        return true;
    const int file = open(path, O_RDWR | O_CREAT, 0644);
    void *memory = MAP_FAILED;
    if (file >= 0 && !ftruncate(file, sizeof *taken_pieces))
        memory = mmap(NULL, sizeof *taken_pieces, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file >= 0)
        close(file);
    taken_pieces = memory;
    return CHECK(memory != MAP_FAILED, "NBHD_TEST_SHARE: %s could not be mapped", path);
}

/* Whether the next piece of work is this process's: all are, unless it shares a file with others; then each takes the
 * next one that none has. A piece is known by how many calls came before, so all must make the same ones. */
static inline bool is_mine(void)
{
    static long long calls, mine = -1;
    if (!taken_pieces)
        return true;
    if (mine < calls)
        mine = atomic_fetch_add(taken_pieces, 1);
    return mine == calls++;
}

static char at_hand[2 * NBHD_TEXT];

static void set_at_hand(const char *kernel, const char *line)
{
    snprintf(at_hand, sizeof at_hand, "%s '%s'\n", kernel ? kernel : "any row", line);
}

static void name_at_hand(int number)
{
    static const char text[] = "FAILED: a signal ended this process, at or after ";
    ssize_t written = write(STDERR_FILENO, text, sizeof text - 1);
    written += write(STDERR_FILENO, at_hand, strlen(at_hand));
    (void)written;
    _exit(128 + number); /* raised again, it would come back: NVRTC catches signals too, while it compiles */
}

static void catch_signals(void)
{
    static const int numbers[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTERM};
    struct sigaction action = {.sa_handler = name_at_hand, .sa_flags = (int)SA_RESETHAND};
    set_at_hand("no row", "");
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        sigaction(numbers[i], &action, NULL);
}

/* ---- device memory ---- */

static void *gpu_alloc(size_t bytes)
{
    unsigned long long address = 0;
    return nbhd_cu.cuMemAlloc_v2(&address, bytes ? bytes : 1) ? NULL : (void *)(uintptr_t)address;
}

static void gpu_release(void *memory) { nbhd_cu.cuMemFree_v2((uintptr_t)memory); }

static bool gpu_upload(void *to, const void *from, size_t bytes)
{
    return !nbhd_cu.cuMemcpyHtoD_v2((uintptr_t)to, from, bytes);
}

static bool gpu_download(void *to, const void *from, size_t bytes)
{
    return !nbhd_cu.cuCtxSynchronize() && !nbhd_cu.cuMemcpyDtoH_v2(to, (uintptr_t)from, bytes);
}

static const struct case_memory gpu = {gpu_alloc, gpu_release, gpu_upload, gpu_download};

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The fused passes: what the whole problems here are made for. */
static bool is_fused(const struct nbhd_kernel *k) { return k->device == NBHD_DEVICE_CUDA && k->pass <= NBHD_BACKWARD; }

/* ---- whole problems on the device ---- */
enum { Q, K, V, O, LSE, DOUT, DQ, DK, DV, TENSORS };

struct problem {
    nbhd_desc desc;
    nbhd_args args;
    void *data[TENSORS], *workspace;
    size_t bytes[TENSORS];
    unsigned flags; /* of its plans */
};

static void close_problem(struct problem *p)
{
    for (int i = 0; i < TENSORS; i++)
        if (p->data[i])
            gpu_release(p->data[i]);
    if (p->workspace)
        gpu_release(p->workspace);
}

/* Random normal-like values; large tensors repeat a block of 4 MiB, of odd length so that rows differ. */
static bool fill(void *device, size_t bytes, int dtype, unsigned seed)
{
    const size_t block = bytes < (4u << 20) ? bytes : (4u << 20) - 8 * 1001, element = nbhd_dtype_size(dtype);
    char *host = malloc(block);
    unsigned long long state = seed * 0x9e3779b97f4a7c15u + 1;
    for (size_t i = 0; host && i < block / element; i++) {
        int sum = -510;
        for (int j = 0; j < 4; j++)
            sum += (int)((state = state * 6364136223846793005u + 1442695040888963407u) >> 56);
        nbhd_store(host, dtype, (long long)i, sum / 128.0);
    }
    bool ok = host && gpu_upload(device, host, block);
    const uintptr_t to = (uintptr_t)device;
    for (size_t at = block; ok && at < bytes; at *= 2) /* what is there, once more behind it */
        ok = !nbhd_cu.cuMemcpyDtoDAsync_v2(to + at, to, bytes - at < at ? bytes - at : at, NULL);
    free(host);
    return ok;
}

/* Allocates and fills every tensor of a contiguous problem; o and lse of a backward are computed by the named
 * forward. */
static bool open_problem(struct problem *p, const char *line, int pass)
{
    memset(p, 0, sizeof *p);
    p->args = (nbhd_args)NBHD_ARGS_INIT;
    struct nbhd_problem full;
    if (nbhd_desc_parse(&p->desc, line) || nbhd_problem_init(&full, &p->desc))
        return CHECK(false, "'%s': %s", line, nbhd_last_error());
    set_at_hand(nbhd_pass_name(pass), line);
    p->desc = full.desc;
    p->desc.pass = pass;
    const size_t element = nbhd_dtype_size(p->desc.dtype);
    size_t queries = (size_t)p->desc.batch, keys = queries;
    for (int i = 0; i < 3; i++) {
        queries *= (size_t)full.axis[i].length;
        keys *= (size_t)full.axis[i].keys;
    }
    const size_t q = queries * (size_t)p->desc.heads * (size_t)p->desc.head_dim * element;
    const size_t o = queries * (size_t)p->desc.heads * (size_t)p->desc.head_dim_v * element;
    const size_t k = keys * (size_t)p->desc.kv_heads * (size_t)p->desc.head_dim * element;
    const size_t v = keys * (size_t)p->desc.kv_heads * (size_t)p->desc.head_dim_v * element;
    const size_t sizes[TENSORS] = {q, k, v, o, queries * (size_t)p->desc.heads * 4, o, q, k, v};
    nbhd_tensor *const tensors[TENSORS] = {&p->args.q, &p->args.k, &p->args.v, &p->args.o, &p->args.lse,
                                           &p->args.dout, &p->args.dq, &p->args.dk, &p->args.dv};
    for (int i = 0; i < (pass == NBHD_FORWARD ? DOUT : TENSORS); i++) {
        p->bytes[i] = sizes[i];
        tensors[i]->data = p->data[i] = gpu_alloc(sizes[i]);
        if (!p->data[i] || ((i <= V || i == DOUT) && !fill(p->data[i], sizes[i], p->desc.dtype, (unsigned)i + 1)))
            return CHECK(false, "'%s': no device memory", line);
    }
    return true;
}

/* Plans with the row and executes once. */
static bool execute(struct problem *p, const char *kernel, nbhd_plan **plan)
{
    if (nbhd_plan_create_with(plan, &p->desc, NBHD_DEVICE_CUDA, p->flags, kernel))
        return false;
    const size_t bytes = nbhd_plan_workspace(*plan);
    if (p->workspace)
        gpu_release(p->workspace);
    p->workspace = bytes ? gpu_alloc(bytes) : NULL;
    return CHECK((!bytes || p->workspace) && !nbhd_execute(*plan, &p->args, p->workspace, NULL) &&
                     !nbhd_cu.cuCtxSynchronize(),
                 "%s: %s", nbhd_plan_kernel(*plan), nbhd_last_error());
}

static inline bool prepare_backward(struct problem *p)
{
    nbhd_plan *plan = NULL;
    p->desc.pass = NBHD_FORWARD;
    const bool ok = execute(p, NULL, &plan);
    nbhd_plan_destroy(&plan);
    p->desc.pass = NBHD_BACKWARD;
    return CHECK(ok, "the forward before it: %s", nbhd_last_error());
}

/* Largest difference of two device arrays, and the largest value; infinite where either is NaN. */
static inline double difference(const void *a, const void *b, size_t bytes, int dtype, double *largest)
{
    char *x = malloc(bytes), *y = malloc(bytes);
    double worst = 0;
    *largest = 0;
    if (!x || !y || !gpu_download(x, a, bytes) || !gpu_download(y, b, bytes))
        worst = INFINITY;
    for (size_t i = 0; worst < INFINITY && i < bytes / nbhd_dtype_size(dtype); i++) {
        const double u = nbhd_load(x, dtype, (long long)i), w = nbhd_load(y, dtype, (long long)i), d = fabs(u - w);
        worst = d == d ? fmax(worst, d) : INFINITY;
        *largest = fmax(*largest, fabs(w));
    }
    free(x);
    free(y);
    return worst;
}

/* ---- main ---- */
struct gpu_part {
    const char *name;
    void (*run)(void);
};

static bool gpu_wants(const char *name, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], name))
            return true;
    return argc < 2;
}

static int gpu_main(const struct gpu_part *parts, int argc, char **argv)
{
    char why[NBHD_TEXT];
    const char *required = getenv("NBHD_REQUIRE");
    catch_signals();
    if (!open_share())
        return test_done();
    const char *missing = nbhd_cuda_machine(&gpu_machine) ? nbhd_last_error() : nbhd_nvrtc(why) ? NULL : why;
    if (missing) {
        if (required && strstr(required, "cuda"))
            CHECK(false, "NBHD_REQUIRE=cuda: %s", missing);
        else
            test_skip(missing);
        return test_done();
    }
    nbhd_cu.cuCtxPushCurrent_v2(gpu_machine.context);
    for (; parts->name; parts++)
        if (gpu_wants(parts->name, argc, argv)) {
            const double start = now_s();
            parts->run();
            printf("%s: %.1f s, %ld passed, %ld failed so far\n", parts->name, now_s() - start, test_passed,
                   test_failed);
            fflush(stdout);
        }
    return test_done();
}

#endif
