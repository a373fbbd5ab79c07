/* The vector backward, written once over a vocabulary: a kernel file includes simd_<isa>.h, then this, and gets
 * bwd_configs, bwd_build and bwd_run.
 *
 *     P = exp2(S - lse)   dS = P (dP - delta)   delta = o.dout - dlse
 *
 * all in the units of fwd.inc.h: S by scale * log2(e). */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/counters.h"
#include "core/kernel.h"
#include "cpu/bwd_order.h"
#include "cpu/bwd_plan.h"
#include "cpu/cpu.h"
#include "cpu/threads.h"

#define LOG2E 1.44269504088896340736f
#define LN2   0.69314718055994530942f
#define V_ALL ((1u << VF) - 1u)

#include "cpu/rows.inc.h"
#include "cpu/broadcast.inc.h"

#include "cpu/bwd_common.inc.h"
#include "cpu/bwd_sums.inc.h"
#include "cpu/bwd_run.inc.h"
#include "cpu/bwd_products.inc.h"
#include "cpu/bwd_tiles.inc.h"
#include "cpu/bwd_broadcast.inc.h"
#include "cpu/permute.inc.h"
#include "cpu/bwd_permute.inc.h"
#include "cpu/bwd_permute_tile.inc.h"
#include "cpu/bwd_lines.inc.h"

static void bwd_do_task(const struct bwd_task *task, const struct bwd_task *after, char *scratch)
{
    if (task->call->b->variant == NBHD_FWD_PERMUTE)
        bwd_permute_task(task, after, scratch);
    else
        bwd_broadcast_task(task, scratch);
}

static const struct nbhd_bwd_machine bwd_machine = {
    .fwd = {.vf = VF, .columns = V_COLUMNS, .lane_block = sizeof(struct lane_block), .unfolded = true},
    .product = 1.0,
    .load = 2.5,
    .strip = V_STRIP * VF,
    .run = sizeof(struct bwd_keys),
    .block = sizeof(struct bwd_block),
};

static int bwd_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room)
{
    return nbhd_bwd_configs(problem, configs, room, &bwd_machine);
}

static nbhd_status bwd_build(struct nbhd_plan *plan) { return nbhd_bwd_build(plan, &bwd_machine); }
