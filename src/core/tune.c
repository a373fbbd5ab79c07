/* The tuner behind NBHD_PLAN_MEASURE: see wisdom.h. On the CPU; a run cannot be interrupted, so the time that it takes
 * is bounded by which candidates are begun. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "core/plan.h"
#include "core/wisdom.h"

enum { CONFIGS = 16 };

static const double budget_ms = 2000;    /* no candidate is begun after so long */
static const double candidate_ms = 60;   /* each is repeated for so long, and RUNS_MIN times at least */
static const double portable_flops = 2e7; /* portable rows are timed on problems up to here, or if no other row runs */
enum { RUNS_MIN = 3 };

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* Bits that are a modest positive number in every dtype, also where read as float32 or float64. */
static void fill(char *memory, size_t bytes)
{
    for (size_t i = 0; i + 2 <= bytes; i += 2) {
        const uint16_t half = (uint16_t)(0x3c00 | ((i >> 1) * 40503 >> 7 & 0x7f));
        memcpy(memory + i, &half, sizeof half);
    }
}

struct candidate {
    const struct nbhd_kernel *kernel;
    struct nbhd_config config;
};

/* Fastest of some runs, in ms; HUGE_VAL if it cannot run. */
static double time_candidate(const struct nbhd_problem *problem, const struct candidate *c, const nbhd_args *args)
{
    nbhd_plan *plan = NULL;
    struct nbhd_params params;
    double best = HUGE_VAL;
    if (nbhd_plan_build(&plan, problem, c->kernel, &c->config))
        return best;
    void *workspace = aligned_alloc(64, (plan->workspace + 127) / 64 * 64);
    if (workspace && !nbhd_params_bind(problem, args, false, &params)) {
        const double begun = now_ms();
        for (int run = 0; run < RUNS_MIN || now_ms() - begun < candidate_ms; run++) {
            const double from = now_ms();
            if (plan->kernel->ops->run(plan, &params, workspace, NULL)) {
                best = HUGE_VAL;
                break;
            }
            const double ms = now_ms() - from;
            best = ms < best ? ms : best;
            if (ms > budget_ms / 4)
                break; /* long enough to be sure of */
        }
    }
    free(workspace);
    nbhd_plan_destroy(&plan);
    nbhd_log(1, "tuning: %s variant %d tile %dx%dx%d, %dx%dx%d: %g ms", c->kernel->name, c->config.variant,
             c->config.q_tile[0], c->config.q_tile[1], c->config.q_tile[2], c->config.k_tile[0], c->config.k_tile[1],
             c->config.k_tile[2], best);
    return best;
}

static bool worth_timing(const struct nbhd_kernel *k, const struct nbhd_problem *problem, bool have_one)
{
    char why[NBHD_TEXT];
    if (nbhd_kernel_refuses(k, problem, why))
        return false;
    return k->needs > 1 || !have_one || nbhd_desc_flops(&problem->desc) <= portable_flops;
}

nbhd_status nbhd_tune(const struct nbhd_problem *problem, const struct nbhd_kernel **kernel, struct nbhd_config *config,
                      double *ms)
{
    nbhd_args args;
    const size_t bytes = nbhd_args_place(problem, NULL, &args);
    char *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory)
        return nbhd_fail(NBHD_ERROR_MEMORY, "the tensors to measure on, %zu bytes, could not be allocated", bytes);
    fill(memory, bytes);
    nbhd_args_place(problem, memory, &args);
    *kernel = NULL;
    *ms = HUGE_VAL;
    const double begun = now_ms();
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        if (!worth_timing(k, problem, *kernel != NULL))
            continue;
        struct nbhd_config offered[CONFIGS];
        const int count = k->ops->configs(problem, offered, CONFIGS);
        for (int i = 0; i < count && (!*kernel || now_ms() - begun < budget_ms); i++) {
            const struct candidate c = {k, offered[i]};
            const double taken = time_candidate(problem, &c, &args);
            if (taken >= *ms)
                continue;
            *ms = taken;
            *kernel = k;
            *config = offered[i];
        }
    }
    free(memory);
    return *kernel ? NBHD_OK : nbhd_fail(NBHD_ERROR_UNSUPPORTED, "no kernel takes this problem and could be measured");
}
