/* Every CUDA row, for every generation of GPU, over a spread of problems, compiled by NVRTC without a GPU: it compiles,
 * without warnings, without spills, within the shared memory of the chip; the expected instructions are in the machine
 * code where a disassembler is at hand. Skipped where NVRTC is absent, unless NBHD_REQUIRE=nvrtc.
 * NBHD_TEST_KERNEL=text: only rows whose name contains it. */
#define _GNU_SOURCE
#include <sys/wait.h>
#include <unistd.h>
#include "case.h"
#include "core/kernel.h"
#include "cuda/cuda.h"
#include "sass.h"
#include "test.h"

static const int chips[] = {80, 89, 90, 100, 120};

/* What stands in the machine code of a row, by the end of its name: products; copies and loads that need no
 * registers. */
static const struct {
    const char *suffix;
    int dtype; /* -1: any but float64 */
    const char *instructions[4];
} expected[] = {
    {"_simt", -1, {"FFMA"}},
    {"_simt", NBHD_F64, {"DFMA"}},
    {"_sm80", NBHD_BF16, {"HMMA.16816.F32.BF16", "LDGSTS", "LDSM"}},
    {"_sm80", NBHD_F16, {"HMMA.16816.F32", "LDGSTS", "LDSM"}},
    {"_sm80", NBHD_F32, {"HMMA.1688.F32.TF32", "LDGSTS", "LDSM"}},
    {"_sm90", -1, {"HGMMA", "UTMALDG"}},
};
enum { EXPECTED = sizeof expected / sizeof *expected };

static const char *const lines[] = {
    "bf16 h4 d64 56x56 w7x7",
    "bf16 h8/2 d128 30x48x80 w18x24x24 s16x8x8",
    "f16 h2 d128 256x256 w80x80",
    "f32 h4 d32 56x56 w13x13 r2x2 ect extra=5",
    "bf16 d128 32768 w2048 s256",
    "f16 b2 h3 d80/48 9x40 w5x9 bias",
    "bf16 d256 64x64 w15x15",
    "bf16 h3/1 d8/256 45 w16 s11",
    "f32 d512/512 100 w30",
    "f32 d7/100 100 w30",
    "f64 d64 40x40 w7x7",
    "f64 d256/512 40x40 w7x7 bias",
    "bf16 h4 d96 20x20x20 w5x5x5 extra=100",
    "bf16 h4 d128 1000 kv=777",
    "bf16 h4 d16 12x20x20 w5x5x5 r1x2x2 eccc",
    "f32 h4 d64 56x56 w7x7 tf32",
    "f32 h8/2 d128 256x256 w80x80 s16x16 tf32",
    "f32 h2 d256/96 2000 w300 tf32 bias extra=9",
    "bf16 b4 h8 d64 112x112 w13x13 bias",
    "f16 h8/2 d64/128 64x64x8 w7x7x8 ennc", /* few registers: operands of dQ once were given away */
    "f16 h4 d128 40x40x8 w7x7x7 bias",
    "bf16 h4 d256 56x56 w9x9 bias scale=-1",
    "f16 h4/2 d256 16x44x80 w15x24x15",
    "bf16 h2 d136/200 40x50 w13x14 ecn extra=5",
    "bf16 h32 d32 8x90x180 w5x7x7 ennp",
    "f16 h4/2 d128 40x50 w13x14 epp bias extra=5",
    "bf16 h24 d128 30x48x80 w18x24x24", /* several shapes of query boxes: their choice once spilled */
};

struct seen {
    const char *kernel, *line;
    int chip, count;
    const struct nbhd_jit *last;
    const struct nbhd_cuda_machine *machine;
};

/* Registers that wgmma reads behind the thread's back. */
static void check_in_flight(const struct seen *s, const struct nbhd_jit *code)
{
    char why[NBHD_TEXT] = "";
    struct sass sass;
    if (s->chip == 90 && strstr(s->kernel, "_sm90") && sass_read(&sass, code->cubin, code->cubin_bytes)) {
        CHECK(!sass_overwrites(&sass, why, sizeof why), "%s '%s', %s: %s", s->kernel, s->line, code->name, why);
        sass_free(&sass);
    }
}

static void judge(const struct nbhd_jit *code, void *context)
{
    struct seen *s = context;
    struct nbhd_jit_entry entries[16];
    const int count = nbhd_jit_entries(code->log, entries, 16);
    const char *complaint = nbhd_jit_complaint(code->log);
    CHECK(count > 0 && count <= 16, "%s '%s' sm_%d: %d kernels in the log", s->kernel, s->line, s->chip, count);
    CHECK(!complaint, "%s '%s' sm_%d: %.200s", s->kernel, s->line, s->chip, complaint ? complaint : "");
    for (int i = 0; i < count && i < 16; i++) {
        CHECK(entries[i].spills == 0 && entries[i].stack == 0, "%s '%s' sm_%d: %s spills %d bytes, stack %d", s->kernel,
              s->line, s->chip, entries[i].name, entries[i].spills, entries[i].stack);
        CHECK(entries[i].registers > 0 && entries[i].shared <= 48 * 1024,
              "%s '%s' sm_%d: %s has %d registers, %d bytes", s->kernel, s->line, s->chip, entries[i].name,
              entries[i].registers, entries[i].shared);
        if (getenv("NBHD_TEST_VERBOSE"))
            printf("%-12s sm_%-4d %-20s %3d registers %6d shared  %5.0f ms  %s\n", s->kernel, s->chip, entries[i].name,
                   entries[i].registers, entries[i].shared, code->compile_ms, s->line);
    }
    check_in_flight(s, code);
    s->last = code;
    s->count++;
}

/* Of the last kernel file that the plan compiled. */
static void check_instructions(const struct nbhd_kernel *kernel, const struct seen *seen, int dtype)
{
    static bool told;
    for (size_t i = 0; i < EXPECTED; i++) {
        const size_t length = strlen(expected[i].suffix), name = strlen(kernel->name);
        if (name < length || strcmp(kernel->name + name - length, expected[i].suffix) ||
            (expected[i].dtype == -1 ? dtype == NBHD_F64 : dtype != expected[i].dtype))
            continue;
        struct sass sass;
        const bool readable = sass_read(&sass, seen->last->cubin, seen->last->cubin_bytes);
        if (!readable && !told) {
            test_skip("machine code is not looked at: nvdisasm is neither on PATH nor at $NBHD_NVDISASM");
            told = true;
        }
        for (int j = 0; j < 4 && expected[i].instructions[j] && readable; j++)
            CHECK(sass_has(&sass, expected[i].instructions[j]), "%s '%s' sm_%d has no %s", kernel->name, seen->line,
                  seen->chip, expected[i].instructions[j]);
        sass_free(&sass);
    }
}

/* A row that takes many sequences in one launch is compiled for that too. */
static void check_many(const struct nbhd_kernel *kernel, int chip)
{
    static const char *const many[] = {"bf16 h4/2 d64 9x9 w7x7", "f32 d32 9x9 w7x7 r1x1 ect extra=5",
                                       "f16 d128/96 5x6x7 w3x3x3", "bf16 d256 9x9 w5x5"};
    static const int lengths[] = {9, 9, 12, 30, 7, 8, 12, 9, 10};
    for (size_t i = 0; i < sizeof many / sizeof *many; i++) {
        nbhd_desc desc;
        nbhd_plan *plan;
        nbhd_ragged ragged = NBHD_RAGGED_INIT;
        struct seen seen = {.kernel = kernel->name, .line = many[i], .chip = chip};
        if (!CHECK(!nbhd_desc_parse(&desc, many[i]), "%s: %s", many[i], nbhd_last_error()) || (test_few() && i))
            continue;
        desc.pass = kernel->pass;
        for (int a = 0; a < 3; a++)
            desc.length[a] = 0;
        ragged.sequences = 3;
        ragged.lengths = lengths;
        nbhd_jit_observe(judge, &seen);
        const nbhd_status status = nbhd_plan_create_ragged(&plan, &desc, &ragged, NBHD_DEVICE_CUDA, 0, kernel->name);
        nbhd_jit_observe(NULL, NULL);
        CHECK(status == NBHD_ERROR_UNSUPPORTED || (!status && seen.count > 0), "%s '%s' ragged, sm_%d: %s",
              kernel->name, many[i], chip, status ? nbhd_last_error() : "no code");
        nbhd_plan_destroy(&plan);
    }
}

/* True if the row takes the problem. flags: of the plan. */
static bool check_build(const struct nbhd_kernel *kernel, const char *line, int chip, unsigned flags, unsigned *looked)
{
    nbhd_desc desc;
    nbhd_plan *plan;
    struct seen seen = {.kernel = kernel->name, .line = line, .chip = chip};
    if (!CHECK(!nbhd_desc_parse(&desc, line), "%s: %s", line, nbhd_last_error()))
        return false;
    desc.pass = kernel->pass;
    desc.extra = kernel->pass >= NBHD_QK ? 0 : desc.extra; /* unfused: scores are of windows only */
    nbhd_jit_observe(judge, &seen);
    const nbhd_status status = nbhd_plan_create_with(&plan, &desc, NBHD_DEVICE_CUDA, flags, kernel->name);
    nbhd_jit_observe(NULL, NULL);
    if (status == NBHD_ERROR_UNSUPPORTED)
        return false;
    CHECK(!status && seen.count > 0, "%s '%s' sm_%d: %s", kernel->name, line, chip,
          status ? nbhd_last_error() : "no code");
    if (!status && !(*looked >> desc.dtype & 1))
        check_instructions(kernel, &seen, desc.dtype);
    *looked |= 1u << desc.dtype;
    nbhd_plan_destroy(&plan);
    return !status;
}

/* Whether a problem is compiled for a chip without NBHD_FULL: all for kernels of Hopper, which fill its registers to
 * the last; of others some. */
static bool is_chosen(const struct nbhd_kernel *kernel, size_t line, size_t chip)
{
    const bool hopper = chips[chip] == 90;
    if (test_full() || (hopper && strstr(kernel->name, "_sm90") && !test_few()))
        return true;
    return (line + chip) % (test_few() ? 14 : hopper ? 3 : 7) == 0;
}

/* Compiles for every workers-th chip from worker on. Returns how many problems the row took. */
static int check_row(const struct nbhd_kernel *kernel, size_t worker, size_t workers)
{
    char why[NBHD_TEXT];
    const struct nbhd_nvrtc *nvrtc = nbhd_nvrtc(why);
    int taken = 0;
    for (size_t c = worker; c < sizeof chips / sizeof *chips; c += workers) {
        bool known = false;
        for (int i = 0; i < nvrtc->arch_count; i++)
            known |= nvrtc->archs[i] == chips[c];
        if (!known) {
            printf("note: NVRTC %d.%d does not compile for sm_%d\n", nvrtc->version / 100, nvrtc->version % 100,
                   chips[c]);
            continue;
        }
        CHECK(!nbhd_cuda_set_target(chips[c]), "%s", nbhd_last_error());
        if (kernel->pass <= NBHD_BACKWARD)
            check_many(kernel, chips[c]);
        unsigned looked = 0; /* one problem of each type per chip */
        for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
            if (is_chosen(kernel, i, c))
                if (check_build(kernel, lines[i], chips[c], 0, &looked)) {
                    taken++;
                    if (kernel->pass == NBHD_BACKWARD) /* may be other kernels */
                        CHECK(check_build(kernel, lines[i], chips[c], NBHD_PLAN_DETERMINISTIC, &looked),
                              "%s '%s' sm_%d: no deterministic plan", kernel->name, lines[i], chips[c]);
                }
    }
    nbhd_cuda_set_target(0);
    return taken;
}

static bool is_tested(const struct nbhd_kernel *k)
{
    const char *wanted = getenv("NBHD_TEST_KERNEL");
    return k->device == NBHD_DEVICE_CUDA && (!wanted || strstr(k->name, wanted));
}

/* What a process tells of its part. */
struct part {
    long passed, failed, skipped;
    int taken[64]; /* by row */
};

static struct part check_part(size_t worker, size_t workers)
{
    struct part part = {.passed = 0};
    int row = 0;
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++)
        if (is_tested(k) && row < 64)
            part.taken[row++] = check_row(k, worker, workers);
    part.passed = test_passed;
    part.failed = test_failed;
    part.skipped = test_skipped;
    return part;
}

/* A process for each processor, since NVRTC compiles one file at a time. */
static void check_rows(void)
{
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    const size_t all = sizeof chips / sizeof *chips;
    const size_t workers = processors < 2 ? 1 : (size_t)processors < all ? (size_t)processors : all;
    int ends[2];
    struct part sum = {.passed = 0};
    if (!CHECK(pipe(ends) == 0, "no pipe"))
        return;
    fflush(NULL);
    for (size_t worker = 0; worker < workers; worker++)
        if (fork() == 0) {
            test_passed = test_failed = test_skipped = 0;
            const struct part part = check_part(worker, workers);
            fflush(NULL);
            _exit(write(ends[1], &part, sizeof part) != sizeof part); /* less than PIPE_BUF: written at once */
        }
    close(ends[1]);
    size_t told = 0;
    for (struct part part; told < workers && read(ends[0], &part, sizeof part) == sizeof part; told++) {
        sum.passed += part.passed;
        sum.failed += part.failed;
        sum.skipped += part.skipped;
        for (int i = 0; i < 64; i++)
            sum.taken[i] += part.taken[i];
    }
    close(ends[0]);
    while (wait(NULL) > 0)
        ;
    CHECK(told == workers, "%zu of %zu processes ended well", told, workers);
    test_passed += sum.passed;
    test_failed += sum.failed;
    test_skipped += sum.skipped;
    int row = 0;
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++)
        if (is_tested(k) && row < 64)
            CHECK(sum.taken[row++] > 0 || test_few(), "%s took none of the problems", k->name);
}

/* A plan for another machine can be made and must not run. */
static void check_no_device(void)
{
    nbhd_desc desc;
    nbhd_plan *plan;
    nbhd_args args = NBHD_ARGS_INIT;
    _Alignas(64) float data[1024] = {0}, o[128]; /* also the workspace */
    nbhd_desc_parse(&desc, "fwd f32 d8 16 w3");
    nbhd_cuda_set_target(90);
    if (CHECK(!nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CUDA, 0), "%s", nbhd_last_error())) {
        args.q.data = args.k.data = args.v.data = data, args.o.data = o;
        CHECK(nbhd_execute(plan, &args, data, NULL) == NBHD_ERROR_DEVICE && strstr(nbhd_last_error(), "sm_90a"), "%s",
              nbhd_last_error());
        nbhd_plan_destroy(&plan);
    }
    CHECK(nbhd_cuda_set_target(42) == NBHD_ERROR_INVALID, "sm_42 was taken");
    nbhd_cuda_set_target(0);
}

/* The second kernel, for tensors that the first cannot read, is compiled unless the caller has none such. */
static void check_aligned(void)
{
    static const unsigned flags[] = {0, NBHD_PLAN_ALIGNED};
    nbhd_desc desc;
    nbhd_plan *plan;
    nbhd_desc_parse(&desc, "fwd bf16 d64 1024 w65");
    nbhd_cuda_set_target(90);
    for (int i = 0; i < 2; i++)
        if (CHECK(!nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CUDA, flags[i]), "%s", nbhd_last_error())) {
            CHECK(!strcmp(nbhd_plan_kernel(plan), "cuda.fwd_sm90") &&
                      (strstr(nbhd_plan_describe(plan), "unaligned tensors: cuda.fwd_sm80") == NULL) == i,
                  "%s %s with flags %u", nbhd_plan_kernel(plan), nbhd_plan_describe(plan), flags[i]);
            nbhd_plan_destroy(&plan);
        }
    nbhd_cuda_set_target(0);
}

int main(void)
{
    char why[NBHD_TEXT];
    const char *required = getenv("NBHD_REQUIRE");
    if (!nbhd_nvrtc(why)) {
        if (required && strstr(required, "nvrtc"))
            CHECK(false, "NBHD_REQUIRE=nvrtc: %s", why);
        else
            test_skip(why);
        return test_done();
    }
    check_rows();
    check_no_device();
    check_aligned();
    return test_done();
}
