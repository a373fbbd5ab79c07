/* Naive unfused passes with AVX2: rows qk_naive_avx2, av_naive_avx2 and their gradients. */
#include "cpu/simd_avx2.h"
#include "cpu/unfused_rows.inc.h"
#include "cpu/unfused_naive.inc.h"

const struct nbhd_kernel_ops nbhd_cpu_qk_naive_avx2 = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_naive_avx2 = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_qk_bwd_naive_avx2 = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_bwd_naive_avx2 = NAIVE_OPS;
