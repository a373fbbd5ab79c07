/* Neighborhood attention by definition: membership of one key in one query's window, and sums over all pairs.
 * Shares nothing with the library, on purpose: it is the second opinion. O(tokens * keys), so for small problems. */
#ifndef NBHD_TESTS_ORACLE_H
#define NBHD_TESTS_ORACLE_H

#include <stdbool.h>

/* The arithmetic to compute in. EXACT: double. The others are a plain computation in that precision, whose own error is
 * the yardstick for a kernel's: sums in float, probabilities and results rounded to the type. F32_BASE2: as plain, but
 * scores are in powers of two, as kernels have them, and dot products begin at the last dimension. TF32: float32
 * tensors, whose products take the upper 11 bits of their operands. */
enum oracle_precision {
    ORACLE_EXACT, ORACLE_F32, ORACLE_F32_BASE2, ORACLE_F16, ORACLE_BF16, ORACLE_TF32, ORACLE_TF32_NEAREST
};

enum oracle_edge { ORACLE_NEAREST, ORACLE_CAUSAL, ORACLE_TRUNCATED, ORACLE_PERIODIC };

struct oracle_axis {
    int length, keys, window, stride, dilation;
    enum oracle_edge edge;
};

struct oracle_problem {
    struct oracle_axis axis[3]; /* leading axes of length 1 where there are fewer */
    int batch, heads, kv_heads, head_dim, head_dim_v, extra;
    double scale;
    enum oracle_precision precision;
};

/* All arrays are contiguous doubles: q, dq [batch, tokens, heads, head_dim]; k, dk [batch, keys, kv_heads, head_dim];
 * v, dv [.., head_dim_v]; o, dout [batch, tokens, heads, head_dim_v]; lse, dlse [batch, tokens, heads]; extra_k..
 * [batch, extra, kv_heads, dim]; bias, dbias [heads, 2 w0 - 1, 2 w1 - 1, 2 w2 - 1] or NULL; scores, dscores [batch,
 * tokens, heads, w0 w1 w2]: the entry of a key is, per axis, how many visible keys precede it. On a periodic axis keys
 * follow each other around the circle, from the window's first on; biases are of how far a key lies from the query
 * along the window, not of the tokens' difference. */
struct oracle_tensors {
    double *q, *k, *v, *o, *lse, *extra_k, *extra_v, *bias;
    double *dout, *dlse, *dq, *dk, *dv, *dextra_k, *dextra_v, *dbias;
    double *scores, *dscores;
};

/* Is token `key` in the window of token `query`? */
bool oracle_sees(const struct oracle_axis *axis, int query, int key);
/* Writes o and lse. false: out of memory. */
bool oracle_forward(const struct oracle_problem *problem, const struct oracle_tensors *tensors);
/* From q, k, v (extra, bias), o, lse, dout and dlse (may be NULL): writes all gradients whose arrays are there. As a
 * kernel, it takes o and lse as they are given: their roundings move its result, and are no error. */
bool oracle_backward(const struct oracle_problem *problem, const struct oracle_tensors *tensors);

/* The unfused products, without a softmax. Entries of scores that no key has (a causal or truncated window may hold
 * fewer than its product) are -inf from qk, 0 in a gradient, and not read. scores are an input of av and av_backward,
 * dscores of qk_backward, which writes dq, dk and dbias; av_backward writes dscores and dv. */
bool oracle_qk(const struct oracle_problem *problem, const struct oracle_tensors *tensors);
bool oracle_av(const struct oracle_problem *problem, const struct oracle_tensors *tensors);
bool oracle_qk_backward(const struct oracle_problem *problem, const struct oracle_tensors *tensors);
bool oracle_av_backward(const struct oracle_problem *problem, const struct oracle_tensors *tensors);
/* Which entries of scores [tokens, w0 w1 w2] have a key, for filling the others of an input. false: out of memory. */
bool oracle_entries(const struct oracle_problem *problem, bool *used);

/* Rounds to the precision's storage type. */
double oracle_round(enum oracle_precision precision, double value);

#endif
