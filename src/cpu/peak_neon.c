/* The loop of peak.h over simd_neon.h. */
#include "cpu/simd_neon.h"
#include "cpu/peak.inc.h"

double nbhd_peak_loop_neon(long rounds)
{
    return peak_loop(rounds, v_set1(0.999f), v_set1(0.001f));
}
