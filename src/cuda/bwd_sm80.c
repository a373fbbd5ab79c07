/* Host half of bwd_sm80.cu, bwd_sm80_dq.cu and bwd_sm80_dbias.cu: the launches that make up a backward.
 *
 *     dq        queries stationary; leaves every query's statistics in the workspace
 *     dk dv     keys stationary; both at once where registers allow, else one after the other
 *     the same for extra keys, as an axis of their own that every query sees whole
 *     dbias     where it is asked for: tables of parts of the queries, into the workspace; their sum */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include "cuda/sm80.h"

static const struct nbhd_sm80_variant key_variants[] = {
    {128, 4, 64, 2}, {128, 4, 32, 2}, {64, 4, 64, 2}, {64, 4, 32, 2}, {64, 4, 16, 2}, {32, 2, 16, 2},
};
static const struct nbhd_sm80_variant query_variants[] = {
    {128, 4, 64, 2}, {128, 4, 32, 2}, {64, 4, 64, 2}, {64, 4, 32, 2}, {64, 4, 16, 2}, {32, 2, 16, 2},
};

static const struct nbhd_sm80_variant bias_variants[] = {
    {64, 4, 64, 2}, {64, 4, 32, 2}, {64, 4, 16, 2}, {32, 2, 16, 2},
};

struct launch {
    struct CUfunc_st *function;
    struct nbhd_cuda_grid grid;
    struct nbhd_boxes_sm80 boxes;
};

/* keys[i], extra[i]: with both sums i is 0; split, 0 is dV and 1 is dK. */
struct state {
    struct nbhd_cuda_module *key_module[2], *query_module, *bias_module;
    struct CUfunc_st *bias_sum;
    struct nbhd_cuda_grid bias_sum_grid;
    struct launch keys[2], extra[2], queries, bias;
    struct nbhd_axis extra_axis[3];
    int parts;      /* launches for dK and dV */
    int bias_parts; /* tables of biases of a head */
    size_t tables;  /* where they begin in the workspace */
};

/* ---- what a variant needs ---- */

/* Columns computed at once: NBHD_PART. */
static int part(const struct nbhd_sm80_variant *v) { return nbhd_min(v->n, 32); }

/* Of sums so wide, S and dP; biases are read ahead, more of them where a warp has 32 rows, and wide rows have more
 * addresses. */
static int accumulators(const struct nbhd_sm80_variant *v, const nbhd_desc *d, int width)
{
    const int rows = v->rows / v->warps;
    return rows * (width + 2 * part(v)) / 32 + (d->bias && rows > 16 ? 32 : 0) + (width > 288 ? 16 : 0);
}

static int both_accumulators(const struct nbhd_sm80_variant *v, const nbhd_desc *d)
{
    return accumulators(v, d, nbhd_sm80_padded(d->head_dim) + nbhd_sm80_padded(d->head_dim_v));
}

/* Of the kernel for dK alone, and enough for that for dV. */
static int one_accumulators(const struct nbhd_sm80_variant *v, const nbhd_desc *d)
{
    const int widest = d->head_dim > d->head_dim_v ? d->head_dim : d->head_dim_v;
    return accumulators(v, d, nbhd_sm80_padded(widest));
}

static int query_accumulators(const struct nbhd_sm80_variant *v, const nbhd_desc *d)
{
    return accumulators(v, d, nbhd_sm80_padded(d->head_dim));
}

static int bias_accumulators(const struct nbhd_sm80_variant *v, const nbhd_desc *d)
{
    return accumulators(v, d, 0);
}

static int shared_rows(const struct nbhd_sm80_variant *v, const nbhd_desc *d)
{
    return (v->rows + v->stages * v->n) * (nbhd_sm80_pitch(d, d->head_dim) + nbhd_sm80_pitch(d, d->head_dim_v)) +
           nbhd_sm80_biases(v, d);
}

static int key_shared(const struct nbhd_sm80_variant *v, const nbhd_desc *d)
{
    return shared_rows(v, d) + 16 * v->n + nbhd_sm80_tables(v, 3);
}

static int query_shared(const struct nbhd_sm80_variant *v, const nbhd_desc *d)
{
    return shared_rows(v, d) + 8 * v->rows + nbhd_sm80_tables(v, 2);
}

static int bias_shared(const struct nbhd_sm80_variant *v, const nbhd_desc *d)
{
    return query_shared(v, d) + 4 * v->rows * (v->n + 1);
}

/* ---- the choice ---- */

struct choices {
    struct nbhd_sm80_choice keys, extra, queries, bias;
    bool split;
};

static bool choose_bias(const struct nbhd_problem *problem, const struct nbhd_cuda_machine *machine, struct choices *c)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_sm80_kernel bias = {.variants = bias_variants,
                                          .count = sizeof bias_variants / sizeof *bias_variants,
                                          .width = nbhd_sm80_padded(d->head_dim) + nbhd_sm80_padded(d->head_dim_v),
                                          .most_accumulators = 192,
                                          .others = 140,
                                          .accumulators = bias_accumulators,
                                          .shared = bias_shared};
    return nbhd_sm80_choose(&c->bias, 1, problem, &bias, machine) == 1;
}

static bool choose(const struct nbhd_problem *problem, const struct nbhd_cuda_machine *machine, struct choices *c)
{
    const nbhd_desc *d = &problem->desc;
    const int k = nbhd_sm80_padded(d->head_dim), v = nbhd_sm80_padded(d->head_dim_v);
    /* ptxas 12.9 to 13.5 spills none, for any generation */
    const int most = d->bias ? 160 : d->dtype == NBHD_F32 ? 176 : 192;
    struct nbhd_sm80_kernel keys = {.variants = key_variants,
                                    .count = sizeof key_variants / sizeof *key_variants,
                                    .inverse = true,
                                    .width = 2 * (k + v),
                                    .most_accumulators = most,
                                    .others = 76,
                                    .fixed = nbhd_sm80_fixed(problem),
                                    .accumulators = both_accumulators,
                                    .shared = key_shared};
    const struct nbhd_sm80_kernel queries = {.variants = query_variants,
                                             .count = sizeof query_variants / sizeof *query_variants,
                                             .packs = true,
                                             .width = 2 * k + v,
                                             .most_accumulators = most,
                                             .others = 76,
                                             .fixed = nbhd_sm80_fixed(problem),
                                             .accumulators = query_accumulators,
                                             .shared = query_shared};
    c->split = !nbhd_sm80_choose(&c->keys, 1, problem, &keys, machine);
    if (c->split) {
        keys.accumulators = one_accumulators;
        keys.width = 3 * k + 2 * v;
        if (!nbhd_sm80_choose(&c->keys, 1, problem, &keys, machine))
            return false;
    }
    if (!nbhd_sm80_choose(&c->queries, 1, problem, &queries, machine))
        return false;
    if (d->bias && !choose_bias(problem, machine, c))
        return false;
    if (d->extra) { /* by the same code: only its boxes are chosen */
        const struct nbhd_problem p = nbhd_cuda_extra_problem(problem);
        keys.variants = c->keys.variant;
        keys.count = 1;
        return nbhd_sm80_choose(&c->extra, 1, &p, &keys, machine) == 1;
    }
    return true;
}

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT]) { return nbhd_sm80_refuses(problem, why); }

static int configs(const struct nbhd_problem *problem, struct nbhd_config *config, int room)
{
    struct nbhd_cuda_machine machine;
    struct choices c;
    (void)room;
    *config = (struct nbhd_config){.variant = 0};
    if (nbhd_cuda_machine(&machine) || !choose(problem, &machine, &c))
        return 1;
    *config = (struct nbhd_config){.variant = c.split,
                                   .stages = 2,
                                   .threads = 32 * c.keys.variant->warps,
                                   .predicted_ms = c.keys.ms + c.queries.ms + (problem->desc.extra ? c.extra.ms : 0) +
                                                   (problem->desc.bias ? c.bias.ms : 0),
                                   .many = problem->flags & NBHD_PROBLEM_MANY && !problem->desc.extra &&
                                           !problem->desc.bias};
    for (int i = 0; i < 3; i++) {
        config->q_tile[i] = c.queries.boxes.row_box[i];
        config->k_tile[i] = c.keys.boxes.row_box[i];
    }
    return 1;
}

/* ---- building ---- */

static nbhd_status compile(struct nbhd_cuda_module **module, struct CUfunc_st **function, const struct nbhd_problem *p,
                           const struct nbhd_sm80_choice *c, const char *file, const char *name, const char *parts)
{
    struct nbhd_options options = {.used = 0};
    nbhd_sm80_options(&options, &p->desc, c);
    nbhd_option(&options, "-DNBHD_PART=%d%s", part(c->variant), parts);
    if (p->flags & NBHD_PROBLEM_MANY)
        nbhd_option(&options, "-DNBHD_MANY=1");
    const nbhd_status status = nbhd_cuda_acquire(module, file, &options, p->flags);
    return status ? status : nbhd_cuda_function(function, *module, name);
}

static nbhd_status set_launch(struct launch *launch, const struct nbhd_problem *p, const struct nbhd_sm80_choice *c,
                              int heads, int shared)
{
    const double blocks = nbhd_sm80_blocks(p, &c->boxes, heads);
    if (blocks > INT_MAX)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "the problem has %.0f tiles; cuda.bwd_sm80 launches %d at most",
                         blocks, INT_MAX);
    launch->boxes = c->boxes;
    launch->boxes.scale_log2 = 1.44269504f * (p->desc.bias ? 1 : p->desc.scale);
    launch->grid = (struct nbhd_cuda_grid){.blocks = {(unsigned)blocks, 1, 1},
                                           .threads = {32 * (unsigned)c->variant->warps, 1, 1},
                                           .shared = (unsigned)shared};
    return NBHD_OK;
}

static nbhd_status build_keys(struct state *state, const struct nbhd_problem *p, const struct choices *c)
{
    static const char *const parts[] = {" -DNBHD_DK=1 -DNBHD_DV=1", " -DNBHD_DK=0 -DNBHD_DV=1",
                                        " -DNBHD_DK=1 -DNBHD_DV=0"};
    const struct nbhd_problem extra = nbhd_cuda_extra_problem(p);
    nbhd_status status = NBHD_OK;
    state->parts = c->split ? 2 : 1;
    for (int i = 0; i < state->parts && !status; i++) {
        const int bytes = key_shared(c->keys.variant, &p->desc);
        status = compile(&state->key_module[i], &state->keys[i].function, p, &c->keys, "bwd_sm80.cu",
                         "nbhd_bwd_sm80_dkdv", parts[c->split + i]);
        if (!status)
            status = set_launch(&state->keys[i], p, &c->keys, p->desc.kv_heads, bytes);
        if (!status && p->desc.extra)
            status = set_launch(&state->extra[i], &extra, &c->extra, p->desc.kv_heads, bytes);
        state->extra[i].function = state->keys[i].function;
    }
    for (int i = 0; i < 3; i++)
        state->extra_axis[i] = extra.axis[i];
    return status;
}

/* Bytes of the queries' statistics. */
static size_t stats_bytes(const struct nbhd_problem *p)
{
    size_t queries = (size_t)p->desc.batch * (size_t)p->desc.heads;
    for (int i = 0; i < 3; i++)
        queries *= (size_t)p->axis[i].length;
    return 8 * queries;
}

/* As many tables as there are CTAs at a time, but not more than 64 MiB of them. */
static nbhd_status build_bias(struct state *state, const struct nbhd_problem *p, const struct choices *c,
                              const struct nbhd_cuda_machine *machine, size_t *workspace)
{
    const struct nbhd_sm80_choice *choice = &c->bias;
    nbhd_status status = compile(&state->bias_module, &state->bias.function, p, choice, "bwd_sm80_dbias.cu",
                                 "nbhd_bwd_sm80_dbias", "");
    if (!status)
        status = nbhd_cuda_function(&state->bias_sum, state->bias_module, "nbhd_bwd_sm80_dbias_sum");
    if (!status)
        status = set_launch(&state->bias, p, choice, p->desc.heads, bias_shared(choice->variant, &p->desc));
    if (status)
        return status;
    int entries = p->desc.heads; /* at most INT_MAX / 2: refuse */
    for (int i = 0; i < 3; i++)
        entries *= 2 * p->axis[i].window - 1;
    const int tiles = (int)state->bias.grid.blocks[0] / p->desc.heads, room = (64 << 20) / 4 / entries;
    const int at_a_time = choice->resident * machine->multiprocessors / p->desc.heads;
    state->bias_parts = nbhd_max(1, nbhd_min(tiles, nbhd_min(at_a_time, room)));
    state->bias.grid.blocks[0] = (unsigned)(state->bias_parts * p->desc.heads);
    state->bias_sum_grid =
        (struct nbhd_cuda_grid){.blocks = {(unsigned)(entries + 255) / 256, 1, 1}, .threads = {256, 1, 1}};
    state->tables = *workspace;
    *workspace += (size_t)entries * (size_t)state->bias_parts * 4;
    return NBHD_OK;
}

static nbhd_status run_many(const struct nbhd_plan *plan, const struct nbhd_params *params, struct nbhd_parts *parts,
                            void *workspace, void *stream);

static nbhd_status build(struct nbhd_plan *plan)
{
    const struct nbhd_problem *p = &plan->problem;
    struct nbhd_cuda_machine machine;
    struct choices c;
    struct state *state = plan->state = calloc(1, sizeof *state);
    if (!state)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's state could not be allocated");
    nbhd_status status = nbhd_cuda_machine(&machine);
    if (status)
        return status;
    if (!choose(p, &machine, &c))
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "no tile of cuda.bwd_sm80 fits the GPU's %d bytes of shared memory",
                         machine.shared_max);
    plan->run_many = plan->config.many ? run_many : NULL;
    const int *k = c.keys.boxes.row_box, *kq = c.keys.boxes.column_box;
    const int *q = c.queries.boxes.row_box, *qk = c.queries.boxes.column_box;
    snprintf(plan->describe, sizeof plan->describe,
             "dK dV: %d keys %dx%dx%d by %d queries %dx%dx%d%s; dQ: %d queries "
             "%dx%dx%d of %d heads by %d keys %dx%dx%d",
             c.keys.variant->rows, k[0], k[1], k[2], c.keys.variant->n, kq[0], kq[1], kq[2],
             c.split ? ", one by one" : "", c.queries.variant->rows, q[0], q[1], q[2], c.queries.boxes.pack,
             c.queries.variant->n, qk[0], qk[1], qk[2]);
    if ((status = build_keys(state, p, &c)))
        return status;
    plan->workspace = stats_bytes(p);
    if (p->desc.bias && (status = build_bias(state, p, &c, &machine, &plan->workspace)))
        return status;
    status = compile(&state->query_module, &state->queries.function, p, &c.queries, "bwd_sm80_dq.cu",
                     "nbhd_bwd_sm80_dq", "");
    return status
               ? status
               : set_launch(&state->queries, p, &c.queries, p->desc.heads, query_shared(c.queries.variant, &p->desc));
}

/* ---- running ---- */

static nbhd_status start(const struct nbhd_cuda_module *module, const struct launch *launch,
                         const struct nbhd_params *params, bool wide, void *stats, void *stream)
{
    struct nbhd_boxes_sm80 boxes = launch->boxes;
    boxes.wide = wide;
    return nbhd_cuda_launch(module, launch->function, &launch->grid, stream,
                            (void *[]){(void *)params, &boxes, &stats});
}

static nbhd_status start_bias(const struct state *state, const struct nbhd_params *params, bool wide, char *workspace,
                              void *stream)
{
    struct nbhd_boxes_sm80 boxes = state->bias.boxes;
    char *tables = workspace + state->tables;
    int parts = state->bias_parts;
    boxes.wide = wide;
    const nbhd_status status = nbhd_cuda_launch(state->bias_module, state->bias.function, &state->bias.grid, stream,
                                                (void *[]){(void *)params, &boxes, &workspace, &tables});
    return status ? status
                  : nbhd_cuda_launch(state->bias_module, state->bias_sum, &state->bias_sum_grid, stream,
                                     (void *[]){(void *)params, &tables, &parts});
}

static bool all_wide(const nbhd_desc *desc, const struct nbhd_params *p)
{
    const struct nbhd_view *views[] = {&p->q,  &p->k,  &p->v,       &p->o,       &p->dout,     &p->dq,
                                       &p->dk, &p->dv, &p->extra_k, &p->extra_v, &p->dextra_k, &p->dextra_v};
    return nbhd_sm80_wide(desc, views, sizeof views / sizeof *views);
}

static nbhd_status run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const struct state *state = plan->state;
    int wide = all_wide(&plan->problem.desc, params);
    struct nbhd_params extra = *params;
    extra.k = params->extra_k;
    extra.v = params->extra_v;
    extra.dk = params->dextra_k;
    extra.dv = params->dextra_v;
    extra.extra = 0;
    extra.bias = NULL; /* they have none */
    for (int i = 0; i < 3; i++)
        extra.axis[i] = state->extra_axis[i];
    nbhd_status status = start(state->query_module, &state->queries, params, wide, workspace, stream);
    for (int i = 0; i < state->parts && params->extra && !status; i++)
        status = start(state->key_module[i], &state->extra[i], &extra, wide, workspace, stream);
    for (int i = 0; i < state->parts && !status; i++)
        status = start(state->key_module[i], &state->keys[i], params, wide, workspace, stream);
    return params->dbias && !status ? start_bias(state, params, wide, workspace, stream) : status;
}

/* ---- running many sequences ---- */

static nbhd_status start_many(const struct nbhd_plan *plan, const struct nbhd_cuda_module *module,
                              const struct launch *launch, bool inverse, const struct nbhd_params *params,
                              struct nbhd_parts *parts, void *stats, void *stream)
{
    struct nbhd_boxes_sm80 boxes = launch->boxes;
    struct nbhd_cuda_grid grid = launch->grid;
    const int heads = inverse ? params->kv_heads : params->heads;
    const double blocks = nbhd_sm80_many(&plan->problem, &boxes, inverse, heads, parts);
    if (blocks > INT_MAX)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "the sequences have %.0f tiles; cuda.bwd_sm80 launches %d at most",
                         blocks, INT_MAX);
    boxes.wide = all_wide(&plan->problem.desc, params);
    grid.blocks[0] = (unsigned)blocks;
    return nbhd_cuda_launch(module, launch->function, &grid, stream, (void *[]){(void *)params, parts, &boxes, &stats});
}

static nbhd_status run_many(const struct nbhd_plan *plan, const struct nbhd_params *params, struct nbhd_parts *parts,
                            void *workspace, void *stream)
{
    const struct state *s = plan->state;
    nbhd_status status = start_many(plan, s->query_module, &s->queries, false, params, parts, workspace, stream);
    for (int i = 0; i < s->parts && !status; i++)
        status = start_many(plan, s->key_module[i], &s->keys[i], true, params, parts, workspace, stream);
    return status;
}

static void drop(struct nbhd_plan *plan)
{
    struct state *state = plan->state;
    if (state) {
        nbhd_cuda_release(state->key_module[0]);
        nbhd_cuda_release(state->key_module[1]);
        nbhd_cuda_release(state->query_module);
        nbhd_cuda_release(state->bias_module);
    }
    free(state);
}

const struct nbhd_kernel_ops nbhd_cuda_bwd_sm80 = {refuse, configs, build, run, drop};
