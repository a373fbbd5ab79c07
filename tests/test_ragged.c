/* Ragged batches: every CPU row against the oracle, sequence by sequence, in every placement; the same bits as a plan
 * of one sequence; refusals one by one; threads. */
#include <stdint.h>
#include "batches.h"
#include "callers.h"
#include "core/kernel.h"
#include "cpu/isa.h"
#include "test.h"

static void run_batch(const struct batch *b, const nbhd_desc *desc, const struct case_options *options)
{
    struct case_result result;
    char text[NBHD_TEXT];
    if (batch_run(b, desc, options, &result, text) != NBHD_ERROR_UNSUPPORTED || !options->kernel)
        CHECK(result.ok, "%s on %s: %s", result.kernel, text, result.why);
}

static void check_rows(void)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        char why[NBHD_TEXT];
        if (k->device != NBHD_DEVICE_CPU || nbhd_isa_refuses(k->needs, why))
            continue;
        for (int i = 0; batches[i].sequences; i++) {
            nbhd_desc desc;
            CHECK(!nbhd_desc_parse(&desc, batches[i].line), "%s: %s", batches[i].line, nbhd_last_error());
            desc.pass = k->pass;
            if (k->pass > NBHD_BACKWARD && !batch_unfused(&batches[i], &desc))
                continue;
            for (int j = 0; j < 4; j++) {
                desc.dtype = j == 3  ? (int)(k->needs == NBHD_ISA_SCALAR ? NBHD_F64 : NBHD_F16)
                             : i % 2 ? NBHD_BF16
                                     : NBHD_F32;
                const struct case_options options = {.kernel = k->name,
                                                     .seed = (unsigned)(i * 4 + j),
                                                     .threads = 1 + (i + j) % 4,
                                                     .layout = (enum case_layout)(j == 3 ? CASE_STRIDED : (i + j) % 3),
                                                     .placement = (enum case_sequences)(j % 3),
                                                     .repeats = j == 1,
                                                     .dlse = j == 2,
                                                     .poison_key = j == 1};
                run_batch(&batches[i], &desc, &options);
            }
        }
    }
}

/* The planner's choice on random problems whose sequences differ. */
static void check_random(void)
{
    const int problems = test_full() ? 2000 : 60;
    for (int i = 0; i < problems; i++) {
        nbhd_desc desc = {.pass = i % 6, .dtype = i / 6 % 3};
        const unsigned seed = 7000u + (unsigned)i;
        const struct batch b = batch_random(seed, &desc);
        const struct case_options options = {.seed = seed, .threads = 1 + i % 3, .layout = (enum case_layout)(i % 3),
                                             .placement = (enum case_sequences)(i / 3 % 3), .dlse = i % 2};
        run_batch(&b, &desc, &options);
    }
}

/* ---- by hand ---- */

static nbhd_desc packed(const char *line)
{
    nbhd_desc desc;
    CHECK(!nbhd_desc_parse(&desc, line), "%s: %s", line, nbhd_last_error());
    for (int i = 0; i < 3; i++)
        desc.length[i] = desc.kv_length[i] = 0;
    return desc;
}

enum { SEQUENCES = 37, ROOM = 1 << 16 };

/* 37 sequences, one of which has half of the work: wide and narrow plans, against a plan of each alone. */
static void check_bits(void)
{
    static float q[ROOM], k[ROOM], v[ROOM], o[ROOM], alone[ROOM];
    static int lengths[SEQUENCES][2];
    for (unsigned i = 0; i < ROOM; i++) {
        q[i] = (float)(i * 7919u % 1000) / 500.0f - 1.0f;
        k[i] = (float)(i * 104729u % 1000) / 500.0f - 1.0f;
        v[i] = (float)(i * 1299709u % 1000) / 500.0f - 1.0f;
    }
    for (int s = 0; s < SEQUENCES; s++) {
        lengths[s][0] = s == 11 ? 25 : 5 + s % 4;
        lengths[s][1] = s == 11 ? 31 : 5 + s % 3;
    }
    nbhd_desc desc = packed("h2 d8 9x9 w5x5");
    desc.threads = 3;
    nbhd_ragged ragged = NBHD_RAGGED_INIT;
    ragged.sequences = SEQUENCES;
    ragged.lengths = lengths[0];
    nbhd_plan *plan = NULL;
    if (!CHECK(!nbhd_plan_create_ragged(&plan, &desc, &ragged, NBHD_DEVICE_CPU, 0, NULL), "%s", nbhd_last_error()))
        return;
    CHECK(strstr(nbhd_plan_describe(plan), "37 sequences of 13 grids, 36 of them side by side on 3 threads"), "%s",
          nbhd_plan_describe(plan));
    void *workspace = aligned_alloc(64, (nbhd_plan_workspace(plan) + 127) / 64 * 64);
    nbhd_args args = NBHD_ARGS_INIT;
    args.q.data = q, args.k.data = k, args.v.data = v, args.o.data = o;
    CHECK(!nbhd_execute(plan, &args, workspace, NULL), "%s", nbhd_last_error());
    free(workspace);
    size_t at = 0;
    for (int s = 0; s < SEQUENCES; s++) {
        nbhd_plan *one = NULL;
        nbhd_desc d = desc;
        const size_t elements = (size_t)(lengths[s][0] * lengths[s][1]) * 16;
        d.length[0] = lengths[s][0], d.length[1] = lengths[s][1];
        CHECK(!nbhd_plan_create_with(&one, &d, NBHD_DEVICE_CPU, 0, nbhd_plan_kernel(plan)), "%s", nbhd_last_error());
        workspace = aligned_alloc(64, (nbhd_plan_workspace(one) + 127) / 64 * 64);
        args.q.data = q + at, args.k.data = k + at, args.v.data = v + at, args.o.data = alone + at;
        CHECK(!nbhd_execute(one, &args, workspace, NULL), "%s", nbhd_last_error());
        CHECK(!memcmp(alone + at, o + at, elements * sizeof(float)), "sequence %d has other bits alone", s);
        free(workspace);
        nbhd_plan_destroy(&one);
        at += elements;
    }
    nbhd_plan_destroy(&plan);
}

struct wrong {
    const char *line, *says;
    int sequences;
    int lengths[6];
    const int *kv_lengths;
    const long long *offsets, *kv_offsets;
    int padded[2], batch;
};

static void check_refusals(void)
{
    static const int kv[] = {20, 20, 5, 5}, bad_kv[] = {20, 20, 5, 0};
    static const long long near[] = {0, 80}, below[] = {0, -1}, far[] = {0, 1LL << 40}, good[] = {0, 99};
    static const struct wrong list[] = {
        {.line = "d8 9x9 w7x7", .sequences = 2, .lengths = {9, 9, 8, 6},
         .says = "sequence 1, of 8x6 tokens: window[1] is 7"},
        {.line = "d8 9x9 w3x3 r1x3", .sequences = 2, .lengths = {9, 8, 9, 9},
         .says = "sequence 0, of 9x8 tokens: window[1] is 3"},
        {.line = "d8 9x9 w3x3", .sequences = 2, .lengths = {9, 9, 9, 0}, .says = "sequence 1: its length[1] is 0"},
        {.line = "d8 9x9 w3x3", .sequences = 0, .lengths = {9, 9}, .says = "sequences is 0; it must be 1 or more"},
        {.line = "d8 9x9 w3x3", .sequences = 2, .lengths = {9, 9, 9, 9}, .batch = 3,
         .says = "batch is 3 where ragged.sequences is 2"},
        {.line = "d8 9x9 w3x3", .sequences = 2, .lengths = {9, 9, 5, 5}, .kv_lengths = kv,
         .says = "sequence 0, of 9x9 tokens: kv_length[0] is 20"},
        {.line = "d8 9x9", .sequences = 2, .lengths = {9, 9, 5, 5}, .kv_lengths = bad_kv,
         .says = "sequence 1: its kv_length[1] is 0"},
        {.line = "d8 9x9 w3x3", .sequences = 2, .lengths = {9, 9, 9, 9}, .offsets = near,
         .says = "sequences 0 and 1 share tokens from 80"},
        {.line = "d8 9x9 w3x3", .sequences = 2, .lengths = {9, 9, 9, 9}, .offsets = below,
         .says = "sequence 1: its tokens begin at -1"},
        {.line = "d8 9x9 w3x3", .sequences = 2, .lengths = {9, 9, 9, 9}, .offsets = far,
         .says = "they must lie between 0 and"},
        {.line = "bwd d8 9x9 w3x3", .sequences = 2, .lengths = {9, 9, 9, 9}, .offsets = good, .kv_offsets = near,
         .says = "sequences 0 and 1 share keys from 80"},
        {.line = "d8 9x9 w3x3", .sequences = 2, .lengths = {9, 9, 9, 9}, .offsets = good, .padded = {9, 9},
         .says = "no offsets"},
        {.line = "d8 9x9 w3x3", .sequences = 2, .lengths = {9, 9, 9, 9}, .padded = {9, 0}, .says = "length[1] is 0"},
        {.line = "d8 9x9 w3x3", .sequences = 2, .lengths = {9, 9, 5, 9}, .padded = {9, 8},
         .says = "sequence 0: its length[1] is 9"},
        {.line = "qk d8 9x9", .sequences = 2, .lengths = {9, 9, 5, 5}, .says = "with a tensor of scores"},
        {.line = "d8 9x9 bias", .sequences = 2, .lengths = {9, 9, 5, 5}, .says = "with a bias"},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        const struct wrong *w = &list[i];
        nbhd_plan *plan = (nbhd_plan *)(void *)&plan;
        nbhd_desc desc = packed(w->line);
        nbhd_ragged ragged = NBHD_RAGGED_INIT;
        ragged.sequences = w->sequences;
        ragged.lengths = w->lengths;
        ragged.kv_lengths = w->kv_lengths;
        ragged.offsets = w->offsets;
        ragged.kv_offsets = w->kv_offsets;
        desc.batch = w->batch;
        desc.length[0] = w->padded[0], desc.length[1] = w->padded[1];
        const nbhd_status status = nbhd_plan_create_ragged(&plan, &desc, &ragged, NBHD_DEVICE_CPU, 0, NULL);
        CHECK(status == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), w->says) && !plan,
              "'%s' gives %d, '%s', not '%s'", w->line, status, nbhd_last_error(), w->says);
    }
}

static void check_bad_arguments(void)
{
    static const long long near[] = {0, 80};
    nbhd_plan *plan = NULL;
    nbhd_desc desc = packed("d8 9x9 w3x3");
    nbhd_ragged ragged = NBHD_RAGGED_INIT;
    ragged.sequences = 1;
    CHECK(nbhd_plan_create_ragged(&plan, &desc, &ragged, NBHD_DEVICE_CPU, 0, NULL) == NBHD_ERROR_INVALID &&
          strstr(nbhd_last_error(), "lengths is NULL"), "%s", nbhd_last_error());
    ragged.size = 0;
    CHECK(nbhd_plan_create_ragged(&plan, &desc, &ragged, NBHD_DEVICE_CPU, 0, NULL) == NBHD_ERROR_INVALID &&
          strstr(nbhd_last_error(), "nbhd_ragged.size is 0"), "%s", nbhd_last_error());
    static const int lengths[] = {9, 9, 9, 9};
    ragged = (nbhd_ragged)NBHD_RAGGED_INIT;
    ragged.sequences = 2, ragged.lengths = lengths, ragged.offsets = near;
    desc.pass = 99; /* which the sentence about tokens that both write would name */
    CHECK(nbhd_plan_create_ragged(&plan, &desc, &ragged, NBHD_DEVICE_CPU, 0, NULL) == NBHD_ERROR_INVALID &&
          strstr(nbhd_last_error(), "pass is 99"), "%s", nbhd_last_error());
    desc.pass = NBHD_FORWARD, ragged.offsets = NULL;
    CHECK(nbhd_plan_create_ragged(&plan, &desc, &ragged, (nbhd_device)7, 0, NULL) == NBHD_ERROR_INVALID &&
          strstr(nbhd_last_error(), "device is 7"), "%s", nbhd_last_error());
    CHECK(nbhd_plan_create_ragged(&plan, &desc, &ragged, NBHD_DEVICE_CUDA, 1u << 16, NULL) == NBHD_ERROR_INVALID &&
          strstr(nbhd_last_error(), "flags is 65536"), "%s", nbhd_last_error());
}

/* Sequences may share keys in a forward: here all attend to the first one's. */
static void check_shared_keys(void)
{
    static float q[3 * 8 * 4], k[8 * 4], v[8 * 4], o[3 * 8 * 4];
    static const int lengths[] = {8, 8, 8};
    static const long long offsets[] = {0, 8, 16}, none[] = {0, 0, 0};
    for (int i = 0; i < 8 * 4; i++) {
        q[i] = q[i + 32] = q[i + 64] = (float)(i % 5);
        k[i] = (float)(i % 7), v[i] = (float)(i % 11);
    }
    nbhd_desc desc = packed("d4 8 w3");
    nbhd_ragged ragged = NBHD_RAGGED_INIT;
    ragged.sequences = 3, ragged.lengths = lengths, ragged.offsets = offsets, ragged.kv_offsets = none;
    nbhd_plan *plan = NULL;
    CHECK(!nbhd_plan_create_ragged(&plan, &desc, &ragged, NBHD_DEVICE_CPU, 0, "cpu.fwd_scalar"), "%s",
          nbhd_last_error());
    nbhd_args args = NBHD_ARGS_INIT;
    args.q.data = q, args.k.data = k, args.v.data = v, args.o.data = o;
    void *workspace = aligned_alloc(64, (nbhd_plan_workspace(plan) + 127) / 64 * 64);
    CHECK(!nbhd_execute(plan, &args, workspace, NULL), "%s", nbhd_last_error());
    CHECK(!memcmp(o, o + 32, 32 * sizeof *o) && !memcmp(o, o + 64, 32 * sizeof *o) && o[0] > 0,
          "equal queries, other outputs");
    CHECK(nbhd_execute(plan, &args, NULL, NULL) == NBHD_ERROR_INVALID, "no workspace passed");
    args.o.stride[0] = 0, args.o.stride[1] = 4;
    CHECK(nbhd_execute(plan, &args, workspace, NULL) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "args.o"), "%s",
          nbhd_last_error());
    args.v.data = NULL;
    CHECK(nbhd_execute(plan, &args, workspace, NULL) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "args.v"), "%s",
          nbhd_last_error());
    free(workspace);
    nbhd_plan_destroy(&plan);
}

/* ---- threads share a plan ---- */

static void check_threads(void)
{
    static int lengths[SEQUENCES];
    size_t tokens = 0;
    for (int i = 0; i < SEQUENCES; i++)
        tokens += (size_t)(lengths[i] = 7 + i % 11);
    nbhd_desc desc = packed("h2 d8 9 w5");
    desc.threads = 3;
    nbhd_ragged ragged = NBHD_RAGGED_INIT;
    ragged.sequences = SEQUENCES, ragged.lengths = lengths;
    nbhd_plan *plan = NULL;
    if (CHECK(!nbhd_plan_create_ragged(&plan, &desc, &ragged, NBHD_DEVICE_CPU, 0, NULL), "%s", nbhd_last_error()))
        check_callers(plan, tokens * 16, 10);
    nbhd_plan_destroy(&plan);
}

int main(void)
{
    check_refusals();
    check_bad_arguments();
    check_shared_keys();
    check_bits();
    check_threads();
    check_rows();
    check_random();
    return test_done();
}
