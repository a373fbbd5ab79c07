/* Backward with AVX2, float32 sums: the algorithms of bwd.inc.h over simd_avx2.h. */
#include "cpu/simd_avx2.h"
#include "cpu/bwd.inc.h"

const struct nbhd_kernel_ops nbhd_cpu_bwd_avx2 = {nbhd_fwd_refuse, bwd_configs, bwd_build, bwd_run, nbhd_bwd_drop};
