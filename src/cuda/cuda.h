/* What the host half of a CUDA kernel uses: the machine, compiled modules, launches, tensor maps.
 * A kernel's build() gets its module and functions and keeps them in plan->state; its run() only launches. */
#ifndef NBHD_CUDA_CUDA_H
#define NBHD_CUDA_CUDA_H

#include "core/kernel.h"
#include "cuda/driver.h"
#include "cuda/jit.h"

/* ---- the machine ---- */
struct nbhd_cuda_machine {
    struct CUctx_st *context; /* NULL: kernels are only compiled, for a machine that is not here */
    int device;
    int cc;                   /* compute capability: 90 */
    int multiprocessors;
    int shared_max;           /* bytes of shared memory that a block may have, opted in */
    int l2_bytes;
    char arch[16];            /* what to compile for: "sm_80"; from 90 on for that chip alone: "sm_90a" */
};

/* The machine that this thread plans for: that of nbhd_cuda_set_target, else of the current context, else device 0 with
 * its primary context. */
nbhd_status nbhd_cuda_machine(struct nbhd_cuda_machine *machine);
/* Plans of this thread compile for that compute capability and cannot be executed; 0: for the real machine again. */
nbhd_status nbhd_cuda_set_target(int cc);
/* For the planner: true, with a sentence, if there is no GPU of at least that compute capability. */
bool nbhd_cuda_refuses(unsigned cc, char why[NBHD_TEXT]);

/* ---- modules ---- */
/* The -D options of a kernel, as text. */
struct nbhd_options {
    char text[1024];
    size_t used;
};
/* Appends one option: nbhd_option(&o, "-DNBHD_TILE_Q=%d", 64). What does not fit makes the compilation fail. */
void nbhd_option(struct nbhd_options *options, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* NBHD_DTYPE, NBHD_HEAD_DIM, NBHD_HEAD_DIM_V, NBHD_BIAS. */
void nbhd_options_problem(struct nbhd_options *options, const nbhd_desc *desc);
/* NBHD_WRAPS=1 where an axis is periodic: others are spared the registers that it takes. */
void nbhd_options_wraps(struct nbhd_options *options, const nbhd_desc *desc);
/* The extra keys as the keys of a problem: an axis of their own, seen whole by the queries of all axes. */
struct nbhd_problem nbhd_cuda_extra_problem(const struct nbhd_problem *problem);

/* A kernel file compiled with one set of options, loaded in one context; plans share it. */
struct nbhd_cuda_module {
    const struct nbhd_jit *code;
    struct nbhd_cuda_machine machine;
    struct CUmod_st *handle; /* NULL: empty */
    unsigned long long context_id;
    int users;
    struct nbhd_cuda_module *next;
};

/* flags: the plan's. Release what was acquired in drop(), once. Where a plan is built only to begin compiling (ahead.c)
 * the module is empty, as it is without a device. */
nbhd_status nbhd_cuda_acquire(struct nbhd_cuda_module **module, const char *source, const struct nbhd_options *options,
                              unsigned flags);
void nbhd_cuda_release(struct nbhd_cuda_module *module); /* NULL is allowed */
/* The kernel called name; it may use as much dynamic shared memory as the device has. NULL of an empty module. */
nbhd_status nbhd_cuda_function(struct CUfunc_st **function, const struct nbhd_cuda_module *module, const char *name);

/* ---- for run(): none of these allocates, locks or waits ---- */
struct nbhd_cuda_grid {
    unsigned blocks[3], threads[3];
    unsigned shared; /* bytes of dynamic shared memory */
};
/* arguments: a pointer to each of the kernel's arguments: the params, then for instance tensor maps. */
nbhd_status nbhd_cuda_launch(const struct nbhd_cuda_module *module, struct CUfunc_st *function,
                             const struct nbhd_cuda_grid *grid, void *stream, void **arguments);

/* A TMA box over a tensor, innermost dimension first. Takes about a microsecond. */
enum { NBHD_CUDA_INT32 = NBHD_F64 + 1 };
struct nbhd_cuda_box {
    int dtype; /* nbhd_dtype, or NBHD_CUDA_INT32 */
    int rank;  /* 1 to 5 */
    void *data;           /* aligned to 16 */
    uint64_t size[5];     /* elements */
    uint64_t stride[5];   /* bytes, multiples of 16; stride[0] is implied */
    uint32_t box[5];      /* elements, 1 to 256; those of an element_stride e count e times */
    uint32_t step[5];     /* element strides, 1 to 8; 0: 1 */
    int swizzle;          /* 0, 32, 64 or 128 bytes */
};
nbhd_status nbhd_cuda_tensor_map(struct nbhd_tensor_map *map, const struct nbhd_cuda_box *box);

#endif
