/* One problem, run by one kernel and compared with the oracle. Uses the public interface and the oracle only, so that
 * the command's `check` and every test of a kernel are the same code. */
#ifndef NBHD_TESTS_CASE_H
#define NBHD_TESTS_CASE_H

#include <stdbool.h>
#include "nbhd.h"

/* Where a kernel's tensors live. NULL members of case_options.memory mean host memory with an inaccessible page right
 * behind every buffer. A device's tests give copies to and from it. */
struct case_memory {
    void *(*alloc)(size_t bytes);
    void (*release)(void *memory);
    bool (*upload)(void *device, const void *host, size_t bytes);
    bool (*download)(void *host, const void *device, size_t bytes);
};

enum case_layout {
    CASE_CONTIGUOUS,
    CASE_PACKED, /* q, k, v are views of one [batch, tokens, heads + 2 kv_heads, dim] projection where they can be */
    CASE_STRIDED /* every tensor has gaps between heads, tokens and batches, filled with NaN; odd offsets of elements */
};

/* A ragged batch: how the sequences lie in the tensors. */
enum case_sequences {
    CASE_ONE_AFTER_THE_OTHER,
    CASE_OFFSETS, /* in the reverse order, with gaps */
    CASE_PADDED   /* each in the corner of a grid that holds the largest */
};

struct case_options {
    const char *kernel; /* NULL: the planner's choice */
    nbhd_device device;
    unsigned flags; /* of the plan */
    unsigned seed;
    enum case_layout layout;
    int threads;
    int granularity;      /* strides of CASE_STRIDED are multiples of so many elements; 0 means 1 */
    bool no_lse;          /* forward: do not ask for the logsumexp */
    bool dlse;            /* backward: give a gradient of it */
    bool poison_key;      /* one key and its value are NaN: just the queries that see it may become NaN;
                             unfused passes: one row of each input */
    int poison_reach;     /* with it: what lies within so many tokens of that key on every axis is not looked at, as
                             kernels on tensor cores multiply a tile's NaN by 0 */
    bool large_values;    /* scores of some hundreds */
    int repeats;          /* further executions, each of which must give the same bits */
    void (*before)(void *); /* called with `state` before each of them */
    void *state;
    struct case_memory memory;
    int sequences; /* of a ragged batch; 0: none. The problem's length is ignored then, and its batch */
    const int *lengths, *kv_lengths; /* as in nbhd_ragged */
    enum case_sequences placement;
};

struct case_result {
    bool ok;
    double max_abs_error, allowed_error; /* of the output that came nearest to what is allowed, or went furthest past */
    const char *worst;                   /* its name */
    char why[NBHD_TEXT];                 /* if not ok: one sentence */
    char kernel[64];
    unsigned long long bits; /* a hash of every output's bits */
};

/* Runs desc, of any pass. ok is false where the plan failed too; status says so (a refusal is no wrong result). */
nbhd_status case_run(const nbhd_desc *desc, const struct case_options *options, struct case_result *result);

/* A random legal problem, of at most so many (query, key) pairs for the oracle; same seed, same problem. */
nbhd_desc case_random(unsigned seed, double most_pairs);

/* Problem lines that exercise every edge by hand; ends with NULL. Forward; add pass and dtype by setting the fields. */
extern const char *const case_lines[];

#endif
