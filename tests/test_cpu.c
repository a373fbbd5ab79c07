/* Every CPU row, under every cap of the instruction set, on every problem of case_lines and on random ones, in every
 * layout, against the oracle; the same bits for any number of threads. */
#include "case.h"
#include "core/kernel.h"
#include "cpu/fwd_plan.h"
#include "cpu/isa.h"
#include "cpu/peak.h"
#include "test.h"

static void check_case(const nbhd_desc *desc, const struct case_options *options)
{
    char line[NBHD_TEXT];
    struct case_result result;
    nbhd_desc_format(desc, line, sizeof line);
    const nbhd_status status = case_run(desc, options, &result);
    if (status == NBHD_ERROR_UNSUPPORTED)
        return; /* a refusal; that some row takes each problem is checked in check_planned */
    CHECK(result.ok, "nbhd check '%s' --kernel %s (seed %u, layout %d, threads %d): %s", line,
          options->kernel ? options->kernel : "any", options->seed, options->layout, options->threads, result.why);
}

/* NBHD_TEST_ROW=cpu.fwd_avx2 leaves it at that row; so does a build with an emulated one (CMakeLists.txt). */
static const char *only_row(void)
{
#ifdef TEST_EMULATED_ROW
    return TEST_EMULATED_ROW;
#else
    return getenv("NBHD_TEST_ROW");
#endif
}

static bool runs_here(const struct nbhd_kernel *kernel)
{
    const bool wanted = !only_row() || !strcmp(only_row(), kernel->name);
    return wanted && kernel->device == NBHD_DEVICE_CPU && nbhd_isa_available() & kernel->needs;
}

/* Rows for bfloat16 alone are given nothing else. */
static bool takes_floats(const struct nbhd_kernel *kernel)
{
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    nbhd_desc_parse(&desc, "d8 8");
    desc.pass = kernel->pass;
    const bool takes = nbhd_plan_create_with(&plan, &desc, NBHD_DEVICE_CPU, 0, kernel->name) == NBHD_OK;
    nbhd_plan_destroy(&plan);
    return takes;
}

static void check_row_on(const struct nbhd_kernel *kernel, const nbhd_desc *desc, unsigned seed)
{
    struct case_options options = {.kernel = kernel->name, .seed = seed, .repeats = 1};
    options.layout = (enum case_layout)(seed % 3);
    options.threads = 1 + (int)(seed % 4);
    options.no_lse = seed % 5 == 0;
    options.poison_key = seed % 4 == 1;
    options.large_values = seed % 7 == 3;
    options.dlse = seed % 2 == 0;
    check_case(desc, &options);
}

/* Tiles whose keys overlap, so many that the forward has them go through these together (take_tiles). */
static void check_bands(const struct nbhd_kernel *kernel, bool floats)
{
    static const char *const lines[] = {"fwd h2 d8 2000 w250 ec", "fwd h4 d8/12 1100 w300 bias extra=3",
                                        "fwd h4/2 d16 2100 w200 r2 et", "fwd h8 d8 40x44 w18x30 enc",
                                        "fwd h4 d16 10x12x20 w5x6x12 s1x2x1 ectn"};
    static const int dtypes[] = {NBHD_F32, NBHD_BF16};
    for (unsigned i = 0; i < 5; i++)
        for (int type = floats ? 0 : 1; type < 2; type++) {
            nbhd_desc desc;
            CHECK(!nbhd_desc_parse(&desc, lines[i]), "%s: %s", lines[i], nbhd_last_error());
            desc.dtype = dtypes[type];
            check_row_on(kernel, &desc, i);
        }
}

static void check_row(const struct nbhd_kernel *kernel)
{
    static const int dtypes[] = {NBHD_F32, NBHD_BF16, NBHD_F16, NBHD_F64};
    const bool floats = takes_floats(kernel);
    unsigned seed = 0;
    if (kernel->pass == NBHD_FORWARD && kernel->needs != NBHD_ISA_SCALAR && !test_few())
        check_bands(kernel, floats);
    const int every = test_few() ? 7 : 1;
    for (int i = 0; case_lines[i]; i++)
        for (int type = floats ? 0 : 1; type < (floats ? 4 : 2) && i % every == 0; type++) {
            nbhd_desc desc;
            if (!CHECK(!nbhd_desc_parse(&desc, case_lines[i]), "%s: %s", case_lines[i], nbhd_last_error()))
                continue;
            desc.pass = kernel->pass;
            desc.dtype = dtypes[type];
            for (int layout = 0; layout < 3; layout++)
                check_row_on(kernel, &desc, seed++);
        }
    const unsigned first = test_random_first(), end = first + test_random(150, 2500);
    for (unsigned i = first; i < end; i++) {
        nbhd_desc desc = case_random(i, 4e6);
        desc.pass = kernel->pass;
        desc.dtype = !floats ? NBHD_BF16 : dtypes[i % 7 < 4 ? 0 : i % 7 - 3];
        check_row_on(kernel, &desc, i);
    }
}

/* The vector kernels have two algorithms; each has to take all that it can, not only what the planner would give it. */
static void check_rows(void)
{
    int rows = 0;
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++)
        if (runs_here(k) && k->pass <= NBHD_BACKWARD) {
            const bool two = k->needs != NBHD_ISA_SCALAR;
            for (int variant = two ? NBHD_FWD_BROADCAST : -1; variant <= (two ? NBHD_FWD_PERMUTE : -1); variant++) {
                nbhd_fwd_force(variant);
                check_row(k);
            }
            nbhd_fwd_force(-1);
            rows++;
        }
    CHECK(rows > 0, "no CPU row ran");
}

/* With the machine capped to each instruction set, the planner still finds a row for every fused problem. */
static void check_planned(void)
{
    for (unsigned cap = NBHD_ISA_SCALAR; cap <= NBHD_ISA_NEON; cap <<= 1) {
        nbhd_isa_limit(cap * 2 - 1);
        for (int i = 0; case_lines[i]; i++) {
            nbhd_desc desc;
            struct case_result result;
            const struct case_options options = {.seed = (unsigned)i, .threads = 2};
            nbhd_desc_parse(&desc, case_lines[i]);
            desc.pass = i % 2 ? NBHD_FORWARD : NBHD_BACKWARD;
            const nbhd_status status = case_run(&desc, &options, &result);
            CHECK(!status && result.ok, "'%s' under cap %s: %s", case_lines[i], nbhd_isa_name(cap), result.why);
        }
    }
    nbhd_isa_limit(~0u);
}

static void check_choice(const char *line, const char *kernel)
{
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    nbhd_desc_parse(&desc, line);
    if (CHECK(!nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CPU, 0), "%s: %s", line, nbhd_last_error()))
        CHECK(!strcmp(nbhd_plan_kernel(plan), kernel), "'%s' gets %s, not %s", line, nbhd_plan_kernel(plan), kernel);
    nbhd_plan_destroy(&plan);
}

/* Large windows in bfloat16 go to the units for it, where they are faster; small ones, and other types, to float32
 * vectors. */
static void check_choices(void)
{
    const unsigned isa = nbhd_isa_available();
    if (!(isa & NBHD_ISA_AVX512))
        return;
#if defined(NBHD_NO_AMX)
    const bool tiles = false;
#else
    const bool tiles = isa & NBHD_ISA_AMX;
#endif
    const char *large = tiles                         ? "cpu.fwd_amx"
                        : nbhd_cpu_dots_speed() > 1.3 ? "cpu.fwd_avx512bf16"
                                                      : "cpu.fwd_avx512";
    const char *backward = tiles ? "cpu.bwd_amx" : "cpu.bwd_avx512";
    check_choice("fwd bf16 d128 2048", large);
    check_choice("fwd bf16 h2 d128 64x64 w32x32 s16x16", large);
    check_choice("fwd bf16 d32 56x56 w7x7", "cpu.fwd_avx512");
    check_choice("fwd f16 d128 2048", "cpu.fwd_avx512");
    check_choice("fwd f32 d128 2048", "cpu.fwd_avx512");
    check_choice("bwd bf16 d128 2048", backward);
    check_choice("bwd bf16 h2 d128 64x64 w32x32 s16x16", backward);
    check_choice("bwd bf16 h4 d64 32x32x32 w3x3x3", "cpu.bwd_avx512");
    check_choice("bwd f32 d128 2048", "cpu.bwd_avx512");
}

/* What the tests allow is little in each type: a bound as large as the values would let anything pass. */
static void check_bounds(void)
{
    static const double most[] = {[NBHD_F32] = 1e-4, [NBHD_F16] = 0.03, [NBHD_BF16] = 0.2, [NBHD_F64] = 1e-5};
    for (int dtype = NBHD_F32; dtype <= NBHD_F64; dtype++)
        for (int pass = NBHD_FORWARD; pass <= NBHD_AV_BACKWARD; pass++) {
            nbhd_desc desc;
            struct case_result result;
            const struct case_options options = {.threads = 1};
            nbhd_desc_parse(&desc, "h2 d16 12x13 w5x4");
            desc.pass = pass;
            desc.dtype = dtype;
            CHECK(!case_run(&desc, &options, &result) && result.ok, "%s, dtype %d: %s", result.kernel, dtype,
                  result.why);
            CHECK(result.allowed_error < most[dtype], "%s, dtype %d: of %s %g is allowed", result.kernel, dtype,
                  result.worst, result.allowed_error);
        }
}

static void check_thread_counts(void)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        if (!runs_here(k) || k->pass > NBHD_BACKWARD)
            continue;
        static const char *const lines[] = {"b2 h4/2 d32 19x23 w7x5", "h2 d64 300 w100 s10",
                                            "h3 d16 5x9x20 w3x3x5 ecnn", "b2 h4/2 d24/40 11x13 w5x4 s1x2 extra=3 bias",
                                            "h2 d32 3x23x40 w3x6x7 s1x2x1 epnp", "h4 d8 1100 w300 ec"};
        for (int i = 0; i < 6; i++) {
            unsigned long long bits = 0;
            for (int threads = 1; threads <= 7; threads += 2) {
                nbhd_desc desc;
                struct case_result result;
                const struct case_options options = {.kernel = k->name, .threads = threads};
                nbhd_desc_parse(&desc, lines[i]);
                desc.pass = k->pass;
                desc.dtype = takes_floats(k) ? NBHD_F32 : NBHD_BF16;
                if (case_run(&desc, &options, &result) == NBHD_ERROR_UNSUPPORTED)
                    break;
                CHECK(result.ok, "%s on '%s': %s", k->name, lines[i], result.why);
                CHECK(threads == 1 || bits == result.bits, "%s on '%s': %d threads give other bits", k->name, lines[i],
                      threads);
                bits = result.bits;
            }
        }
    }
}

/* A sequence of one head is a single row, and work for several threads. */
static void check_sequences(void)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        nbhd_desc desc;
        nbhd_plan *plan;
        nbhd_desc_parse(&desc, "d32 4000 w33 threads=3");
        desc.pass = k->pass;
        desc.dtype = !runs_here(k) || takes_floats(k) ? NBHD_F32 : NBHD_BF16;
        if (!runs_here(k) || nbhd_plan_create_with(&plan, &desc, NBHD_DEVICE_CPU, 0, k->name))
            continue;
        CHECK(strstr(nbhd_plan_describe(plan), "3 threads"), "%s on one sequence: %s", k->name,
              nbhd_plan_describe(plan));
        nbhd_plan_destroy(&plan);
    }
}

int main(void)
{
#ifdef TEST_EMULATED_ROW
    if (!(nbhd_isa_available() & TEST_EMULATED_NEEDS)) {
        test_skip("this machine cannot emulate " TEST_EMULATED_ROW);
        return test_done();
    }
    nbhd_isa_assume(~0u);
#endif
    check_rows();
    if (!only_row()) {
        check_planned();
        check_choices();
        check_bounds();
        check_sequences();
    }
    check_thread_counts();
    return test_done();
}
