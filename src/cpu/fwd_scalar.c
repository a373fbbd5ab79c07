/* The forward that refuses nothing legal, on any CPU: one query at a time, in double, with online softmax.
 * It is the fallback and the clearest statement of the operation; the other rows are for speed.
 * A task is a row of queries along axis 2, of one head of one batch entry. Scratch of a thread: a row of q and of o. */
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

static long long count_tasks(const struct nbhd_problem *p)
{
    return (long long)p->desc.batch * p->desc.heads * p->axis[0].length * p->axis[1].length *
           nbhd_segments(p->axis[2].length);
}

static int configs(const struct nbhd_problem *problem, struct nbhd_config *config, int room)
{
    (void)room;
    *config = (struct nbhd_config){.threads = nbhd_plan_threads(problem, count_tasks(problem))};
    return 1;
}

static size_t scratch(const struct nbhd_problem *p)
{
    const int doubles = p->desc.head_dim + p->desc.head_dim_v;
    return (size_t)(doubles + 7) / 8 * 8 * sizeof(double); /* a multiple of a cache line */
}

static nbhd_status build(struct nbhd_plan *plan)
{
    plan->workspace = scratch(&plan->problem) * (size_t)plan->config.threads;
    snprintf(plan->describe, sizeof plan->describe, "one query at a time, %d threads", plan->config.threads);
    return NBHD_OK;
}

struct call {
    const struct nbhd_plan *plan;
    const struct nbhd_params *params;
    char *workspace;
};

/* One query: o is unnormalised, relative to the softmax's maximum. */
struct query {
    double *q, *o;
    struct nbhd_softmax softmax;
};

static void see_key(const struct call *call, struct query *query, const char *k, const char *v, double bias)
{
    const struct nbhd_params *p = call->params;
    const int dtype = call->plan->problem.desc.dtype;
    double keep;
    const double score = nbhd_dot(query->q, k, dtype, p->head_dim) + bias;
    const double weight = nbhd_softmax_add(&query->softmax, score, &keep);
    for (int d = 0; d < p->head_dim_v; d++)
        query->o[d] = query->o[d] * keep + weight * nbhd_load(v, dtype, d);
}

static void see_window(const struct call *call, int batch, int head, const int x[3], struct query *query)
{
    const struct nbhd_params *p = call->params;
    const int kv_head = head / (p->heads / p->kv_heads);
    const struct nbhd_box keys = nbhd_box_at(p, NBHD_KEYS_OF_QUERY, x);
    int key[3], token[3];
    if (nbhd_counters)
        nbhd_count_visits(nbhd_box_volume(&keys), 0);
    for (bool more = nbhd_box_first(&keys, key); more; more = nbhd_box_next(&keys, key)) {
        nbhd_box_token(p, &keys, key, token);
        see_key(call, query, nbhd_view_at(&p->k, batch, token, kv_head), nbhd_view_at(&p->v, batch, token, kv_head),
                nbhd_bias_at(p, head, keys.from, key));
    }
    for (int e = 0; e < p->extra; e++) {
        const int extra[3] = {0, 0, e};
        see_key(call, query, nbhd_view_at(&p->extra_k, batch, extra, kv_head),
                nbhd_view_at(&p->extra_v, batch, extra, kv_head), 0);
    }
}

static void attend(const struct call *call, int batch, int head, const int x[3], double *scratch_row)
{
    const struct nbhd_params *p = call->params;
    const int dtype = call->plan->problem.desc.dtype;
    struct query query = {scratch_row, scratch_row + p->head_dim, NBHD_SOFTMAX_INIT};
    nbhd_load_row(query.q, nbhd_view_at(&p->q, batch, x, head), dtype, p->head_dim);
    for (int d = 0; d < p->head_dim; d++)
        query.q[d] *= (double)p->scale;
    memset(query.o, 0, sizeof(double) * (size_t)p->head_dim_v);
    see_window(call, batch, head, x, &query);
    char *to = nbhd_view_at(&p->o, batch, x, head);
    for (int d = 0; d < p->head_dim_v; d++)
        nbhd_store(to, dtype, d, query.o[d] / query.softmax.sum);
    if (p->lse.data)
        nbhd_store(nbhd_view_at(&p->lse, batch, x, head), NBHD_F32, 0, nbhd_softmax_lse(&query.softmax));
}

static void work(void *context, long long task, int thread)
{
    const struct call *call = context;
    const struct nbhd_params *p = call->params;
    const struct nbhd_range segment = nbhd_segment(&task, p->axis[2].length);
    int x[3];
    x[1] = (int)(task % p->axis[1].length);
    task /= p->axis[1].length;
    x[0] = (int)(task % p->axis[0].length);
    task /= p->axis[0].length;
    double *scratch_row = (double *)(void *)(call->workspace + (size_t)thread * scratch(&call->plan->problem));
    for (x[2] = segment.begin; x[2] < segment.end; x[2]++)
        attend(call, (int)(task / p->heads), (int)(task % p->heads), x, scratch_row);
}

static nbhd_status run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    (void)stream;
    struct call call = {plan, params, workspace};
    nbhd_parallel(plan->config.threads, count_tasks(&plan->problem), work, &call);
    return NBHD_OK;
}

const struct nbhd_kernel_ops nbhd_cpu_fwd_scalar = {refuse, configs, build, run, NULL};
