/* Measured choices, one line of text each: which kernel and configuration were fastest for a problem on a machine. */
#ifndef NBHD_CORE_WISDOM_H
#define NBHD_CORE_WISDOM_H

#include "core/kernel.h"

/* The kernel and configuration that this machine's wisdom names for the problem, if that kernel still takes the problem
 * and still offers that configuration. */
bool nbhd_wisdom_find(const struct nbhd_problem *problem, const struct nbhd_kernel **kernel,
                      struct nbhd_config *config);
/* Remembers a choice, in place of an older one for the problem. */
nbhd_status nbhd_wisdom_add(const struct nbhd_problem *problem, const struct nbhd_kernel *kernel,
                            const struct nbhd_config *config, double ms);

/* tune.c: times every kernel that takes the problem, in every configuration that it offers, on synthetic tensors. */
nbhd_status nbhd_tune(const struct nbhd_problem *problem, const struct nbhd_kernel **kernel, struct nbhd_config *config,
                      double *ms);

#endif
