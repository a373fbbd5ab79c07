/* The loop of peak.h in dot products of bfloat16 pairs. */
#include "cpu/simd_avx512bf16.h"
#define PEAK_STEP v_pair_step
#include "cpu/peak.inc.h"

double nbhd_peak_loop_avx512bf16(long rounds)
{
    return 2 * peak_loop(rounds, (vf)v_iset1(0x3f803f80), (vf)v_iset1(0x3a803a80));
}
