/* The forward that refuses nothing legal, on any CPU: one query at a time, in double, with online softmax.
 * It is the fallback and the clearest statement of the operation; the other rows are for speed.
 * A task is one row of queries along axis 2, of one head of one batch entry. Scratch per thread: one row of q and of o. */
#include <math.h>
#include <stdio.h>
#include "core/kernel.h"
#include "cpu/cpu.h"
#include "cpu/threads.h"

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    (void)problem;
    (void)why;
    return false;
}

static long long count_tasks(const struct nbhd_problem *p)
{
    return (long long)p->desc.batch * p->desc.heads * p->axis[0].length * p->axis[1].length;
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

/* The softmax of one query so far: o is unnormalised, relative to the maximum. */
struct softmax {
    double max, sum;
    double *o;
};

struct call {
    const struct nbhd_plan *plan;
    const struct nbhd_params *params;
    char *workspace;
};

static void see_key(const struct call *call, const double *q, const char *k, const char *v, double bias, struct softmax *s)
{
    const struct nbhd_params *p = call->params;
    const int dtype = call->plan->problem.desc.dtype;
    double score = 0;
    for (int d = 0; d < p->head_dim; d++)
        score += q[d] * nbhd_load(k, dtype, d);
    score += bias;
    const double max = score > s->max ? score : s->max;
    const double keep = s->sum > 0 ? exp(s->max - max) : 0, weight = exp(score - max);
    for (int d = 0; d < p->head_dim_v; d++)
        s->o[d] = s->o[d] * keep + weight * nbhd_load(v, dtype, d);
    s->sum = s->sum * keep + weight;
    s->max = max;
}

/* Bias of the head's table at the relative position of key element k to query element q. */
static double bias_at(const struct nbhd_params *p, int head, const int q[3], const int k[3])
{
    if (!p->bias)
        return 0;
    long long at = head;
    for (int i = 0; i < 3; i++)
        at = at * (2 * p->axis[i].window - 1) + k[i] - q[i] + p->axis[i].window - 1;
    return (double)p->bias[at];
}

static void see_window(const struct call *call, int batch, int head, const int x[3], const double *q, struct softmax *s)
{
    const struct nbhd_params *p = call->params;
    const int kv_head = head / (p->heads / p->kv_heads);
    int group[3], element[3], key[3], at[3];
    struct nbhd_range keys[3];
    for (int i = 0; i < 3; i++) {
        group[i] = x[i] % p->axis[i].dilation;
        element[i] = x[i] / p->axis[i].dilation;
        keys[i] = nbhd_keys(p->axis[i], nbhd_group_size(p->axis[i], group[i]), element[i]);
    }
    for (key[0] = keys[0].begin; key[0] < keys[0].end; key[0]++)
        for (key[1] = keys[1].begin; key[1] < keys[1].end; key[1]++)
            for (key[2] = keys[2].begin; key[2] < keys[2].end; key[2]++) {
                for (int i = 0; i < 3; i++)
                    at[i] = key[i] * p->axis[i].dilation + group[i];
                see_key(call, q, nbhd_view_at(&p->k, batch, at, kv_head), nbhd_view_at(&p->v, batch, at, kv_head),
                        bias_at(p, head, element, key), s);
            }
    for (int e = 0; e < p->extra; e++) {
        const int token[3] = {0, 0, e};
        see_key(call, q, nbhd_view_at(&p->extra_k, batch, token, kv_head),
                nbhd_view_at(&p->extra_v, batch, token, kv_head), 0, s);
    }
}

static void attend(const struct call *call, int batch, int head, const int x[3], double *scratch_row)
{
    const struct nbhd_params *p = call->params;
    const int dtype = call->plan->problem.desc.dtype;
    double *q = scratch_row;
    struct softmax s = {-INFINITY, 0, scratch_row + p->head_dim};
    const char *from = nbhd_view_at(&p->q, batch, x, head);
    for (int d = 0; d < p->head_dim; d++)
        q[d] = nbhd_load(from, dtype, d) * (double)p->scale;
    memset(s.o, 0, sizeof(double) * (size_t)p->head_dim_v);
    see_window(call, batch, head, x, q, &s);
    char *to = nbhd_view_at(&p->o, batch, x, head);
    for (int d = 0; d < p->head_dim_v; d++)
        nbhd_store(to, dtype, d, s.o[d] / s.sum);
    if (p->lse.data)
        nbhd_store(nbhd_view_at(&p->lse, batch, x, head), NBHD_F32, 0, s.max + log(s.sum));
}

static void work(void *context, long long task, int thread)
{
    const struct call *call = context;
    const struct nbhd_params *p = call->params;
    int x[3];
    x[1] = (int)(task % p->axis[1].length);
    task /= p->axis[1].length;
    x[0] = (int)(task % p->axis[0].length);
    task /= p->axis[0].length;
    double *scratch_row = (double *)(void *)(call->workspace + (size_t)thread * scratch(&call->plan->problem));
    for (x[2] = 0; x[2] < p->axis[2].length; x[2]++)
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
