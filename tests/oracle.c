/* See oracle.h. Nothing of the library is included here. */
#include "oracle.h"
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* ---- the mask, by membership ---- */

/* Of the dilation group that a token is in. */
static int members_of(const struct oracle_axis *a, int token)
{
    return (a->length - token % a->dilation + a->dilation - 1) / a->dilation;
}

/* Queries come in groups of `stride`; all of a group use the window around one of them, or around the last member. */
static int leader_of(const struct oracle_axis *a, int query)
{
    const int p = query / a->dilation, last = members_of(a, query) - 1;
    const int leader = p - p % a->stride + (a->edge == ORACLE_CAUSAL ? a->stride - 1 : a->stride / 2);
    return leader > last ? last : leader;
}

/* How far around the circle of its group a key lies from the query's leader, from -left to the rest of the circle. */
static int around(const struct oracle_axis *a, int query, int key, int left)
{
    const int members = members_of(a, query);
    int far = key / a->dilation - leader_of(a, query);
    for (; far < -left; far += members) {}
    for (; far >= members - left; far -= members) {}
    return far;
}

bool oracle_sees(const struct oracle_axis *a, int query, int key)
{
    if (a->keys != a->length)
        return true; /* cross attention: the whole axis */
    if (query % a->dilation != key % a->dilation)
        return false;
    const int members = members_of(a, query), leader = leader_of(a, query);
    const int p = query / a->dilation, j = key / a->dilation;
    if (a->edge == ORACLE_CAUSAL)
        return j <= p && leader - j < a->window;
    int left = a->window / 2, right = a->window - 1 - left; /* how far the window reaches from its leader */
    if (a->edge == ORACLE_PERIODIC)
        return around(a, query, key, left) <= right;
    if (a->edge == ORACLE_NEAREST) {
        for (; leader - left < 0; left--) /* what the border cuts off on one side is given to the other */
            right++;
        for (; leader + right > members - 1; right--)
            left++;
    }
    return j >= leader - left && j <= leader + right;
}

/* ---- rounding ---- */

static double round_to_bits(double value, int bits, double smallest_normal)
{
    if (!isfinite(value) || value == 0)
        return value;
    int exponent;
    frexp(value, &exponent);
    double unit = ldexp(1.0, exponent - bits);
    const double least = smallest_normal * ldexp(1.0, 1 - bits);
    if (unit < least)
        unit = least;
    return nearbyint(value / unit) * unit;
}

double oracle_round(enum oracle_precision precision, double value)
{
    switch (precision) {
    case ORACLE_F32:
    case ORACLE_F32_BASE2:
    case ORACLE_TF32:
    case ORACLE_TF32_NEAREST: return (double)(float)value;
    case ORACLE_F16:
        value = round_to_bits(value, 11, 0x1p-14);
        return fabs(value) > 65504 ? copysign(INFINITY, value) : value;
    case ORACLE_BF16: return round_to_bits(value, 8, 0x1p-126);
    default: return value;
    }
}

/* What a product takes of a value: it is rounded to the type. Of a float32 that is given to them as it stands, tensor
 * cores read the 19 bits of a TF32: they cut the others off. Others round to the nearest before. */
static double operand(const struct oracle_problem *p, double value)
{
    if (p->precision == ORACLE_TF32_NEAREST)
        return round_to_bits(value, 11, 0x1p-126);
    if (p->precision != ORACLE_TF32)
        return oracle_round(p->precision, value);
    float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, 4);
    if (!isfinite(single))
        return value;
    bits &= ~UINT32_C(0x1fff);
    memcpy(&single, &bits, 4);
    return (double)single;
}

/* Of a tensor's element, which has its type already. */
static double element(const struct oracle_problem *p, double value)
{
    return p->precision == ORACLE_TF32 || p->precision == ORACLE_TF32_NEAREST ? operand(p, value) : value;
}

/* Sums are kept in float by all but EXACT. */
static double sum_up(const struct oracle_problem *p, double value)
{
    return p->precision == ORACLE_EXACT ? value : (double)(float)value;
}

/* ---- attention ---- */

struct oracle {
    const struct oracle_problem *p;
    const struct oracle_tensors *t;
    bool *sees[3]; /* per axis [length][keys] */
    long long tokens, keys;
    /* Of one query: the keys that it sees, in order, extra keys after the grid's; scores, then probabilities. */
    long long *seen, count;
    double *weights;
};

static void close_oracle(struct oracle *c)
{
    for (int i = 0; i < 3; i++)
        free(c->sees[i]);
    free(c->weights);
    free(c->seen);
}

static bool open_oracle(struct oracle *c, const struct oracle_problem *p, const struct oracle_tensors *t)
{
    memset(c, 0, sizeof *c);
    c->p = p;
    c->t = t;
    c->tokens = c->keys = 1;
    bool ok = true;
    for (int i = 0; i < 3; i++) {
        const struct oracle_axis *a = &p->axis[i];
        c->tokens *= a->length;
        c->keys *= a->keys;
        c->sees[i] = malloc(sizeof(bool) * (size_t)a->length * (size_t)a->keys);
        for (int q = 0; c->sees[i] && q < a->length; q++)
            for (int k = 0; k < a->keys; k++)
                c->sees[i][(size_t)q * (size_t)a->keys + (size_t)k] = oracle_sees(a, q, k);
        ok = ok && c->sees[i];
    }
    c->weights = malloc(sizeof(double) * (size_t)(c->keys + p->extra));
    c->seen = malloc(sizeof(long long) * (size_t)(c->keys + p->extra));
    ok = ok && c->weights && c->seen;
    if (!ok)
        close_oracle(c);
    return ok;
}

static void coordinates(const struct oracle_problem *p, bool of_key, long long token, int x[3])
{
    for (int i = 2; i >= 0; i--) {
        const int extent = of_key ? p->axis[i].keys : p->axis[i].length;
        x[i] = (int)(token % extent);
        token /= extent;
    }
}

static void find_visible(struct oracle *c, long long query)
{
    const struct oracle_axis *a = c->p->axis;
    const bool *sees[3];
    int x[3];
    coordinates(c->p, false, query, x);
    for (int i = 0; i < 3; i++)
        sees[i] = c->sees[i] + (size_t)x[i] * (size_t)a[i].keys;
    long long key = 0;
    c->count = 0;
    for (int i = 0; i < a[0].keys; i++)
        for (int j = 0; j < a[1].keys; j++)
            for (int k = 0; k < a[2].keys; k++, key++)
                if (sees[0][i] && sees[1][j] && sees[2][k])
                    c->seen[c->count++] = key;
    for (int e = 0; e < c->p->extra; e++)
        c->seen[c->count++] = c->keys + e;
}

/* Row of a key, extra keys after the grid's, in k/v or a gradient of them. */
static double *key_row(const struct oracle *c, double *grid, double *extra, int batch, long long key, int kv_head,
                       int width)
{
    const struct oracle_problem *p = c->p;
    if (key < c->keys)
        return grid + (((long long)batch * c->keys + key) * p->kv_heads + kv_head) * width;
    return extra + (((long long)batch * p->extra + key - c->keys) * p->kv_heads + kv_head) * width;
}

static double *query_row(const struct oracle *c, double *array, int batch, long long token, int head, int width)
{
    return array + (((long long)batch * c->tokens + token) * c->p->heads + head) * width;
}

static long long bias_index(const struct oracle *c, int head, long long query, long long key)
{
    int x[3], y[3];
    coordinates(c->p, false, query, x);
    coordinates(c->p, true, key, y);
    long long at = head;
    for (int i = 0; i < 3; i++) {
        const struct oracle_axis *a = &c->p->axis[i];
        int apart = (y[i] - x[i]) / a->dilation;
        if (a->edge == ORACLE_PERIODIC)
            apart = leader_of(a, x[i]) + around(a, x[i], y[i], a->window / 2) - x[i] / a->dilation;
        at = at * (2 * a->window - 1) + apart + a->window - 1;
    }
    return at;
}

static bool in_base_2(const struct oracle_problem *p) { return p->precision == ORACLE_F32_BASE2; }

/* A power of what the scores are exponents of. */
static double power(const struct oracle_problem *p, double exponent)
{
    return sum_up(p, in_base_2(p) ? exp2(exponent) : exp(exponent));
}

static double dot(const struct oracle *c, const double *a, const double *b, int n)
{
    const bool reversed = in_base_2(c->p);
    double sum = 0;
    if (c->p->precision == ORACLE_EXACT) { /* the same as below, in less time */
        for (int j = 0; j < n; j++)
            sum += a[j] * b[j];
        return sum;
    }
    for (int j = 0; j < n; j++) {
        const int i = reversed ? n - 1 - j : j;
        sum = sum_up(c->p, sum + sum_up(c->p, element(c->p, a[i]) * element(c->p, b[i])));
    }
    return sum;
}

/* Fills weights with the probabilities of one query; returns its logsumexp. With a logsumexp given, they are relative
 * to that one, rounding and all. */
static double softmax(struct oracle *c, int batch, long long query, int head, const double *given)
{
    const struct oracle_problem *p = c->p;
    const int kv_head = head / (p->heads / p->kv_heads);
    const double *q = query_row(c, c->t->q, batch, query, head, p->head_dim);
    const double unit = in_base_2(p) ? 1.44269504088896340736 : 1; /* of a score: log2(e) */
    const double scale = in_base_2(p) ? sum_up(p, p->scale * unit) : p->scale;
    double max = -INFINITY, sum = 0;
    for (long long i = 0; i < c->count; i++) {
        const long long j = c->seen[i];
        double score = dot(c, q, key_row(c, c->t->k, c->t->extra_k, batch, j, kv_head, p->head_dim), p->head_dim);
        score = sum_up(p, score * scale);
        if (c->t->bias && j < c->keys)
            score = sum_up(p, score + sum_up(p, c->t->bias[bias_index(c, head, query, j)] * unit));
        c->weights[i] = score;
        max = score > max || isnan(score) ? score : max;
    }
    for (long long i = 0; given && i < c->count; i++)
        c->weights[i] = power(p, sum_up(p, c->weights[i] - sum_up(p, *given * unit)));
    if (given)
        return *given;
    for (long long i = 0; i < c->count; i++)
        sum = sum_up(p, sum + (c->weights[i] = power(p, c->weights[i] - max)));
    for (long long i = 0; i < c->count; i++)
        c->weights[i] = sum_up(p, c->weights[i] / sum);
    return sum_up(p, max / unit + log(sum));
}

static void weigh_values(struct oracle *c, int batch, int head, double *o)
{
    const struct oracle_problem *p = c->p;
    const int kv_head = head / (p->heads / p->kv_heads);
    for (int d = 0; d < p->head_dim_v; d++)
        o[d] = 0;
    for (long long i = 0; i < c->count; i++) {
        const double *v = key_row(c, c->t->v, c->t->extra_v, batch, c->seen[i], kv_head, p->head_dim_v);
        const double weight = operand(p, c->weights[i]);
        for (int d = 0; d < p->head_dim_v; d++)
            o[d] = sum_up(p, o[d] + sum_up(p, weight * element(p, v[d])));
    }
}

bool oracle_forward(const struct oracle_problem *problem, const struct oracle_tensors *tensors)
{
    struct oracle c;
    if (!open_oracle(&c, problem, tensors))
        return false;
    for (long long query = 0; query < c.tokens; query++) {
        find_visible(&c, query);
        for (int batch = 0; batch < problem->batch; batch++)
            for (int head = 0; head < problem->heads; head++) {
                *query_row(&c, tensors->lse, batch, query, head, 1) = softmax(&c, batch, query, head, NULL);
                double *o = query_row(&c, tensors->o, batch, query, head, problem->head_dim_v);
                weigh_values(&c, batch, head, o);
                for (int d = 0; d < problem->head_dim_v; d++)
                    o[d] = oracle_round(problem->precision, o[d]);
            }
    }
    close_oracle(&c);
    return true;
}

static void add_scaled(const struct oracle *c, double *to, double factor, const double *from, int n)
{
    for (int d = 0; d < n; d++)
        to[d] = sum_up(c->p, to[d] + sum_up(c->p, factor * element(c->p, from[d])));
}

/* One query's share of every gradient: dV += P dO; dP = dO.v; dS = P (dP - delta); dQ += scale dS K; dK += scale dS
 * Q. */
static void differentiate(struct oracle *c, int batch, long long query, int head)
{
    const struct oracle_problem *p = c->p;
    const struct oracle_tensors *t = c->t;
    const int kv_head = head / (p->heads / p->kv_heads);
    double *q = query_row(c, t->q, batch, query, head, p->head_dim);
    double *dq = query_row(c, t->dq, batch, query, head, p->head_dim);
    double *dout = query_row(c, t->dout, batch, query, head, p->head_dim_v);
    const double *o = query_row(c, t->o, batch, query, head, p->head_dim_v);
    softmax(c, batch, query, head, query_row(c, t->lse, batch, query, head, 1));
    double delta = 0; /* a sum of few products, which are not rounded to TF32 */
    for (int d = 0; d < p->head_dim_v; d++)
        delta = sum_up(p, delta + sum_up(p, o[d] * dout[d]));
    if (t->dlse)
        delta = sum_up(p, delta - *query_row(c, t->dlse, batch, query, head, 1));
    for (long long i = 0; i < c->count; i++) {
        const long long j = c->seen[i];
        const double dp = dot(c, dout, key_row(c, t->v, t->extra_v, batch, j, kv_head, p->head_dim_v), p->head_dim_v);
        const double ds = sum_up(p, c->weights[i] * (dp - delta));
        const double rounded = operand(p, ds);
        add_scaled(c, key_row(c, t->dv, t->dextra_v, batch, j, kv_head, p->head_dim_v),
                   operand(p, c->weights[i]), dout, p->head_dim_v);
        add_scaled(c, dq, rounded, key_row(c, t->k, t->extra_k, batch, j, kv_head, p->head_dim), p->head_dim);
        add_scaled(c, key_row(c, t->dk, t->dextra_k, batch, j, kv_head, p->head_dim), rounded, q, p->head_dim);
        if (t->dbias && j < c->keys) {
            double *db = &t->dbias[bias_index(c, head, query, j)];
            *db = sum_up(p, *db + ds);
        }
    }
}

static void finish(const struct oracle_problem *p, double *array, double factor, long long count)
{
    for (long long i = 0; array && i < count; i++)
        array[i] = oracle_round(p->precision, array[i] * factor);
}

static void clear(double *array, long long count)
{
    if (array)
        memset(array, 0, sizeof(double) * (size_t)count);
}

bool oracle_backward(const struct oracle_problem *p, const struct oracle_tensors *t)
{
    struct oracle c;
    if (!open_oracle(&c, p, t))
        return false;
    const long long queries = c.tokens * p->batch * p->heads, keys = c.keys * p->batch * p->kv_heads;
    const long long extra = (long long)p->extra * p->batch * p->kv_heads;
    long long table = p->heads;
    for (int i = 0; i < 3; i++)
        table *= 2 * p->axis[i].window - 1;
    clear(t->dq, queries * p->head_dim);
    clear(t->dk, keys * p->head_dim);
    clear(t->dv, keys * p->head_dim_v);
    clear(t->dextra_k, extra * p->head_dim);
    clear(t->dextra_v, extra * p->head_dim_v);
    clear(t->dbias, table);
    for (long long query = 0; query < c.tokens; query++) {
        find_visible(&c, query);
        for (int batch = 0; batch < p->batch; batch++)
            for (int head = 0; head < p->heads; head++)
                differentiate(&c, batch, query, head);
    }
    finish(p, t->dq, p->scale, queries * p->head_dim);
    finish(p, t->dk, p->scale, keys * p->head_dim);
    finish(p, t->dv, 1, keys * p->head_dim_v);
    finish(p, t->dextra_k, p->scale, extra * p->head_dim);
    finish(p, t->dextra_v, 1, extra * p->head_dim_v);
    close_oracle(&c);
    return true;
}

/* ---- unfused products ---- */

/* Entry of a visible key in a row of scores: per axis its rank among the keys that the query sees. */
static long long entry_of(const struct oracle *c, long long query, long long key)
{
    int x[3], y[3];
    coordinates(c->p, false, query, x);
    coordinates(c->p, true, key, y);
    long long entry = 0;
    for (int i = 0; i < 3; i++) {
        const struct oracle_axis *a = &c->p->axis[i];
        int rank = 0;
        for (int j = 0; j < y[i]; j++)
            rank += c->sees[i][(size_t)x[i] * (size_t)a->keys + (size_t)j];
        if (a->edge == ORACLE_PERIODIC)
            rank = around(a, x[i], y[i], a->window / 2) + a->window / 2;
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
    if (!open_oracle(&c, p, t))
        return false;
    for (long long query = 0; query < c.tokens; query++) {
        find_visible(&c, query);
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
    close_oracle(&c);
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

static void qk_pair(const struct oracle *c, const struct pair *at)
{
    const int d = c->p->head_dim;
    double score = dot(c, query_row(c, c->t->q, at->batch, at->query, at->head, d),
                       key_row(c, c->t->k, NULL, at->batch, at->key, at->kv_head, d), d);
    score = sum_up(c->p, score * c->p->scale);
    if (c->t->bias)
        score = sum_up(c->p, score + c->t->bias[bias_index(c, at->head, at->query, at->key)]);
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
    add_scaled(c, query_row(c, c->t->o, at->batch, at->query, at->head, d), c->t->scores[at->entry],
               key_row(c, c->t->v, NULL, at->batch, at->key, at->kv_head, d), d);
}

bool oracle_av(const struct oracle_problem *p, const struct oracle_tensors *t)
{
    const long long count = count_of(p, false, p->heads, p->head_dim_v);
    clear(t->o, count);
    const bool ok = each_pair(p, t, av_pair);
    finish(p, t->o, 1, count);
    return ok;
}

static void qk_backward_pair(const struct oracle *c, const struct pair *at)
{
    const int d = c->p->head_dim;
    const double ds = c->t->dscores[at->entry];
    add_scaled(c, query_row(c, c->t->dq, at->batch, at->query, at->head, d), ds,
               key_row(c, c->t->k, NULL, at->batch, at->key, at->kv_head, d), d);
    add_scaled(c, key_row(c, c->t->dk, NULL, at->batch, at->key, at->kv_head, d), ds,
               query_row(c, c->t->q, at->batch, at->query, at->head, d), d);
    if (c->t->dbias) {
        double *db = &c->t->dbias[bias_index(c, at->head, at->query, at->key)];
        *db = sum_up(c->p, *db + ds);
    }
}

bool oracle_qk_backward(const struct oracle_problem *p, const struct oracle_tensors *t)
{
    const long long queries = count_of(p, false, p->heads, p->head_dim),
                    keys = count_of(p, true, p->kv_heads, p->head_dim);
    long long table = p->heads;
    for (int i = 0; i < 3; i++)
        table *= 2 * p->axis[i].window - 1;
    clear(t->dq, queries);
    clear(t->dk, keys);
    clear(t->dbias, table);
    const bool ok = each_pair(p, t, qk_backward_pair);
    finish(p, t->dq, p->scale, queries);
    finish(p, t->dk, p->scale, keys);
    return ok;
}

static void av_backward_pair(const struct oracle *c, const struct pair *at)
{
    const int d = c->p->head_dim_v;
    const double *dout = query_row(c, c->t->dout, at->batch, at->query, at->head, d);
    const double ds = dot(c, dout, key_row(c, c->t->v, NULL, at->batch, at->key, at->kv_head, d), d);
    c->t->dscores[at->entry] = oracle_round(c->p->precision, ds);
    add_scaled(c, key_row(c, c->t->dv, NULL, at->batch, at->key, at->kv_head, d), c->t->scores[at->entry], dout, d);
}

bool oracle_av_backward(const struct oracle_problem *p, const struct oracle_tensors *t)
{
    const long long keys = count_of(p, true, p->kv_heads, p->head_dim_v);
    clear(t->dscores, count_of(p, false, p->heads, window_of(p)));
    clear(t->dv, keys);
    const bool ok = each_pair(p, t, av_backward_pair);
    finish(p, t->dv, 1, keys);
    return ok;
}
