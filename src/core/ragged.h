/* What the files of ragged batches share: sequences.c reads and checks what the caller gave, ragged.c plans it and
 * ragged_run.c executes the plan. */
#ifndef NBHD_CORE_RAGGED_H
#define NBHD_CORE_RAGGED_H

#include "core/kernel.h"

struct nbhd_sequence {
    int lengths[6]; /* tokens per axis, then keys per axis */
    int index;      /* the caller's number */
    int plan;       /* of the distinct grids */
    long long token, kv_token;
    double flops;
    struct nbhd_part part; /* what kernels need of this */
};

/* parts: most work first; each of the first `wide` has all threads, the others have one each. */
struct nbhd_ragged_plan {
    nbhd_plan **plans;
    struct nbhd_sequence *parts;
    int distinct, count, wide, threads;
    nbhd_plan *joint; /* computes them all, many to a launch; then there are no plans */
    bool padded;
    size_t lane; /* bytes of a thread's workspace, where there are threads side by side */
};

/* What nbhd_plan_create_ragged was given. */
struct nbhd_request {
    nbhd_desc desc;
    nbhd_ragged ragged;
    nbhd_device device;
    unsigned flags;
    const char *kernel;
    bool padded;                 /* set by nbhd_sequences_check */
    long long tokens, kv_tokens; /* extents of packed tensors: by nbhd_sequences_read */
};

/* What does not need the lengths. */
nbhd_status nbhd_sequences_check(struct nbhd_request *request);
/* Fills list, one for each sequence, but for part, plan and flops: lengths that are there, tokens that lie inside what
 * they should and are written once. */
nbhd_status nbhd_sequences_read(struct nbhd_request *request, struct nbhd_sequence *list);

#endif
