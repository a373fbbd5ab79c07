/* The vector forward, written once over a vocabulary: a kernel file includes simd_<isa>.h, then this, and gets
 * fwd_configs, fwd_build and fwd_run. Lanes are queries throughout; how a key reaches them is the difference of the two algorithms. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/counters.h"
#include "core/kernel.h"
#include "cpu/cpu.h"
#include "cpu/fwd_plan.h"
#include "cpu/threads.h"

#define LOG2E 1.44269504088896340736f
#define LN2   0.69314718055994530942f
#define V_ALL ((1u << VF) - 1u)

#include "cpu/rows.inc.h"
#include "cpu/fwd_common.inc.h"
#include "cpu/broadcast.inc.h"
#include "cpu/fwd_broadcast.inc.h"
#include "cpu/permute.inc.h"
#include "cpu/fwd_permute.inc.h"
#include "cpu/fwd_lines.inc.h"

struct fwd_call {
    const struct nbhd_params *params;
    const struct nbhd_fwd *fwd;
    char *workspace;
};

static void fwd_task(void *context, long long task, int thread)
{
    const struct fwd_call *call = context;
    char *scratch = call->workspace + (size_t)thread * call->fwd->scratch;
    if (call->fwd->variant == NBHD_FWD_PERMUTE)
        permute_task(call->params, call->fwd, task, scratch);
    else
        broadcast_task(call->params, call->fwd, task, scratch);
}

static nbhd_status fwd_run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const struct nbhd_fwd *fwd = plan->state;
    struct fwd_call call = {params, fwd, workspace};
    (void)stream;
    nbhd_parallel(fwd->threads, fwd->tasks, fwd_task, &call);
    return NBHD_OK;
}

static const struct nbhd_fwd_machine fwd_machine = {.vf = VF, .columns = V_COLUMNS,
                                                    .lane_block = sizeof(struct lane_block)};

static int fwd_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room)
{
    return nbhd_fwd_configs(problem, configs, room, &fwd_machine);
}

static nbhd_status fwd_build(struct nbhd_plan *plan) { return nbhd_fwd_build(plan, &fwd_machine); }
