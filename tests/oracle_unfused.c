/* See oracle.h: scores and weighted sums as tensors of their own, and their gradients. */
#include "oracle_pairs.h"
#include <math.h>
#include <stdlib.h>

/* Entry of a visible key in a row of scores: per axis its rank among the keys that the query sees. */
static long long entry_of(const struct oracle *c, long long query, long long key)
{
    int x[3], y[3];
    oracle_coordinates(c->p, false, query, x);
    oracle_coordinates(c->p, true, key, y);
    long long entry = 0;
    for (int i = 0; i < 3; i++) {
        const struct oracle_axis *a = &c->p->axis[i];
        int rank = 0;
        for (int j = 0; j < y[i]; j++)
            rank += c->sees[i][(size_t)x[i] * (size_t)a->keys + (size_t)j];
        if (a->edge == ORACLE_PERIODIC)
            rank = oracle_around(a, x[i], y[i], a->window / 2) + a->window / 2;
        entry = entry * a->window + rank;
    }
    return entry;
}

static int window_of(const struct oracle_problem *p)
{
    return p->axis[0].window * p->axis[1].window * p->axis[2].window;
}

/* Calls visit for every visible (query, key) pair of every batch entry and head, with the pair's score entry. */
struct pair {
    int batch, head, kv_head;
    long long query, key, entry; /* entry: index into scores */
};

static bool each_pair(const struct oracle_problem *p, const struct oracle_tensors *t,
                      void (*visit)(const struct oracle *c, const struct pair *at))
{
    struct oracle c;
    if (!oracle_open(&c, p, t))
        return false;
    for (long long query = 0; query < c.tokens; query++) {
        oracle_find_visible(&c, query);
        for (long long i = 0; i < c.count; i++) {
            const long long key = c.seen[i];
            const long long entry = entry_of(&c, query, key);
            for (int batch = 0; batch < p->batch; batch++)
                for (int head = 0; head < p->heads; head++) {
                    const long long row = ((long long)batch * c.tokens + query) * p->heads + head;
                    const struct pair at = {batch, head, head / (p->heads / p->kv_heads), query, key,
                                            row * window_of(p) + entry};
                    visit(&c, &at);
                }
        }
    }
    oracle_close(&c);
    return true;
}

static long long count_of(const struct oracle_problem *p, bool of_key, int heads, int width)
{
    long long count = (long long)p->batch * heads * width;
    for (int i = 0; i < 3; i++)
        count *= of_key ? p->axis[i].keys : p->axis[i].length;
    return count;
}

static void fill_with(double *array, double value, long long count)
{
    for (long long i = 0; i < count; i++)
        array[i] = value;
}

static void mark_entry(const struct oracle *c, const struct pair *at)
{
    if (!at->batch && !at->head) /* scores of the first batch entry and head: [query][heads][window] */
        c->t->scores[at->query * window_of(c->p) + at->entry % window_of(c->p)] = 1;
}

bool oracle_entries(const struct oracle_problem *p, bool *used)
{
    long long count = count_of(p, false, 1, window_of(p)) / p->batch;
    struct oracle_tensors t = {.scores = calloc((size_t)count, sizeof(double))};
    const bool ok = t.scores && each_pair(p, &t, mark_entry);
    for (long long i = 0; ok && i < count; i++)
        used[i] = t.scores[i] != 0;
    free(t.scores);
    return ok;
}

static double *query_of(const struct oracle *c, const struct pair *at, double *array, int width)
{
    return oracle_query_row(c, array, at->batch, at->query, at->head, width);
}

static double *key_of(const struct oracle *c, const struct pair *at, double *array, int width)
{
    return oracle_key_row(c, array, NULL, at->batch, at->key, at->kv_head, width);
}

static void qk_pair(const struct oracle *c, const struct pair *at)
{
    const int d = c->p->head_dim;
    double score = oracle_dot(c, query_of(c, at, c->t->q, d), key_of(c, at, c->t->k, d), d);
    score = oracle_sum(c->p, score * c->p->scale);
    if (c->t->bias)
        score = oracle_sum(c->p, score + c->t->bias[oracle_bias_index(c, at->head, at->query, at->key)]);
    c->t->scores[at->entry] = oracle_round(c->p->precision, score);
}

bool oracle_qk(const struct oracle_problem *p, const struct oracle_tensors *t)
{
    fill_with(t->scores, -INFINITY, count_of(p, false, p->heads, window_of(p)));
    return each_pair(p, t, qk_pair);
}

static void av_pair(const struct oracle *c, const struct pair *at)
{
    const int d = c->p->head_dim_v;
    oracle_add_scaled(c, query_of(c, at, c->t->o, d), c->t->scores[at->entry], key_of(c, at, c->t->v, d), d);
}

bool oracle_av(const struct oracle_problem *p, const struct oracle_tensors *t)
{
    const long long count = count_of(p, false, p->heads, p->head_dim_v);
    oracle_clear(t->o, count);
    const bool ok = each_pair(p, t, av_pair);
    oracle_finish(p, t->o, 1, count);
    return ok;
}

static void qk_backward_pair(const struct oracle *c, const struct pair *at)
{
    const int d = c->p->head_dim;
    const double ds = c->t->dscores[at->entry];
    oracle_add_scaled(c, query_of(c, at, c->t->dq, d), ds, key_of(c, at, c->t->k, d), d);
    oracle_add_scaled(c, key_of(c, at, c->t->dk, d), ds, query_of(c, at, c->t->q, d), d);
    if (c->t->dbias) {
        double *db = &c->t->dbias[oracle_bias_index(c, at->head, at->query, at->key)];
        *db = oracle_sum(c->p, *db + ds);
    }
}

bool oracle_qk_backward(const struct oracle_problem *p, const struct oracle_tensors *t)
{
    const long long queries = count_of(p, false, p->heads, p->head_dim),
                    keys = count_of(p, true, p->kv_heads, p->head_dim);
    long long table = p->heads;
    for (int i = 0; i < 3; i++)
        table *= 2 * p->axis[i].window - 1;
    oracle_clear(t->dq, queries);
    oracle_clear(t->dk, keys);
    oracle_clear(t->dbias, table);
    const bool ok = each_pair(p, t, qk_backward_pair);
    oracle_finish(p, t->dq, p->scale, queries);
    oracle_finish(p, t->dk, p->scale, keys);
    return ok;
}

static void av_backward_pair(const struct oracle *c, const struct pair *at)
{
    const int d = c->p->head_dim_v;
    const double *dout = query_of(c, at, c->t->dout, d);
    const double ds = oracle_dot(c, dout, key_of(c, at, c->t->v, d), d);
    c->t->dscores[at->entry] = oracle_round(c->p->precision, ds);
    oracle_add_scaled(c, key_of(c, at, c->t->dv, d), c->t->scores[at->entry], dout, d);
}

bool oracle_av_backward(const struct oracle_problem *p, const struct oracle_tensors *t)
{
    const long long keys = count_of(p, true, p->kv_heads, p->head_dim_v);
    oracle_clear(t->dscores, count_of(p, false, p->heads, window_of(p)));
    oracle_clear(t->dv, keys);
    const bool ok = each_pair(p, t, av_backward_pair);
    oracle_finish(p, t->dv, 1, keys);
    return ok;
}
