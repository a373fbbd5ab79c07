/* The loop of peak.h in dot products of bfloat16 pairs: as many chains as the microkernels have accumulators. */
#include "cpu/simd_avx512bf16.h"
#include "cpu/peak.h"

double nbhd_peak_loop_avx512bf16(long rounds)
{
    enum { CHAINS = V_ROWS * V_STRIP };
    const vi ones = v_iset1(0x3f803f80), small = v_iset1(0x3a803a80);
    vf acc[CHAINS], sum = v_zero();
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; i++)
        acc[i] = v_set1((float)i);
    for (long r = 0; r < rounds; r++)
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; i++)
            acc[i] = v_pair_dot(acc[i], ones, small);
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; i++)
        sum = v_add(sum, acc[i]);
    volatile float keep = v_sum(sum);
    (void)keep;
    return 2.0 * CHAINS * VP * (double)rounds;
}
