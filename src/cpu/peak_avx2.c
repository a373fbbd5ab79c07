/* The loop of peak.h over simd_avx2.h. */
#include "cpu/simd_avx2.h"
#include "cpu/peak.inc.h"

double nbhd_peak_loop_avx2(long rounds)
{
    return peak_loop(rounds, v_set1(0.999f), v_set1(0.001f));
}
