/* What a plan of bwd_sm90 costs, by a model fitted to docs/notes/hopper-backward.md and hopper-backward-dq.md, and what
 * it needs of registers, shared memory and mask columns. */
#include <math.h>
#include "cuda/sm90_bwd_search.h"

enum {
    MASK_COLUMNS = 32,
    MOST_MASKED = 32000 /* queries of an axis that mask columns can tell apart */
};

static int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* ---- the model, in clocks of one multiprocessor ---- */

/* A step: five products (without dQ four); shared memory keeps them from the full rate. Tiles must come from the L2. */
static double step_clocks(const nbhd_desc *d, const struct nbhd_sm90_bwd_plan *p)
{
    const int k = (d->head_dim + 15) / 16 * 16, v = (d->head_dim_v + 15) / 16 * 16;
    if (p->adds_dq) /* the way of dS and dQ through shared memory is hidden in part */
        return 1.1 * 256 * p->n * (2 * k + 2 * v + (k + 63) / 64 * 64) / 4096 + 4.5 * p->n + 600;
    const double scores = p->blocks * (k + v) / 16 * fmax(p->n / 2, 16 + p->n / 4); /* A and B from shared memory */
    const double products = scores + p->blocks * p->n * (k + v) / 32;
    const double load = p->n * (double)(d->head_dim + d->head_dim_v) * 2 / 32;
    if (p->apart)
        return fmax(1.2 * products + 100, load);
    if (p->groups == 2)
        return fmax(0.58 * products + 4.4 * p->n + 1210, load);
    return fmax(1.25 * products + 2.25 * p->n + 80 + 1.5 * nbhd_max(0, 80 - p->n), load);
}

/* Whether two warpgroups keep P only packed, for want of the registers for S beside it. */
static bool packs(const nbhd_desc *d, const struct nbhd_sm90_bwd_plan *p)
{
    return p->groups == 2 && !p->apart && (d->head_dim + d->head_dim_v) / 2 + 3 * p->n / 2 > 224;
}

/* What a step takes longer whose dQ becomes integers. */
static double integer_clocks(const nbhd_desc *d, const struct nbhd_sm90_bwd_plan *p)
{
    return 0.055 * p->n * ((d->head_dim + 63) / 64 * 64);
}

static double mask_clocks(const nbhd_desc *d, const struct nbhd_sm90_bwd_plan *p)
{
    if (p->adds_dq)
        return 50 + 100 * p->mask_steps;
    const int packed = !packs(d, p) ? 0 : p->mask_bits ? 1500 : 400 + 150 * p->mask_steps;
    return (50 + 50 * p->mask_steps) * p->blocks + packed;
}

/* Statistics, zeroing and conversion of dQ: bytes, at what the memory gives. */
static double rows_ms(const struct nbhd_bwd_search *s, const struct nbhd_sm90_bwd_plan *p)
{
    const nbhd_desc *d = &s->problem->desc;
    double rows = (double)d->batch * d->heads;
    for (int a = 0; a < 3; a++)
        rows *= s->problem->axis[a].length;
    const bool integers = p->adds_dq == NBHD_DQ_INTEGERS; /* which look at K and V, too */
    return rows * (4 * d->head_dim_v + (p->adds_dq ? 10 * d->head_dim : 0) + 16) / 3.4e9 +
           (integers ? rows * d->kv_heads / d->heads * 2 * (d->head_dim + d->head_dim_v) / 3.4e9 : 0);
}

double nbhd_sm90_bwd_ms(const struct nbhd_bwd_search *s, const struct nbhd_sm90_bwd_plan *p)
{
    const nbhd_desc *d = &s->problem->desc;
    const double share = (double)d->heads / d->kv_heads, slices = (double)d->batch * d->kv_heads;
    const double masked = p->boxes - p->full_boxes, tile = 11000.0 / p->ctas;
    const double steps = (p->seen + p->boxes) / 2; /* a block that skips a box waits for the other now and then */
    const double step = step_clocks(d, p) + (p->adds_dq == NBHD_DQ_INTEGERS ? integer_clocks(d, p) : 0);
    const double clocks = share * (steps * step + masked * mask_clocks(d, p)) + p->tiles * tile;
    const double waves = p->tiles * slices / (s->multiprocessors * p->ctas);
    const double uneven = waves > 8 ? 1 + 0.5 / waves : ceil(waves) / waves;
    return clocks * slices / s->multiprocessors * uneven / 1.755e6 + rows_ms(s, p);
}

/* ---- what fits ---- */

const struct nbhd_sm90_bwd_kind nbhd_sm90_bwd_kinds[NBHD_SM90_BWD_KINDS] = {
    {2, 2, 1, 240, 0}, {1, 1, 2, 232, 0}, {1, 1, 3, 136, 0}, {2, 1, 1, 240, 1}};

int nbhd_sm90_bwd_registers(const struct nbhd_sm90_bwd_plan *plan)
{
    int kind = 0;
    while (kind < NBHD_SM90_BWD_KINDS - 1 && nbhd_sm90_bwd_kinds[kind].ctas != plan->ctas)
        kind++;
    return nbhd_sm90_bwd_kinds[kind].registers;
}

int nbhd_sm90_bwd_shared(const struct nbhd_problem *problem, const struct nbhd_sm90_bwd_plan *plan)
{
    const int k = ceil_div(problem->desc.head_dim, 64), v = ceil_div(problem->desc.head_dim_v, 64), n = plan->n;
    const int tiles = (k + v) * 64 * plan->blocks + 2 * (k + v) * n;
    const int others = plan->adds_dq ? 4 * n + 2 * k * n : plan->apart ? 2 * plan->blocks * n + 1 : 0;
    return 128 * (tiles + others) + plan->mask_steps * (plan->blocks * 128 + n) * 32 + NBHD_BWD_SM90_TABLES(n) +
           (plan->adds_dq == NBHD_DQ_INTEGERS ? NBHD_BWD_SM90_FINENESS(n) : 0);
}

/* Lays out the mask columns; false if they are too many. A problem of one axis compares coordinates instead. There is
 * one at least, as rows past a box of keys are masked by it: a probability of 0 - logsumexp may be infinite there. */
static bool lay_out_mask(const struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *p)
{
    p->mask_bits = s->one_axis;
    p->mask_steps = 0;
    for (int i = 0; i < p->shapes; i++) {
        int columns = 0;
        for (int a = 0; a < 3; a++) {
            const struct nbhd_bwd_axis *m = &s->memo[a];
            const bool none = a == 2 && columns == 0;
            const bool needed = !s->one_axis && (m->queries > 1 || m->keys > 1 || none);
            if (needed && m->queries > MOST_MASKED)
                return false;
            p->mask_at[i][a] = needed ? columns : -1;
            columns += needed ? p->q_box[i][a] : 0;
        }
        p->mask_steps = nbhd_max(p->mask_steps, ceil_div(columns, 16));
    }
    return 16 * p->mask_steps <= MASK_COLUMNS;
}

/* Registers that dK, dV, S, dP, P and dS of a consumer thread take: more than this does not compile without spills or
 * serialized products. The A operand of a second mask step wants a few more. Two warpgroups can do without S beside
 * P. */
static bool has_registers(const nbhd_desc *d, const struct nbhd_sm90_bwd_plan *p)
{
    if (p->apart)
        return nbhd_max(d->head_dim, d->head_dim_v) / 2 + 3 * p->n / 4 <= nbhd_sm90_bwd_registers(p) - 16;
    const int others = p->mask_steps > 1 ? 28 : 16, sums = (d->head_dim + d->head_dim_v) / 2;
    if (packs(d, p))
        return sums + p->n <= 224 - others;
    return sums + 3 * p->n / 2 <= nbhd_sm90_bwd_registers(p) - others;
}

bool nbhd_sm90_bwd_fits(const struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *p)
{
    return lay_out_mask(s, p) && has_registers(&s->problem->desc, p) &&
           nbhd_sm90_bwd_shared(s->problem, p) <= (s->shared_max + 1024) / p->ctas - 1024;
}
