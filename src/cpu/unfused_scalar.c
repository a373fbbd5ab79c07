/* The unfused passes on any CPU and in every dtype: the naive algorithm over a vocabulary of one double. They refuse
 * nothing legal; the rows qk_scalar, av_scalar, qk_bwd_scalar and av_bwd_scalar. */
#include "core/kernel.h"
#include "cpu/cpu.h"

#define VF   1
#define V_FN static inline __attribute__((unused))

typedef double vf, real;

V_FN vf v_zero(void) { return 0; }
V_FN vf v_set1(double x) { return x; }
V_FN vf v_load(const double *p) { return *p; }
V_FN void v_store(double *p, vf x) { *p = x; }
V_FN vf v_load_part(const double *p, int n) { return n ? *p : 0; }
V_FN void v_store_part(double *p, vf x, int n)
{
    if (n)
        *p = x;
}
V_FN vf v_add(vf a, vf b) { return a + b; }
V_FN vf v_mul(vf a, vf b) { return a * b; }
V_FN vf v_fma(vf a, vf b, vf c) { return a * b + c; }
V_FN double v_sum(vf a) { return a; }
V_FN vf row_load(const char *row, int dtype, int i, int n) { return n ? nbhd_load(row, dtype, i) : 0; }
V_FN void row_store(char *row, int dtype, int i, vf x, int n)
{
    if (n)
        nbhd_store(row, dtype, i, x);
}
V_FN real row_element(const char *row, int dtype, int i) { return nbhd_load(row, dtype, i); }

#include "cpu/unfused_naive.inc.h"

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    (void)problem;
    (void)why;
    return false;
}

const struct nbhd_kernel_ops nbhd_cpu_qk_scalar = {refuse, nbhd_unfused_configs, naive_build, naive_run, NULL};
const struct nbhd_kernel_ops nbhd_cpu_av_scalar = {refuse, nbhd_unfused_configs, naive_build, naive_run, NULL};
const struct nbhd_kernel_ops nbhd_cpu_qk_bwd_scalar = {refuse, nbhd_unfused_configs, naive_build, naive_run, NULL};
const struct nbhd_kernel_ops nbhd_cpu_av_bwd_scalar = {refuse, nbhd_unfused_configs, naive_build, naive_run, NULL};
