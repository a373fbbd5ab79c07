/* Backward on aarch64, float32 sums: the algorithms of bwd.inc.h over simd_neon.h. */
#include "cpu/simd_neon.h"
#include "cpu/bwd.inc.h"

const struct nbhd_kernel_ops nbhd_cpu_bwd_neon = {nbhd_fwd_refuse, bwd_configs, bwd_build, bwd_run, nbhd_bwd_drop};
