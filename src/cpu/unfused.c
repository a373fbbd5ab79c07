/* What the unfused rows have in common: which products a pass is, and planning. See unfused.h. */
#include <math.h>
#include <stdio.h>
#include "cpu/cpu.h"
#include "cpu/unfused.h"

static struct nbhd_product product(const struct nbhd_params *p, int dtype, enum nbhd_product_kind kind,
                                   const struct nbhd_view *query, const struct nbhd_view *key,
                                   const struct nbhd_view *scores, bool of_values)
{
    struct nbhd_product r = {.kind = kind, .batch = p->batch, .heads = p->heads, .kv_heads = p->kv_heads,
                             .dtype = dtype, .width = of_values ? p->head_dim_v : p->head_dim, .query = *query,
                             .key = *key, .scores = *scores, .scale = of_values ? 1.0f : p->scale, .fill = 0.0f};
    for (int i = 0; i < 3; i++)
        r.axis[i] = p->axis[i];
    return r;
}

int nbhd_unfused_products(const struct nbhd_plan *plan, const struct nbhd_params *p, struct nbhd_product products[2])
{
    const int dtype = plan->problem.desc.dtype;
    switch (plan->problem.desc.pass) {
    case NBHD_QK:
        products[0] = product(p, dtype, WRITES_SCORES, &p->q, &p->k, &p->scores, false);
        products[0].bias = p->bias;
        products[0].fill = -INFINITY;
        return 1;
    case NBHD_AV:
        products[0] = product(p, dtype, WRITES_QUERIES, &p->o, &p->v, &p->scores, true);
        return 1;
    case NBHD_QK_BACKWARD:
        products[0] = product(p, dtype, WRITES_QUERIES, &p->dq, &p->k, &p->dscores, false);
        products[1] = product(p, dtype, WRITES_KEYS, &p->q, &p->dk, &p->dscores, false);
        return 2;
    default:
        products[0] = product(p, dtype, WRITES_SCORES, &p->dout, &p->v, &p->dscores, true);
        products[1] = product(p, dtype, WRITES_KEYS, &p->dout, &p->dv, &p->scores, true);
        return 2;
    }
}

long long nbhd_unfused_table_entries(const struct nbhd_problem *problem)
{
    long long entries = 1;
    for (int i = 0; i < 3; i++)
        entries *= 2LL * problem->axis[i].window - 1;
    return entries;
}

int nbhd_unfused_table_parts(const struct nbhd_problem *problem)
{
    enum { MOST_PARTS = 16 };
    const double most_floats = 4e6; /* all partial tables together: 16 MB, or one table where that is more */
    const long long lines = (long long)problem->desc.batch * problem->axis[0].length * problem->axis[1].length;
    const double tables = most_floats / ((double)nbhd_unfused_table_entries(problem) * problem->desc.heads);
    const int parts = tables < 1 ? 1 : tables < MOST_PARTS ? (int)tables : MOST_PARTS;
    return lines < parts ? (int)lines : parts;
}

bool nbhd_unfused_refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    if (problem->desc.dtype == NBHD_F64)
        return nbhd_refuse(why, "dtype is f64; it computes f32, f16 and bf16");
    return false;
}

int nbhd_unfused_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room)
{
    (void)room;
    const long long segments = (long long)problem->desc.batch * problem->desc.heads * problem->axis[0].length *
                               problem->axis[1].length * nbhd_segments(problem->axis[2].length);
    configs[0] = (struct nbhd_config){.threads = nbhd_plan_threads(problem, segments)};
    return 1;
}

nbhd_status nbhd_unfused_build(struct nbhd_plan *plan, size_t real, const char *describe)
{
    const struct nbhd_problem *p = &plan->problem;
    if (p->desc.pass == NBHD_QK_BACKWARD && p->desc.bias)
        plan->workspace = real * (size_t)(nbhd_unfused_table_entries(p) * p->desc.heads * nbhd_unfused_table_parts(p));
    snprintf(plan->describe, sizeof plan->describe, "%s, %d threads", describe, plan->config.threads);
    return NBHD_OK;
}
