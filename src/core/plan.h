/* What core/ files share among themselves. */
#ifndef NBHD_CORE_PLAN_H
#define NBHD_CORE_PLAN_H

#include "core/kernel.h"

/* args.c: checks args against the problem and lays out the block that kernels read. */
nbhd_status nbhd_params_bind(const struct nbhd_problem *problem, const nbhd_args *args, struct nbhd_params *params);
/* args.c: the same for one tensor of o's shape, or of lse's (float32), outside of args; NULL is an error. */
nbhd_status nbhd_bind_o(const struct nbhd_problem *problem, const nbhd_tensor *tensor, const char *name, bool write,
                        struct nbhd_view *view);
nbhd_status nbhd_bind_lse(const struct nbhd_problem *problem, const nbhd_tensor *tensor, const char *name, bool write,
                          struct nbhd_view *view);
/* args.c: args whose required tensors lie one after the other in memory, contiguous, each at a multiple of 64 bytes; returns
 * the bytes. memory NULL: only counts. */
size_t nbhd_args_place(const struct nbhd_problem *problem, char *memory, nbhd_args *args);
/* plan.c: a plan of the kernel; config NULL: its first. */
nbhd_status nbhd_plan_build(nbhd_plan **plan, const struct nbhd_problem *problem, const struct nbhd_kernel *kernel,
                            const struct nbhd_config *config);
/* desc.c: copies args of any size known to the caller. */
nbhd_status nbhd_args_copy(nbhd_args *to, const nbhd_args *from);
/* kernel.c: the row of that name ("cpu.fwd_avx2"), or NULL. */
const struct nbhd_kernel *nbhd_kernel_named(const char *name);
/* kernel.c: true, with a sentence, if the row cannot compute the problem on this machine. */
bool nbhd_kernel_refuses(const struct nbhd_kernel *kernel, const struct nbhd_problem *problem, char why[NBHD_TEXT]);

#endif
