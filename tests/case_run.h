/* A case under way, between case.c, case_tensors.c and case_oracle.c. A tensor has a double original, for the oracle,
 * and a buffer in the kernel's dtype and layout. */
#ifndef NBHD_TESTS_CASE_RUN_H
#define NBHD_TESTS_CASE_RUN_H

#include <stdint.h>
#include "case.h"
#include "oracle.h"

struct tensor {
    const char *name;
    nbhd_tensor *arg; /* of the nbhd_args under construction */
    double *exact;    /* contiguous, what the oracle reads or writes */
    double *plain;    /* outputs: the plain computation's result */
    char *host;       /* the kernel's buffer, host side: dtype and layout */
    void *device;     /* what the kernel gets */
    int shape[6];     /* batch, axes (3), heads, width */
    long long stride[6], count, elements, offset; /* elements: extent of the buffer */
    const struct place *tokens; /* of a ragged batch, where each lies; else NULL */
    int dtype;
    bool output, owner; /* owner: host and device are this tensor's own */
};

enum { Q, K, V, EXTRA_K, EXTRA_V, BIAS, DOUT, DLSE, O, LSE, DQ, DK, DV, DEXTRA_K, DEXTRA_V, DBIAS, SCORES,
       DSCORES, TENSORS };

/* Tokens of a ragged batch: the oracle has them one sequence after the other, the kernel in slots. */
struct place {
    long long count, slots;
    long long *slot;           /* by token */
    long long *first, *offset; /* by sequence: first token, and first slot */
    int largest[3];            /* grid that holds each */
};

struct run {
    nbhd_desc desc;            /* with defaults filled in; of a ragged batch the first sequence's */
    nbhd_desc given;
    struct place tokens, keys; /* of a ragged batch */
    const struct case_options *options;
    struct case_memory memory;
    struct tensor tensors[TENSORS];
    nbhd_args args;
    uint64_t random;
    int poisoned[3]; /* where the poisoned key is */
};

/* ---- case_tensors.c ---- */
size_t case_size_of(int dtype);
void case_put(char *to, int dtype, double value);
double case_get(const char *from, int dtype);
enum oracle_precision case_precision(int dtype);
/* Where in the buffer the element of a contiguous index lies. */
long long case_place(const struct tensor *t, long long index);
/* The problem of one sequence; of a batch that is not ragged there is one, the whole. */
nbhd_desc case_desc(const struct run *r, int sequence);
bool case_place_sequences(struct run *r, struct place *p, bool keys);
void case_release_place(struct place *p);
bool case_of_extra(int which);
/* Every tensor of the pass, laid out; then q, k and v as views of one projection, where they can be. */
bool case_describe(struct run *r);
void case_pack(struct run *r);
void case_fill(struct run *r);
/* Whether what a kernel writes there may be NaN by the poisoned key. */
bool case_is_near_poison(const struct run *r, const struct tensor *t, long long index);

/* ---- case_oracle.c ---- */
/* Fills the outputs' exact values, or those of a plain computation in the problem's own precision. */
bool case_consult(struct run *r, bool plain);
/* Whether an output, in the kernel's layout, is near enough to the oracle's; keeps the worst in result. */
bool case_compare(const struct run *r, const struct tensor *t, const char *got, struct case_result *result);

#endif
