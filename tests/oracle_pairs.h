/* What the files of the oracle share: the keys that a query sees, the tensors' rows, arithmetic of each precision. */
#ifndef NBHD_TESTS_ORACLE_PAIRS_H
#define NBHD_TESTS_ORACLE_PAIRS_H

#include "oracle.h"

struct oracle {
    const struct oracle_problem *p;
    const struct oracle_tensors *t;
    bool *sees[3]; /* per axis [length][keys] */
    long long tokens, keys;
    /* Of one query: the keys that it sees, in order, extra keys after the grid's; scores, then probabilities. */
    long long *seen, count;
    double *weights;
};

/* false: out of memory. */
bool oracle_open(struct oracle *c, const struct oracle_problem *p, const struct oracle_tensors *t);
void oracle_close(struct oracle *c);
/* Fills c->seen. */
void oracle_find_visible(struct oracle *c, long long query);
void oracle_coordinates(const struct oracle_problem *p, bool of_key, long long token, int x[3]);
/* How far around the circle of its group a key lies from the query's leader, from -left to the rest of the circle. */
int oracle_around(const struct oracle_axis *a, int query, int key, int left);

/* Row of a key, extra keys after the grid's, in k/v or a gradient of them. */
double *oracle_key_row(const struct oracle *c, double *grid, double *extra, int batch, long long key, int kv_head,
                       int width);
double *oracle_query_row(const struct oracle *c, double *array, int batch, long long token, int head, int width);
long long oracle_bias_index(const struct oracle *c, int head, long long query, long long key);

/* What a product takes of a value: it is rounded to the type. Of a float32 that is given to them as it stands, tensor
 * cores read the 19 bits of a TF32: they cut the others off. Others round to the nearest before. */
double oracle_operand(const struct oracle_problem *p, double value);
/* Of a tensor's element, which has its type already. */
static inline double oracle_element(const struct oracle_problem *p, double value)
{
    return p->precision == ORACLE_TF32 || p->precision == ORACLE_TF32_NEAREST ? oracle_operand(p, value) : value;
}

/* Sums are kept in float by all but EXACT. */
static inline double oracle_sum(const struct oracle_problem *p, double value)
{
    return p->precision == ORACLE_EXACT ? value : (double)(float)value;
}

double oracle_dot(const struct oracle *c, const double *a, const double *b, int n);
void oracle_add_scaled(const struct oracle *c, double *to, double factor, const double *from, int n);
/* Results: each times factor, rounded. */
void oracle_finish(const struct oracle_problem *p, double *array, double factor, long long count);
void oracle_clear(double *array, long long count); /* NULL is allowed */

#endif
