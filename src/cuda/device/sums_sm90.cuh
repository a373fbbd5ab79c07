/* Where the rows of the float32 dQ lie that bwd_sm90.cu adds up in the workspace, [batch][queries][heads][head_dim],
 * and the caller's rows of the same queries. */
#ifndef NBHD_DEVICE_SUMS_SM90_CUH
#define NBHD_DEVICE_SUMS_SM90_CUH

#include "nbhd_params.h"

NBHD_FN int queries_of(const struct nbhd_params *p)
{
    return p->axis[0].length * p->axis[1].length * p->axis[2].length;
}

/* A query's place on the axes. */
struct query {
    int x[3];
};

NBHD_FN struct query query_at(const struct nbhd_params *p, int number)
{
    int line = number / p->axis[2].length;
    struct query q = {{line / p->axis[1].length, line % p->axis[1].length, number % p->axis[2].length}};
    return q;
}

/* Moves it on to the next. */
NBHD_FN void step_query(const struct nbhd_params *p, struct query *q)
{
    if (++q->x[2] < p->axis[2].length)
        return;
    q->x[2] = 0;
    if (++q->x[1] < p->axis[1].length)
        return;
    q->x[1] = 0;
    q->x[0]++;
}

NBHD_FN long long place_of(const struct nbhd_view *view, const struct query *q)
{
    return (unsigned)q->x[0] * view->axis[0] + (unsigned)q->x[1] * view->axis[1] + (unsigned)q->x[2] * view->axis[2];
}

NBHD_FN float *sum_address(const struct nbhd_params *p, float *sums, int batch, int head, int query)
{
    unsigned row = (batch * queries_of(p) + query) * p->heads + head; /* less than 2^31 (bwd_sm90.c) */
    return sums + (unsigned long long)row * NBHD_HEAD_DIM;
}

#endif
