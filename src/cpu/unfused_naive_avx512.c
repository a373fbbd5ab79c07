/* Naive unfused passes with AVX-512: rows qk_naive_avx512, av_naive_avx512 and their gradients. */
#include "cpu/simd_avx512.h"
#include "cpu/unfused_rows.inc.h"
#include "cpu/unfused_naive.inc.h"

const struct nbhd_kernel_ops nbhd_cpu_qk_naive_avx512 = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_naive_avx512 = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_qk_bwd_naive_avx512 = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_bwd_naive_avx512 = NAIVE_OPS;
