/* Float32 forward with AVX2: the algorithms of fwd.inc.h over simd_avx2.h. */
#include "cpu/simd_avx2.h"
#include "cpu/fwd.inc.h"

const struct nbhd_kernel_ops nbhd_cpu_fwd_avx2 = {nbhd_fwd_refuse, fwd_configs, fwd_build, fwd_run, nbhd_fwd_drop};
