/* What core/ files share among themselves. */
#ifndef NBHD_CORE_PLAN_H
#define NBHD_CORE_PLAN_H

#include "core/kernel.h"

/* args.c: the tensors that a pass may touch, one row each. */
enum nbhd_form {
    NBHD_FORM_Q, NBHD_FORM_K, NBHD_FORM_V, NBHD_FORM_O, NBHD_FORM_LSE, NBHD_FORM_SCORES, NBHD_FORM_EXTRA_K,
    NBHD_FORM_EXTRA_V
};
struct nbhd_tensor_row {
    size_t arg, view; /* offsets in nbhd_args and nbhd_params */
    const char *name;
    enum nbhd_form form;
    char use[7]; /* by pass */
};
enum { NBHD_TENSOR_ROWS = 16 };
extern const struct nbhd_tensor_row nbhd_tensor_rows[NBHD_TENSOR_ROWS];

/* args.c: checks args against the problem and lays out the block that kernels read. gaps: parts of the tensors may
 * belong to no sequence, so that of two that overlap only those at one address are refused. */
nbhd_status nbhd_params_bind(const struct nbhd_problem *problem, const nbhd_args *args, bool gaps,
                             struct nbhd_params *params);
/* args.c: the same for one tensor of o's shape, or of lse's (float32), outside of args; NULL is an error. */
nbhd_status nbhd_bind_o(const struct nbhd_problem *problem, const nbhd_tensor *tensor, const char *name, bool write,
                        struct nbhd_view *view);
nbhd_status nbhd_bind_lse(const struct nbhd_problem *problem, const nbhd_tensor *tensor, const char *name, bool write,
                          struct nbhd_view *view);
/* args.c: args whose required tensors lie one after the other in memory, contiguous, each at a multiple of 64 bytes;
 * returns the bytes. memory NULL: only counts. */
size_t nbhd_args_place(const struct nbhd_problem *problem, char *memory, nbhd_args *args);
/* plan.c: what a caller may ask for besides a problem. */
nbhd_status nbhd_plan_check(nbhd_device device, unsigned flags);
/* plan.c: a plan of the kernel; config NULL: its first. */
nbhd_status nbhd_plan_build(nbhd_plan **plan, const struct nbhd_problem *problem, const struct nbhd_kernel *kernel,
                            const struct nbhd_config *config);
/* kernel.c: make(plan, order), which leaves *plan NULL where it fails. Where CUDA kernels have to be compiled it is
 * called twice: to begin with all of them, whose plan is dropped, and when they are there. */
nbhd_status nbhd_plan_make(nbhd_plan **plan, nbhd_device device, nbhd_status (*make)(nbhd_plan **, const void *),
                           const void *order);
/* plan.c: what NBHD_KERNEL names, if it is for this device and pass, or no kernel at all: a user's override, for
 * experiments. */
const char *nbhd_kernel_forced(const struct nbhd_problem *problem);
/* plan.c: computes, by the reference where the kernel cannot read the tensors. */
nbhd_status nbhd_plan_run(const nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream);
/* ragged_run.c, ragged.c: execution and destruction of a plan of many sequences. */
nbhd_status nbhd_ragged_execute(const nbhd_plan *plan, const nbhd_args *args, void *workspace, void *stream);
void nbhd_ragged_drop(struct nbhd_ragged_plan *ragged);
/* desc.c: copies args of any size known to the caller. */
nbhd_status nbhd_args_copy(nbhd_args *to, const nbhd_args *from);
/* kernel.c: the row of that name ("cpu.fwd_avx2"), or NULL. */
const struct nbhd_kernel *nbhd_kernel_named(const char *name);
/* kernel.c: true, with a sentence, if the machine has no such device at all. */
bool nbhd_device_missing(nbhd_device device, char why[NBHD_TEXT]);
/* kernel.c: true, with a sentence, if the row cannot compute the problem on this machine. */
bool nbhd_kernel_refuses(const struct nbhd_kernel *kernel, const struct nbhd_problem *problem, char why[NBHD_TEXT]);

#endif
