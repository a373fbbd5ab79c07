/* Host half of fwd_sm80.cu: which tile, which boxes, and the launch. */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "cuda/sm80.h"

/* A way to compile the kernel. */
struct variant {
    int rows, warps, n, stages;
    double speed; /* of a warp's step, relative to its products: rows x n */
};
/* 32 rows a warp read half as much from shared memory; 64-row tiles waste less where tiles are few or windows small. */
static const struct variant variants[] = {
    {128, 4, 64, 2, 1.0}, {128, 4, 32, 2, 0.9}, {64, 4, 64, 2, 0.7}, {64, 4, 64, 1, 0.65},
    {64, 4, 32, 2, 0.6},  {64, 4, 32, 1, 0.5},  {64, 4, 16, 1, 0.3},
};
enum { VARIANTS = sizeof variants / sizeof *variants };

struct state {
    struct nbhd_cuda_module *module;
    struct CUfunc_st *function;
    struct nbhd_cuda_grid grid;
    struct nbhd_boxes_sm80 boxes;
};

static int padded(int dim) { return (dim + 15) / 16 * 16; }

/* Bytes of shared memory: as the kernel lays it out. */
static int shared_bytes(const struct variant *v, const nbhd_desc *d)
{
    const int k = 2 * padded(d->head_dim) + 16, w = 2 * padded(d->head_dim_v) + 16, q = k > w ? k : w;
    const int tables = 256 + (2 * 8 + 4) * v->n + 4 * v->rows + 8 * (v->rows + 2) + 32 * (v->rows + 2) +
                       16 * (v->n + 5) + 128 * v->warps + (d->bias ? 4 * (v->rows + v->n) : 0);
    return v->rows * q + v->stages * v->n * (k + w) + tables;
}

static bool scaled(const nbhd_desc *d) { return d->bias || d->scale < 0; }

/* CTAs that fit a multiprocessor. Registers: O and S, and what else a thread needs; 0 if they would spill. */
static int resident(const struct variant *v, const nbhd_desc *d, const struct nbhd_cuda_machine *machine)
{
    const int accumulators = v->rows / v->warps * (padded(d->head_dim_v) + v->n) / 32;
    if (accumulators > (scaled(d) ? 160 : 192))
        return 0;
    const int by_registers = 65536 / (32 * v->warps * nbhd_min(255, accumulators + 64));
    const int by_memory = (machine->shared_max + 1024) / (shared_bytes(v, d) + 1024);
    return nbhd_min(nbhd_min(by_registers, by_memory), 6);
}

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    if (nbhd_sm80_refuses(problem, why))
        return true;
    double biases = problem->desc.heads;
    for (int i = 0; i < 3; i++)
        biases *= 2.0 * problem->axis[i].window - 1;
    if (problem->desc.bias && biases > INT_MAX / 2)
        return nbhd_refuse(why, "the table of biases has %.0f entries; it may have %d", biases, INT_MAX / 2);
    return false;
}

/* Milliseconds: steps at the rate of the device's tensor cores, in waves of CTAs. */
static double predict(const struct nbhd_problem *problem, const struct variant *v, double cost, double ctas, int fit,
                      const struct nbhd_cuda_machine *machine)
{
    const double flops = 2.0 * v->rows / v->warps * v->n * (padded(problem->desc.head_dim) + padded(problem->desc.head_dim_v));
    const double rate = 2.6e9 * v->speed * (fit > 1 ? 1 : 0.75); /* FLOP per ms of a multiprocessor */
    const double wave = (double)machine->multiprocessors * fit, waves = ctas / wave;
    return flops * cost / (rate * machine->multiprocessors) * (ceil(waves) / waves);
}

/* Tries every variant that fits the device. false: none does. */
static bool choose(const struct nbhd_problem *problem, const struct nbhd_cuda_machine *machine, struct nbhd_config *config,
                   struct nbhd_boxes_sm80 *boxes)
{
    const nbhd_desc *d = &problem->desc;
    bool found = false;
    for (int i = 0; i < VARIANTS; i++) {
        const struct variant *v = &variants[i];
        const int fit = resident(v, d, machine);
        if (fit < 1)
            continue;
        const struct nbhd_sm80_shape shape = {v->rows, v->warps, v->n, false, true};
        struct nbhd_boxes_sm80 candidate = {.wide = 0};
        double ctas = 1;
        const double ms = predict(problem, v, nbhd_sm80_boxes(problem, &shape, &candidate, &ctas), ctas, fit, machine);
        if (found && ms >= config->predicted_ms)
            continue;
        found = true;
        *boxes = candidate;
        *config = (struct nbhd_config){.variant = i, .stages = v->stages, .threads = 32 * v->warps, .predicted_ms = ms};
        for (int a = 0; a < 3; a++) {
            config->q_tile[a] = candidate.row_box[a];
            config->k_tile[a] = candidate.column_box[a];
        }
    }
    return found;
}

static int configs(const struct nbhd_problem *problem, struct nbhd_config *config, int room)
{
    struct nbhd_cuda_machine machine;
    struct nbhd_boxes_sm80 boxes;
    (void)room;
    *config = (struct nbhd_config){.variant = VARIANTS - 1};
    if (!nbhd_cuda_machine(&machine))
        choose(problem, &machine, config, &boxes);
    return 1;
}

static nbhd_status build(struct nbhd_plan *plan)
{
    const struct nbhd_problem *p = &plan->problem;
    struct nbhd_cuda_machine machine;
    struct nbhd_options options = {.used = 0};
    struct state *state = plan->state = calloc(1, sizeof *state);
    if (!state)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's state could not be allocated");
    nbhd_status status = nbhd_cuda_machine(&machine);
    if (status)
        return status;
    if (!choose(p, &machine, &plan->config, &state->boxes))
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "no tile of cuda.fwd_sm80 fits the GPU's %d bytes of shared memory",
                         machine.shared_max);
    const struct variant *v = &variants[plan->config.variant];
    struct nbhd_boxes_sm80 *b = &state->boxes;
    b->scale_log2 = 1.44269504f * (scaled(&p->desc) ? 1 : p->desc.scale);
    b->reverse = p->axis[0].edge == NBHD_EDGE_CAUSAL || p->axis[1].edge == NBHD_EDGE_CAUSAL ||
                 p->axis[2].edge == NBHD_EDGE_CAUSAL;
    nbhd_option(&options, "-DNBHD_HEAD_DIM=%d -DNBHD_HEAD_DIM_V=%d -DNBHD_BF16=%d", p->desc.head_dim, p->desc.head_dim_v,
                p->desc.dtype == NBHD_BF16);
    nbhd_option(&options, "-DNBHD_ROWS=%d -DNBHD_WARPS=%d -DNBHD_N=%d -DNBHD_STAGES=%d", v->rows, v->warps, v->n, v->stages);
    nbhd_option(&options, "-DNBHD_CTAS=%d -DNBHD_BIAS=%d -DNBHD_SCALED=%d", resident(v, &p->desc, &machine),
                p->desc.bias != 0, scaled(&p->desc));
    double blocks = (double)p->desc.batch * (p->desc.heads / b->pack);
    for (int i = 0; i < 3; i++)
        blocks *= (double)b->tiles[i] * p->axis[i].dilation;
    if (blocks > INT_MAX)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "the problem has %.0f tiles; cuda.fwd_sm80 launches %d at most", blocks, INT_MAX);
    state->grid = (struct nbhd_cuda_grid){.blocks = {(unsigned)blocks, 1, 1},
                                          .threads = {32 * (unsigned)v->warps, 1, 1},
                                          .shared = (unsigned)shared_bytes(v, &p->desc)};
    snprintf(plan->describe, sizeof plan->describe, "%d rows, %d keys a step: boxes %dx%dx%d, %dx%dx%d, %d heads, %d stages",
             v->rows, v->n, b->row_box[0], b->row_box[1], b->row_box[2], b->column_box[0], b->column_box[1],
             b->column_box[2], b->pack, v->stages);
    status = nbhd_cuda_acquire(&state->module, "fwd_sm80.cu", &options, p->flags);
    return status ? status : nbhd_cuda_function(&state->function, state->module, "nbhd_fwd_sm80");
}

static nbhd_status run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const struct state *state = plan->state;
    struct nbhd_boxes_sm80 boxes = state->boxes;
    const struct nbhd_view *views[] = {&params->q, &params->k, &params->v, &params->o, &params->extra_k, &params->extra_v};
    (void)workspace;
    boxes.wide = nbhd_sm80_wide(views, 6, params->head_dim, params->head_dim_v);
    return nbhd_cuda_launch(state->module, state->function, &state->grid, stream, (void *[]){(void *)params, &boxes});
}

static void drop(struct nbhd_plan *plan)
{
    struct state *state = plan->state;
    if (state)
        nbhd_cuda_release(state->module);
    free(state);
}

const struct nbhd_kernel_ops nbhd_cuda_fwd_sm80 = {refuse, configs, build, run, drop};
