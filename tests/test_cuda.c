/* Every CUDA row on a GPU against the oracle: the problems of case_lines and random ones, sequences, every legal
 * problem planned, the same bits every time, NaN. Skipped without a GPU, unless NBHD_REQUIRE=cuda. test_cuda_api.c has
 * what a caller may do with plans, gpu_large.c what takes a large GPU.
 *
 *     test_cuda [part]...   parts: rows random repeats ragged planned nan integers
 *     NBHD_TEST_SHARE=file  processes given the same empty file share the problems of rows, random, ragged and planned
 *     NBHD_TEST_RANDOM=n    random problems per row (150; 2500 with NBHD_FULL=1)
 *     NBHD_TEST_KERNEL=text rows, random, repeats and nan: only rows whose name has text in it */
#define _GNU_SOURCE
#include "batches.h"
#include "gpu.h"

/* ---- rows and random: against the oracle ---- */
/* Option `which` of a problem, below `count`. Mixed, so that none follows another, or the type: the seed modulo 4. */
static unsigned option(unsigned seed, int which, unsigned count)
{
    return ((seed + 1) * 2654435761u >> (4 + 4 * which)) % count;
}

/* Returns true if the row took the problem. */
static bool check_case(const char *kernel, const nbhd_desc *desc, unsigned seed)
{
    struct case_options options = {.kernel = kernel, .device = NBHD_DEVICE_CUDA, .seed = seed, .repeats = 1};
    struct case_result result;
    char line[NBHD_TEXT];
    options.memory = gpu;
    options.layout = (enum case_layout)option(seed, 0, 3);
    const bool odd = option(seed, 1, 2) && !(kernel && strstr(kernel, "_sm90")); /* sm90 reads aligned tensors only */
    options.granularity = odd ? 1 : 8;
    options.no_lse = option(seed, 2, 5) == 0;
    options.large_values = option(seed, 3, 7) == 0;
    options.dlse = option(seed, 4, 2);
    options.flags = option(seed, 5, 2) ? NBHD_PLAN_DETERMINISTIC : 0;
    nbhd_desc_format(desc, line, sizeof line);
    set_at_hand(kernel, line);
    const nbhd_status status = case_run(desc, &options, &result);
    if (status == NBHD_ERROR_UNSUPPORTED)
        return false;
    CHECK(result.ok, "nbhd check '%s' --device cuda --kernel %s (seed %u, layout %d): %s", line,
          kernel ? kernel : "any", seed, options.layout, result.why);
    return true;
}

static void set_pass(nbhd_desc *desc, int pass)
{
    desc->pass = pass;
    if (pass >= NBHD_QK)
        desc->extra = 0; /* scores are of windows only */
}

/* tf32: float32 whose products may be rounded. */
static const struct {
    int dtype, tf32;
} types[] = {{NBHD_F32, 0}, {NBHD_BF16, 0}, {NBHD_F16, 0}, {NBHD_F32, 1}, {NBHD_F64, 0}};
enum { TYPES = 5 };

static void set_type(nbhd_desc *desc, unsigned type)
{
    desc->dtype = types[type].dtype;
    desc->tf32 = types[type].tf32;
}

/* Rows to test. */
static bool is_wanted(const struct nbhd_kernel *k)
{
    const char *wanted = getenv("NBHD_TEST_KERNEL");
    return k->device == NBHD_DEVICE_CUDA && (!wanted || strstr(k->name, wanted));
}

/* Without tensor cores, tf32 changes nothing. */
static bool is_new(const struct nbhd_kernel *k, const nbhd_desc *desc)
{
    return !desc->tf32 || !strstr(k->name, "_simt");
}

static void check_rows(void)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        if (!is_wanted(k))
            continue;
        const double start = now_s();
        int taken = 0;
        for (int i = 0; case_lines[i]; i++)
            for (unsigned type = 0; type < TYPES; type++) {
                const unsigned seed = TYPES * (unsigned)i + type;
                nbhd_desc desc;
                if (!is_mine() || nbhd_desc_parse(&desc, case_lines[i]))
                    continue;
                set_pass(&desc, k->pass);
                set_type(&desc, type);
                if (is_new(k, &desc))
                    taken += check_case(k->name, &desc, seed * 7 + 1);
            }
        printf("rows %s: %d problems, %.1f s\n", k->name, taken, now_s() - start);
    }
}

/* simt takes every problem. For the tensor cores each is another kernel to compile, which is what takes the time: sm80
 * and sm90 have every second one, in turn; with NBHD_FULL, all. */
static bool is_turn(const struct nbhd_kernel *k, unsigned seed)
{
    const bool compiles = strstr(k->name, "_sm80") || strstr(k->name, "_sm90");
    return !compiles || test_full() || seed / TYPES % 2 == (strstr(k->name, "_sm90") != NULL);
}

/* Returns true if the row took the random problem. */
static bool check_seed(const struct nbhd_kernel *k, unsigned seed)
{
    nbhd_desc desc = case_random(seed, 4e6);
    set_pass(&desc, k->pass);
    set_type(&desc, seed % 9 < 8 ? seed % 4 : 4);
    return is_new(k, &desc) && check_case(k->name, &desc, seed);
}

static void check_random(void)
{
    static const unsigned found[] = {1487, 2481}; /* that once failed */
    const unsigned count = test_random(150, 2500);
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        if (!is_wanted(k))
            continue;
        const double start = now_s();
        int taken = 0;
        for (unsigned i = 0; i < count; i++)
            if (is_turn(k, i) && is_mine())
                taken += check_seed(k, i);
        for (unsigned i = 0; i < sizeof found / sizeof *found; i++)
            if (is_mine())
                taken += check_seed(k, found[i]);
        printf("random %s: %d problems, %.1f s\n", k->name, taken, now_s() - start);
    }
}

/* ---- ragged: every row, one by one and many to a launch, and the planner's choice ---- */
static bool check_batch(const char *kernel, const struct batch *b, const nbhd_desc *desc, unsigned seed)
{
    const bool odd = seed % 2 && !(kernel && strstr(kernel, "_sm90"));
    const struct case_options options = {
        .kernel = kernel, .device = NBHD_DEVICE_CUDA, .seed = seed, .repeats = 1, .memory = gpu,
        .layout = (enum case_layout)(seed % 3), .granularity = odd ? 1 : 8,
        .placement = (enum case_sequences)(seed / 3 % 3), .dlse = seed % 2 == 0, .no_lse = seed % 5 == 0,
    };
    struct case_result result;
    char text[NBHD_TEXT];
    if (batch_run(b, desc, &options, &result, text) == NBHD_ERROR_UNSUPPORTED && kernel)
        return false;
    CHECK(result.ok, "%s on %s (seed %u): %s", kernel ? kernel : result.kernel, text, seed, result.why);
    return true;
}

static void check_ragged_of(const char *kernel, int pass)
{
    const double start = now_s();
    const unsigned count = test_random(320, 2400) / 32; /* each other head_dim is another kernel to compile */
    int taken = 0;
    for (int i = 0; batches[i].sequences; i++)
        for (int j = 0; j < 3; j++) {
            nbhd_desc desc;
            if (!is_mine() || nbhd_desc_parse(&desc, batches[i].line))
                continue;
            desc.pass = pass;
            set_type(&desc, (unsigned)(i + j) % 4);
            if (pass < NBHD_QK || batch_unfused(&batches[i], &desc))
                taken += check_batch(kernel, &batches[i], &desc, (unsigned)(3 * i + j));
        }
    for (unsigned i = 0; i < count; i++) {
        if (!is_mine())
            continue;
        nbhd_desc desc = {.pass = pass, .dtype = types[i % 9 < 8 ? i % 3 : 4].dtype};
        const struct batch b = batch_random(i, &desc);
        if (desc.pass == pass)
            taken += check_batch(kernel, &b, &desc, i);
    }
    printf("ragged %s: %d problems, %.1f s\n", kernel ? kernel : "any", taken, now_s() - start);
}

static void check_ragged(void)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++)
        if (is_wanted(k))
            check_ragged_of(k->name, k->pass);
    check_ragged_of(NULL, NBHD_FORWARD);
    check_ragged_of(NULL, NBHD_BACKWARD);
}

/* ---- nan: a key and value of NaN reach those who see them, and at most who shares a tile with one who does ---- */
static void check_nan_in(const struct nbhd_kernel *k, const char *line, int type)
{
    enum { TILE = 256 }; /* the longest extent of any */
    nbhd_desc desc;
    char text[NBHD_TEXT];
    struct case_result result;
    if (!CHECK(!nbhd_desc_parse(&desc, line), "%s", nbhd_last_error()))
        return;
    set_pass(&desc, k->pass);
    set_type(&desc, (unsigned)type);
    /* A gradient of a key comes from queries that come from keys. */
    const int axis = desc.rank - 1, dilation = desc.dilation[axis] ? desc.dilation[axis] : 1;
    const int reach = 2 * (desc.window[axis] + TILE) * dilation;
    for (unsigned seed = 0; seed < 2 && is_new(k, &desc); seed++) {
        const struct case_options options = {.kernel = k->name, .device = NBHD_DEVICE_CUDA, .seed = seed,
                                             .poison_key = true, .poison_reach = reach, .memory = gpu};
        nbhd_desc_format(&desc, text, sizeof text);
        if (case_run(&desc, &options, &result) != NBHD_ERROR_UNSUPPORTED)
            CHECK(result.ok, "%s '%s', NaN in a key (seed %u): %s", k->name, text, seed, result.why);
    }
}

static void check_nan(void)
{
    static const char *const far[] = {"h2/1 d32 1300 w9", "d64 1400 w33 s4 ec", "h2 d16 2x1300 w2x5"};
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++)
        for (size_t i = 0; is_wanted(k) && k->pass <= NBHD_BACKWARD && i < sizeof far / sizeof *far; i++)
            check_nan_in(k, far[i], (int)(i + (size_t)k->pass) % 4);
}

/* Every legal problem is taken by some row. */
static void check_planned(void)
{
    for (int i = 0; case_lines[i]; i++)
        for (int pass = NBHD_FORWARD; pass <= NBHD_AV_BACKWARD; pass++) {
            nbhd_desc desc;
            if (!is_mine())
                continue;
            nbhd_desc_parse(&desc, case_lines[i]);
            set_pass(&desc, pass);
            set_type(&desc, (unsigned)i % TYPES);
            CHECK(check_case(NULL, &desc, (unsigned)i), "'%s': no row takes it", case_lines[i]);
        }
}

/* ---- repeats: a deterministic plan's bits, 100 times, after kernels that leave other values in shared memory ---- */
static const char *const repeat_lines[] = {
    "bwd bf16 h2 d128 8x9x10 w5x7x7", "bwd bf16 b2 h2 d64 24x24 w13x13",  "bwd f16 h2/1 d64/128 300 w101 ec extra=7",
    "bwd bf16 b4 h2 d32 16x16 w7x7",  "fwd bf16 h2 d128 10x18x20 w6x8x8", "fwd f16 b2 h2 d64 9x23 w5x7 extra=9",
    "fwd bf16 b3 h2/1 d72 10x7 w1x7 s1x3 r10x1 extra=33",
};

struct disturbance {
    struct problem problem;
    nbhd_plan *plan;
    int turn;
};

/* Fills shared memory with what varies from turn to turn: 3 to 3e9 in bfloat16. */
static void disturb(void *state)
{
    struct disturbance *d = state;
    const unsigned char value = (unsigned char)(0x40 + d->turn++ % 16);
    nbhd_cu.cuMemsetD8Async((uintptr_t)d->problem.data[Q], value, d->problem.bytes[Q], NULL);
    CHECK(!nbhd_execute(d->plan, &d->problem.args, d->problem.workspace, NULL), "%s", nbhd_last_error());
}

static void check_repeats(void)
{
    struct disturbance other = {.plan = NULL};
    const bool ready = open_problem(&other.problem, "fwd bf16 h8 d128 8192 w512", NBHD_FORWARD) &&
                       CHECK(execute(&other.problem, NULL, &other.plan), "%s", nbhd_last_error());
    for (const struct nbhd_kernel *k = nbhd_kernels; ready && k->name; k++)
        for (size_t i = 0; i < sizeof repeat_lines / sizeof *repeat_lines; i++) {
            struct case_options options = {
                .kernel = k->name, .device = NBHD_DEVICE_CUDA, .seed = (unsigned)i, .repeats = 100, .memory = gpu,
                .flags = NBHD_PLAN_DETERMINISTIC, .before = disturb, .state = &other,
            };
            struct case_result result;
            nbhd_desc desc;
            if (!is_fused(k) || !is_wanted(k) || !strstr(k->name, "_sm90") ||
                !CHECK(!nbhd_desc_parse(&desc, repeat_lines[i]), "%s", nbhd_last_error()) || desc.pass != k->pass ||
                case_run(&desc, &options, &result) == NBHD_ERROR_UNSUPPORTED)
                continue;
            CHECK(result.ok, "%s '%s': %s", k->name, repeat_lines[i], result.why);
        }
    nbhd_plan_destroy(&other.plan);
    close_problem(&other.problem);
}

/* ---- integers: a dQ that is added up in them, where one value is thirty times the others, or no number ---- */
static void check_integers_of(const struct nbhd_kernel *k, const char *line)
{
    struct problem p;
    nbhd_plan *plan = NULL, *exact = NULL;
    void *sums = NULL;
    double largest;
    if (!open_problem(&p, line, NBHD_BACKWARD))
        goto done;
    const size_t row = (size_t)p.desc.head_dim_v * 2;
    nbhd_cu.cuMemsetD8Async((uintptr_t)p.data[V] + p.bytes[V] / row / 2 * row, 0x42, row, NULL); /* 48.5 */
    if (!prepare_backward(&p) || !execute(&p, k->name, &plan))
        goto done;
    sums = gpu_alloc(p.bytes[DQ]);
    nbhd_cu.cuMemcpyDtoDAsync_v2((uintptr_t)sums, (uintptr_t)p.data[DQ], p.bytes[DQ], NULL);
    p.flags = NBHD_PLAN_DETERMINISTIC;
    if (!CHECK(execute(&p, k->name, &exact), "%s '%s': %s", k->name, line, nbhd_last_error()))
        goto done;
    double worst = difference(p.data[DQ], sums, p.bytes[DQ], p.desc.dtype, &largest);
    /* The plans' boxes may differ, and with them whether P is rounded; one unit of bfloat16 is up to 1/128. */
    CHECK(worst <= 1e-2 * largest, "%s '%s': dQ is off by %.3g of %.3g", k->name, line, worst, largest);
    nbhd_cu.cuMemsetD8Async((uintptr_t)p.data[K], 0xff, row, NULL); /* NaN */
    nbhd_plan_destroy(&exact);
    if (prepare_backward(&p) && execute(&p, k->name, &exact))
        CHECK(isinf(difference(p.data[DQ], sums, row, p.desc.dtype, &largest)), "%s '%s': dQ hides a NaN", k->name,
              line);
done:
    if (sums)
        gpu_release(sums);
    nbhd_plan_destroy(&plan);
    nbhd_plan_destroy(&exact);
    close_problem(&p);
}

static void check_integers(void)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++)
        if (!strcmp(k->name, "cuda.bwd_sm90")) {
            check_integers_of(k, "bf16 h16/8 d128 64x64 w48x48");
            check_integers_of(k, "bf16 b2 h2 d64 4000 w2000");
        }
}

static const struct gpu_part parts[] = {
    {"rows", check_rows}, {"random", check_random}, {"repeats", check_repeats}, {"planned", check_planned},
    {"nan", check_nan},   {"ragged", check_ragged}, {"integers", check_integers}, {NULL, NULL},
};

int main(int argc, char **argv) { return gpu_main(parts, argc, argv); }
