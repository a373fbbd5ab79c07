/* What the scalar forward and backward share: who sees whom, as boxes to walk through, and softmax arithmetic in
 * double. */
#ifndef NBHD_CPU_SCALAR_H
#define NBHD_CPU_SCALAR_H

#include <math.h>
#include <stdbool.h>
#include "cpu/cpu.h"

/* Elements of one dilation group per axis: the keys that a query sees, or the queries that see a key. */
struct nbhd_box {
    int group[3], size[3];
    int from[3]; /* the element whose box it is */
    struct nbhd_range axis[3];
};

enum nbhd_box_of { NBHD_KEYS_OF_QUERY, NBHD_QUERIES_OF_KEY };

static inline struct nbhd_box nbhd_box_at(const struct nbhd_params *p, enum nbhd_box_of what, const int token[3])
{
    struct nbhd_box box;
    for (int i = 0; i < 3; i++) {
        const struct nbhd_axis a = p->axis[i];
        box.group[i] = token[i] % a.dilation;
        box.from[i] = token[i] / a.dilation;
        const int n = box.size[i] = nbhd_group_size(a, box.group[i]);
        box.axis[i] = what == NBHD_KEYS_OF_QUERY ? nbhd_keys(a, n, box.from[i]) : nbhd_queries(a, n, box.from[i]);
    }
    return box;
}

/* at = the first element. false: the box is empty (some keys are seen by no query). */
static inline bool nbhd_box_first(const struct nbhd_box *box, int at[3])
{
    bool any = true;
    for (int i = 0; i < 3; i++) {
        at[i] = box->axis[i].begin;
        any &= box->axis[i].begin < box->axis[i].end;
    }
    return any;
}

static inline long long nbhd_box_volume(const struct nbhd_box *box)
{
    long long volume = 1;
    for (int i = 0; i < 3; i++)
        volume *= nbhd_max(box->axis[i].end - box->axis[i].begin, 0);
    return volume;
}

static inline bool nbhd_box_next(const struct nbhd_box *box, int at[3])
{
    for (int i = 2; i >= 0; i--) {
        if (++at[i] < box->axis[i].end)
            return true;
        at[i] = box->axis[i].begin;
    }
    return false;
}

static inline void nbhd_box_token(const struct nbhd_params *p, const struct nbhd_box *box, const int at[3],
                                  int token[3])
{
    for (int i = 0; i < 3; i++)
        token[i] = nbhd_wrap(p->axis[i], box->size[i], at[i]) * p->axis[i].dilation + box->group[i];
}

/* Bias of the head's table for key element k seen by query element q; 0 without a table. */
static inline double nbhd_bias_at(const struct nbhd_params *p, int head, const int q[3], const int k[3])
{
    if (!p->bias)
        return 0;
    long long at = head;
    for (int i = 0; i < 3; i++)
        at = at * (2 * p->axis[i].window - 1) + k[i] - q[i] + p->axis[i].window - 1;
    return (double)p->bias[at];
}

static inline void nbhd_load_row(double *to, const char *from, int dtype, int n)
{
    for (int i = 0; i < n; i++)
        to[i] = nbhd_load(from, dtype, i);
}

static inline double nbhd_dot(const double *a, const char *b, int dtype, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += a[i] * nbhd_load(b, dtype, i);
    return sum;
}

/* The softmax of one query so far: sum is of exp(score - max). */
struct nbhd_softmax {
    double max, sum;
};

#define NBHD_SOFTMAX_INIT {-INFINITY, 0}

/* Takes one more score in. Returns its weight, relative to the new maximum; what was weighted before is to be scaled by
 * *keep. A score of -inf (of a bias) weighs nothing, also where it is the first. */
static inline double nbhd_softmax_add(struct nbhd_softmax *s, double score, double *keep)
{
    const double max = score > s->max ? score : s->max, weight = score == -INFINITY ? 0 : exp(score - max);
    *keep = s->sum > 0 ? exp(s->max - max) : 0;
    s->sum = s->sum * *keep + weight;
    s->max = max;
    return weight;
}

static inline double nbhd_softmax_lse(const struct nbhd_softmax *s) { return s->max + log(s->sum); }

#endif
