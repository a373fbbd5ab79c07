/* The body of nbhd_peak_loop_<isa>, over a vocabulary: as many chains as the microkernels have accumulators.
 * PEAK_STEP(a, b, sum) is sum + a b, of floats or of what else is one in a vector. */
#include "cpu/peak.h"

#ifndef PEAK_STEP
#define PEAK_STEP v_fma
#endif

V_FN double peak_loop(long rounds, const vf a, const vf b)
{
    enum { CHAINS = V_ROWS * V_STRIP };
    vf acc[CHAINS], sum = v_zero();
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; i++)
        acc[i] = v_set1((float)i);
    for (long r = 0; r < rounds; r++)
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; i++)
            acc[i] = PEAK_STEP(a, b, acc[i]);
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; i++)
        sum = v_add(sum, acc[i]);
    volatile float keep = v_sum(sum);
    (void)keep;
    return 2.0 * CHAINS * VF * (double)rounds;
}
