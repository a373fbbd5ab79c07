/* Host half of bwd_sm90_dq.cu: its costs, for the search for boxes (sm90_plan.c); its launch (sm90.c). */
#include "cuda/bwd_sm90_dq.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/sm90.h"

struct nbhd_bwd_sm90_dq {
    struct nbhd_sm90_launch launch;
};

/* ---- the plan ---- */

/* Warpgroups, CTAs of a multiprocessor, and registers for S, dP, dQ and what goes with them, by the steps of the mask:
 * what compiles without spills. */
static const struct kind {
    int groups, ctas, room[3];
} kinds[] = {{2, 1, {208, 208, 208}}, {3, 1, {124, 124, 116}}, {1, 2, {184, 184, 184}}, {1, 3, {88, 88, 80}}};

/* Where two boxes of V do not fit, one: it is free again as soon as dP is computed. */
static int variants_of(const nbhd_desc *d, struct nbhd_sm90_variant list[NBHD_SM90_VARIANTS])
{
    static const int sizes[] = {32, 48, 64, 80, 96, 112, 128, 144, 160};
    int count = 0;
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            list[count++] = (struct nbhd_sm90_variant){.groups = kinds[kind].groups,
                                                       .n = sizes[i],
                                                       .ctas = kinds[kind].ctas,
                                                       .stages = 2,
                                                       .v_stages = d->head_dim + d->head_dim_v > 384 ? 1 : 2};
    return count;
}

static int shared_bytes(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan)
{
    const struct nbhd_sm90_variant *v = &plan->variant;
    int k = (problem->desc.head_dim + 63) / 64, w = (problem->desc.head_dim_v + 63) / 64;
    return 128 * ((k + w) * 64 * v->groups + (v->stages * k + v->v_stages * w) * v->n) +
           NBHD_SM90_TABLES(v->groups, v->stages) + plan->mask_steps * v->n * 32;
}

static int has_registers(const nbhd_desc *d, const struct nbhd_sm90_plan *plan)
{
    const struct nbhd_sm90_variant *v = &plan->variant;
    if (v->groups != 2 && d->head_dim > 192) /* ptxas does not take so wide a product among 128 registers at launch */
        return 0;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (kinds[i].groups == v->groups && kinds[i].ctas == v->ctas)
            return v->n * 9 / 8 + (d->head_dim + 1) / 2 <= kinds[i].room[plan->mask_steps];
    return 0;
}

/* Fitted to docs/notes/hopper-backward-dq.md: matrix and other work overlap, the better where CTAs are on their own. */
static double box_clocks(const nbhd_desc *d, const struct nbhd_sm90_variant *v)
{
    int k = (d->head_dim + 15) / 16 * 16, w = (d->head_dim_v + 15) / 16 * 16;
    double scores = v->groups * (k + w) / 16 * fmax(v->n / 2, 16 + v->n / 4); /* A and B from shared memory */
    double matrix = scores + v->groups * v->n * k / 32.0;
    double others = (v->groups == 2 ? 6.1 : 5.1) * v->groups * v->n;
    double load = v->n * (double)(d->head_dim + d->head_dim_v) * 2 / 40;
    double step = v->groups == 1 ? 90 + 3 * nbhd_max(0, 64 - v->n) : 100 + 50 * v->groups;
    return fmax(fmax(0.5 * matrix + others, 1.18 * matrix), load) + step;
}

static double mask_clocks(const struct nbhd_sm90_plan *p)
{
    const struct nbhd_sm90_variant *v = &p->variant;
    return p->mask_steps ? p->mask_steps * (0.5 * v->groups * v->n + 60) : 1.6 * v->groups * v->n;
}

static double plan_ms(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *p, int multiprocessors)
{
    const nbhd_desc *d = &problem->desc;
    const double slices = nbhd_sm90_slices(problem, p), extra = (d->extra + p->variant.n - 1) / p->variant.n * p->tiles;
    const double clocks = (p->boxes + extra) * box_clocks(d, &p->variant) +
                          (p->boxes - p->full_boxes) * mask_clocks(p) + p->tiles * 8000 / p->variant.ctas;
    const double waves = p->tiles * slices / (multiprocessors * p->variant.ctas);
    const double uneven = waves > 8 ? 1 + 0.5 / waves : ceil(waves) / waves;
    return clocks * slices / multiprocessors * uneven / 1.755e6;
}

const struct nbhd_sm90_kernel nbhd_sm90_dq = {
    .variants = variants_of, .shared = shared_bytes, .has_registers = has_registers, .ms = plan_ms, .pad_columns = 1};

/* The best plan for this thread's machine. It is asked for three times and takes milliseconds, so the thread keeps its
 * last. */
static bool plan_here(const struct nbhd_problem *problem, struct nbhd_sm90_plan *plan)
{
    static _Thread_local struct {
        nbhd_desc desc;
        int multiprocessors, shared_max, count;
        struct nbhd_sm90_plan plan;
    } last;
    struct nbhd_cuda_machine machine;
    if (nbhd_cuda_machine(&machine))
        return false;
    if (!last.count || last.multiprocessors != machine.multiprocessors || last.shared_max != machine.shared_max ||
        memcmp(&last.desc, &problem->desc, sizeof last.desc) != 0) {
        last.count =
            nbhd_sm90_plans(&nbhd_sm90_dq, problem, machine.multiprocessors, machine.shared_max, &last.plan, 1);
        last.multiprocessors = machine.multiprocessors;
        last.shared_max = machine.shared_max;
        memcpy(&last.desc, &problem->desc, sizeof last.desc);
    }
    *plan = last.plan;
    return last.count > 0;
}

bool nbhd_bwd_sm90_dq_refuses(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    struct nbhd_sm90_plan plan;
    if (nbhd_sm90_refuses(problem, why))
        return true;
    if (!plan_here(problem, &plan))
        return nbhd_refuse(why, "head_dim=%d with head_dim_v=%d: no tile of dQ fits into shared memory",
                           problem->desc.head_dim, problem->desc.head_dim_v);
    return false;
}

double nbhd_bwd_sm90_dq_ms(const struct nbhd_problem *problem)
{
    struct nbhd_sm90_plan plan;
    return plan_here(problem, &plan) ? plan.ms : 0;
}

nbhd_status nbhd_bwd_sm90_dq_build(struct nbhd_bwd_sm90_dq **dq, const struct nbhd_problem *problem)
{
    struct nbhd_sm90_plan plan;
    *dq = calloc(1, sizeof **dq);
    if (!*dq)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's state could not be allocated");
    if (!plan_here(problem, &plan))
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "no tile of dQ fits the GPU's shared memory");
    struct nbhd_sm90_launch *launch = &(*dq)->launch;
    struct nbhd_options options = {.used = 0};
    nbhd_sm90_set_launch(launch, &nbhd_sm90_dq, problem, &plan);
    nbhd_sm90_options(&options, problem, launch);
    nbhd_option(&options, "-DNBHD_V_STAGES=%d -DNBHD_FIRST=wgmma_ss_first_n%d -DNBHD_DQ=wgmma_rs_bt_n%d",
                plan.variant.v_stages, plan.variant.n, problem->desc.head_dim);
    nbhd_status status = nbhd_cuda_acquire(&launch->module, "bwd_sm90_dq.cu", &options, problem->flags);
    return status ? status : nbhd_cuda_function(&launch->function, launch->module, "nbhd_bwd_sm90_dq");
}

size_t nbhd_bwd_sm90_dq_describe(const struct nbhd_bwd_sm90_dq *dq, char *text, size_t room)
{
    return nbhd_sm90_describe(text, room, &dq->launch.plan);
}

nbhd_status nbhd_bwd_sm90_dq_run(const struct nbhd_bwd_sm90_dq *dq, const struct nbhd_params *params,
                                 const float *lse_log2, const float *delta, void *stream)
{
    return nbhd_sm90_run(&dq->launch, params, &params->dout, (void *[]){&lse_log2, &delta}, 2, stream);
}

void nbhd_bwd_sm90_dq_drop(struct nbhd_bwd_sm90_dq *dq)
{
    if (dq)
        nbhd_cuda_release(dq->launch.module);
    free(dq);
}
