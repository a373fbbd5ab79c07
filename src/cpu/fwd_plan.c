/* See fwd_plan.h: which of the two algorithms runs. */
#include <limits.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include "cpu/cpu.h"
#include "cpu/fwd_choice.h"
#include "cpu/threads.h"

bool nbhd_fwd_refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    const nbhd_desc *d = &problem->desc;
    if (d->dtype == NBHD_F64)
        return nbhd_refuse(why, "dtype is f64; it computes in float32");
    double table = 1;
    for (int i = 0; i < 3 && d->bias; i++)
        table *= 2.0 * problem->axis[i].window - 1;
    if (table * FWD_LANES > INT_MAX)
        return nbhd_refuse(why, "the bias table has %g entries a head; at most %d fit its 32-bit indices", table,
                           INT_MAX / FWD_LANES);
    return false;
}

struct nbhd_config nbhd_fwd_config_of(const struct nbhd_problem *problem, int variant,
                                      const struct nbhd_fwd_choice *choice, int threads)
{
    struct nbhd_config c = {.variant = variant, .stages = choice->heads, .threads = threads};
    for (int a = 0; a < 3; a++) {
        c.q_tile[a] = choice->extent[a];
        c.k_tile[a] = variant == NBHD_FWD_BROADCAST && choice->heads == 1; /* keys one by one, in any order */
    }
    if (variant == NBHD_FWD_PERMUTE)
        c.k_tile[1] = choice->chunk;
    c.predicted_ms = choice->cycles * problem->desc.batch * problem->desc.kv_heads / NBHD_CYCLES_PER_MS;
    return c;
}

static atomic_int forced_variant = -1;

void nbhd_fwd_force(int variant) { atomic_store(&forced_variant, variant); }

int nbhd_fwd_forced(void) { return atomic_load(&forced_variant); }

int nbhd_fwd_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room,
                     const struct nbhd_fwd_machine *machine)
{
    const int threads = problem->desc.threads ? problem->desc.threads : nbhd_threads_available();
    struct nbhd_fwd_choice choices[2] = {[NBHD_FWD_PERMUTE] = {.cycles = HUGE_VAL}};
    choices[NBHD_FWD_BROADCAST] = nbhd_fwd_choose_broadcast(problem, machine);
    if (machine->price.product == 0)
        choices[NBHD_FWD_PERMUTE] = nbhd_fwd_choose_permute(problem, machine, threads);
    const bool possible = choices[NBHD_FWD_PERMUTE].cycles < HUGE_VAL;
    int variant = nbhd_fwd_forced();
    if (variant < 0)
        variant = choices[NBHD_FWD_PERMUTE].cycles < choices[NBHD_FWD_BROADCAST].cycles;
    if (!possible)
        variant = NBHD_FWD_BROADCAST;
    const int n = possible && room > 1 ? 2 : 1;
    for (int i = 0; i < n; i++, variant = !variant)
        configs[i] = nbhd_fwd_config_of(problem, variant, &choices[variant], threads);
    return n;
}

bool nbhd_fwd_refuse_pairs(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *machine,
                           char why[NBHD_TEXT])
{
    const nbhd_desc *d = &problem->desc;
    if (d->dtype != NBHD_BF16)
        return nbhd_refuse(why, "dtype is %s; its products take bf16", nbhd_dtype_name(d->dtype));
    if (nbhd_fwd_refuse(problem, why))
        return true;
    const int forced = nbhd_fwd_forced();
    if (forced == NBHD_FWD_BROADCAST)
        return false;
    const double pairs = nbhd_fwd_choose_broadcast(problem, machine).cycles;
    const double permuted = nbhd_fwd_choose_permute(problem, machine, 1).cycles;
    if (permuted < HUGE_VAL && (pairs > permuted || forced == NBHD_FWD_PERMUTE))
        return nbhd_refuse(
            why, "the windows are small: it would take %.2g times as long as %s_avx512 with keys permuted in float32",
            pairs / permuted, d->pass == NBHD_BACKWARD ? "bwd" : "fwd");
    return false;
}

nbhd_status nbhd_fwd_build(struct nbhd_plan *plan, const struct nbhd_fwd_machine *machine)
{
    struct nbhd_config *c = &plan->config;
    struct nbhd_fwd *f = calloc(1, sizeof *f);
    if (!f)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's tiling of %zu bytes could not be allocated", sizeof *f);
    plan->state = f;
    f->variant = c->variant;
    f->dtype = plan->problem.desc.dtype;
    nbhd_status status = NBHD_OK;
    if (f->variant == NBHD_FWD_PERMUTE)
        status = nbhd_fwd_build_permute(&plan->problem, c, f, machine);
    else
        nbhd_fwd_build_broadcast(&plan->problem, c, f, machine);
    if (status)
        return status;
    f->threads = c->threads = nbhd_plan_threads(&plan->problem, f->tasks);
    if (f->rest)
        f->rest->threads = f->threads;
    c->predicted_ms /= f->threads;
    plan->workspace = f->scratch * (size_t)f->threads;
    if (f->variant == NBHD_FWD_PERMUTE)
        snprintf(plan->describe, sizeof plan->describe,
                 "permute%s, parts %dx%dx%d by %d rows and %d heads, %lld tasks, %d threads",
                 f->fold.dilation ? " folded" : "", c->q_tile[0], c->q_tile[1], c->q_tile[2], f->chunk, f->group,
                 f->tasks, f->threads);
    else
        snprintf(plan->describe, sizeof plan->describe, "%s, tiles %dx%dx%d of %d heads, %lld tasks, %d threads",
                 machine->price.product > 0 ? "pairs" : "broadcast", c->q_tile[0], c->q_tile[1], c->q_tile[2],
                 f->head_tile, f->tasks, f->threads);
    return NBHD_OK;
}

void nbhd_fwd_drop(struct nbhd_plan *plan)
{
    struct nbhd_fwd *f = plan->state;
    if (f)
        free(f->rest);
    free(f);
    plan->state = NULL;
}
