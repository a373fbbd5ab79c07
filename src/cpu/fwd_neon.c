/* Forward on aarch64, float32 sums: the algorithms of fwd.inc.h over simd_neon.h. */
#include "cpu/simd_neon.h"
#include "cpu/fwd.inc.h"

const struct nbhd_kernel_ops nbhd_cpu_fwd_neon = {nbhd_fwd_refuse, fwd_configs, fwd_build, fwd_run, nbhd_fwd_drop};
