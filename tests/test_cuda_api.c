/* What a caller may do with plans on a GPU: captured into a graph, executed from several threads and contexts at once,
 * refused in a sentence. Skipped without a GPU, unless NBHD_REQUIRE=cuda.
 *
 *     test_cuda_api [part]...   parts: graph threads contexts sentences */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include "gpu.h"

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
        CHECK(exec && !nbhd_cu.cuGraphLaunch(exec, stream) && !nbhd_cu.cuStreamSynchronize(stream), "%s: launch",
              k->name);
    CHECK(difference(direct, p.data[output], p.bytes[output], p.desc.dtype, &largest) == 0,
          "%s '%s': a graph gives other bits", k->name, line);
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
        if (is_fused(k))
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
    job->ok = !nbhd_cu.cuCtxPushCurrent_v2(gpu_machine.context) &&
              !nbhd_cu.cuStreamCreate(&stream, NBHD_CU_STREAM_NON_BLOCKING);
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
    if (!CHECK(!create(&other, 0, gpu_machine.device), "a second context could not be made"))
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
    nbhd_plan_destroy(&second_plan);
    close_problem(&second);
    destroy(other);
    CHECK(!nbhd_cu.cuCtxSynchronize(), "the first context is hurt");
}

/* ---- sentences ---- */
/* A plan for aligned tensors refuses others, in a sentence; without the flag some row takes them. */
static void check_unaligned(unsigned flags, nbhd_status expected)
{
    struct problem p;
    nbhd_plan *plan = NULL;
    if (open_problem(&p, "bf16 b2 h2 d64 40x40 w7x7", NBHD_FORWARD)) {
        p.desc.batch = 1; /* leaves room behind */
        p.flags = flags;
        if (CHECK(execute(&p, NULL, &plan), "%s", nbhd_last_error()) && strstr(nbhd_plan_kernel(plan), "_sm90")) {
            p.args.q.data = (char *)p.data[Q] + 2;
            const nbhd_status status = nbhd_execute(plan, &p.args, p.workspace, NULL);
            CHECK(status == expected && (!status || strstr(nbhd_last_error(), "aligned to 16")), "status %d: %s",
                  status, nbhd_last_error());
            nbhd_cu.cuCtxSynchronize();
        }
    }
    nbhd_plan_destroy(&plan);
    close_problem(&p);
}

static void check_sentences(void)
{
    check_unaligned(0, NBHD_OK);
    check_unaligned(NBHD_PLAN_ALIGNED, NBHD_ERROR_UNSUPPORTED);
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    nbhd_desc_parse(&desc, "fwd f32 d33 16 w3");
    const char *directory = getenv("NBHD_CACHE_DIR");
    char *kept = directory ? strdup(directory) : NULL;
    setenv("NBHD_CACHE_DIR", "/dev/null/nbhd", 1);
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

static const struct gpu_part parts[] = {
    {"graph", check_graph},         {"threads", check_threads}, {"contexts", check_contexts},
    {"sentences", check_sentences}, {NULL, NULL},
};

int main(int argc, char **argv) { return gpu_main(parts, argc, argv); }
