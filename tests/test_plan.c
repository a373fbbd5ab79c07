/* Planning and executing: choice and refusal, arguments one by one, threads that share a plan. */
#include <limits.h>

#include "callers.h"
#include "core/kernel.h"
#include "cpu/isa.h"
#include "nbhd.h"
#include "test.h"

static nbhd_plan *plan_of(const char *line, const char *kernel)
{
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    CHECK(!nbhd_desc_parse(&desc, line), "%s: %s", line, nbhd_last_error());
    CHECK(!nbhd_plan_create_with(&plan, &desc, NBHD_DEVICE_CPU, 0, kernel), "%s: %s", line, nbhd_last_error());
    return plan;
}

static void check_choice(void)
{
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    nbhd_desc_parse(&desc, "d16 20 w5");
    nbhd_isa_limit(NBHD_ISA_SCALAR);
    plan = plan_of("d16 20 w5", NULL);
    CHECK(!strcmp(nbhd_plan_kernel(plan), "cpu.fwd_scalar"), "chose %s", nbhd_plan_kernel(plan));
    nbhd_plan_destroy(&plan);
    CHECK(plan == NULL, "destroy left the pointer");
    nbhd_plan_destroy(&plan);
    nbhd_plan_destroy(NULL);
    nbhd_isa_limit(~0u);
    CHECK(nbhd_plan_create_with(&plan, &desc, NBHD_DEVICE_CPU, 0, "cpu.nothing") == NBHD_ERROR_INVALID,
          "unknown kernel");
    CHECK(strstr(nbhd_last_error(), "cpu.nothing") != NULL, "%s", nbhd_last_error());
    CHECK(nbhd_plan_create(&plan, &desc, (nbhd_device)7, 0) == NBHD_ERROR_INVALID, "device 7 passed");
    CHECK(nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CPU, 1u << 20) == NBHD_ERROR_INVALID, "unknown flag passed");
}

/* Axes of one token come first, wherever the caller has them: kernels run along the last. */
static void check_order(void)
{
    nbhd_plan *plan = plan_of("d16 64x1x48 w5x1x7", NULL);
    const struct nbhd_problem *p = &plan->problem;
    CHECK(p->axis[0].length == 1 && p->axis[1].length == 64 && p->axis[2].length == 48, "64x1x48 became %dx%dx%d",
          p->axis[0].length, p->axis[1].length, p->axis[2].length);
    CHECK(p->at[0] == 1 && p->at[1] == 0 && p->at[2] == 2, "whose axes stand at %d, %d, %d", p->at[0], p->at[1],
          p->at[2]);
    nbhd_plan_destroy(&plan);
}

/* Every row refuses a problem of another pass or device, with a sentence. */
static void check_refusals(void)
{
    nbhd_desc desc;
    char why[NBHD_TEXT];
    int rows = 0;
    for (int i = 0; nbhd_kernel_name(i); i++, rows++) {
        nbhd_desc_parse(&desc, "d16 20 w5");
        const nbhd_device device = nbhd_kernels[i].device;
        desc.pass = nbhd_kernels[i].pass == NBHD_FORWARD ? NBHD_BACKWARD : NBHD_FORWARD;
        CHECK(!nbhd_kernel_refusal(i, &desc, device, why, sizeof why) && strstr(why, "pass"), "%s: '%s'",
              nbhd_kernel_name(i), why);
        desc.pass = nbhd_kernels[i].pass;
        CHECK(!nbhd_kernel_refusal(i, &desc, device == NBHD_DEVICE_CPU ? NBHD_DEVICE_CUDA : NBHD_DEVICE_CPU, why,
              sizeof why) &&
                  strstr(why, "runs on"), "%s: '%s'", nbhd_kernel_name(i), why);
        if (device == NBHD_DEVICE_CPU && nbhd_kernels[i].needs != NBHD_ISA_SCALAR) {
            nbhd_isa_limit(NBHD_ISA_SCALAR);
            CHECK(!nbhd_kernel_refusal(i, &desc, device, why, sizeof why) && strstr(why, "machine has no"), "%s: '%s'",
                  nbhd_kernel_name(i), why);
            nbhd_isa_limit(~0u);
        }
    }
    CHECK(rows > 0, "no kernels");
    CHECK(nbhd_kernel_refusal(rows, &desc, NBHD_DEVICE_CPU, why, sizeof why) == NBHD_ERROR_INVALID, "row %d exists",
          rows);
    CHECK(nbhd_kernel_refusal(0, &desc, (nbhd_device)7, why, sizeof why) == NBHD_ERROR_INVALID &&
          strstr(nbhd_last_error(), "device is 7"), "device 7 passed");
    CHECK(nbhd_kernel_refusal_with(0, &desc, NBHD_DEVICE_CPU, 1u << 20, why, sizeof why) == NBHD_ERROR_INVALID,
          "unknown flag passed");
}

struct arguments {
    nbhd_plan *plan;
    nbhd_args good;
    void *workspace;
    float *q, *k, *o; /* of 2 heads x 20 tokens x 16 */
};

static bool refused(const struct arguments *a, const nbhd_args *bad, const char *says)
{
    return nbhd_execute(a->plan, bad, a->workspace, NULL) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), says);
}

static void check_missing_tensors(const struct arguments *a)
{
    static const struct {
        size_t offset;
        const char *says;
    } needed[] = {{offsetof(nbhd_args, q), "args.q "},
                  {offsetof(nbhd_args, k), "args.k "},
                  {offsetof(nbhd_args, v), "args.v "},
                  {offsetof(nbhd_args, o), "args.o "},
                  {offsetof(nbhd_args, extra_k), "args.extra_k"},
                  {offsetof(nbhd_args, extra_v), "args.extra_v"}};
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        nbhd_args bad = a->good;
        nbhd_tensor *tensor = (nbhd_tensor *)(void *)((char *)&bad + needed[i].offset);
        tensor->data = NULL;
        CHECK(refused(a, &bad, needed[i].says), "%s: %s", needed[i].says, nbhd_last_error());
        tensor->data = (char *)a->q + 1;
        CHECK(refused(a, &bad, "aligned"), "%s: %s", needed[i].says, nbhd_last_error());
    }
}

static void check_overlaps(const struct arguments *a)
{
    nbhd_args bad = a->good;
    bad.o.stride[0] = 640, bad.o.stride[1] = 0, bad.o.stride[2] = 16;
    CHECK(refused(a, &bad, "args.o"), "an output of stride 0 passed: %s", nbhd_last_error());
    bad.o.stride[1] = 16, bad.o.stride[2] = 0;
    CHECK(refused(a, &bad, "args.o"), "an output whose heads are one passed: %s", nbhd_last_error());
    bad.o.stride[1] = 16, bad.o.stride[2] = 15;
    CHECK(refused(a, &bad, "stride of 15"), "an output whose heads overlap passed: %s", nbhd_last_error());
    bad = a->good, bad.o.data = a->k;
    CHECK(refused(a, &bad, "args.o, from ") && strstr(nbhd_last_error(), "lies over args.k"),
          "an output in place of the keys passed: %s", nbhd_last_error());
    bad = a->good, bad.lse.data = a->o + 2 * 20 * 16 - 1;
    CHECK(refused(a, &bad, "lies over"), "an output at the end of another passed: %s", nbhd_last_error());
    bad = a->good, bad.q.data = a->o + 19 * 32, bad.q.stride[1] = -32, bad.q.stride[2] = 16;
    CHECK(refused(a, &bad, "lies over"), "an output over queries in reverse passed: %s", nbhd_last_error());
    bad = a->good, bad.q.stride[1] = LLONG_MAX / 4, bad.q.stride[2] = 16;
    CHECK(refused(a, &bad, "args.q has a stride of 2305843009213693951"), "a stride beyond all memory passed: %s",
          nbhd_last_error());
}

/* The gradient of a table of biases may be left out, but lie on nothing else. */
static void check_tables(void)
{
    static float tensors[9][2 * 6 * 8], bias[2 * 2 * 5], dbias[2 * 5];
    static _Alignas(64) double workspace[1 << 16];
    nbhd_plan *plan = plan_of("bwd h2 d8 6 w3 bias", NULL);
    if (!plan || !CHECK(nbhd_plan_workspace(plan) <= sizeof workspace, "%zu", nbhd_plan_workspace(plan)))
        return;
    struct arguments a = {.plan = plan, .good = NBHD_ARGS_INIT, .workspace = workspace};
    nbhd_tensor *const used[] = {&a.good.q,    &a.good.k,  &a.good.v,  &a.good.o, &a.good.lse,
                                 &a.good.dout, &a.good.dq, &a.good.dk, &a.good.dv};
    for (size_t i = 0; i < sizeof used / sizeof *used; i++)
        used[i]->data = tensors[i];
    a.good.bias.data = bias;
    CHECK(!nbhd_execute(plan, &a.good, workspace, NULL), "%s", nbhd_last_error());
    nbhd_args bad = a.good;
    bad.dbias.data = dbias;
    CHECK(!nbhd_execute(plan, &bad, workspace, NULL), "%s", nbhd_last_error());
    bad.dbias.data = bias + 9;
    CHECK(refused(&a, &bad, "lies over args.bias"), "a gradient over its table passed: %s", nbhd_last_error());
    bad.dbias.data = tensors[8];
    CHECK(refused(&a, &bad, "lies over args.dv"), "a table over another gradient passed: %s", nbhd_last_error());
    bad.dbias.data = (char *)dbias + 1;
    CHECK(refused(&a, &bad, "aligned"), "a table that is not aligned passed: %s", nbhd_last_error());
    nbhd_plan_destroy(&plan);
}

/* Views that a caller may have: keys and values of one head for all, queries in reverse, one tensor for q, k and v. */
static void check_views(const struct arguments *a)
{
    nbhd_args view = a->good;
    view.k.stride[0] = view.v.stride[0] = 320, view.k.stride[1] = view.v.stride[1] = 16;
    CHECK(!nbhd_execute(a->plan, &view, a->workspace, NULL), "keys of head stride 0: %s", nbhd_last_error());
    view = a->good, view.q.data = a->q + 19 * 32, view.q.stride[1] = -32, view.q.stride[2] = 16;
    CHECK(!nbhd_execute(a->plan, &view, a->workspace, NULL), "queries in reverse: %s", nbhd_last_error());
    view = a->good, view.k.data = view.v.data = a->q;
    CHECK(!nbhd_execute(a->plan, &view, a->workspace, NULL), "q, k and v in one: %s", nbhd_last_error());
}

static void check_arguments(void)
{
    static float q[2 * 20 * 16], k[2 * 20 * 16], v[2 * 20 * 16], o[2 * 20 * 16], extra[64];
    static _Alignas(64) double workspace[1 << 16];
    nbhd_plan *plan = plan_of("h2 d16 20 w5 extra=2", NULL);
    if (!plan || !CHECK(nbhd_plan_workspace(plan) <= sizeof workspace, "%zu", nbhd_plan_workspace(plan)))
        return;
    struct arguments a = {.plan = plan, .good = NBHD_ARGS_INIT, .workspace = workspace, .q = q, .k = k, .o = o};
    a.good.q.data = q, a.good.k.data = k, a.good.v.data = v, a.good.o.data = o;
    a.good.extra_k.data = a.good.extra_v.data = extra;
    CHECK(!nbhd_execute(plan, &a.good, workspace, NULL), "%s", nbhd_last_error());
    check_missing_tensors(&a);
    check_overlaps(&a);
    check_views(&a);
    CHECK(nbhd_execute(plan, &a.good, NULL, NULL) == NBHD_ERROR_INVALID, "no workspace passed");
    CHECK(nbhd_execute(plan, &a.good, workspace + 4, NULL) == NBHD_ERROR_INVALID &&
              strstr(nbhd_last_error(), "aligned to 64"),
          "a workspace aligned to 32 bytes passed: %s", nbhd_last_error());
    CHECK(nbhd_execute(NULL, &a.good, workspace, NULL) == NBHD_ERROR_INVALID, "no plan passed");
    CHECK(nbhd_execute(plan, NULL, workspace, NULL) == NBHD_ERROR_INVALID, "no args passed");
    nbhd_plan_destroy(&plan);
}

/* NULL where something must be: a status and a sentence that names it, and no crash. */
static void check_null(void)
{
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    nbhd_ragged ragged = NBHD_RAGGED_INIT;
    char text[NBHD_TEXT];
    int n;
    CHECK(nbhd_desc_parse(NULL, "d16 20") == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "desc"), "%s",
          nbhd_last_error());
    CHECK(nbhd_desc_parse(&desc, NULL) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "text"), "%s",
          nbhd_last_error());
    nbhd_desc_parse(&desc, "d16 20 w5");
    CHECK(nbhd_desc_format(NULL, text, sizeof text) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "desc"), "%s",
          nbhd_last_error());
    CHECK(nbhd_desc_format(&desc, NULL, 99) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "text"), "%s",
          nbhd_last_error());
    CHECK(nbhd_desc_keys(&desc, 0, 0, NULL, &n) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "first"), "%s",
          nbhd_last_error());
    CHECK(nbhd_desc_keys(&desc, 0, 0, &n, NULL) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "count"), "%s",
          nbhd_last_error());
    CHECK(nbhd_desc_pairs(NULL) == 0 && nbhd_desc_flops(NULL) == 0, "pairs of no problem");
    CHECK(nbhd_plan_create(NULL, &desc, NBHD_DEVICE_CPU, 0) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "plan"),
          "%s", nbhd_last_error());
    CHECK(nbhd_plan_create(&plan, NULL, NBHD_DEVICE_CPU, 0) == NBHD_ERROR_INVALID && !plan, "%s", nbhd_last_error());
    CHECK(nbhd_plan_create_ragged(NULL, &desc, &ragged, NBHD_DEVICE_CPU, 0, NULL) == NBHD_ERROR_INVALID,
          "no plan passed");
    CHECK(nbhd_plan_create_ragged(&plan, NULL, &ragged, NBHD_DEVICE_CPU, 0, NULL) == NBHD_ERROR_INVALID,
          "no desc passed");
    CHECK(nbhd_plan_create_ragged(&plan, &desc, NULL, NBHD_DEVICE_CPU, 0, NULL) == NBHD_ERROR_INVALID,
          "no ragged passed");
    CHECK(nbhd_plan_workspace(NULL) == 0 && !*nbhd_plan_kernel(NULL) && !*nbhd_plan_describe(NULL) &&
          nbhd_plan_predicted_ms(NULL) == 0,
          "something of no plan");
    CHECK(!nbhd_kernel_refusal(0, &desc, NBHD_DEVICE_CPU, NULL, 9), "%s", nbhd_last_error());
}

/* A machine without a GPU says so once, and not once a kernel. */
static void check_missing_device(void)
{
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    nbhd_desc_parse(&desc, "d16 20 w5");
    const nbhd_status status = nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CUDA, 0);
    if (!status)
        test_skip("there is a GPU, so none is missing");
    else
        CHECK(status == NBHD_ERROR_DEVICE && strstr(nbhd_last_error(), "device is cuda") && !strstr(nbhd_last_error(),
              "fwd_"), "%d: %s",
              (int)status, nbhd_last_error());
    nbhd_plan_destroy(&plan);
}

static void check_batch_and_bias(void)
{
    static float tokens[2 * 6 * 4], o[2 * 6 * 4], table[8];
    static _Alignas(64) double workspace[1 << 16];
    nbhd_plan *plan = plan_of("b2 d4 6 w3 bias", NULL);
    if (!plan || !CHECK(nbhd_plan_workspace(plan) <= sizeof workspace, "%zu", nbhd_plan_workspace(plan)))
        return;
    nbhd_args args = NBHD_ARGS_INIT;
    args.q.data = args.k.data = args.v.data = tokens, args.o.data = o;
    CHECK(nbhd_execute(plan, &args, workspace, NULL) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "args.bias"),
          "%s", nbhd_last_error());
    args.bias.data = (char *)table + 1;
    CHECK(nbhd_execute(plan, &args, workspace, NULL) == NBHD_ERROR_INVALID &&
              strstr(nbhd_last_error(), "args.bias is at"),
          "%s", nbhd_last_error());
    args.bias.data = table;
    CHECK(!nbhd_execute(plan, &args, workspace, NULL), "%s", nbhd_last_error());
    args.o.stride[1] = args.o.stride[2] = 4; /* of [batch, axis, heads] */
    CHECK(nbhd_execute(plan, &args, workspace, NULL) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "args.o"),
          "an output whose batch elements are one passed: %s", nbhd_last_error());
    nbhd_plan_destroy(&plan);
}

static void check_threads(void)
{
    nbhd_plan *plan = plan_of("h2 d16 64 w9", NULL);
    check_callers(plan, 2 * 64 * 16, 20);
    nbhd_plan_destroy(&plan);
}

/* Detection, from recorded words of cpuid and xgetbv. */
static void check_isa(void)
{
    static const struct {
        struct nbhd_cpuid words;
        unsigned isa;
    } recorded[] = {
        {{0, 0, 0, 0, 0}, 1},
        {{0xfffa3203, 0xf1bf97a9, 0x10, 0x20, 0x2e7}, 1 | 2 | 4 | 8},                  /* Zen 4 */
        {{0xfffa3203, 0xf1bf97a9, 0x10, 0x20, 0x7}, 1 | 2},                            /* the same,
        AVX-512 state not saved */
        {{0xfffa3203, 0xf1bf97a9, 0x10, 0x20, 0x3}, 1},                                /* and no AVX state either */
        {{0x7ffefbff, 0x209c01a9, 0xbc000400, 0, 0x7}, 1 | 2},                         /* Zen 2 */
        {{0x7ffefbff, 0xf1bf07ab, 0x01c00010u | 1u << 24, 0x30, 0x602e7}, 1 | 2 | 4 | 8 | 16}, /* Sapphire Rapids */
    };
    for (size_t i = 0; i < sizeof recorded / sizeof *recorded; i++) {
        const unsigned isa = nbhd_isa_from_cpuid(&recorded[i].words);
        CHECK(isa == recorded[i].isa, "record %zu gives %x, not %x", i, isa, recorded[i].isa);
    }
    CHECK(nbhd_isa_available() & NBHD_ISA_SCALAR, "not even scalar");
}

int main(void)
{
    check_choice();
    check_order();
    check_refusals();
    check_arguments();
    check_tables();
    check_batch_and_bias();
    check_null();
    check_missing_device();
    check_threads();
    check_isa();
    return test_done();
}
