/* Measurements from a CSV file, and a model of time from the command line. */
#ifndef NBHD_TOOL_SIM_TABLE_H
#define NBHD_TOOL_SIM_TABLE_H

#include "nbhd_sim.h"

/* Exit status; the caller frees *samples. */
int sim_table_read(const char *path, nbhd_sim_sample **samples, int *count);
/* "h200", or prices: "processors=132 matrix=1093 ...", or both, the name first. Exit status. */
int sim_model_read(const char *text, nbhd_sim_device *device);
/* The prices in the same form. */
void sim_model_print(const nbhd_sim_device *device);

#endif
