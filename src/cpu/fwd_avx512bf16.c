/* Bfloat16 forward with AVX-512-BF16: the algorithm of fwd_pairs.inc.h by dot products of pairs, where they are faster
 * than multiply-adds of float32: 64 operations a cycle on Zen 4, twice as many. */
#include "cpu/simd_avx512bf16.h"
#include "cpu/fwd_pairs.inc.h"
#include "cpu/dots.inc.h"
#include "cpu/peak.h"

static const struct nbhd_fwd_machine machine = {.vf = VF, .columns = V_COLUMNS, .block = WALK_KEYS,
                                                .price = {0.55, 17.0, 20.0, 0.5, 0.0}};

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    const double speed = problem->desc.dtype == NBHD_BF16 ? nbhd_cpu_dots_speed() : 2; /* measured once it matters */
    if (speed < 1.2)
        return nbhd_refuse(why, "dot products are %.1f times as fast as float32 multiply-adds here; that does not pay",
                           speed);
    return nbhd_fwd_refuse_pairs(problem, &machine, why);
}

static int configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room)
{
    return nbhd_fwd_configs(problem, configs, room, &machine);
}

static nbhd_status build(struct nbhd_plan *plan) { return nbhd_fwd_build(plan, &machine); }

const struct nbhd_kernel_ops nbhd_cpu_fwd_avx512bf16 = {refuse, configs, build, pair_run, nbhd_fwd_drop};
