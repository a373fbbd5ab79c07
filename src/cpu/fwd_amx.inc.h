/* The row fwd_amx over a vocabulary of tiles: amx.h, or the tests' emulation. */
#define WALK_KEYS FWD_MOST_BLOCK
#include "cpu/fwd_pairs.inc.h"
#include "cpu/amx_products.inc.h"
#include "cpu/amx_units.inc.h"

static const struct nbhd_fwd_machine machine = {.vf = VF,
                                                .columns = V_COLUMNS,
                                                .block = WALK_KEYS,
                                                .sums = 2 * SUMS * sizeof(float),
                                                .scores = SCORES * sizeof(float),
                                                .unit_state = sizeof(struct unit_cache),
                                                .price = {0.05, 22.0, 14.0, 0.8, 0.0}};

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    return nbhd_fwd_refuse_pairs(problem, &machine, why);
}

static int configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room)
{
    return nbhd_fwd_configs(problem, configs, room, &machine);
}

static nbhd_status build(struct nbhd_plan *plan) { return nbhd_fwd_build(plan, &machine); }

const struct nbhd_kernel_ops nbhd_cpu_fwd_amx = {refuse, configs, build, pair_run, nbhd_fwd_drop};
