/* The backward that refuses nothing legal, on any CPU: one pair at a time, in double. The clearest statement of the
 * gradients.
 *
 *     P = exp(scale q.k + bias - lse)      dS = P (dout.v - delta)      delta = o.dout - dlse
 *     dq = scale sum_k dS k     dk = scale sum_q dS q     dv = sum_q P dout     dbias[r] = sum_{k - q = r} dS
 *
 * Three sweeps, each of which sums one element of its result in one task, in a fixed order: the bits do not depend on
 * the number of threads. Queries first (dq; lse and delta are kept in the workspace), then keys over the queries that
 * see them (dk, dv, those of extra keys), then elements of the bias table. Workspace: lse and delta of every query and
 * head, 16 bytes each; per thread, four rows. */
#include <stdio.h>
#include "core/counters.h"
#include "core/kernel.h"
#include "cpu/scalar.h"
#include "cpu/threads.h"

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    (void)problem;
    (void)why;
    return false;
}

static long long count_query_rows(const struct nbhd_problem *p)
{
    return (long long)p->desc.batch * p->desc.heads * p->axis[0].length * p->axis[1].length;
}

static long long count_query_tasks(const struct nbhd_problem *p)
{
    return count_query_rows(p) * nbhd_segments(p->axis[2].length);
}

/* A task is a segment of keys, or one extra key. */
static long long key_segments(const struct nbhd_axis axis[3])
{
    return (long long)axis[0].keys * axis[1].keys * nbhd_segments(axis[2].keys);
}

static long long count_key_tasks(const struct nbhd_problem *p)
{
    return (long long)p->desc.batch * p->desc.kv_heads * (key_segments(p->axis) + p->desc.extra);
}

static int configs(const struct nbhd_problem *problem, struct nbhd_config *config, int room)
{
    (void)room;
    const long long queries = count_query_tasks(problem), keys = count_key_tasks(problem);
    *config = (struct nbhd_config){.threads = nbhd_plan_threads(problem, queries > keys ? queries : keys)};
    return 1;
}

/* What a query keeps for the later sweeps. */
struct query_state {
    double lse, delta;
};

static size_t states_size(const struct nbhd_problem *p)
{
    const size_t bytes = (size_t)count_query_rows(p) * (size_t)p->axis[2].length * sizeof(struct query_state);
    return (bytes + 63) / 64 * 64;
}

static size_t scratch_size(const struct nbhd_problem *p)
{
    const int doubles = 2 * (p->desc.head_dim + p->desc.head_dim_v);
    return (size_t)(doubles + 7) / 8 * 8 * sizeof(double);
}

static nbhd_status build(struct nbhd_plan *plan)
{
    plan->workspace = states_size(&plan->problem) + scratch_size(&plan->problem) * (size_t)plan->config.threads;
    snprintf(plan->describe, sizeof plan->describe, "one pair at a time, %d threads", plan->config.threads);
    return NBHD_OK;
}

struct call {
    const struct nbhd_params *p;
    int dtype;
    struct query_state *states; /* [batch][head][tokens] */
    char *scratch;
    size_t scratch_each;
};

static struct query_state *state_at(const struct call *call, int batch, int head, const int x[3])
{
    const struct nbhd_axis *a = call->p->axis;
    const long long row = (((long long)batch * call->p->heads + head) * a[0].length + x[0]) * a[1].length + x[1];
    return call->states + row * a[2].length + x[2];
}

/* Both sweeps look at a pair from one of its sides: `mine` are q and dout of a query, or k and v of a key, and the sums
 * are dq, or dk and dv; the other side's rows come from memory. */
struct side {
    double *mine_a, *mine_b; /* [head_dim], [head_dim_v] */
    double *sum_a, *sum_b;   /* gradients; sum_b is for a key's only */
};

static struct side side_at(const struct call *call, int thread)
{
    struct side s;
    s.mine_a = (double *)(void *)(call->scratch + call->scratch_each * (size_t)thread);
    s.mine_b = s.mine_a + call->p->head_dim;
    s.sum_a = s.mine_b + call->p->head_dim_v;
    s.sum_b = s.sum_a + call->p->head_dim;
    return s;
}

static void load_side(const struct call *call, struct side *s, const char *a, const char *b)
{
    nbhd_load_row(s->mine_a, a, call->dtype, call->p->head_dim);
    nbhd_load_row(s->mine_b, b, call->dtype, call->p->head_dim_v);
    memset(s->sum_a, 0, sizeof(double) * (size_t)(call->p->head_dim + call->p->head_dim_v));
}

static double score_of(const struct call *call, const struct side *s, const char *a, double bias)
{
    return (double)call->p->scale * nbhd_dot(s->mine_a, a, call->dtype, call->p->head_dim) + bias;
}

/* P and dS of a pair. */
struct weights {
    double p, ds;
};

static struct weights weigh(const struct call *call, const struct side *s, const char *a, const char *b, double bias,
                            const struct query_state *state)
{
    const double p = exp(score_of(call, s, a, bias) - state->lse);
    return (struct weights){p, p * (nbhd_dot(s->mine_b, b, call->dtype, call->p->head_dim_v) - state->delta)};
}

static void add_row(const struct call *call, double *sum, double factor, const char *row, int n)
{
    for (int d = 0; d < n; d++)
        sum[d] += factor * nbhd_load(row, call->dtype, d);
}

static void store_row(const struct call *call, char *to, const double *row, double factor, int n)
{
    for (int d = 0; d < n; d++)
        nbhd_store(to, call->dtype, d, row[d] * factor);
}

/* ---- queries: dq, and what the later sweeps need to know ---- */

/* The logsumexp is given in float32, whose rounding a float64 problem would feel in every probability. So there it is
 * computed again, and used where the given one is its rounding; a given one that is not (of a larger whole, of which
 * these keys are a part) stands. */
static double exact_lse(const struct call *call, int batch, int head, const struct side *s, const struct nbhd_box *keys,
                        double given)
{
    const struct nbhd_params *p = call->p;
    const int kv_head = head / (p->heads / p->kv_heads);
    struct nbhd_softmax softmax = NBHD_SOFTMAX_INIT;
    double keep;
    int key[3], token[3];
    for (bool more = nbhd_box_first(keys, key); more; more = nbhd_box_next(keys, key)) {
        nbhd_box_token(p, keys, key, token);
        nbhd_softmax_add(&softmax, score_of(call, s, nbhd_view_at(&p->k, batch, token, kv_head),
                                            nbhd_bias_at(p, head, keys->from, key)), &keep);
    }
    for (int e = 0; e < p->extra; e++) {
        const int extra[3] = {0, 0, e};
        nbhd_softmax_add(&softmax, score_of(call, s, nbhd_view_at(&p->extra_k, batch, extra, kv_head), 0), &keep);
    }
    const double lse = nbhd_softmax_lse(&softmax);
    return fabs(lse - given) <= 1e-6 * (1 + fabs(lse)) ? lse : given;
}

static struct query_state find_state(const struct call *call, int batch, int head, const int x[3], const struct side *s,
                                     const struct nbhd_box *keys)
{
    const struct nbhd_params *p = call->p;
    struct query_state state = {nbhd_load(nbhd_view_at(&p->lse, batch, x, head), NBHD_F32, 0),
                                nbhd_dot(s->mine_b, nbhd_view_at(&p->o, batch, x, head), call->dtype, p->head_dim_v)};
    if (p->dlse.data)
        state.delta -= nbhd_load(nbhd_view_at(&p->dlse, batch, x, head), NBHD_F32, 0);
    if (call->dtype == NBHD_F64)
        state.lse = exact_lse(call, batch, head, s, keys, state.lse);
    return state;
}

static void query_gradient(const struct call *call, int batch, int head, const int x[3], struct side *s)
{
    const struct nbhd_params *p = call->p;
    const int kv_head = head / (p->heads / p->kv_heads);
    const struct nbhd_box keys = nbhd_box_at(p, NBHD_KEYS_OF_QUERY, x);
    load_side(call, s, nbhd_view_at(&p->q, batch, x, head), nbhd_view_at(&p->dout, batch, x, head));
    const struct query_state state = *state_at(call, batch, head, x) = find_state(call, batch, head, x, s, &keys);
    int key[3], token[3];
    for (bool more = nbhd_box_first(&keys, key); more; more = nbhd_box_next(&keys, key)) {
        nbhd_box_token(p, &keys, key, token);
        const char *k = nbhd_view_at(&p->k, batch, token, kv_head), *v = nbhd_view_at(&p->v, batch, token, kv_head);
        const struct weights w = weigh(call, s, k, v, nbhd_bias_at(p, head, keys.from, key), &state);
        add_row(call, s->sum_a, w.ds, k, p->head_dim);
    }
    for (int e = 0; e < p->extra; e++) {
        const int extra[3] = {0, 0, e};
        const char *k = nbhd_view_at(&p->extra_k, batch, extra, kv_head);
        const struct weights w = weigh(call, s, k, nbhd_view_at(&p->extra_v, batch, extra, kv_head), 0, &state);
        add_row(call, s->sum_a, w.ds, k, p->head_dim);
    }
    store_row(call, nbhd_view_at(&p->dq, batch, x, head), s->sum_a, (double)p->scale, p->head_dim);
}

static void query_task(void *context, long long task, int thread)
{
    const struct call *call = context;
    const struct nbhd_params *p = call->p;
    const struct nbhd_range segment = nbhd_segment(&task, p->axis[2].length);
    int x[3];
    x[1] = (int)(task % p->axis[1].length);
    task /= p->axis[1].length;
    x[0] = (int)(task % p->axis[0].length);
    task /= p->axis[0].length;
    struct side s = side_at(call, thread);
    for (x[2] = segment.begin; x[2] < segment.end; x[2]++)
        query_gradient(call, (int)(task / p->heads), (int)(task % p->heads), x, &s);
}

/* ---- keys: dk and dv ---- */

static void see_query(const struct call *call, int batch, int head, const int x[3], double bias, struct side *s)
{
    const struct nbhd_params *p = call->p;
    const char *q = nbhd_view_at(&p->q, batch, x, head), *dout = nbhd_view_at(&p->dout, batch, x, head);
    const struct weights w = weigh(call, s, q, dout, bias, state_at(call, batch, head, x));
    add_row(call, s->sum_a, w.ds, q, p->head_dim);
    add_row(call, s->sum_b, w.p, dout, p->head_dim_v);
}

static void key_gradient(const struct call *call, int batch, int kv_head, const int y[3], struct side *s)
{
    const struct nbhd_params *p = call->p;
    const int share = p->heads / p->kv_heads;
    const struct nbhd_box queries = nbhd_box_at(p, NBHD_QUERIES_OF_KEY, y);
    int query[3], x[3];
    load_side(call, s, nbhd_view_at(&p->k, batch, y, kv_head), nbhd_view_at(&p->v, batch, y, kv_head));
    if (nbhd_counters)
        nbhd_count_visits(nbhd_box_volume(&queries), 0);
    for (int head = kv_head * share; head < (kv_head + 1) * share; head++)
        for (bool more = nbhd_box_first(&queries, query); more; more = nbhd_box_next(&queries, query)) {
            nbhd_box_token(p, &queries, query, x);
            see_query(call, batch, head, x, nbhd_bias_at(p, head, query, queries.from), s);
        }
    store_row(call, nbhd_view_at(&p->dk, batch, y, kv_head), s->sum_a, (double)p->scale, p->head_dim);
    store_row(call, nbhd_view_at(&p->dv, batch, y, kv_head), s->sum_b, 1, p->head_dim_v);
}

static void extra_gradient(const struct call *call, int batch, int kv_head, int e, struct side *s)
{
    const struct nbhd_params *p = call->p;
    const int share = p->heads / p->kv_heads, at[3] = {0, 0, e};
    int x[3];
    load_side(call, s, nbhd_view_at(&p->extra_k, batch, at, kv_head), nbhd_view_at(&p->extra_v, batch, at, kv_head));
    for (int head = kv_head * share; head < (kv_head + 1) * share; head++)
        for (x[0] = 0; x[0] < p->axis[0].length; x[0]++)
            for (x[1] = 0; x[1] < p->axis[1].length; x[1]++)
                for (x[2] = 0; x[2] < p->axis[2].length; x[2]++)
                    see_query(call, batch, head, x, 0, s);
    store_row(call, nbhd_view_at(&p->dextra_k, batch, at, kv_head), s->sum_a, (double)p->scale, p->head_dim);
    store_row(call, nbhd_view_at(&p->dextra_v, batch, at, kv_head), s->sum_b, 1, p->head_dim_v);
}

static void key_task(void *context, long long task, int thread)
{
    const struct call *call = context;
    const struct nbhd_params *p = call->p;
    const long long segments = key_segments(p->axis), each = segments + p->extra;
    const int kv_head = (int)(task / each % p->kv_heads), batch = (int)(task / each / p->kv_heads);
    struct side s = side_at(call, thread);
    long long row = task % each;
    if (row >= segments) {
        extra_gradient(call, batch, kv_head, (int)(row - segments), &s);
        return;
    }
    const struct nbhd_range segment = nbhd_segment(&row, p->axis[2].keys);
    int y[3] = {(int)(row / p->axis[1].keys), (int)(row % p->axis[1].keys), segment.begin};
    for (; y[2] < segment.end; y[2]++)
        key_gradient(call, batch, kv_head, y, &s);
}

/* ---- the bias table: one element sums dS over all queries whose key at that relative position they see ---- */

static double bias_gradient(const struct call *call, int head, const int offset[3], struct side *s)
{
    const struct nbhd_params *p = call->p;
    const int kv_head = head / (p->heads / p->kv_heads);
    double sum = 0;
    int x[3], key[3], token[3];
    for (x[0] = 0; x[0] < p->axis[0].length; x[0]++)
        for (x[1] = 0; x[1] < p->axis[1].length; x[1]++)
            for (x[2] = 0; x[2] < p->axis[2].length; x[2]++) {
                const struct nbhd_box keys = nbhd_box_at(p, NBHD_KEYS_OF_QUERY, x);
                bool seen = true;
                for (int i = 0; i < 3; i++) {
                    key[i] = keys.from[i] + offset[i];
                    seen &= key[i] >= keys.axis[i].begin && key[i] < keys.axis[i].end;
                }
                if (!seen)
                    continue;
                nbhd_box_token(p, &keys, key, token);
                for (int batch = 0; batch < p->batch; batch++) {
                    load_side(call, s, nbhd_view_at(&p->q, batch, x, head), nbhd_view_at(&p->dout, batch, x, head));
                    sum += weigh(call, s, nbhd_view_at(&p->k, batch, token, kv_head),
                                 nbhd_view_at(&p->v, batch, token, kv_head), nbhd_bias_at(p, head, keys.from, key),
                                 state_at(call, batch, head, x)).ds;
                }
            }
    return sum;
}

static void bias_element(void *context, long long task, int thread)
{
    const struct call *call = context;
    const struct nbhd_params *p = call->p;
    struct side s = side_at(call, thread);
    long long rest = task;
    int offset[3];
    for (int i = 2; i >= 0; i--) {
        const int w = p->axis[i].window;
        offset[i] = (int)(rest % (2 * w - 1)) - (w - 1);
        rest /= 2 * w - 1;
    }
    const double before = p->flags & NBHD_PARAMS_ADD ? (double)p->dbias[task] : 0;
    p->dbias[task] = (float)(before + bias_gradient(call, (int)rest, offset, &s));
}

static nbhd_status run(const struct nbhd_plan *plan, const struct nbhd_params *p, void *workspace, void *stream)
{
    (void)stream;
    const struct nbhd_problem *problem = &plan->problem;
    struct call call = {p, problem->desc.dtype, workspace, (char *)workspace + states_size(problem),
                        scratch_size(problem)};
    nbhd_parallel(plan->config.threads, count_query_tasks(problem), query_task, &call);
    nbhd_parallel(plan->config.threads, count_key_tasks(problem), key_task, &call);
    if (p->dbias) {
        long long table = p->heads;
        for (int i = 0; i < 3; i++)
            table *= 2 * p->axis[i].window - 1;
        nbhd_parallel(plan->config.threads, table, bias_element, &call);
    }
    return NBHD_OK;
}

const struct nbhd_kernel_ops nbhd_cpu_bwd_scalar = {refuse, configs, build, run, NULL};
