/* --arch sm_80,sm_90: plans for GPUs that are not here. */
#ifndef NBHD_TOOL_ARCH_H
#define NBHD_TOOL_ARCH_H

#include "args.h"

struct option opt_arch(const char **value, const char *help);
/* Calls each() for every architecture of the list, while this thread's CUDA plans are for that one. Such a plan can be
 * looked at, and its kernels are compiled; it cannot be executed. Ends at TOOL_USAGE; a failure is remembered. */
int arch_each(const char *list, int (*each)(const char *arch, void *context), void *context);

#endif
