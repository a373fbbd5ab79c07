/* Every CUDA row on a GPU: against the oracle on the problems of case_lines and on random ones, every legal problem planned,
 * captured into a graph, from several threads and contexts at once. Skipped without a GPU, unless NBHD_REQUIRE=cuda.
 *
 *     test_cuda [part]...   parts: rows random planned graph threads contexts sentences, and on request only: large offsets overhead
 *     NBHD_TEST_SHARD=i/n   of rows and random, the i-th n-th part, so that n processes share the work
 *     NBHD_TEST_RANDOM=n    random problems per row (150; 2500 with NBHD_FULL=1) */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <time.h>
#include "case.h"
#include "core/kernel.h"
#include "cuda/cuda.h"
#include "test.h"

static int shard, shards = 1;
static struct nbhd_cuda_machine machine;

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

static bool has_reference(const struct nbhd_kernel *k) { return k->device == NBHD_DEVICE_CUDA && k->pass <= NBHD_BACKWARD; }

/* ---- rows and random: against the oracle ---- */
/* Returns true if the row took the problem. */
static bool check_case(const char *kernel, const nbhd_desc *desc, unsigned seed)
{
    struct case_options options = {.kernel = kernel, .device = NBHD_DEVICE_CUDA, .seed = seed, .repeats = 1, .memory = gpu};
    struct case_result result;
    char line[NBHD_TEXT];
    options.layout = (enum case_layout)(seed % 3);
    options.granularity = seed % 2 ? 1 : 8;
    options.no_lse = seed % 5 == 0;
    options.large_values = seed % 7 == 3;
    options.dlse = seed % 2 == 0;
    nbhd_desc_format(desc, line, sizeof line);
    const nbhd_status status = case_run(desc, &options, &result);
    if (status == NBHD_ERROR_UNSUPPORTED)
        return false;
    CHECK(result.ok, "nbhd check '%s' --device cuda --kernel %s (seed %u, layout %d): %s", line, kernel ? kernel : "any", seed,
          options.layout, result.why);
    return true;
}

static const int dtypes[] = {NBHD_F32, NBHD_BF16, NBHD_F16, NBHD_F64};

static void check_rows(void)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        if (!has_reference(k))
            continue;
        const double start = now_s();
        int taken = 0;
        for (int i = 0; case_lines[i]; i++)
            for (int type = 0; type < 4; type++) {
                const unsigned seed = (unsigned)(4 * i + type);
                nbhd_desc desc;
                if ((int)(seed % (unsigned)shards) != shard || nbhd_desc_parse(&desc, case_lines[i]))
                    continue;
                desc.pass = k->pass;
                desc.dtype = dtypes[type];
                taken += check_case(k->name, &desc, seed * 7 + 1);
            }
        printf("rows %s: %d problems, %.1f s\n", k->name, taken, now_s() - start);
    }
}

static void check_random(void)
{
    const char *wanted = getenv("NBHD_TEST_RANDOM");
    const unsigned count = wanted ? (unsigned)atoi(wanted) : test_full() ? 2500 : 150;
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        if (!has_reference(k))
            continue;
        const double start = now_s();
        int taken = 0;
        for (unsigned i = (unsigned)shard; i < count; i += (unsigned)shards) {
            nbhd_desc desc = case_random(i, 4e6);
            desc.pass = k->pass;
            desc.dtype = dtypes[i % 9 < 8 ? i % 9 % 3 : 3];
            taken += check_case(k->name, &desc, i);
        }
        printf("random %s: %d of %u problems, %.1f s\n", k->name, taken, count / (unsigned)shards, now_s() - start);
    }
}

/* Every legal problem is taken by some row. */
static void check_planned(void)
{
    for (int i = 0; case_lines[i]; i++)
        for (int pass = NBHD_FORWARD; pass <= NBHD_BACKWARD; pass++) {
            nbhd_desc desc;
            nbhd_desc_parse(&desc, case_lines[i]);
            desc.pass = pass;
            desc.dtype = dtypes[i % 4];
            CHECK(check_case(NULL, &desc, (unsigned)i), "'%s': no row takes it", case_lines[i]);
        }
}

/* ---- whole problems on the device ---- */
enum { Q, K, V, O, LSE, DOUT, DQ, DK, DV, TENSORS };

struct problem {
    nbhd_desc desc;
    nbhd_args args;
    void *data[TENSORS], *workspace;
    size_t bytes[TENSORS];
};

static void close_problem(struct problem *p)
{
    for (int i = 0; i < TENSORS; i++)
        if (p->data[i])
            gpu_release(p->data[i]);
    if (p->workspace)
        gpu_release(p->workspace);
}

/* Random normal-like values; large tensors repeat a block of 16 MiB, of odd length so that rows differ. */
static bool fill(void *device, size_t bytes, int dtype, unsigned seed)
{
    const size_t block = bytes < (16u << 20) ? bytes : (16u << 20) - 8 * 1001, element = nbhd_dtype_size(dtype);
    char *host = malloc(block);
    unsigned long long state = seed * 0x9e3779b97f4a7c15u + 1;
    for (size_t i = 0; host && i < block / element; i++) {
        int sum = -510;
        for (int j = 0; j < 4; j++)
            sum += (int)((state = state * 6364136223846793005u + 1442695040888963407u) >> 56);
        const float value = (float)sum / 128;
        unsigned bits;
        memcpy(&bits, &value, 4);
        const _Float16 half = (_Float16)value;
        const unsigned short upper = (unsigned short)(bits >> 16);
        const double wide = (double)value;
        memcpy(host + i * element, dtype == NBHD_F32 ? (const void *)&value : dtype == NBHD_F16 ? (const void *)&half
                                   : dtype == NBHD_BF16 ? (const void *)&upper : (const void *)&wide, element);
    }
    bool ok = host != NULL;
    for (size_t at = 0; ok && at < bytes; at += block)
        ok = gpu_upload((char *)device + at, host, bytes - at < block ? bytes - at : block);
    free(host);
    return ok;
}

/* Allocates and fills every tensor of a contiguous problem; o and lse of a backward are computed by the named forward. */
static bool open_problem(struct problem *p, const char *line, int pass)
{
    memset(p, 0, sizeof *p);
    p->args = (nbhd_args)NBHD_ARGS_INIT;
    struct nbhd_problem full;
    if (nbhd_desc_parse(&p->desc, line) || nbhd_problem_init(&full, &p->desc))
        return CHECK(false, "'%s': %s", line, nbhd_last_error());
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
    if (nbhd_plan_create_with(plan, &p->desc, NBHD_DEVICE_CUDA, 0, kernel))
        return false;
    const size_t bytes = nbhd_plan_workspace(*plan);
    if (p->workspace)
        gpu_release(p->workspace);
    p->workspace = bytes ? gpu_alloc(bytes) : NULL;
    return CHECK((!bytes || p->workspace) && !nbhd_execute(*plan, &p->args, p->workspace, NULL) &&
                     !nbhd_cu.cuCtxSynchronize(),
                 "%s: %s", kernel, nbhd_last_error());
}

static bool prepare_backward(struct problem *p)
{
    nbhd_plan *plan = NULL;
    p->desc.pass = NBHD_FORWARD;
    const bool ok = execute(p, NULL, &plan);
    nbhd_plan_destroy(&plan);
    p->desc.pass = NBHD_BACKWARD;
    return CHECK(ok, "the forward before it: %s", nbhd_last_error());
}

static double element_at(const char *data, int dtype, size_t i)
{
    if (dtype == NBHD_F64)
        return ((const double *)(const void *)data)[i];
    if (dtype == NBHD_F32)
        return (double)((const float *)(const void *)data)[i];
    if (dtype == NBHD_F16)
        return (double)((const _Float16 *)(const void *)data)[i];
    const unsigned bits = (unsigned)((const unsigned short *)(const void *)data)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return (double)value;
}

/* Largest difference of two device arrays, and the largest value; infinite where either is NaN. */
static double difference(const void *a, const void *b, size_t bytes, int dtype, double *largest)
{
    char *x = malloc(bytes), *y = malloc(bytes);
    double worst = 0;
    *largest = 0;
    if (!x || !y || !gpu_download(x, a, bytes) || !gpu_download(y, b, bytes))
        worst = INFINITY;
    for (size_t i = 0; worst < INFINITY && i < bytes / nbhd_dtype_size(dtype); i++) {
        const double u = element_at(x, dtype, i), w = element_at(y, dtype, i), d = fabs(u - w);
        worst = d == d ? fmax(worst, d) : INFINITY;
        *largest = fmax(*largest, fabs(w));
    }
    free(x);
    free(y);
    return worst;
}

/* ---- large: every row against simt ---- */
static const char *const large_lines[] = {
    "bf16 h2 d128 30x48x80 w18x24x24",           "bf16 h2 d128 30x48x80 w18x24x24 s16x8x8", "f16 h2 d128 256x256 w80x80",
    "bf16 h2 d128 32768 w2048 s256",             "bf16 b4 h4 d64 112x112 w13x13 r2x2",      "f16 h8/2 d64/128 64x64x8 w7x7x8 ennc",
    "f32 h2 d64 64x200 w15x31 s1x4",             "bf16 h4 d96 5000 w1001 ec",               "bf16 h2 d256 96x96 w31x31",
};

static void compare_with_simt(const struct nbhd_kernel *k, const char *line)
{
    const bool backward = k->pass == NBHD_BACKWARD;
    struct problem p;
    nbhd_plan *plan = NULL, *simt = NULL;
    void *reference[TENSORS] = {NULL};
    const int first = backward ? DQ : O, last = backward ? DV : LSE;
    if (!open_problem(&p, line, k->pass) || (backward && !prepare_backward(&p)) || !execute(&p, k->name, &plan))
        goto done; /* a refusal */
    for (int i = first; i <= last; i++) {
        reference[i] = p.data[i];
        p.data[i] = gpu_alloc(p.bytes[i]);
    }
    nbhd_tensor *const tensors[TENSORS] = {[O] = &p.args.o, [LSE] = &p.args.lse, [DQ] = &p.args.dq, [DK] = &p.args.dk,
                                           [DV] = &p.args.dv};
    for (int i = first; i <= last; i++)
        tensors[i]->data = p.data[i];
    if (!CHECK(execute(&p, backward ? "cuda.bwd_simt" : "cuda.fwd_simt", &simt), "simt refused '%s': %s", line,
               nbhd_last_error()))
        goto done;
    for (int i = first; i <= last; i++) {
        double largest;
        const double worst = difference(reference[i], p.data[i], p.bytes[i], i == LSE ? NBHD_F32 : p.desc.dtype, &largest);
        const double share = i == LSE ? 1e-3 : p.desc.dtype == NBHD_BF16 ? 2e-2 : 4e-3;
        CHECK(worst <= share * largest, "%s '%s': tensor %d differs from simt by %.3g (largest %.3g)", k->name, line, i, worst,
              largest);
    }
    printf("large %s '%s': compared\n", k->name, line);
done:
    for (int i = 0; i < TENSORS; i++)
        if (reference[i])
            gpu_release(reference[i]);
    nbhd_plan_destroy(&plan);
    nbhd_plan_destroy(&simt);
    close_problem(&p);
}

static void check_large(void)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++)
        for (size_t i = 0; has_reference(k) && i < sizeof large_lines / sizeof *large_lines; i++)
            if (!strstr(k->name, "_simt"))
                compare_with_simt(k, large_lines[i]);
}

/* ---- offsets: tensors of over 2^31 elements ---- */
/* The last tokens' results do not depend on how many come before: they must equal those of the tail alone. */
static void check_offsets_of(const struct nbhd_kernel *k)
{
    const int tail = 8192, heads = 8, dim = 64, length = 4259840; /* 2.18e9 elements a tensor */
    const size_t row = (size_t)heads * (size_t)dim * 2;
    char line[NBHD_TEXT];
    struct problem p, small;
    nbhd_plan *plan = NULL, *small_plan = NULL;
    memset(&small, 0, sizeof small);
    snprintf(line, sizeof line, "bf16 h%d d%d %d w64", heads, dim, length);
    const double start = now_s();
    if (!open_problem(&p, line, k->pass) || (k->pass == NBHD_BACKWARD && !prepare_backward(&p)) ||
        !execute(&p, k->name, &plan))
        goto done;
    snprintf(line, sizeof line, "bf16 h%d d%d %d w64", heads, dim, tail);
    if (!open_problem(&small, line, k->pass))
        goto done;
    for (int i = Q; i <= DOUT; i++) { /* the tail of every input; o and lse are inputs of the backward */
        const size_t part = i == LSE ? (size_t)heads * 4 : row;
        if (small.data[i] && (i <= V || k->pass == NBHD_BACKWARD))
            nbhd_cu.cuMemcpyDtoDAsync_v2((uintptr_t)small.data[i], (uintptr_t)p.data[i] + (size_t)(length - tail) * part,
                                         (size_t)tail * part, NULL);
    }
    if (!execute(&small, k->name, &small_plan))
        goto done;
    for (int i = O; i < TENSORS; i++) {
        if (i == LSE || i == DOUT || !p.data[i] || (i == O && k->pass == NBHD_BACKWARD))
            continue;
        double largest;
        const size_t skip = (size_t)tail / 2 * row;
        const double worst = difference((char *)p.data[i] + (size_t)(length - tail) * row + skip,
                                        (char *)small.data[i] + skip, (size_t)tail / 2 * row, NBHD_BF16, &largest);
        CHECK(worst <= 1e-2 * largest && largest > 0, "%s: tensor %d past 2^31 elements is off by %.3g of %.3g", k->name, i,
              worst, largest);
    }
    printf("offsets %s: compared, %.1f s\n", k->name, now_s() - start);
done:
    nbhd_plan_destroy(&plan);
    nbhd_plan_destroy(&small_plan);
    close_problem(&p);
    close_problem(&small);
}

static void check_offsets(void)
{
    size_t free_bytes = 0, total = 0;
    nbhd_cu.cuMemGetInfo_v2(&free_bytes, &total);
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        if (!has_reference(k))
            continue;
        if (free_bytes < (k->pass == NBHD_FORWARD ? 20ull << 30 : 42ull << 30))
            test_skip("the GPU's memory is too small for tensors of 2^31 elements");
        else
            check_offsets_of(k);
    }
}

/* ---- graph ---- */
static void check_graph_of(const struct nbhd_kernel *k, const char *line)
{
    struct problem p;
    nbhd_plan *plan = NULL;
    struct CUstream_st *stream = NULL;
    struct CUgraph_st *graph = NULL;
    struct CUgraphExec_st *exec = NULL;
    const int output = k->pass == NBHD_FORWARD ? O : DK;
    void *direct = NULL;
    double largest;
    if (!open_problem(&p, line, k->pass) || (k->pass == NBHD_BACKWARD && !prepare_backward(&p)) ||
        !execute(&p, k->name, &plan))
        goto done;
    direct = gpu_alloc(p.bytes[output]);
    nbhd_cu.cuMemcpyDtoDAsync_v2((uintptr_t)direct, (uintptr_t)p.data[output], p.bytes[output], NULL);
    nbhd_cu.cuMemsetD8Async((uintptr_t)p.data[output], 0xff, p.bytes[output], NULL);
    nbhd_cu.cuCtxSynchronize();
    nbhd_cu.cuStreamCreate(&stream, NBHD_CU_STREAM_NON_BLOCKING);
    enum { GLOBAL = 0 }; /* the strictest mode: any call that could wait makes the capture fail */
    CHECK(!nbhd_cu.cuStreamBeginCapture_v2(stream, GLOBAL), "capture");
    CHECK(!nbhd_execute(plan, &p.args, p.workspace, stream), "%s in a capture: %s", k->name, nbhd_last_error());
    CHECK(!nbhd_cu.cuStreamEndCapture(stream, &graph) && graph, "%s: the capture failed", k->name);
    CHECK(!nbhd_cu.cuGraphInstantiateWithFlags(&exec, graph, 0), "%s: the graph could not be made", k->name);
    for (int i = 0; i < 2; i++)
        CHECK(exec && !nbhd_cu.cuGraphLaunch(exec, stream) && !nbhd_cu.cuStreamSynchronize(stream), "%s: launch", k->name);
    CHECK(difference(direct, p.data[output], p.bytes[output], p.desc.dtype, &largest) == 0, "%s '%s': a graph gives other bits",
          k->name, line);
done:
    if (exec)
        nbhd_cu.cuGraphExecDestroy(exec);
    if (graph)
        nbhd_cu.cuGraphDestroy(graph);
    if (stream)
        nbhd_cu.cuStreamDestroy_v2(stream);
    if (direct)
        gpu_release(direct);
    nbhd_plan_destroy(&plan);
    close_problem(&p);
}

static void check_graph(void)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++)
        if (has_reference(k))
            check_graph_of(k, "bf16 h4/2 d64 40x40 w7x7");
}

/* ---- threads: one plan, several streams at once ---- */
struct job {
    const nbhd_plan *plan;
    const struct problem *shared;
    void *output, *workspace;
    bool ok;
};

static void *work(void *context)
{
    struct job *job = context;
    struct CUstream_st *stream = NULL;
    nbhd_args args = job->shared->args;
    args.o.data = job->output;
    args.lse.data = NULL;
    job->ok = !nbhd_cu.cuCtxPushCurrent_v2(machine.context) && !nbhd_cu.cuStreamCreate(&stream, NBHD_CU_STREAM_NON_BLOCKING);
    for (int i = 0; job->ok && i < 50; i++)
        job->ok = !nbhd_execute(job->plan, &args, job->workspace, stream);
    job->ok = job->ok && !nbhd_cu.cuStreamSynchronize(stream);
    if (stream)
        nbhd_cu.cuStreamDestroy_v2(stream);
    return NULL;
}

static void check_threads(void)
{
    struct problem p;
    nbhd_plan *plan = NULL;
    pthread_t threads[8];
    struct job jobs[8];
    double largest;
    if (open_problem(&p, "bf16 h4/2 d64 40x40 w7x7", NBHD_FORWARD) && execute(&p, NULL, &plan)) {
        for (int i = 0; i < 8; i++) {
            const size_t bytes = nbhd_plan_workspace(plan);
            jobs[i] = (struct job){plan, &p, gpu_alloc(p.bytes[O]), bytes ? gpu_alloc(bytes) : NULL, false};
            pthread_create(&threads[i], NULL, work, &jobs[i]);
        }
        for (int i = 0; i < 8; i++) {
            pthread_join(threads[i], NULL);
            CHECK(jobs[i].ok && difference(p.data[O], jobs[i].output, p.bytes[O], NBHD_BF16, &largest) == 0,
                  "thread %d has another result", i);
            gpu_release(jobs[i].output);
            if (jobs[i].workspace)
                gpu_release(jobs[i].workspace);
        }
    }
    nbhd_plan_destroy(&plan);
    close_problem(&p);
}

/* ---- contexts: a plan belongs to the one that was current when it was made ---- */
static void check_contexts(void)
{
    unsigned (*create)(struct CUctx_st **, unsigned, int) = NULL;
    unsigned (*destroy)(struct CUctx_st *) = NULL;
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    void *symbols[] = {dlsym(library, "cuCtxCreate_v2"), dlsym(library, "cuCtxDestroy_v2")};
    memcpy(&create, &symbols[0], sizeof create);
    memcpy(&destroy, &symbols[1], sizeof destroy);
    struct CUctx_st *other = NULL, *popped;
    struct problem first, second;
    nbhd_plan *first_plan = NULL, *second_plan = NULL;
    const char *line = "f32 h2 d32 50 w9";
    if (!CHECK(!create(&other, 0, machine.device), "a second context could not be made"))
        return;
    /* other is current now */
    if (open_problem(&second, line, NBHD_FORWARD) && execute(&second, NULL, &second_plan)) {
        nbhd_cu.cuCtxPopCurrent_v2(&popped);
        double largest;
        if (open_problem(&first, line, NBHD_FORWARD) && execute(&first, NULL, &first_plan)) {
            nbhd_cu.cuMemsetD8Async((uintptr_t)first.data[O], 0xff, first.bytes[O], NULL);
            nbhd_cu.cuCtxSynchronize();
            nbhd_cu.cuCtxPushCurrent_v2(other);
            CHECK(!nbhd_execute(first_plan, &first.args, first.workspace, NULL), "%s", nbhd_last_error());
            nbhd_cu.cuCtxPopCurrent_v2(&popped);
            nbhd_cu.cuCtxSynchronize();
            CHECK(difference(first.data[O], second.data[O], first.bytes[O], NBHD_F32, &largest) == 0,
                  "two contexts give two results");
        }
        nbhd_plan_destroy(&first_plan);
        close_problem(&first);
        nbhd_cu.cuCtxPushCurrent_v2(other);
    }
    close_problem(&second);
    destroy(other);
    nbhd_plan_destroy(&second_plan); /* after its context: nothing is left to unload */
    CHECK(!nbhd_cu.cuCtxSynchronize(), "the first context is hurt");
}

/* ---- sentences ---- */
static void check_sentences(void)
{
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    nbhd_desc_parse(&desc, "fwd f32 d33 16 w3");
    const char *directory = getenv("NBHD_CACHE_DIR");
    char *kept = directory ? strdup(directory) : NULL;
    setenv("NBHD_CACHE_DIR", "/nonexistent/nbhd", 1);
    CHECK(nbhd_plan_create_with(&plan, &desc, NBHD_DEVICE_CUDA, NBHD_PLAN_NO_JIT, "cuda.fwd_simt") == NBHD_OK ||
              strstr(nbhd_last_error(), "NBHD_PLAN_NO_JIT"),
          "%s", nbhd_last_error());
    nbhd_plan_destroy(&plan);
    if (kept)
        setenv("NBHD_CACHE_DIR", kept, 1);
    else
        unsetenv("NBHD_CACHE_DIR");
    free(kept);
}

/* ---- overhead: what a call costs the calling thread ---- */
static void measure_overhead(void)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        struct problem p;
        nbhd_plan *plan = NULL;
        if (!has_reference(k))
            continue;
        if (open_problem(&p, "bf16 d64 8x16 w3x3", k->pass) && (k->pass == NBHD_FORWARD || prepare_backward(&p)) &&
            execute(&p, k->name, &plan)) {
            double best = 1e9;
            for (int round = 0; round < 20; round++) {
                const double start = now_s();
                for (int i = 0; i < 100; i++)
                    nbhd_execute(plan, &p.args, p.workspace, NULL);
                best = fmin(best, (now_s() - start) / 100);
                nbhd_cu.cuCtxSynchronize();
            }
            printf("overhead %s: %.2f us a call\n", k->name, best * 1e6);
            CHECK(best < 30e-6, "%s: a call takes %.1f us", k->name, best * 1e6);
        }
        nbhd_plan_destroy(&plan);
        close_problem(&p);
    }
}

static const struct {
    const char *name;
    void (*run)(void);
    bool always;
} parts[] = {
    {"rows", check_rows, true},       {"random", check_random, true},     {"planned", check_planned, true},
    {"graph", check_graph, true},     {"threads", check_threads, true},   {"contexts", check_contexts, true},
    {"sentences", check_sentences, true}, {"large", check_large, false},  {"offsets", check_offsets, false},
    {"overhead", measure_overhead, false},
};

static bool wanted(const char *name, bool always, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], name))
            return true;
    return argc < 2 && always;
}

int main(int argc, char **argv)
{
    char why[NBHD_TEXT];
    const char *required = getenv("NBHD_REQUIRE"), *part = getenv("NBHD_TEST_SHARD");
    if (part)
        sscanf(part, "%d/%d", &shard, &shards);
    const char *missing = nbhd_cuda_machine(&machine) ? nbhd_last_error() : nbhd_nvrtc(why) ? NULL : why;
    if (missing) {
        if (required && strstr(required, "cuda"))
            CHECK(false, "NBHD_REQUIRE=cuda: %s", missing);
        else
            test_skip(missing);
        return test_done();
    }
    nbhd_cu.cuCtxPushCurrent_v2(machine.context);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (wanted(parts[i].name, parts[i].always, argc, argv)) {
            const double start = now_s();
            parts[i].run();
            printf("%s: %.1f s, %ld passed, %ld failed so far\n", parts[i].name, now_s() - start, test_passed, test_failed);
            fflush(stdout);
        }
    return test_done();
}
