/* The unfused passes with NEON, naive and GEMM-based: rows <pass>_naive_neon and <pass>_gemm_neon. */
#include "cpu/simd_neon.h"
#include "cpu/unfused_rows.inc.h"
#include "cpu/unfused_naive.inc.h"
#include "cpu/unfused_gemm.inc.h"

const struct nbhd_kernel_ops nbhd_cpu_qk_naive_neon = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_naive_neon = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_qk_bwd_naive_neon = NAIVE_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_bwd_naive_neon = NAIVE_OPS;

const struct nbhd_kernel_ops nbhd_cpu_qk_gemm_neon = GEMM_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_gemm_neon = GEMM_OPS;
const struct nbhd_kernel_ops nbhd_cpu_qk_bwd_gemm_neon = GEMM_OPS;
const struct nbhd_kernel_ops nbhd_cpu_av_bwd_gemm_neon = GEMM_OPS;
