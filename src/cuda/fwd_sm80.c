/* Host half of fwd_sm80.cu: which tile, which boxes, and the launch. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/sm80.h"

/* 64-row tiles waste less where windows are small or tiles few; the last ones are for wide heads and little memory. */
static const struct nbhd_sm80_variant variants[] = {
    {128, 4, 64, 2}, {128, 4, 32, 2}, {128, 4, 32, 1}, {64, 4, 64, 2},
    {64, 4, 64, 1},  {64, 4, 32, 2},  {64, 4, 32, 1},  {64, 4, 16, 1},
};
enum { VARIANTS = sizeof variants / sizeof *variants };

struct state {
    struct nbhd_cuda_module *module;
    struct CUfunc_st *function;
    struct nbhd_cuda_grid grid;
    struct nbhd_boxes_sm80 boxes;
};

/* Whether scores are scaled before their maximum is taken. */
static bool scaled(const nbhd_desc *d) { return d->bias || d->scale < 0; }

/* Biases are read ahead, more of them where a warp has 32 rows. */
static int accumulators(const struct nbhd_sm80_variant *v, const nbhd_desc *d)
{
    const int rows = v->rows / v->warps, ahead = scaled(d) && rows > 16 ? 24 : 0;
    return rows * (nbhd_sm80_padded(d->head_dim_v) + v->n) / 32 + ahead;
}

static int shared(const struct nbhd_sm80_variant *v, const nbhd_desc *d)
{
    const int k = nbhd_sm80_pitch(d, d->head_dim), w = nbhd_sm80_pitch(d, d->head_dim_v);
    return v->rows * nbhd_max(k, w) + v->stages * v->n * (k + w) + nbhd_sm80_tables(v, 2) + nbhd_sm80_biases(v, d);
}

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT]) { return nbhd_sm80_refuses(problem, why); }

/* The variants that fit, best first; only: that one if it is not negative. */
static int choose(const struct nbhd_problem *problem, const struct nbhd_cuda_machine *machine, int only,
                  struct nbhd_sm80_choice *choices, int room)
{
    const nbhd_desc *d = &problem->desc;
    /* What ptxas 12.9 to 13.5 compiles without spills; that of 13.0 for sm_100 less, if Q is narrower than O. */
    const bool tight = d->dtype == NBHD_F32 || (d->head_dim < d->head_dim_v && machine->cc / 10 == 10);
    const struct nbhd_sm80_kernel kernel = {.variants = variants + (only < 0 ? 0 : only),
                                            .count = only < 0 ? VARIANTS : 1,
                                            .packs = true,
                                            .width = nbhd_sm80_padded(d->head_dim) + nbhd_sm80_padded(d->head_dim_v),
                                            .most_accumulators = scaled(d) ? 152 : tight ? 176 : 192,
                                            .others = scaled(d) ? 88 : 64,
                                            .fixed = nbhd_sm80_fixed(problem),
                                            .accumulators = accumulators,
                                            .shared = shared};
    return nbhd_sm80_choose(choices, room, problem, &kernel, machine);
}

static int configs(const struct nbhd_problem *problem, struct nbhd_config *config, int room)
{
    struct nbhd_cuda_machine machine;
    struct nbhd_sm80_choice choices[NBHD_SM80_VARIANTS];
    *config = (struct nbhd_config){.variant = 0};
    if (nbhd_cuda_machine(&machine))
        return 1;
    const int count = choose(problem, &machine, -1, choices, nbhd_min(room, NBHD_SM80_VARIANTS));
    for (int i = 0; i < count; i++) {
        const struct nbhd_sm80_choice *c = &choices[i];
        config[i] = (struct nbhd_config){.variant = (int)(c->variant - variants),
                                         .stages = c->variant->stages,
                                         .threads = 32 * c->variant->warps,
                                         .predicted_ms = c->ms,
                                         .many = problem->flags & NBHD_PROBLEM_MANY};
        memcpy(config[i].q_tile, c->boxes.row_box, sizeof config[i].q_tile);
        memcpy(config[i].k_tile, c->boxes.column_box, sizeof config[i].k_tile);
    }
    return nbhd_max(count, 1);
}

static nbhd_status compile(struct nbhd_plan *plan, struct state *state, const struct nbhd_sm80_choice *c)
{
    const nbhd_desc *d = &plan->problem.desc;
    struct nbhd_options options = {.used = 0};
    nbhd_sm80_options(&options, d, c);
    nbhd_option(&options, "-DNBHD_STAGES=%d -DNBHD_SCALED=%d", c->variant->stages, scaled(d));
    if (plan->problem.flags & NBHD_PROBLEM_MANY)
        nbhd_option(&options, "-DNBHD_MANY=1");
    const nbhd_status status = nbhd_cuda_acquire(&state->module, "fwd_sm80.cu", &options, plan->problem.flags);
    return status ? status : nbhd_cuda_function(&state->function, state->module, "nbhd_fwd_sm80");
}

static bool all_wide(const nbhd_desc *desc, const struct nbhd_params *p)
{
    const struct nbhd_view *views[] = {&p->q, &p->k, &p->v, &p->o, &p->extra_k, &p->extra_v};
    return nbhd_sm80_wide(desc, views, 6);
}

static nbhd_status run_many(const struct nbhd_plan *plan, const struct nbhd_params *params, struct nbhd_parts *parts,
                            void *workspace, void *stream)
{
    const struct state *state = plan->state;
    struct nbhd_boxes_sm80 boxes = state->boxes;
    struct nbhd_cuda_grid grid = state->grid;
    (void)workspace;
    const double blocks = nbhd_sm80_many(&plan->problem, &boxes, false, params->heads, parts);
    if (blocks > INT_MAX)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "the sequences have %.0f tiles; cuda.fwd_sm80 launches %d at most",
                         blocks, INT_MAX);
    grid.blocks[0] = (unsigned)blocks;
    boxes.wide = all_wide(&plan->problem.desc, params);
    return nbhd_cuda_launch(state->module, state->function, &grid, stream, (void *[]){(void *)params, parts, &boxes});
}

static nbhd_status build(struct nbhd_plan *plan)
{
    const nbhd_desc *d = &plan->problem.desc;
    struct nbhd_cuda_machine machine;
    struct nbhd_sm80_choice choice;
    struct state *state = plan->state = calloc(1, sizeof *state);
    if (!state)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's state could not be allocated");
    const nbhd_status status = nbhd_cuda_machine(&machine);
    if (status)
        return status;
    if (plan->config.variant < 0 || plan->config.variant >= VARIANTS ||
        !choose(&plan->problem, &machine, plan->config.variant, &choice, 1))
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED,
                         "variant %d of cuda.fwd_sm80 does not fit the GPU's %d bytes of shared "
                         "memory",
                         plan->config.variant, machine.shared_max);
    const struct nbhd_boxes_sm80 *b = &choice.boxes;
    const double blocks = nbhd_sm80_blocks(&plan->problem, b, d->heads);
    if (blocks > INT_MAX)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "the problem has %.0f tiles; cuda.fwd_sm80 launches %d at most",
                         blocks, INT_MAX);
    state->boxes = *b;
    plan->run_many = plan->config.many ? run_many : NULL;
    state->boxes.scale_log2 = 1.44269504f * (scaled(d) ? 1 : d->scale);
    state->grid = (struct nbhd_cuda_grid){.blocks = {(unsigned)blocks, 1, 1},
                                          .threads = {32 * (unsigned)choice.variant->warps, 1, 1},
                                          .shared = (unsigned)shared(choice.variant, d)};
    snprintf(plan->describe, sizeof plan->describe, "%d rows of %d heads in boxes %dx%dx%d, %d keys in boxes %dx%dx%d",
             choice.variant->rows, b->pack, b->row_box[0], b->row_box[1], b->row_box[2], choice.variant->n,
             b->column_box[0], b->column_box[1], b->column_box[2]);
    return compile(plan, state, &choice);
}

static nbhd_status run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const struct state *state = plan->state;
    struct nbhd_boxes_sm80 boxes = state->boxes;
    (void)workspace;
    boxes.wide = all_wide(&plan->problem.desc, params);
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
