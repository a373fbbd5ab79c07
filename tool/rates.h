/* What the machine could do at most. */
#ifndef NBHD_TOOL_RATES_H
#define NBHD_TOOL_RATES_H

#include "nbhd.h"

/* GFLOP/s of so many threads in a loop on registers with the instructions that the kernel is named after: multiply-adds
 * of float32 (float64: half of it), or products of bfloat16 (avx512bf16, amx); measured once for each. 0: not known, as
 * on a GPU. */
double peak_gflops(nbhd_device device, const char *kernel, int dtype, int threads);

#endif
