/* The unfused passes as three products over the pairs of a query and a key that it sees; each pass is one or two of
 * them:
 *
 *     WRITES_SCORES    scores[q][k]  = scale * query[q] . key[k] (+ bias)      qk; av_bwd (dout . v)
 *     WRITES_QUERIES   query[q]      = scale * sum over k of scores[q][k] key[k]     av; qk_bwd (dq)
 *     WRITES_KEYS      key[k]        = scale * sum over q of scores[q][k] query[q]   qk_bwd (dk); av_bwd (dv)
 *
 * A row of scores has the window's product of entries; a key's entry is its distance from the query's first key, per
 * axis (around the circle of a periodic one). Where a causal or truncated window has fewer keys, the entries past its
 * end are written as `fill` and never read. */
#ifndef NBHD_CPU_UNFUSED_H
#define NBHD_CPU_UNFUSED_H

#include "core/kernel.h"

enum nbhd_product_kind { WRITES_SCORES, WRITES_QUERIES, WRITES_KEYS };

struct nbhd_product {
    enum nbhd_product_kind kind;
    struct nbhd_axis axis[3];
    int batch, heads, kv_heads, dtype, width; /* width: elements of a query's and of a key's row */
    struct nbhd_view query, key, scores;
    float scale, fill;
    const float *bias; /* of scores; NULL: none */
};

/* The products of the plan's pass, in order; returns how many. */
int nbhd_unfused_products(const struct nbhd_plan *plan, const struct nbhd_params *params,
                          struct nbhd_product products[2]);

/* The gradient of the bias is summed in parts, one task each, whose number does not depend on that of threads. */
int nbhd_unfused_table_parts(const struct nbhd_problem *problem);
long long nbhd_unfused_table_entries(const struct nbhd_problem *problem); /* of one head */

/* Of the rows that compute in float: they refuse float64. */
bool nbhd_unfused_refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT]);
/* Of the naive rows. real: bytes of a partial sum of the bias' gradient. */
int nbhd_unfused_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room);
nbhd_status nbhd_unfused_build(struct nbhd_plan *plan, size_t real, const char *describe);

#endif
