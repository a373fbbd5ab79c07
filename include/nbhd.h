/* nbhd: neighborhood attention in C.   SPDX-License-Identifier: MIT
 *
 * A problem is described, planned once, and executed as often as wanted:
 *
 *     nbhd_desc desc = NBHD_DESC_INIT;
 *     nbhd_desc_parse(&desc, "fwd f32 b2 h8 d64 56x56 w13x13");
 *     nbhd_plan *plan = NULL;
 *     if (nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CPU, 0)) puts(nbhd_last_error());
 *     nbhd_args args = NBHD_ARGS_INIT;
 *     args.q.data = q; args.k.data = k; args.v.data = v; args.o.data = o;
 *     void *workspace = aligned_alloc(64, (nbhd_plan_workspace(plan) + 63) / 64 * 64);
 *     nbhd_execute(plan, &args, workspace, NULL);
 *     nbhd_plan_destroy(&plan);
 *
 * Tensors are [batch, axis0(, axis1(, axis2)), heads, head_dim]. What a token sees is defined in docs/mask.md.
 * Functions return a status; nbhd_last_error() then holds one sentence. Nothing here aborts, exits or prints. */
#ifndef NBHD_H
#define NBHD_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define NBHD_API __attribute__((visibility("default")))
#else
#define NBHD_API
#endif

#define NBHD_VERSION 100 /* 10000 * major + 100 * minor + patch */
NBHD_API int nbhd_version(void);

/* ---- status: values never change ---- */
typedef enum nbhd_status {
    NBHD_OK = 0,
    NBHD_ERROR_INVALID = 1,     /* the input is wrong: a field or an argument is out of its range */
    NBHD_ERROR_UNSUPPORTED = 2, /* the input is legal, but no kernel of this build and machine takes it */
    NBHD_ERROR_MEMORY = 3,      /* an allocation failed */
    NBHD_ERROR_DEVICE = 4,      /* no such device, or its driver reported an error */
    NBHD_ERROR_COMPILE = 5,     /* a kernel could not be compiled at run time */
    NBHD_ERROR_IO = 6           /* a file could not be read or written */
} nbhd_status;

NBHD_API const char *nbhd_status_name(nbhd_status status);
/* The sentence of this thread's last failed call; "" if none failed. Valid until this thread's next failure. */
NBHD_API const char *nbhd_last_error(void);

/* ---- the problem ---- */
typedef enum nbhd_pass {
    NBHD_FORWARD = 0,  /* o, lse from q, k, v */
    NBHD_BACKWARD = 1, /* dq, dk, dv from q, k, v, o, lse, dout (, dlse) */
    NBHD_QK = 2,       /* unfused: scores from q, k */
    NBHD_AV = 3,       /* unfused: o from scores, v */
    NBHD_QK_BACKWARD = 4,
    NBHD_AV_BACKWARD = 5
} nbhd_pass;

typedef enum nbhd_dtype { NBHD_F32 = 0, NBHD_F16 = 1, NBHD_BF16 = 2, NBHD_F64 = 3 } nbhd_dtype;
typedef enum nbhd_device { NBHD_DEVICE_CPU = 0, NBHD_DEVICE_CUDA = 1 } nbhd_device;

/* What happens where a window reaches past an end of an axis. */
typedef enum nbhd_edge {
    NBHD_NEAREST = 0,   /* the window is shifted inwards: always `window` keys (the usual choice) */
    NBHD_CAUSAL = 1,    /* keys up to the query itself only */
    NBHD_TRUNCATED = 2, /* the window is cut off at the border, as a convolution's valid taps */
    NBHD_PERIODIC = 3   /* the axis wraps around, as longitude does: always `window` keys */
} nbhd_edge;

/* In every field but head_dim and length, 0 means the default. Use NBHD_DESC_INIT, then set what differs. */
typedef struct nbhd_desc {
    size_t size;      /* sizeof(nbhd_desc): lets fields be added without breaking callers */
    int pass;         /* nbhd_pass */
    int dtype;        /* nbhd_dtype of q, k, v, o and their gradients */
    int rank;         /* number of axes, 1 to 3; of the arrays below as many entries are looked at */
    int batch;        /* default 1 */
    int heads;        /* query heads; default 1 */
    int kv_heads;     /* key/value heads, a divisor of heads; default heads */
    int head_dim;     /* of q and k, 1 to 512; required */
    int head_dim_v;   /* of v and o, 1 to 512; default head_dim */
    int length[3];    /* tokens per axis, slowest first; required */
    int window[3];    /* keys per axis; default the whole axis. window * dilation <= length */
    int stride[3];    /* queries that share a window, 1 to window; default 1 */
    int dilation[3];  /* step between keys in tokens; default 1 */
    int edge[3];      /* nbhd_edge per axis */
    int kv_length[3]; /* cross attention: key tokens per axis where they differ from length; then that axis is
                         attended to whole (window = kv_length, stride and dilation 1, NBHD_NEAREST) */
    int extra;        /* additional keys and values without a position, seen by every query */
    float scale;      /* factor on q.k before the softmax; default head_dim^-1/2 */
    int bias;         /* 1: a table of relative positional biases, args.bias, is added to the scaled scores; -inf hides
                         keys, and a query that sees none then gets NaN, and a logsumexp of -inf */
    int threads;      /* CPU threads; default as many as this process may use, by affinity and a container's quota */
    int tf32;         /* 1: products of f32 may round their operands to TF32 (11 bits of precision, as bf16 has 8), to
                         run on a GPU's tensor cores; sums stay float32. No effect on other types, nor where no kernel
                         uses it */
} nbhd_desc;

#define NBHD_DESC_INIT {sizeof(nbhd_desc), 0, 0, 0, 0, 0, 0, 0, 0, {0, 0, 0}, {0, 0, 0}, {0, 0, 0}, {0, 0, 0}, \
                        {0, 0, 0}, {0, 0, 0}, 0, 0.0f, 0, 0, 0}

#define NBHD_TEXT 512 /* room enough for any problem line or sentence */

/* One line of text names a problem: "fwd bf16 b2 h24/8 d128/64 30x48x80 w18x24x24 s16x8x8 r1x1x2 enct extra=512".
 * parse overwrites *desc; format writes the canonical order, leaving out defaults. INVALID names the bad field. */
NBHD_API nbhd_status nbhd_desc_parse(nbhd_desc *desc, const char *text);
NBHD_API nbhd_status nbhd_desc_format(const nbhd_desc *desc, char *text, size_t capacity);
/* The keys that a query sees on one axis: tokens first, first + dilation, ... (count of them); on a periodic axis those
 * at or past its length go on at query % dilation. */
NBHD_API nbhd_status nbhd_desc_keys(const nbhd_desc *desc, int axis, int query, int *first, int *count);
/* Visible (query, key) pairs over batch and heads, extra keys included; 0 and a sentence if desc is invalid. */
NBHD_API double nbhd_desc_pairs(const nbhd_desc *desc);
/* Useful floating-point operations: 2 * pairs * (head_dim + head_dim_v), 2.5 times that for the backward pass;
 * a product of the unfused passes counts for itself. */
NBHD_API double nbhd_desc_flops(const nbhd_desc *desc);

/* ---- plan ---- */
typedef struct nbhd_plan nbhd_plan;

enum {
    NBHD_PLAN_NO_JIT = 1,        /* use only kernels that are compiled or cached already */
    NBHD_PLAN_MEASURE = 2,       /* CPU: time the candidates, and remember the winner as wisdom (below) */
    NBHD_PLAN_DETERMINISTIC = 4, /* the same bits at every execution, also where that is slower; cuda.bwd_sm90 then adds
                                    some dQ up in integers (docs/cuda.md: how they round, and what infinities do) */
    NBHD_PLAN_ALIGNED = 8        /* CUDA: addresses and strides in bytes will be multiples of 16. No second kernel is
                                    planned and compiled for others, which nbhd_execute then refuses as
                                    NBHD_ERROR_UNSUPPORTED */
};

/* Plans desc on device. kernel: NULL to let the planner choose, or a name as nbhd_kernel_name lists it, e.g.
 * "cpu.fwd_avx2". NBHD_DEVICE_CUDA plans for the calling thread's current context, else for device 0. On failure *plan
 * is NULL and the sentence tells the field, its value and the rows that refused. INVALID: desc, device, flags or kernel
 * is wrong; UNSUPPORTED: no row takes the problem, or not the one named; DEVICE: there is no such GPU, or its driver
 * failed; COMPILE: a row's kernel could not be compiled, or NBHD_PLAN_NO_JIT forbids it; MEMORY. */
NBHD_API nbhd_status nbhd_plan_create(nbhd_plan **plan, const nbhd_desc *desc, nbhd_device device, unsigned flags);
NBHD_API nbhd_status nbhd_plan_create_with(nbhd_plan **plan, const nbhd_desc *desc, nbhd_device device,
                                           unsigned flags, const char *kernel);
NBHD_API size_t nbhd_plan_workspace(const nbhd_plan *plan);     /* bytes, on the plan's device; may be 0 */
NBHD_API const char *nbhd_plan_kernel(const nbhd_plan *plan);   /* its name: "cpu.fwd_avx512" */
NBHD_API const char *nbhd_plan_describe(const nbhd_plan *plan); /* and its choices: "permute, parts 1x8x56 ..." */
NBHD_API double nbhd_plan_predicted_ms(const nbhd_plan *plan);  /* by the cost model; 0 where there is none */
/* NULL is allowed; sets *plan to NULL. A plan for a GPU must go before the CUDA context that it was made in. */
NBHD_API void nbhd_plan_destroy(nbhd_plan **plan);

/* A ragged batch: sequences whose axes differ in length, each a grid of its own (docs/ragged.md). They lie in the
 * tensors
 *   packed: q [tokens, heads, head_dim] and so on, each sequence's grid in row-major order, one after the other or from
 *           the token that offsets names; nbhd_tensor.stride is then of [token, heads]; or, where desc->length is set,
 *   padded: in tensors [sequences, desc->length..., heads, head_dim] as ever, at the lower end of each axis.
 * Extra keys are [sequences, extra, ...]; biases are shared. Tokens of no sequence are not touched. */
typedef struct nbhd_ragged {
    size_t size;                 /* sizeof(nbhd_ragged) */
    int sequences;
    const int *lengths;          /* [sequences][rank]: tokens per axis */
    const int *kv_lengths;       /* cross attention: the same of the keys; NULL: lengths */
    const long long *offsets;    /* packed: [sequences] first tokens in q, o, lse, ...; NULL: one after the other */
    const long long *kv_offsets; /* and in k, v; NULL: with kv_lengths one after the other, else offsets */
} nbhd_ragged;

#define NBHD_RAGGED_INIT {sizeof(nbhd_ragged), 0, NULL, NULL, NULL, NULL}

/* Plans desc for each of the sequences: a window of 0 is the whole axis of each, and one that does not fit a sequence
 * is refused. desc->length is 0 (packed) or the padded tensors' axes, kv_length the same of the keys, batch 0 or the
 * number of sequences. The arrays are read here only. The plan's kernel, description and predicted time: of the largest
 * sequence, and of all. */
NBHD_API nbhd_status nbhd_plan_create_ragged(nbhd_plan **plan, const nbhd_desc *desc, const nbhd_ragged *ragged,
                                             nbhd_device device, unsigned flags, const char *kernel);

/* Wisdom: what NBHD_PLAN_MEASURE found, kept in the process and consulted by every plan that names no kernel. A
 * measurement takes about two seconds; it uses made-up tensors of the problem's size. The file is text: "nbhd wisdom
 * 1", then a line "machine <processor>" above the choices measured there, "<kernel> <configuration> <ms> <device>
 * <problem> threads=<n>". Choices of other machines, or of kernels and configurations that this build does not offer,
 * are not used. load adds a file's; lines that it cannot read are left out and counted in *ignored (NULL is allowed),
 * nbhd_last_error tells of the first. save replaces the file. All may be called from any thread. */
NBHD_API nbhd_status nbhd_wisdom_load(const char *path, int *ignored);
NBHD_API nbhd_status nbhd_wisdom_save(const char *path);
NBHD_API void nbhd_wisdom_forget(void);

/* Kernels, best first: name of the i-th, NULL past the end. */
NBHD_API const char *nbhd_kernel_name(int i);
/* Why the i-th kernel cannot run desc on device: writes "" and returns NBHD_OK if it can. flags: of the plan that would
 * run it, since some kernels take a problem but not, say, deterministically. */
NBHD_API nbhd_status nbhd_kernel_refusal(int i, const nbhd_desc *desc, nbhd_device device, char *why, size_t capacity);
NBHD_API nbhd_status nbhd_kernel_refusal_with(int i, const nbhd_desc *desc, nbhd_device device, unsigned flags,
                                              char *why, size_t capacity);

/* ---- execute ---- */
/* A tensor of the caller's. stride: in elements, of [batch, axes..., heads], rank + 2 of them in that order; the last
 * extent is unit stride. All zero: contiguous. Where an extent is 1, its stride is not used. A tensor of extra keys has
 * [batch, extra, heads]. */
typedef struct nbhd_tensor {
    void *data;
    long long stride[5];
} nbhd_tensor;

typedef struct nbhd_args {
    size_t size;                /* sizeof(nbhd_args) */
    nbhd_tensor q, k, v;        /* [batch, axes, heads | kv_heads, head_dim | head_dim_v] */
    nbhd_tensor o;              /* [batch, axes, heads, head_dim_v]; written forward, read backward */
    nbhd_tensor lse;            /* float32 [batch, axes, heads], natural logarithm; optional forward, read backward */
    nbhd_tensor extra_k, extra_v; /* [batch, extra, kv_heads, dim]; required when extra > 0 */
    nbhd_tensor dout, dlse;     /* backward: gradient of o, and optionally of lse (float32) */
    nbhd_tensor dq, dk, dv, dextra_k, dextra_v; /* backward: written */
    nbhd_tensor bias, dbias;    /* float32 [heads, 2 w0 - 1, ...]: of (key - query) / dilation + w - 1; contiguous:
                                 * stride is not looked at */
    nbhd_tensor scores, dscores; /* unfused: [batch, axes, heads, product of windows] */
} nbhd_args;

#define NBHD_ARGS_INIT {sizeof(nbhd_args), {0, {0}}, {0, {0}}, {0, {0}}, {0, {0}}, {0, {0}}, {0, {0}}, {0, {0}}, \
                        {0, {0}}, {0, {0}}, {0, {0}}, {0, {0}}, {0, {0}}, {0, {0}}, {0, {0}}, {0, {0}}, {0, {0}}, \
                        {0, {0}}, {0, {0}}}

/* Runs the plan. workspace: nbhd_plan_workspace bytes, aligned to 64, one per concurrent call. stream: a CUstream, or
 * NULL; ignored on the CPU, where the call returns when the result is there. Any number of threads may execute one
 * plan. Allocates nothing, and on a GPU does not wait. What is written must not overlap what is read, nor itself.
 * Refused as INVALID are tensors that are missing or not aligned to their elements, equal addresses, tensors without
 * gaps that overlap, and strides less than a row; tensors that the pass does not use are not looked at. UNSUPPORTED:
 * the kernel cannot read a tensor's address or strides, and the plan has no other (NBHD_PLAN_ALIGNED, or a kernel that
 * was named). DEVICE: the driver refused the launch. */
NBHD_API nbhd_status nbhd_execute(const nbhd_plan *plan, const nbhd_args *args, void *workspace, void *stream);

/* ---- merge ---- */
/* Partial results over disjoint sets of keys become the result over all of them, on the CPU:
 *     lse = log sum_p exp(lse_p),   o = sum_p exp(lse_p - lse) o_p
 * desc tells the shape of every part, o [batch, axes, heads, head_dim_v] of its dtype and lse [batch, axes, heads] of
 * float32, and threads; parts: 1 to 64. A part whose lse is -inf saw no key: its o is not read; where all are, o is 0
 * and lse -inf. o and lse may be a part's own memory; lse may be NULL. Starts threads at its first call. */
NBHD_API nbhd_status nbhd_merge(const nbhd_desc *desc, int parts, const nbhd_tensor *o_parts,
                                const nbhd_tensor *lse_parts, const nbhd_tensor *o, const nbhd_tensor *lse);
/* Its gradient, written to do_parts and dlse_parts, from dout and dlse (NULL: zero). */
NBHD_API nbhd_status nbhd_merge_backward(const nbhd_desc *desc, int parts, const nbhd_tensor *o_parts,
                                         const nbhd_tensor *lse_parts, const nbhd_tensor *dout, const nbhd_tensor *dlse,
                                         const nbhd_tensor *do_parts, const nbhd_tensor *dlse_parts);

#ifdef __cplusplus
}
#endif
#endif
