/* What the files of `nbhd run` share: cmd_run.c parses, reads, computes and writes; run_problem.c makes a problem of
 * the tensors in files. Functions return an exit status, and have told the sentence of a failure. */
#ifndef NBHD_TOOL_RUN_H
#define NBHD_TOOL_RUN_H

#include <stdbool.h>

#include "args.h"
#include "array.h"
#include "problem.h"
#include "slots.h"

struct run_options {
    const char *in[SLOT_COUNT], *out[SLOT_COUNT]; /* file by slot; NULL: not given */
    struct extents window, stride, dilation;
    const char *edge, *kernel, *lengths, *kv_lengths;
    double scale;
    int device, threads;
    bool tf32, deterministic, json;
};

/* One pass of the work: its tensors are files, or memory of our own where only the backward needs them. */
struct run_work {
    const struct run_options *options;
    struct problem problem; /* of the forward */
    nbhd_desc tensors;      /* whose tensors they are (problem_tensors) */
    struct array in[SLOT_COUNT];
    struct output out[SLOT_COUNT];
    struct outputs *files;
    void *own[SLOT_COUNT];
    nbhd_args args;
    double ms, plan_ms;
    char kernels[160];
};

/* "--dq", for sentences. */
const char *run_option_name(int slot);
/* The problem, from the shapes of Q, K and V. Other tensors are compared with it afterwards. */
int run_describe(struct run_work *w);
/* The legality of every sequence's problem, and then of which tensors they are. */
int run_check_problem(struct run_work *w);
/* Every input has the shape and type that the problem gives it. */
int run_check_inputs(const struct run_work *w);
/* A file's array: of a ragged batch [tokens, heads, head_dim], and [sequences, extra, ...]. Returns its rank. */
int run_array_shape(const struct run_work *w, int slot, long long shape[6]);

#endif
