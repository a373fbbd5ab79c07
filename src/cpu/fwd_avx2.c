/* Float32 forward with AVX2. The algorithm is fwd.inc.h over simd_avx2.h. */
#include "cpu/simd_avx2.h"
#include "cpu/fwd.inc.h"

static int configs(const struct nbhd_problem *problem, struct nbhd_config *list, int room)
{
    return nbhd_fwd_configs(problem, list, room, VF);
}

static nbhd_status build(struct nbhd_plan *plan) { return nbhd_fwd_build(plan, VF); }

const struct nbhd_kernel_ops nbhd_cpu_fwd_avx2 = {nbhd_fwd_refuse, configs, build, fwd_run, nbhd_fwd_drop};
