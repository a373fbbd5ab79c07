/* The problem: what is legal, and what a field that was left out means. */
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "core/kernel.h"
#include "core/plan.h"
#include "core/tiles.h"

#define MAX_HEAD_DIM 512
#define MAX_LENGTH (1 << 30) /* so that length + window * dilation fits an int */
#define MAX_PERIOD (1 << 28) /* so that elements two images away do */

size_t nbhd_dtype_size(int dtype) { return dtype == NBHD_F64 ? 8 : dtype == NBHD_F32 ? 4 : 2; }

/* A caller built against an older header has a shorter struct: missing fields are 0, the default. A newer one has a
 * longer struct, whose extra bytes must be 0, or the caller asks for what this build does not know. */
nbhd_status nbhd_copy_sized(void *to, size_t known, const void *from, const char *what)
{
    size_t given;
    memcpy(&given, from, sizeof given);
    if (given < sizeof(size_t) || given > 1 << 16)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s.size is %zu; set it to sizeof(%s), or start from the initializer",
                         what, given, what);
    const unsigned char *bytes = from;
    for (size_t i = known; i < given; i++)
        if (bytes[i])
            return nbhd_fail(NBHD_ERROR_UNSUPPORTED,
                             "%s has %zu bytes, of which this build (version %d) knows %zu, and a field past those is "
                             "set",
                             what, given, NBHD_VERSION, known);
    memset(to, 0, known);
    memcpy(to, from, given < known ? given : known);
    return NBHD_OK;
}

nbhd_status nbhd_return_sized(void *to, const void *from, size_t known, const char *what)
{
    size_t room;
    memcpy(&room, to, sizeof room);
    if (room < sizeof(size_t) || room > 1 << 16)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s.size is %zu; set it to sizeof(%s), or start from the initializer",
                         what, room, what);
    memcpy(to, from, room < known ? room : known);
    memcpy(to, &room, sizeof room);
    return NBHD_OK;
}

nbhd_status nbhd_args_copy(nbhd_args *to, const nbhd_args *from)
{
    return nbhd_copy_sized(to, sizeof *to, from, "nbhd_args");
}

static nbhd_status check_range(const char *field, int value, int low, int high)
{
    if (value < low || value > high)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is %d; it must be %d to %d", field, value, low, high);
    return NBHD_OK;
}

static nbhd_status fill_scalars(nbhd_desc *d)
{
    nbhd_status status;
    d->batch = d->batch ? d->batch : 1;
    d->heads = d->heads ? d->heads : 1;
    d->kv_heads = d->kv_heads ? d->kv_heads : d->heads;
    d->head_dim_v = d->head_dim_v ? d->head_dim_v : d->head_dim;
    if ((status = check_range("pass", d->pass, NBHD_FORWARD, NBHD_AV_BACKWARD)) ||
        (status = check_range("dtype", d->dtype, NBHD_F32, NBHD_F64)) ||
        (status = check_range("rank", d->rank, 1, 3)) || (status = check_range("batch", d->batch, 1, INT_MAX)) ||
        (status = check_range("heads", d->heads, 1, 1 << 20)) ||
        (status = check_range("kv_heads", d->kv_heads, 1, 1 << 20)) ||
        (status = check_range("head_dim", d->head_dim, 1, MAX_HEAD_DIM)) ||
        (status = check_range("head_dim_v", d->head_dim_v, 1, MAX_HEAD_DIM)) ||
        (status = check_range("extra", d->extra, 0, MAX_LENGTH)) || (status = check_range("bias", d->bias, 0, 1)) ||
        (status = check_range("threads", d->threads, 0, 4096)) || (status = check_range("tf32", d->tf32, 0, 1)))
        return status;
    if (d->heads % d->kv_heads)
        return nbhd_fail(NBHD_ERROR_INVALID, "kv_heads is %d; it must divide heads, %d", d->kv_heads, d->heads);
    if (!isfinite(d->scale))
        return nbhd_fail(NBHD_ERROR_INVALID, "scale is %g; it must be finite", (double)d->scale);
    if (d->scale == 0.0f)
        d->scale = (float)(1.0 / sqrt(d->head_dim));
    return NBHD_OK;
}

static nbhd_status fill_axis(nbhd_desc *d, int i)
{
    int length = d->length[i];
    if (length < 1 || length > MAX_LENGTH)
        return nbhd_fail(NBHD_ERROR_INVALID, "length[%d] is %d; it must be 1 to %d", i, length, MAX_LENGTH);
    if (d->kv_length[i] < 0 || d->kv_length[i] > MAX_LENGTH)
        return nbhd_fail(NBHD_ERROR_INVALID, "kv_length[%d] is %d; it must be 0 to %d", i, d->kv_length[i], MAX_LENGTH);
    if (d->kv_length[i] == 0)
        d->kv_length[i] = length;
    d->stride[i] = d->stride[i] ? d->stride[i] : 1;
    d->dilation[i] = d->dilation[i] ? d->dilation[i] : 1;
    if (d->dilation[i] < 1 || d->dilation[i] > length)
        return nbhd_fail(NBHD_ERROR_INVALID, "dilation[%d] is %d; it must be 1 to length[%d], %d", i, d->dilation[i], i,
                         length);
    if (d->window[i] == 0)
        d->window[i] = d->kv_length[i] != length ? d->kv_length[i] : length / d->dilation[i];
    if (d->edge[i] < NBHD_NEAREST || d->edge[i] > NBHD_PERIODIC)
        return nbhd_fail(NBHD_ERROR_INVALID, "edge[%d] is %d; it must be 0 to 3 (nbhd_edge)", i, d->edge[i]);
    if (d->edge[i] == NBHD_PERIODIC && length > MAX_PERIOD)
        return nbhd_fail(NBHD_ERROR_INVALID, "length[%d] is %d; of a periodic axis it must be 1 to %d", i, length,
                         MAX_PERIOD);
    if (d->kv_length[i] != length) {
        if (d->window[i] != d->kv_length[i] || d->stride[i] != 1 || d->dilation[i] != 1 || d->edge[i] != NBHD_NEAREST)
            return nbhd_fail(NBHD_ERROR_INVALID,
                             "kv_length[%d] is %d where length[%d] is %d, so the axis is attended to whole: window "
                             "must be %d, stride and dilation 1, edge nearest",
                             i, d->kv_length[i], i, length, d->kv_length[i]);
        return NBHD_OK;
    }
    if (d->window[i] < 1 || (int64_t)d->window[i] * d->dilation[i] > length)
        return nbhd_fail(NBHD_ERROR_INVALID,
                         "window[%d] is %d; window * dilation must be 1 to length[%d]: %d * %d against %d", i,
                         d->window[i], i, d->window[i], d->dilation[i], length);
    if (d->stride[i] < 1 || d->stride[i] > d->window[i])
        return nbhd_fail(NBHD_ERROR_INVALID, "stride[%d] is %d; it must be 1 to window[%d], %d", i, d->stride[i], i,
                         d->window[i]);
    return NBHD_OK;
}

/* The number of query tokens, key tokens and elements per tensor must fit 62 bits, so that no offset overflows. */
static nbhd_status check_product(const nbhd_desc *d)
{
    double tokens = d->batch, keys = d->batch, pairs = 1;
    for (int i = 0; i < d->rank; i++) {
        tokens *= d->length[i];
        keys *= d->kv_length[i];
        pairs *= d->window[i];
    }
    double width = 8.0 * d->heads * (d->head_dim > d->head_dim_v ? d->head_dim : d->head_dim_v);
    if ((tokens + keys + d->extra) * width > 4e18 || pairs > INT_MAX)
        return nbhd_fail(NBHD_ERROR_INVALID, "the tensors are too large: %g tokens of %d heads, windows of %g keys",
                         tokens, d->heads, pairs);
    return NBHD_OK;
}

static nbhd_status check_pass(const nbhd_desc *d)
{
    bool unfused = d->pass >= NBHD_QK;
    if (unfused && d->extra)
        return nbhd_fail(NBHD_ERROR_INVALID, "extra is %d; the unfused pass %s has scores for windows only", d->extra,
                         nbhd_pass_name(d->pass));
    if (d->bias)
        for (int i = 0; i < d->rank; i++)
            if (d->kv_length[i] != d->length[i])
                return nbhd_fail(NBHD_ERROR_INVALID,
                                 "bias is 1; a relative position needs kv_length[%d], %d, to be length[%d], %d", i,
                                 d->kv_length[i], i, d->length[i]);
    return NBHD_OK;
}

nbhd_status nbhd_problem_init(struct nbhd_problem *problem, const nbhd_desc *desc)
{
    memset(problem, 0, sizeof *problem);
    if (!desc)
        return nbhd_fail(NBHD_ERROR_INVALID, "desc is NULL");
    nbhd_desc *d = &problem->desc;
    nbhd_status status = nbhd_copy_sized(d, sizeof *d, desc, "nbhd_desc");
    if (status)
        return status;
    d->size = sizeof *d;
    if ((status = fill_scalars(d)))
        return status;
    for (int i = 0; i < d->rank; i++)
        if ((status = fill_axis(d, i)))
            return status;
    if ((status = check_product(d)) || (status = check_pass(d)))
        return status;
    for (int i = 0; i < 3; i++)
        problem->axis[i] = (struct nbhd_axis){1, 1, 1, 1, 1, NBHD_EDGE_NEAREST};
    for (int i = 0; i < d->rank; i++) {
        problem->at[i] = i + 3 - d->rank;
        problem->axis[problem->at[i]] = (struct nbhd_axis){d->length[i], d->kv_length[i], d->window[i],
                                                           d->stride[i], d->dilation[i],  d->edge[i]};
    }
    return NBHD_OK;
}

void nbhd_problem_order(struct nbhd_problem *problem)
{
    const struct nbhd_problem given = *problem;
    int next = 2;
    for (int one = 0; one < 2; one++) /* from the last place on */
        for (int i = 2; i >= 0; i--) {
            if ((given.axis[i].length == 1 && given.axis[i].keys == 1) != one)
                continue;
            problem->axis[next] = given.axis[i];
            for (int d = 0; d < given.desc.rank; d++)
                problem->at[d] = given.at[d] == i ? next : problem->at[d];
            next--;
        }
}

nbhd_status nbhd_desc_keys(const nbhd_desc *desc, int axis, int query, int *first, int *count)
{
    struct nbhd_problem problem;
    nbhd_status status = nbhd_problem_init(&problem, desc);
    if (status || (status = check_range("axis", axis, 0, problem.desc.rank - 1)) ||
        (status = check_range("query", query, 0, problem.desc.length[axis] - 1)))
        return status;
    if (!first || !count)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is NULL", first ? "count" : "first");
    struct nbhd_axis a = problem.axis[problem.at[axis]];
    const int group = query % a.dilation, n = nbhd_group_size(a, group);
    const struct nbhd_range keys = nbhd_keys(a, n, query / a.dilation);
    *first = nbhd_wrap(a, n, keys.begin) * a.dilation + group;
    *count = keys.end - keys.begin;
    return NBHD_OK;
}

static double problem_pairs(const struct nbhd_problem *problem)
{
    double window_pairs = 1, tokens = 1;
    for (int i = 0; i < 3; i++) {
        window_pairs *= nbhd_axis_pairs(problem->axis[i]);
        tokens *= problem->axis[i].length;
    }
    return (window_pairs + tokens * problem->desc.extra) * problem->desc.batch * problem->desc.heads;
}

double nbhd_desc_pairs(const nbhd_desc *desc)
{
    struct nbhd_problem problem;
    return nbhd_problem_init(&problem, desc) ? 0 : problem_pairs(&problem);
}

double nbhd_desc_flops(const nbhd_desc *desc)
{
    struct nbhd_problem problem;
    if (nbhd_problem_init(&problem, desc))
        return 0;
    const double qk = 2.0 * problem.desc.head_dim, av = 2.0 * problem.desc.head_dim_v;
    const double per_pair[] = {
        [NBHD_FORWARD] = qk + av, [NBHD_BACKWARD] = 3 * qk + 2 * av, [NBHD_QK] = qk,
        [NBHD_AV] = av,           [NBHD_QK_BACKWARD] = 2 * qk,       [NBHD_AV_BACKWARD] = 2 * av};
    return problem_pairs(&problem) * per_pair[problem.desc.pass];
}
