/* What the machine could do at most. */
#ifndef NBHD_TOOL_RATES_H
#define NBHD_TOOL_RATES_H

#include "nbhd.h"

/* GFLOP/s of so many threads in a loop of float32 multiply-adds on registers, with the instructions that the kernel is
 * named after (float64: half of it); measured once for each. 0: not known, as on a GPU. */
double peak_gflops(nbhd_device device, const char *kernel, int dtype, int threads);

#endif
