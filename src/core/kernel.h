/* What the planner knows of a kernel, and what a kernel knows of its plan. */
#ifndef NBHD_CORE_KERNEL_H
#define NBHD_CORE_KERNEL_H

#include <stdbool.h>
#include "nbhd.h"
#include "nbhd_params.h"

/* A validated problem: desc has every default filled in; axis[] is desc's, with leading axes of length 1. at[i]: where
 * desc's axis i stands in axis[]. */
struct nbhd_problem {
    nbhd_desc desc;
    nbhd_device device;
    unsigned flags;
    struct nbhd_axis axis[3];
    int at[3];
};

/* One way to run a kernel. What variant and the tiles mean is the kernel's business; but where both tiles are set, each
 * query tile visits key tiles that start at its union, for one head at a time (nbhd_sim_plan_tiles). */
struct nbhd_config {
    int variant;
    int q_tile[3], k_tile[3];
    int stages, threads;
    double predicted_ms; /* by the kernel's cost model; 0: none */
    bool many;           /* of a problem with NBHD_PROBLEM_MANY: build sets plan->run_many */
};

/* A bit of nbhd_problem.flags: the problem stands for many sequences of different lengths, about as many as its batch
 * says, that a kernel may compute in one launch. Kernels that cannot take no notice. */
#define NBHD_PROBLEM_MANY 0x10000

/* refuse: false if the kernel takes the problem; else true, and one sentence with field and value in why.
 * configs: fills up to room configurations, best guess first; returns their number (at least 1).
 * build: given plan->problem, kernel and config, sets workspace, state and describe.
 * run: computes. No allocation, no lock, no environment. params is complete; its pointers are checked.
 * drop: frees plan->state; may be NULL. */
struct nbhd_kernel_ops {
    bool (*refuse)(const struct nbhd_problem *problem, char why[NBHD_TEXT]);
    int (*configs)(const struct nbhd_problem *problem, struct nbhd_config *configs, int room);
    nbhd_status (*build)(struct nbhd_plan *plan);
    nbhd_status (*run)(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream);
    void (*drop)(struct nbhd_plan *plan);
};

struct nbhd_kernel {
    const char *name; /* "cpu.fwd_avx2" */
    nbhd_device device;
    unsigned needs; /* CPU: a bit of isa.h. CUDA: the least compute capability, e.g. 80 */
    int pass;
    const struct nbhd_kernel_ops *ops;
};

struct nbhd_plan {
    struct nbhd_problem problem;
    const struct nbhd_kernel *kernel;
    struct nbhd_config config;
    size_t workspace; /* bytes */
    void *state;      /* the kernel's own */
    char describe[256];
    bool picky; /* set by build: run may answer NBHD_ERROR_UNSUPPORTED, before it has done anything, for tensors whose
                   addresses or strides it cannot read */
    /* With config.many: run for these sequences; parts->part[].block is for it to set. The workspace has
     * plan->workspace bytes for as many tokens as problem has, and the more for more. */
    nbhd_status (*run_many)(const struct nbhd_plan *plan, const struct nbhd_params *params, struct nbhd_parts *parts,
                            void *workspace, void *stream);
    struct nbhd_plan *reference; /* runs those, where the planner chose a picky kernel; else NULL */
    /* ragged.c: a plan of many sequences, whose problem is the tensors' shape; else NULL */
    struct nbhd_ragged_plan *ragged;
};

extern const struct nbhd_kernel nbhd_kernels[]; /* ends with name == NULL */

/* desc.c: checks desc and fills in every default. */
nbhd_status nbhd_problem_init(struct nbhd_problem *problem, const nbhd_desc *desc);
/* desc.c: axes of one query and one key first, the others in their order: as plans have them, so that no kernel meets
 * such an axis where it expects its longest rows. */
void nbhd_problem_order(struct nbhd_problem *problem);
/* desc.c: from and to a caller's struct that begins with its size, shorter or longer than this build's `known`
 * bytes. */
nbhd_status nbhd_copy_sized(void *to, size_t known, const void *from, const char *what);
nbhd_status nbhd_return_sized(void *to, const void *from, size_t known, const char *what);
/* status.c: sets the thread's sentence; returns status. */
nbhd_status nbhd_fail(nbhd_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* why[] of refuse. Always true, so that a refusal is one return. */
bool nbhd_refuse(char why[NBHD_TEXT], const char *format, ...) __attribute__((format(printf, 2, 3)));

size_t nbhd_dtype_size(int dtype);
const char *nbhd_dtype_name(int dtype);
const char *nbhd_pass_name(int pass);

/* number.c: numbers as text with a point, whatever the process's locale says. read: *end is text where there is
 * none. */
double nbhd_read_number(const char *text, const char **end);
void nbhd_write_number(char text[32], int digits, double value);

/* env.c: the only reader of the environment. NULL if unset or empty. */
const char *nbhd_env(const char *name);
/* log.c: to stderr; level 0 always, 1 and 2 when NBHD_LOG is that or more. */
void nbhd_log(int level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
