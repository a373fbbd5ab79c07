/* See oracle.h: attention and its gradients. */
#include "oracle_pairs.h"
#include <math.h>
#include <stddef.h>

static bool in_base_2(const struct oracle_problem *p) { return p->precision == ORACLE_F32_BASE2; }

/* A power of what the scores are exponents of. */
static double power(const struct oracle_problem *p, double exponent)
{
    return oracle_sum(p, in_base_2(p) ? exp2(exponent) : exp(exponent));
}

/* Fills weights with the probabilities of one query; returns its logsumexp. With a logsumexp given, they are relative
 * to that one, rounding and all. */
static double softmax(struct oracle *c, int batch, long long query, int head, const double *given)
{
    const struct oracle_problem *p = c->p;
    const int kv_head = head / (p->heads / p->kv_heads);
    const double *q = oracle_query_row(c, c->t->q, batch, query, head, p->head_dim);
    const double unit = in_base_2(p) ? 1.44269504088896340736 : 1; /* of a score: log2(e) */
    const double scale = in_base_2(p) ? oracle_sum(p, p->scale * unit) : p->scale;
    double max = -INFINITY, sum = 0;
    for (long long i = 0; i < c->count; i++) {
        const long long j = c->seen[i];
        const double *k = oracle_key_row(c, c->t->k, c->t->extra_k, batch, j, kv_head, p->head_dim);
        double score = oracle_sum(p, oracle_dot(c, q, k, p->head_dim) * scale);
        if (c->t->bias && j < c->keys)
            score = oracle_sum(p, score + oracle_sum(p, c->t->bias[oracle_bias_index(c, head, query, j)] * unit));
        c->weights[i] = score;
        max = score > max || isnan(score) ? score : max;
    }
    for (long long i = 0; given && i < c->count; i++)
        c->weights[i] = power(p, oracle_sum(p, c->weights[i] - oracle_sum(p, *given * unit)));
    if (given)
        return *given;
    for (long long i = 0; i < c->count; i++)
        sum = oracle_sum(p, sum + (c->weights[i] = power(p, c->weights[i] - max)));
    for (long long i = 0; i < c->count; i++)
        c->weights[i] = oracle_sum(p, c->weights[i] / sum);
    return oracle_sum(p, max / unit + log(sum));
}

static void weigh_values(struct oracle *c, int batch, int head, double *o)
{
    const struct oracle_problem *p = c->p;
    const int kv_head = head / (p->heads / p->kv_heads);
    for (int d = 0; d < p->head_dim_v; d++)
        o[d] = 0;
    for (long long i = 0; i < c->count; i++) {
        const double *v = oracle_key_row(c, c->t->v, c->t->extra_v, batch, c->seen[i], kv_head, p->head_dim_v);
        const double weight = oracle_operand(p, c->weights[i]);
        for (int d = 0; d < p->head_dim_v; d++)
            o[d] = oracle_sum(p, o[d] + oracle_sum(p, weight * oracle_element(p, v[d])));
    }
}

bool oracle_forward(const struct oracle_problem *problem, const struct oracle_tensors *tensors)
{
    struct oracle c;
    if (!oracle_open(&c, problem, tensors))
        return false;
    for (long long query = 0; query < c.tokens; query++) {
        oracle_find_visible(&c, query);
        for (int batch = 0; batch < problem->batch; batch++)
            for (int head = 0; head < problem->heads; head++) {
                *oracle_query_row(&c, tensors->lse, batch, query, head, 1) = softmax(&c, batch, query, head, NULL);
                double *o = oracle_query_row(&c, tensors->o, batch, query, head, problem->head_dim_v);
                weigh_values(&c, batch, head, o);
                for (int d = 0; d < problem->head_dim_v; d++)
                    o[d] = oracle_round(problem->precision, o[d]);
            }
    }
    oracle_close(&c);
    return true;
}

/* One query's share of every gradient: dV += P dO; dP = dO.v; dS = P (dP - delta); dQ += scale dS K; dK += scale dS
 * Q. */
static void differentiate(struct oracle *c, int batch, long long query, int head)
{
    const struct oracle_problem *p = c->p;
    const struct oracle_tensors *t = c->t;
    const int kv_head = head / (p->heads / p->kv_heads);
    double *q = oracle_query_row(c, t->q, batch, query, head, p->head_dim);
    double *dq = oracle_query_row(c, t->dq, batch, query, head, p->head_dim);
    double *dout = oracle_query_row(c, t->dout, batch, query, head, p->head_dim_v);
    const double *o = oracle_query_row(c, t->o, batch, query, head, p->head_dim_v);
    softmax(c, batch, query, head, oracle_query_row(c, t->lse, batch, query, head, 1));
    double delta = 0; /* a sum of few products, which are not rounded to TF32 */
    for (int d = 0; d < p->head_dim_v; d++)
        delta = oracle_sum(p, delta + oracle_sum(p, o[d] * dout[d]));
    if (t->dlse)
        delta = oracle_sum(p, delta - *oracle_query_row(c, t->dlse, batch, query, head, 1));
    for (long long i = 0; i < c->count; i++) {
        const long long j = c->seen[i];
        const double *k = oracle_key_row(c, t->k, t->extra_k, batch, j, kv_head, p->head_dim);
        const double *v = oracle_key_row(c, t->v, t->extra_v, batch, j, kv_head, p->head_dim_v);
        double *dk = oracle_key_row(c, t->dk, t->dextra_k, batch, j, kv_head, p->head_dim);
        double *dv = oracle_key_row(c, t->dv, t->dextra_v, batch, j, kv_head, p->head_dim_v);
        const double dp = oracle_dot(c, dout, v, p->head_dim_v);
        const double ds = oracle_sum(p, c->weights[i] * (dp - delta));
        const double rounded = oracle_operand(p, ds);
        oracle_add_scaled(c, dv, oracle_operand(p, c->weights[i]), dout, p->head_dim_v);
        oracle_add_scaled(c, dq, rounded, k, p->head_dim);
        oracle_add_scaled(c, dk, rounded, q, p->head_dim);
        if (t->dbias && j < c->keys) {
            double *db = &t->dbias[oracle_bias_index(c, head, query, j)];
            *db = oracle_sum(p, *db + ds);
        }
    }
}

bool oracle_backward(const struct oracle_problem *p, const struct oracle_tensors *t)
{
    struct oracle c;
    if (!oracle_open(&c, p, t))
        return false;
    const long long queries = c.tokens * p->batch * p->heads, keys = c.keys * p->batch * p->kv_heads;
    const long long extra = (long long)p->extra * p->batch * p->kv_heads;
    long long table = p->heads;
    for (int i = 0; i < 3; i++)
        table *= 2 * p->axis[i].window - 1;
    oracle_clear(t->dq, queries * p->head_dim);
    oracle_clear(t->dk, keys * p->head_dim);
    oracle_clear(t->dv, keys * p->head_dim_v);
    oracle_clear(t->dextra_k, extra * p->head_dim);
    oracle_clear(t->dextra_v, extra * p->head_dim_v);
    oracle_clear(t->dbias, table);
    for (long long query = 0; query < c.tokens; query++) {
        oracle_find_visible(&c, query);
        for (int batch = 0; batch < p->batch; batch++)
            for (int head = 0; head < p->heads; head++)
                differentiate(&c, batch, query, head);
    }
    oracle_finish(p, t->dq, p->scale, queries * p->head_dim);
    oracle_finish(p, t->dk, p->scale, keys * p->head_dim);
    oracle_finish(p, t->dv, 1, keys * p->head_dim_v);
    oracle_finish(p, t->dextra_k, p->scale, extra * p->head_dim);
    oracle_finish(p, t->dextra_v, 1, extra * p->head_dim_v);
    oracle_close(&c);
    return true;
}
