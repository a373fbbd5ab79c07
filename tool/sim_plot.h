/* The picture of `nbhd sim --plot`. */
#ifndef NBHD_TOOL_SIM_PLOT_H
#define NBHD_TOOL_SIM_PLOT_H

#include "nbhd_sim.h"

/* Speedup over self attention against stride, one curve per window, to path (.svg or .png): tile-wise and FLOP-wise
 * bounds under these tiles, and the measured points among samples (may be none), relative to the sample with the whole
 * axes as window. Exit status. */
int sim_plot(const nbhd_desc *desc, const nbhd_sim_tiles *tiles, const nbhd_sim_sample *samples, int count,
             const char *path);

#endif
