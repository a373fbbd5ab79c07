/* The vector forward, written once over a vocabulary: a kernel file includes simd_<isa>.h, then this, and gets
 * fwd_configs, fwd_build and fwd_run. Lanes are queries throughout; how a key reaches them is the difference of the two
 * algorithms. */
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
#include "cpu/fwd_tile.inc.h"
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

/* The view of folded tokens: elements of a group along axis 1, groups along axis 2. */
static void fold_view(struct nbhd_view *v, const struct nbhd_fold *fold)
{
    v->data = v->data ? v->data + fold->first * v->axis[2] : NULL;
    v->axis[0] = v->axis[1];
    v->axis[1] = v->axis[2] * fold->dilation;
}

/* The bias table needs no change: axis 0, whose window is 1, goes, and a last one of window 1 comes. */
static struct nbhd_params fold_params(const struct nbhd_params *p, const struct nbhd_fwd *f)
{
    struct nbhd_params folded = *p;
    struct nbhd_view *const views[] = {&folded.q, &folded.k, &folded.v, &folded.o, &folded.lse};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++)
        fold_view(views[i], &f->fold);
    memcpy(folded.axis, f->axis, sizeof folded.axis);
    return folded;
}

static nbhd_status fwd_run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace,
                           void *stream)
{
    (void)stream;
    for (const struct nbhd_fwd *fwd = plan->state; fwd; fwd = fwd->rest) {
        const struct nbhd_params folded = fwd->fold.dilation ? fold_params(params, fwd) : *params;
        struct fwd_call call = {&folded, fwd, workspace};
        nbhd_parallel(fwd->threads, fwd->tasks, fwd_task, &call);
    }
    return NBHD_OK;
}

static const struct nbhd_fwd_machine fwd_machine = {.vf = VF, .columns = V_COLUMNS,
                                                    .lane_block = sizeof(struct lane_block)};

static int fwd_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room)
{
    return nbhd_fwd_configs(problem, configs, room, &fwd_machine);
}

static nbhd_status fwd_build(struct nbhd_plan *plan) { return nbhd_fwd_build(plan, &fwd_machine); }
