/* The unfused passes with AVX-512, naive and GEMM-based: rows <pass>_naive_avx512 and <pass>_gemm_avx512. */
#include "cpu/simd_avx512.h"
#include "cpu/unfused_rows.inc.h"
#include "cpu/unfused_naive.inc.h"
#include "cpu/unfused_gemm.inc.h"

const struct nbhd_kernel_ops nbhd_cpu_qk_naive_avx512 = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_naive_avx512 = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_qk_bwd_naive_avx512 = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_bwd_naive_avx512 = NAIVE_OPS;

const struct nbhd_kernel_ops nbhd_cpu_qk_gemm_avx512 = GEMM_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_gemm_avx512 = GEMM_OPS;
const struct nbhd_kernel_ops nbhd_cpu_qk_bwd_gemm_avx512 = GEMM_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_bwd_gemm_avx512 = GEMM_OPS;
