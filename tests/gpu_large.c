/* Every CUDA row on a large GPU: large problems against the simt rows, the Hopper rows with their waits and arrivals
 * delayed by chance, tensors of over 2^31 elements, the time that a call costs its thread, and the table of benchmarks.
 * Run by scripts/gpu-check.
 *
 *     gpu_large [part]...   parts: large races offsets overhead compile bench
 *     NBHD_TEST_SHARE=file  processes given the same empty file share the problems of large, races and compile
 *     NBHD_AMPLIFIED=dir    the kernels' files for races, with NBHD_AMPLIFY defined (device/tma_sm90.cuh)
 *     NBHD_BENCH_LINES=file the problems of bench, and of compile, which fills the cache for it, one a line
 *     NBHD_BENCH_CSV=file   takes bench's table, each record as soon as it is there, after what stands in the file
 *     NBHD_BENCH_KERNEL=name times only that row; NBHD_BENCH_DETERMINISTIC=1 its deterministic plans */
#define _GNU_SOURCE
#include "case.h"
#include "gpu.h"

/* ---- large: every row against simt ---- */
static const char *const large_lines[] = {
    "bf16 h2 d128 30x48x80 w18x24x24", "bf16 h2 d128 30x48x80 w18x24x24 s16x8x8", "f16 h2 d128 256x256 w80x80",
    "bf16 h2 d128 32768 w2048 s256",   "bf16 b4 h4 d64 112x112 w13x13 r2x2",      "bf16 h2 d256 96x96 w31x31",
    "f32 h2 d64 64x200 w15x31 s1x4",   "f16 h8/2 d64/128 64x64x8 w7x7x8 ennc",    "bf16 h4 d96 5000 w1001 ec",
    "f32 h4/2 d128 96x96 w31x31 tf32", "bf16 h16 d48 8192",
    /* bwd_sm90 clears and converts sums of some heads while it works on others */
    "bf16 b3 h8/4 d64 3000 w1500 s3",  "f16 b2 h12 d128/64 80x80 w41x43",         "bf16 h10 d40 13x31x29 w9x21x15",
    "f16 b5 h12/4 d72 40x50 w30x31",   "bf16 b40 h2/1 d8 700 w300",              "bf16 b20 h3 d128 20x30x9 w9x9x9",
    /* and, with 132 multiprocessors, shares out the queries of the last wave's tiles */
    "bf16 h12/6 d128/72 6144",         "f16 h6 d128 6144 ec",                    "bf16 h25 d96/128 128x128 w40x40",
};

static void compare_with_simt(const struct nbhd_kernel *k, const char *line, unsigned flags)
{
    const bool backward = k->pass == NBHD_BACKWARD;
    struct problem p;
    nbhd_plan *plan = NULL, *simt = NULL;
    void *reference[TENSORS] = {NULL};
    const int first = backward ? DQ : O, last = backward ? DV : LSE;
    if (!open_problem(&p, line, k->pass) || (backward && !prepare_backward(&p)))
        goto done;
    p.flags = flags;
    if (!execute(&p, k->name, &plan))
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
        const int dtype = i == LSE ? NBHD_F32 : p.desc.dtype;
        const double worst = difference(reference[i], p.data[i], p.bytes[i], dtype, &largest);
        const double share = i == LSE ? 1e-3 : p.desc.dtype == NBHD_BF16 ? 2e-2 : 4e-3;
        CHECK(worst <= share * largest, "%s '%s': tensor %d differs from simt by %.3g (largest %.3g)", k->name, line, i,
              worst, largest);
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
        for (size_t i = 0; is_fused(k) && i < sizeof large_lines / sizeof *large_lines; i++)
            if (!strstr(k->name, "_simt")) {
                if (is_mine())
                    compare_with_simt(k, large_lines[i], 0);
                if (k->pass == NBHD_BACKWARD && is_mine())
                    compare_with_simt(k, large_lines[i], NBHD_PLAN_DETERMINISTIC);
            }
}

/* ---- races: the Hopper rows' bits do not depend on how fast a warp is ---- */
/* Tiles of all kinds of boxes, some for every multiprocessor; masks by columns and by bits; packed heads. */
static const char *const race_lines[] = {
    "f16 h8/2 d64/128 64x64x8 w7x7x8 ennc", "bf16 h4 d64 16x32x32 w3x5x5", "bf16 h8 d128 64x64 w13x13",
    "bf16 b2 h2/1 d128 4000 w300 s4 ec",    "bf16 h4 d256 56x56 w9x9",    "f16 h4 d96/40 12x20x20 w5x5x5 r1x2x2",
    "bf16 b2 h6 d128 4000 w2000",           "bf16 h6 d128 6144",
};

/* Executes often; all outputs must be those in `expected`, but for a dQ that is added up in any order. */
static void repeat_amplified(struct problem *p, const nbhd_plan *plan, const char *kernel, const char *line,
                             char *const expected[TENSORS])
{
    enum { TIMES = 20 };
    const int first = p->desc.pass == NBHD_BACKWARD ? DQ : O, last = p->desc.pass == NBHD_BACKWARD ? DV : LSE;
    for (int i = first; i <= last; i++) {
        const bool any_order = i == DQ && !(p->flags & NBHD_PLAN_DETERMINISTIC);
        char *got = malloc(p->bytes[i]);
        int others = 0;
        for (int time = 0; got && time < TIMES && !any_order; time++) {
            const nbhd_status status = nbhd_execute(plan, &p->args, p->workspace, NULL);
            others += status || !gpu_download(got, p->data[i], p->bytes[i]) ||
                      memcmp(got, expected[i], p->bytes[i]) != 0;
        }
        CHECK(got && !others, "%s '%s': tensor %d has other bits in %d of %d executions with delays", kernel, line, i,
              others, TIMES);
        free(got);
    }
}

static void check_races_of(const struct nbhd_kernel *k, const char *line, unsigned flags, const char *amplified)
{
    struct problem p;
    nbhd_plan *plan = NULL, *delayed = NULL;
    char *expected[TENSORS] = {NULL};
    if (!open_problem(&p, line, k->pass) || (k->pass == NBHD_BACKWARD && !prepare_backward(&p)))
        goto done;
    p.flags = flags;
    if (!execute(&p, k->name, &plan))
        goto done; /* a refusal */
    for (int i = O; i < TENSORS; i++)
        if (p.data[i] && (expected[i] = malloc(p.bytes[i])))
            gpu_download(expected[i], p.data[i], p.bytes[i]);
    setenv("NBHD_KERNEL_DIR", amplified, 1);
    if (CHECK(execute(&p, k->name, &delayed), "%s '%s': %s", k->name, line, nbhd_last_error()))
        repeat_amplified(&p, delayed, k->name, line, expected);
    compare_with_simt(k, line, flags);
    unsetenv("NBHD_KERNEL_DIR");
done:
    for (int i = 0; i < TENSORS; i++)
        free(expected[i]);
    nbhd_plan_destroy(&plan);
    nbhd_plan_destroy(&delayed);
    close_problem(&p);
}

static void check_races(void)
{
    const char *amplified = getenv("NBHD_AMPLIFIED");
    if (!amplified)
        test_skip("races: NBHD_AMPLIFIED names no kernels with delays");
    for (const struct nbhd_kernel *k = nbhd_kernels; amplified && k->name; k++)
        for (size_t i = 0; is_fused(k) && strstr(k->name, "_sm90") && i < sizeof race_lines / sizeof *race_lines; i++) {
            if (is_mine())
                check_races_of(k, race_lines[i], 0, amplified);
            if (k->pass == NBHD_BACKWARD && is_mine())
                check_races_of(k, race_lines[i], NBHD_PLAN_DETERMINISTIC, amplified);
        }
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
            nbhd_cu.cuMemcpyDtoDAsync_v2((uintptr_t)small.data[i],
                                         (uintptr_t)p.data[i] + (size_t)(length - tail) * part, (size_t)tail * part,
                                         NULL);
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
        CHECK(worst <= 1e-2 * largest && largest > 0, "%s: tensor %d past 2^31 elements is off by %.3g of %.3g",
              k->name, i, worst, largest);
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
        if (!is_fused(k))
            continue;
        if (free_bytes < (k->pass == NBHD_FORWARD ? 20ull << 30 : 42ull << 30))
            test_skip("the GPU's memory is too small for tensors of 2^31 elements");
        else
            check_offsets_of(k);
    }
}

/* ---- overhead: what a call costs the calling thread ---- */
static void measure_overhead(void)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        struct problem p;
        nbhd_plan *plan = NULL;
        if (!is_fused(k))
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

/* ---- bench ---- */
static double event_ms(struct CUevent_st *const event[2])
{
    float ms = NAN;
    nbhd_cu.cuEventSynchronize(event[1]);
    nbhd_cu.cuEventElapsedTime(&ms, event[0], event[1]);
    return (double)ms;
}

static double time_one(const nbhd_plan *plan, const struct problem *p, struct CUevent_st *const event[2])
{
    nbhd_cu.cuEventRecord(event[0], NULL);
    const nbhd_status status = nbhd_execute(plan, &p->args, p->workspace, NULL);
    nbhd_cu.cuEventRecord(event[1], NULL);
    return CHECK(!status, "%s", nbhd_last_error()) ? event_ms(event) : (double)NAN;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, by_value);
    return values[count / 2];
}

/* Burst: 0.25 s idle before each of 5 launches, so at the highest clock. Sustained: 10 back to back after 0.9 s of the
 * same, where the card's power limit sets the clock. Both are medians; the work counted is that of visible pairs.
 * False: the row does not take the problem. */
static bool bench_row(const struct nbhd_kernel *k, const char *line, FILE *csv)
{
    struct problem p;
    bool timed = false;
    nbhd_plan *plan = NULL;
    struct CUevent_st *event[2] = {NULL, NULL};
    double burst[5], sustained[10];
    char text[NBHD_TEXT];
    const double start = now_s();
    if (!open_problem(&p, line, k->pass) || (k->pass == NBHD_BACKWARD && !prepare_backward(&p)))
        goto done;
    p.flags = getenv("NBHD_BENCH_DETERMINISTIC") ? NBHD_PLAN_DETERMINISTIC : 0;
    if (!execute(&p, k->name, &plan))
        goto done; /* a refusal */
    nbhd_cu.cuEventCreate(&event[0], 0);
    nbhd_cu.cuEventCreate(&event[1], 0);
    const struct timespec idle = {0, 250000000};
    const int bursts = time_one(plan, &p, event) > 500 ? 1 : 5; /* slow kernels are not worth more */
    for (int i = 0; i < bursts; i++) {
        nanosleep(&idle, NULL);
        burst[i] = time_one(plan, &p, event);
    }
    const double begun = now_s();
    while (now_s() - begun < 0.9)
        time_one(plan, &p, event);
    const int runs = bursts == 1 ? 2 : 10;
    for (int i = 0; i < runs; i++)
        sustained[i] = time_one(plan, &p, event);
    const double b = median(burst, bursts), s = median(sustained, runs), tera = nbhd_desc_flops(&p.desc) * 1e-9;
    nbhd_desc_format(&p.desc, text, sizeof text);
    fprintf(csv, "\"%s\",%s%s,\"%s\",%.4f,%.4f,%.1f,%.1f\n", text, k->name, p.flags ? " deterministic" : "",
            nbhd_plan_describe(plan), b, s, tera / b, tera / s);
    fflush(csv);
    printf("%-58s %-16s burst %9.3f ms %6.1f  sustained %9.3f ms %6.1f TFLOP/s  (%.1f s)\n", text, k->name, b,
           tera / b, s, tera / s, now_s() - start);
    fflush(stdout);
    timed = true;
done:
    for (int i = 0; i < 2; i++)
        if (event[i])
            nbhd_cu.cuEventDestroy_v2(event[i]);
    nbhd_plan_destroy(&plan);
    close_problem(&p);
    return timed;
}

/* Plans what bench_row will, so that the code is in the cache. */
static bool compile_row(const struct nbhd_kernel *k, const char *line, FILE *csv)
{
    static const unsigned flags[] = {0, NBHD_PLAN_DETERMINISTIC};
    nbhd_plan *plan = NULL;
    nbhd_desc desc;
    bool taken = false;
    (void)csv;
    nbhd_desc_parse(&desc, line);
    for (int i = 0; i < (k->pass == NBHD_BACKWARD ? 2 : 1); i++) {
        taken = !nbhd_plan_create_with(&plan, &desc, NBHD_DEVICE_CUDA, flags[i], k->name);
        nbhd_plan_destroy(&plan);
    }
    desc.pass = NBHD_FORWARD; /* comes before a backward */
    if (k->pass == NBHD_BACKWARD && !nbhd_plan_create_with(&plan, &desc, NBHD_DEVICE_CUDA, 0, NULL))
        nbhd_plan_destroy(&plan);
    return taken;
}

/* Calls visit for the row that is the best for each line, or every row that takes it where the line's comment says
 * "every row", until it returns true for one; "simt" rows only on float32, where they are the fastest. Lines: of the
 * process's share. */
static void each_bench(bool (*visit)(const struct nbhd_kernel *k, const char *line, FILE *csv), FILE *csv)
{
    const char *lines = getenv("NBHD_BENCH_LINES"), *only = getenv("NBHD_BENCH_KERNEL");
    FILE *in = lines ? fopen(lines, "r") : NULL;
    char line[NBHD_TEXT];
    if (!in)
        test_skip("NBHD_BENCH_LINES names no file of problems");
    while (in && fgets(line, sizeof line, in)) {
        nbhd_desc desc;
        const bool every = strstr(line, "every row") != NULL;
        line[strcspn(line, "#\n")] = 0;
        if (!line[strspn(line, " \t")] || !is_mine() || !CHECK(!nbhd_desc_parse(&desc, line), "%s", nbhd_last_error()))
            continue;
        for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++)
            if (is_fused(k) && k->pass == desc.pass && (!only || !strcmp(k->name, only)) &&
                (desc.dtype == NBHD_F32 || !strstr(k->name, "_simt")) && visit(k, line, csv) && !every)
                break;
    }
    if (in)
        fclose(in);
}

static void compile_bench(void) { each_bench(compile_row, NULL); }

static void measure_bench(void)
{
    const char *table = getenv("NBHD_BENCH_CSV");
    FILE *csv = table ? fopen(table, "a") : NULL;
    each_bench(bench_row, csv ? csv : stdout);
    if (csv)
        fclose(csv);
}

static const struct gpu_part parts[] = {
    {"large", check_large},         {"races", check_races},     {"offsets", check_offsets},
    {"overhead", measure_overhead}, {"compile", compile_bench}, {"bench", measure_bench},
    {NULL, NULL},
};

int main(int argc, char **argv) { return gpu_main(parts, argc, argv); }
