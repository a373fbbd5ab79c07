/* A problem of the command line: what a problem line says, and the sequences of a ragged batch, which a descriptor has
 * no room for. In a line the axes, and kv= with them, then list grids: "fwd d64 30x40+16x16*3+9x33 w7x7"; "*3" repeats
 * one. */
#ifndef NBHD_TOOL_PROBLEM_H
#define NBHD_TOOL_PROBLEM_H

#include <stdbool.h>

#include "nbhd.h"

struct problem {
    nbhd_desc desc;             /* of a ragged batch: its window, heads, ...; the axes are its first sequence's */
    char line[NBHD_TEXT];       /* canonical */
    bool deterministic;         /* so are its plans to be */
    int sequences;              /* of a ragged batch; 0: none */
    int *lengths, *kv_lengths;  /* [sequences][rank]; kv_lengths NULL: as lengths */
};

/* where: "FILE:LINE: " or "", ahead of the sentence of a failure. Returns the exit status. */
int problem_parse(struct problem *problem, const char *text, const char *where);
/* Writes line anew from the rest. */
int problem_write_line(struct problem *problem);
void problem_release(struct problem *problem);
/* "30x40,16x16*2", or with + between grids, to [sequences][rank]; *rank 0: told by the first grid. name: for the
 * sentence. */
int problem_grids(const char *name, const char *text, int *rank, int *sequences, int **lengths);

nbhd_status problem_plan(nbhd_plan **plan, const struct problem *problem, int pass, nbhd_device device,
                         const char *kernel);
/* One sequence as a problem of its own; where there are none, the problem. */
nbhd_desc problem_part(const struct problem *problem, int sequence);
static inline int problem_parts(const struct problem *problem) { return problem->sequences ? problem->sequences : 1; }
double problem_pairs(const struct problem *problem);
double problem_flops(const struct problem *problem);
/* Why the i-th kernel does not take the problem; "" if it does. */
void problem_refusal(const struct problem *problem, int i, nbhd_device device, char why[NBHD_TEXT]);
/* Tokens of queries and of keys of all sequences together. */
void problem_tokens(const struct problem *problem, long long *tokens, long long *keys);
/* A problem whose tensors (slots.h) have as many elements: all tokens on the last axis. */
nbhd_desc problem_tensors(const struct problem *problem);

#endif
