/* Merging partial results over disjoint sets of keys by their logsumexp, and its gradient: nbhd_merge in nbhd.h.
 * Bound by memory, so plain loops in double. A task is a row of tokens along axis 2, all heads. */
#include <math.h>
#include <stdio.h>
#include "core/plan.h"
#include "cpu/cpu.h"
#include "cpu/threads.h"

enum { MAX_PARTS = 64, MAX_WIDTH = 512 };

struct merge {
    int parts, dtype, width, heads, length[3];
    struct nbhd_view o[MAX_PARTS], lse[MAX_PARTS], out, out_lse; /* out_lse.data may be NULL */
    struct nbhd_view dout, dlse, d_o[MAX_PARTS], d_lse[MAX_PARTS]; /* backward; dlse.data may be NULL */
};

static void load_row(const char *row, int dtype, int n, double *to)
{
    switch (dtype) {
    case NBHD_F32:
        for (int i = 0; i < n; i++)
            to[i] = (double)((const float *)(const void *)row)[i];
        return;
    case NBHD_BF16:
        for (int i = 0; i < n; i++)
            to[i] = (double)nbhd_from_bf16(((const uint16_t *)(const void *)row)[i]);
        return;
    default:
        for (int i = 0; i < n; i++)
            to[i] = nbhd_load(row, dtype, i);
    }
}

static void store_row(char *row, int dtype, int n, const double *from, double factor)
{
    switch (dtype) {
    case NBHD_F32:
        for (int i = 0; i < n; i++)
            ((float *)(void *)row)[i] = (float)(from[i] * factor);
        return;
    case NBHD_BF16:
        for (int i = 0; i < n; i++)
            ((uint16_t *)(void *)row)[i] = nbhd_to_bf16((float)(from[i] * factor));
        return;
    default:
        for (int i = 0; i < n; i++)
            nbhd_store(row, dtype, i, from[i] * factor);
    }
}

/* One token and head: each part's weight, o, and the merged logsumexp, which is returned. Parts of weight 0 are not
 * read: where no key was seen, o may be anything. */
static double merge_row(const struct merge *m, int batch, const int x[3], int head, double weight[MAX_PARTS], double *o)
{
    double max = -INFINITY, sum = 0, part[MAX_WIDTH];
    for (int i = 0; i < m->parts; i++) {
        weight[i] = nbhd_load(nbhd_view_at(&m->lse[i], batch, x, head), NBHD_F32, 0);
        if (weight[i] > max || isnan(weight[i]))
            max = weight[i];
    }
    memset(o, 0, sizeof *o * (size_t)m->width);
    for (int i = 0; i < m->parts; i++)
        sum += weight[i] = weight[i] == -INFINITY ? 0 : exp(weight[i] - max);
    for (int i = 0; i < m->parts; i++) {
        if (weight[i] == 0)
            continue;
        weight[i] /= sum;
        load_row(nbhd_view_at(&m->o[i], batch, x, head), m->dtype, m->width, part);
        for (int d = 0; d < m->width; d++)
            o[d] += weight[i] * part[d];
    }
    return max == -INFINITY ? max : max + log(sum);
}

static void forward_row(const struct merge *m, int batch, const int x[3], int head)
{
    double weight[MAX_PARTS], o[MAX_WIDTH];
    const double lse = merge_row(m, batch, x, head, weight, o);
    store_row(nbhd_view_at(&m->out, batch, x, head), m->dtype, m->width, o, 1);
    if (m->out_lse.data)
        nbhd_store(nbhd_view_at(&m->out_lse, batch, x, head), NBHD_F32, 0, lse);
}

/* do_p = w_p dout; dlse_p = w_p (dlse + dout . (o_p - o)). */
static void backward_row(const struct merge *m, int batch, const int x[3], int head)
{
    double weight[MAX_PARTS], o[MAX_WIDTH], dout[MAX_WIDTH], part[MAX_WIDTH];
    merge_row(m, batch, x, head, weight, o);
    load_row(nbhd_view_at(&m->dout, batch, x, head), m->dtype, m->width, dout);
    const double dlse = m->dlse.data ? nbhd_load(nbhd_view_at(&m->dlse, batch, x, head), NBHD_F32, 0) : 0;
    for (int i = 0; i < m->parts; i++) {
        double slope = 0;
        if (weight[i] != 0) {
            load_row(nbhd_view_at(&m->o[i], batch, x, head), m->dtype, m->width, part);
            for (int d = 0; d < m->width; d++)
                slope += dout[d] * (part[d] - o[d]);
            slope = weight[i] * (dlse + slope);
        }
        store_row(nbhd_view_at(&m->d_o[i], batch, x, head), m->dtype, m->width, dout, weight[i]);
        nbhd_store(nbhd_view_at(&m->d_lse[i], batch, x, head), NBHD_F32, 0, slope);
    }
}

static void each_token(const struct merge *m, long long task,
                       void (*row)(const struct merge *m, int batch, const int x[3], int head))
{
    const struct nbhd_range segment = nbhd_segment(&task, m->length[2]);
    int x[3];
    x[1] = (int)(task % m->length[1]);
    task /= m->length[1];
    x[0] = (int)(task % m->length[0]);
    for (x[2] = segment.begin; x[2] < segment.end; x[2]++)
        for (int head = 0; head < m->heads; head++)
            row(m, (int)(task / m->length[0]), x, head);
}

static void forward_task(void *context, long long task, int thread)
{
    (void)thread;
    each_token(context, task, forward_row);
}

static void backward_task(void *context, long long task, int thread)
{
    (void)thread;
    each_token(context, task, backward_row);
}

/* ---- the two calls ---- */

/* The i-th of o_parts and lse_parts, or, with prefix "d", of their gradients. */
static nbhd_status bind_part(const struct nbhd_problem *problem, int i, const char *prefix, bool write,
                             const nbhd_tensor *o, const nbhd_tensor *lse, struct nbhd_view *o_view,
                             struct nbhd_view *lse_view)
{
    char name[32];
    snprintf(name, sizeof name, "%so_parts[%d]", prefix, i);
    const nbhd_status status = nbhd_bind_o(problem, o, name, write, o_view);
    snprintf(name, sizeof name, "%slse_parts[%d]", prefix, i);
    return status ? status : nbhd_bind_lse(problem, lse, name, write, lse_view);
}

static nbhd_status begin(struct merge *m, struct nbhd_problem *problem, const nbhd_desc *desc, int parts,
                         const nbhd_tensor *o_parts, const nbhd_tensor *lse_parts)
{
    nbhd_status status = desc ? nbhd_problem_init(problem, desc) : nbhd_fail(NBHD_ERROR_INVALID, "desc is NULL");
    if (status)
        return status;
    if (parts < 1 || parts > MAX_PARTS)
        return nbhd_fail(NBHD_ERROR_INVALID, "parts is %d; it must be 1 to %d", parts, MAX_PARTS);
    if (!o_parts || !lse_parts)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is NULL", o_parts ? "lse_parts" : "o_parts");
    memset(m, 0, sizeof *m);
    m->parts = parts;
    m->dtype = problem->desc.dtype;
    m->width = problem->desc.head_dim_v;
    m->heads = problem->desc.heads;
    for (int i = 0; i < 3; i++)
        m->length[i] = problem->axis[i].length;
    for (int i = 0; i < parts && !status; i++)
        status = bind_part(problem, i, "", false, &o_parts[i], &lse_parts[i], &m->o[i], &m->lse[i]);
    return status;
}

static nbhd_status finish(struct merge *m, const struct nbhd_problem *problem, void (*task)(void *, long long, int))
{
    const long long tasks =
        (long long)problem->desc.batch * m->length[0] * m->length[1] * nbhd_segments(m->length[2]);
    nbhd_parallel(nbhd_plan_threads(problem, tasks), tasks, task, m);
    return NBHD_OK;
}

nbhd_status nbhd_merge(const nbhd_desc *desc, int parts, const nbhd_tensor *o_parts, const nbhd_tensor *lse_parts,
                       const nbhd_tensor *o, const nbhd_tensor *lse)
{
    struct merge m;
    struct nbhd_problem problem;
    nbhd_status status = begin(&m, &problem, desc, parts, o_parts, lse_parts);
    if (!status)
        status = nbhd_bind_o(&problem, o, "o", true, &m.out);
    if (!status && lse && lse->data)
        status = nbhd_bind_lse(&problem, lse, "lse", true, &m.out_lse);
    return status ? status : finish(&m, &problem, forward_task);
}

nbhd_status nbhd_merge_backward(const nbhd_desc *desc, int parts, const nbhd_tensor *o_parts,
                                const nbhd_tensor *lse_parts, const nbhd_tensor *dout, const nbhd_tensor *dlse,
                                const nbhd_tensor *do_parts, const nbhd_tensor *dlse_parts)
{
    struct merge m;
    struct nbhd_problem problem;
    nbhd_status status = begin(&m, &problem, desc, parts, o_parts, lse_parts);
    if (!status)
        status = nbhd_bind_o(&problem, dout, "dout", false, &m.dout);
    if (!status && dlse && dlse->data)
        status = nbhd_bind_lse(&problem, dlse, "dlse", false, &m.dlse);
    if (!status && (!do_parts || !dlse_parts))
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is NULL", do_parts ? "dlse_parts" : "do_parts");
    for (int i = 0; i < parts && !status; i++)
        status = bind_part(&problem, i, "d", true, &do_parts[i], &dlse_parts[i], &m.d_o[i], &m.d_lse[i]);
    return status ? status : finish(&m, &problem, backward_task);
}
