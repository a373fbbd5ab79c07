/* The row bwd_amx over a vocabulary of tiles: amx.h, or the tests' emulation. P and dS are rounded to bfloat16 between
 * products; sums, scores and dP are float32. */
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
#define V_ALL ((1u << VF) - 1u)
#define WALK_KEYS 128

#include "cpu/rows.inc.h"
#include "cpu/broadcast.inc.h"

#include "cpu/bwd_common.inc.h"
#include "cpu/bwd_sums.inc.h"
#include "cpu/bwd_run.inc.h"
#include "cpu/bwd_tiles.inc.h"
#include "cpu/amx_sums.inc.h"
#include "cpu/bwd_units.inc.h"
#include "cpu/bwd_pairs.inc.h"

static const struct nbhd_bwd_machine machine = {
    .fwd = {.vf = VF,
            .columns = V_COLUMNS,
            .block = WALK_KEYS,
            .price = {0.048, 13.0, 8.4, 0.48, 1e4},
            .unfolded = true},
    .product = 0.12,
    .load = 1.0,
    .block = sizeof(struct bwd_block),
};

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    return nbhd_fwd_refuse_pairs(problem, &machine.fwd, why);
}

static int configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room)
{
    return nbhd_bwd_configs(problem, configs, room, &machine);
}

static nbhd_status build(struct nbhd_plan *plan) { return nbhd_bwd_build(plan, &machine); }

const struct nbhd_kernel_ops nbhd_cpu_bwd_amx = {refuse, configs, build, bwd_run, nbhd_bwd_drop};
