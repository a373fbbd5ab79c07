/* The unfused passes: every CPU row on every problem of case_lines without extra keys and on random ones, in every
 * dtype and layout, against the oracle; the same bits for any number of threads; and that qk, a softmax and av make the
 * forward. */
#include <math.h>
#include "case.h"
#include "core/kernel.h"
#include "cpu/isa.h"
#include "test.h"

static bool runs_here(const struct nbhd_kernel *kernel)
{
    return kernel->device == NBHD_DEVICE_CPU && kernel->pass >= NBHD_QK && nbhd_isa_available() & kernel->needs;
}

static void check_row_on(const struct nbhd_kernel *kernel, const nbhd_desc *desc, unsigned seed)
{
    char line[NBHD_TEXT];
    struct case_result result;
    struct case_options options = {.kernel = kernel->name, .seed = seed, .repeats = 1};
    options.layout = (enum case_layout)(seed % 3);
    options.threads = 1 + (int)(seed % 4);
    options.poison_key = seed % 4 == 1;
    nbhd_desc_format(desc, line, sizeof line);
    if (case_run(desc, &options, &result) == NBHD_ERROR_UNSUPPORTED)
        return;
    CHECK(result.ok, "nbhd check '%s' --kernel %s (seed %u, layout %d, threads %d): %s", line, kernel->name, seed,
          (int)options.layout, options.threads, result.why);
}

static void check_row(const struct nbhd_kernel *kernel)
{
    static const int dtypes[] = {NBHD_F32, NBHD_BF16, NBHD_F16, NBHD_F64};
    unsigned seed = 0;
    const int every = test_few() ? 7 : 1;
    for (int i = 0; case_lines[i]; i++)
        for (int type = 0; type < 4 && i % every == 0; type++) {
            nbhd_desc desc;
            if (!CHECK(!nbhd_desc_parse(&desc, case_lines[i]), "%s: %s", case_lines[i], nbhd_last_error()))
                continue;
            desc.pass = kernel->pass;
            desc.dtype = dtypes[type];
            desc.extra = 0; /* unfused passes have scores for windows only */
            check_row_on(kernel, &desc, seed++);
        }
    const unsigned random = test_random(60, 2500);
    for (unsigned i = 0; i < random; i++) {
        nbhd_desc desc = case_random(i, 2e6);
        desc.pass = kernel->pass;
        desc.dtype = dtypes[i % 7 < 4 ? 0 : i % 7 - 3];
        desc.extra = 0;
        check_row_on(kernel, &desc, i);
    }
}

static void check_thread_counts(const struct nbhd_kernel *kernel)
{
    static const char *const lines[] = {"b2 h4/2 d32 19x23 w7x5 bias", "h2 d64 300 w100 s10",
                                        "h3 d16 5x9x20 w3x3x5 ecnn"};
    for (int i = 0; i < 3; i++) {
        unsigned long long bits = 0;
        for (int threads = 1; threads <= 7; threads += 2) {
            nbhd_desc desc;
            struct case_result result;
            const struct case_options options = {.kernel = kernel->name, .threads = threads};
            nbhd_desc_parse(&desc, lines[i]);
            desc.pass = kernel->pass;
            case_run(&desc, &options, &result);
            CHECK(result.ok, "%s on '%s': %s", kernel->name, lines[i], result.why);
            CHECK(threads == 1 || bits == result.bits, "%s on '%s': %d threads give other bits", kernel->name, lines[i],
                  threads);
            bits = result.bits;
        }
    }
}

/* ---- qk, softmax, av against the fused forward, by the public interface alone ---- */

enum { TOKENS = 9 * 11, HEADS = 2, WIDTH = 16, WINDOW = 15 };

static bool run_pass(const char *line, nbhd_args *args)
{
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    bool ok = !nbhd_desc_parse(&desc, line) && !nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CPU, 0);
    void *workspace = ok ? aligned_alloc(64, (nbhd_plan_workspace(plan) + 127) / 64 * 64) : NULL;
    ok = ok && !nbhd_execute(plan, args, workspace, NULL);
    CHECK(ok, "%s: %s", line, nbhd_last_error());
    free(workspace);
    nbhd_plan_destroy(&plan);
    return ok;
}

static void softmax_row(float *row, int n)
{
    float max = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++)
        max = fmaxf(max, row[i]);
    for (int i = 0; i < n; i++)
        sum += row[i] = expf(row[i] - max);
    for (int i = 0; i < n; i++)
        row[i] /= sum;
}

static void check_composition(void)
{
    static float q[TOKENS * HEADS * WIDTH], k[TOKENS * HEADS * WIDTH], v[TOKENS * HEADS * WIDTH];
    static float fused[TOKENS * HEADS * WIDTH], o[TOKENS * HEADS * WIDTH], scores[TOKENS * HEADS * WINDOW];
    for (int i = 0; i < TOKENS * HEADS * WIDTH; i++) {
        q[i] = (float)(i * 7919 % 1000) / 400.0f - 1.2f;
        k[i] = (float)(i * 6007 % 1000) / 400.0f - 1.2f;
        v[i] = (float)(i * 4001 % 1000) / 400.0f - 1.2f;
    }
    nbhd_args args = NBHD_ARGS_INIT;
    args.q.data = q, args.k.data = k, args.v.data = v, args.o.data = fused, args.scores.data = scores;
    bool ok = run_pass("fwd h2 d16 9x11 w5x3 r1x2 ecn", &args) && run_pass("qk h2 d16 9x11 w5x3 r1x2 ecn", &args);
    for (int i = 0; ok && i < TOKENS * HEADS; i++)
        softmax_row(scores + i * WINDOW, WINDOW); /* -inf past the end of a causal window becomes 0 */
    args.o.data = o;
    ok = ok && run_pass("av h2 d16 9x11 w5x3 r1x2 ecn", &args);
    for (int i = 0; ok && i < TOKENS * HEADS * WIDTH; i++)
        ok = CHECK(fabsf(o[i] - fused[i]) < 1e-5f, "element %d: %g, fused %g", i, (double)o[i], (double)fused[i]);
}

int main(void)
{
    int rows = 0;
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++)
        if (runs_here(k)) {
            check_row(k);
            check_thread_counts(k);
            rows++;
        }
    CHECK(rows >= 4, "%d rows of unfused passes ran", rows);
    check_composition();
    return test_done();
}
