/* The body of nbhd_peak_loop_<isa>, over a vocabulary: as many chains as the microkernels have accumulators. */
#include "cpu/peak.h"

V_FN double peak_loop(long rounds)
{
    enum { CHAINS = V_ROWS * V_STRIP };
    vf acc[CHAINS], scale = v_set1(0.999f), step = v_set1(0.001f), sum = v_zero();
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; i++)
        acc[i] = v_set1((float)i);
    for (long r = 0; r < rounds; r++)
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; i++)
            acc[i] = v_fma(acc[i], scale, step);
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; i++)
        sum = v_add(sum, acc[i]);
    volatile float keep = v_sum(sum);
    (void)keep;
    return 2.0 * CHAINS * VF * (double)rounds;
}
