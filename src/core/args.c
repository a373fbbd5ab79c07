/* From the caller's arguments to the block that kernels read: which tensors a pass needs, their strides in bytes. */
#include <limits.h>
#include <stdint.h>
#include <string.h>
#include "core/kernel.h"
#include "core/plan.h"

/* How a tensor of a pass is shaped, beyond its batch: the axes it runs over, heads, and its last extent. */
struct shape {
    int axes[3]; /* query or key lengths, as in nbhd_params; extra tensors: {1, 1, extra} */
    int rank;    /* axes that the caller's stride[] names, and of each the place in axes */
    int at[3];
    int batch, heads, width;
    size_t element;
};

enum kind { OF_QUERY, OF_KEY, OF_EXTRA };

static struct shape shape_of(const struct nbhd_problem *p, enum kind kind, int heads, int width, size_t element)
{
    struct shape s = {{1, 1, p->desc.extra}, 1, {2}, p->desc.batch, heads, width, element};
    if (kind != OF_EXTRA) {
        s.rank = p->desc.rank;
        memcpy(s.at, p->at, sizeof s.at);
        for (int i = 0; i < 3; i++)
            s.axes[i] = kind == OF_QUERY ? p->axis[i].length : p->axis[i].keys;
    }
    return s;
}

static void contiguous(const struct shape *s, struct nbhd_view *view)
{
    long long step = (long long)s->element * s->width;
    view->head = step;
    step *= s->heads;
    for (int i = 2; i >= 0; i--) {
        view->axis[i] = step;
        step *= s->axes[i];
    }
    view->batch = step;
}

/* A stride in bytes. That of one element is never used; 0 suits kernels that want multiples of something. */
static bool scale_stride(long long stride, int extent, size_t element, long long *step)
{
    const long long reach = LLONG_MAX / 8 / (long long)element / extent; /* so that no sum of five overflows */
    *step = 0;
    if (extent == 1)
        return true;
    if (stride < -reach || stride > reach)
        return false;
    *step = stride * (long long)element;
    return true;
}

static nbhd_status strided(const struct shape *s, const nbhd_tensor *tensor, const char *name, struct nbhd_view *view)
{
    long long *step[5] = {&view->batch};
    int extent[5] = {s->batch};
    for (int i = 0; i < s->rank; i++) {
        step[1 + i] = &view->axis[s->at[i]];
        extent[1 + i] = s->axes[s->at[i]];
    }
    step[1 + s->rank] = &view->head;
    extent[1 + s->rank] = s->heads;
    for (int i = 0; i < s->rank + 2; i++)
        if (!scale_stride(tensor->stride[i], extent[i], s->element, step[i]))
            return nbhd_fail(NBHD_ERROR_INVALID, "%s has a stride of %lld on an extent of %d; no memory is that large",
                             name, tensor->stride[i], extent[i]);
    return NBHD_OK;
}

static bool all_zero(const long long stride[5])
{
    return !(stride[0] | stride[1] | stride[2] | stride[3] | stride[4]);
}

enum use { OPTIONAL, READ, WRITE };

/* A stride between 0 and the last extent lays one row over another. */
static nbhd_status check_output(const struct shape *s, const struct nbhd_view *view, const char *name)
{
    const int extent[5] = {s->batch, s->axes[0], s->axes[1], s->axes[2], s->heads};
    const long long step[5] = {view->batch, view->axis[0], view->axis[1], view->axis[2], view->head};
    const long long element = (long long)s->element, row = element * s->width;
    for (int i = 0; i < 5; i++)
        if (extent[i] > 1 && step[i] > -row && step[i] < row)
            return nbhd_fail(NBHD_ERROR_INVALID, "%s has a stride of %lld, and rows of %d; it is written, so its "
                             "elements must not overlap", name, step[i] / element, s->width);
    return NBHD_OK;
}

static nbhd_status bind(const struct nbhd_problem *p, const nbhd_tensor *tensor, const char *name, enum use use,
                        const struct shape *s, struct nbhd_view *view)
{
    memset(view, 0, sizeof *view);
    if (!tensor->data)
        return use == OPTIONAL ? NBHD_OK
                               : nbhd_fail(NBHD_ERROR_INVALID, "%s is NULL; the pass %s of this problem needs it",
                                           name, nbhd_pass_name(p->desc.pass));
    if ((uintptr_t)tensor->data % s->element)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is at %p; it must be aligned to its elements of %zu bytes", name,
                         tensor->data, s->element);
    view->data = tensor->data;
    if (all_zero(tensor->stride))
        contiguous(s, view);
    else {
        const nbhd_status status = strided(s, tensor, name, view);
        if (status)
            return status;
    }
    return use == WRITE ? check_output(s, view, name) : NBHD_OK;
}

/* A tensor outside of nbhd_args, of o's or lse's shape. */
static nbhd_status bind_alone(const struct nbhd_problem *p, const nbhd_tensor *tensor, const char *name, bool write,
                              int width, size_t element, struct nbhd_view *view)
{
    const struct shape s = shape_of(p, OF_QUERY, p->desc.heads, width, element);
    if (!tensor || !tensor->data)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is NULL", name);
    return bind(p, tensor, name, write ? WRITE : READ, &s, view);
}

nbhd_status nbhd_bind_o(const struct nbhd_problem *p, const nbhd_tensor *tensor, const char *name, bool write,
                        struct nbhd_view *view)
{
    return bind_alone(p, tensor, name, write, p->desc.head_dim_v, nbhd_dtype_size(p->desc.dtype), view);
}

nbhd_status nbhd_bind_lse(const struct nbhd_problem *p, const nbhd_tensor *tensor, const char *name, bool write,
                          struct nbhd_view *view)
{
    return bind_alone(p, tensor, name, write, 1, sizeof(float), view);
}

static struct shape shape_for(const struct nbhd_problem *p, enum nbhd_form form)
{
    const nbhd_desc *d = &p->desc;
    const size_t element = nbhd_dtype_size(d->dtype);
    switch (form) {
    case NBHD_FORM_Q: return shape_of(p, OF_QUERY, d->heads, d->head_dim, element);
    case NBHD_FORM_K: return shape_of(p, OF_KEY, d->kv_heads, d->head_dim, element);
    case NBHD_FORM_V: return shape_of(p, OF_KEY, d->kv_heads, d->head_dim_v, element);
    case NBHD_FORM_O: return shape_of(p, OF_QUERY, d->heads, d->head_dim_v, element);
    case NBHD_FORM_LSE: return shape_of(p, OF_QUERY, d->heads, 1, sizeof(float));
    case NBHD_FORM_EXTRA_K: return shape_of(p, OF_EXTRA, d->kv_heads, d->head_dim, element);
    case NBHD_FORM_EXTRA_V: return shape_of(p, OF_EXTRA, d->kv_heads, d->head_dim_v, element);
    default: break;
    }
    return shape_of(p, OF_QUERY, d->heads, p->axis[0].window * p->axis[1].window * p->axis[2].window, element);
}

/* A pass is a column: r read, w written, o optional, blank not used. */
const struct nbhd_tensor_row nbhd_tensor_rows[NBHD_TENSOR_ROWS] = {
#define ROW(name, form, use) {offsetof(nbhd_args, name), offsetof(struct nbhd_params, name), "args." #name, form, use}
    ROW(q, NBHD_FORM_Q, "rrr r "),
    ROW(k, NBHD_FORM_K, "rrr r "),
    ROW(v, NBHD_FORM_V, "rr r r"),
    ROW(o, NBHD_FORM_O, "wr w  "),
    ROW(lse, NBHD_FORM_LSE, "or    "),
    ROW(extra_k, NBHD_FORM_EXTRA_K, "rr    "),
    ROW(extra_v, NBHD_FORM_EXTRA_V, "rr    "),
    ROW(dout, NBHD_FORM_O, " r   r"),
    ROW(dlse, NBHD_FORM_LSE, " o    "),
    ROW(dq, NBHD_FORM_Q, " w  w "),
    ROW(dk, NBHD_FORM_K, " w  w "),
    ROW(dv, NBHD_FORM_V, " w   w"),
    ROW(dextra_k, NBHD_FORM_EXTRA_K, " w    "),
    ROW(dextra_v, NBHD_FORM_EXTRA_V, " w    "),
    ROW(scores, NBHD_FORM_SCORES, "  wr r"),
    ROW(dscores, NBHD_FORM_SCORES, "    rw"),
#undef ROW
};

static char use_of(const struct nbhd_problem *p, const struct nbhd_tensor_row *row)
{
    const bool extra = row->form == NBHD_FORM_EXTRA_K || row->form == NBHD_FORM_EXTRA_V;
    return extra && !p->desc.extra ? ' ' : row->use[p->desc.pass];
}

/* Of biases: 2 w - 1 an axis for each head, contiguous. */
static size_t table_bytes(const struct nbhd_problem *p)
{
    size_t bytes = (size_t)p->desc.heads * sizeof(float);
    for (int i = 0; i < 3; i++)
        bytes *= (size_t)(2 * p->axis[i].window - 1);
    return bytes;
}

size_t nbhd_args_place(const struct nbhd_problem *p, char *memory, nbhd_args *args)
{
    size_t at = 0;
    *args = (nbhd_args)NBHD_ARGS_INIT;
    for (int i = 0; i < NBHD_TENSOR_ROWS; i++) {
        const char use = use_of(p, &nbhd_tensor_rows[i]);
        if (use == ' ' || use == 'o')
            continue;
        const struct shape s = shape_for(p, nbhd_tensor_rows[i].form);
        nbhd_tensor *tensor = (nbhd_tensor *)(void *)((char *)args + nbhd_tensor_rows[i].arg);
        tensor->data = memory ? memory + at : NULL;
        const size_t row = s.element * (size_t)s.width * (size_t)s.heads * (size_t)s.batch;
        at += (row * (size_t)s.axes[0] * (size_t)s.axes[1] * (size_t)s.axes[2] + 63) / 64 * 64;
    }
    if (!p->desc.bias)
        return at;
    const size_t table = (table_bytes(p) + 63) / 64 * 64;
    args->bias.data = memory ? memory + at : NULL;
    args->dbias.data = memory ? memory + at + table : NULL;
    return at + 2 * table;
}

/* The bytes of a tensor that has no gaps, else of its first element. */
struct span {
    uintptr_t begin, end;
    const char *name;
    bool written;
};

static struct span span_of(const struct shape *s, const nbhd_tensor *tensor, const struct nbhd_view *view, bool gaps)
{
    const uintptr_t data = (uintptr_t)view->data;
    if (all_zero(tensor->stride) && !gaps)
        return (struct span){.begin = data, .end = data + (uintptr_t)view->batch * (size_t)s->batch};
    const int extent[5] = {s->batch, s->axes[0], s->axes[1], s->axes[2], s->heads};
    const long long step[5] = {view->batch, view->axis[0], view->axis[1], view->axis[2], view->head};
    size_t bytes = s->element * (size_t)s->width, below = 0, reach = bytes;
    for (int i = 0; i < 5; i++) {
        const size_t way = (size_t)(extent[i] - 1) * (size_t)(step[i] < 0 ? -step[i] : step[i]);
        bytes *= (size_t)extent[i];
        reach += way;
        below += step[i] < 0 ? way : 0;
    }
    if (gaps || reach != bytes)
        return (struct span){.begin = data, .end = data + 1};
    return (struct span){.begin = data - below, .end = data - below + bytes};
}

/* The tensors of a call so far: those above and two tables. */
struct spans {
    struct span span[NBHD_TENSOR_ROWS + 2];
    int count;
    bool gaps; /* between the sequences of a ragged batch: extents are not known */
};

/* No tensor is written over another: computing in place is not possible, as many queries read a key. */
static nbhd_status add_apart(struct spans *spans, struct span next)
{
    for (const struct span *s = spans->span; s < spans->span + spans->count; s++)
        if (s->begin < next.end && next.begin < s->end && (next.written || s->written))
            return nbhd_fail(NBHD_ERROR_INVALID, "%s, from %p on, lies over %s, from %p on; what is written must not "
                             "overlap another tensor", next.name, (void *)next.begin, s->name, (void *)s->begin);
    spans->span[spans->count++] = next;
    return NBHD_OK;
}

static nbhd_status check_table(const struct nbhd_problem *p, const float *table, const char *name, bool written,
                               struct spans *spans)
{
    const uintptr_t begin = (uintptr_t)table;
    if (begin % sizeof(float))
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is at %p; it must be aligned to its elements of %zu bytes", name,
                         (const void *)table, sizeof(float));
    const struct span span = {begin, begin + (spans->gaps ? 1 : table_bytes(p)), name, written};
    return table ? add_apart(spans, span) : NBHD_OK;
}

static nbhd_status bind_tables(const struct nbhd_problem *p, const nbhd_args *args, struct spans *spans,
                               struct nbhd_params *params)
{
    const bool gradient = p->desc.pass == NBHD_BACKWARD || p->desc.pass == NBHD_QK_BACKWARD;
    params->bias = NULL;
    params->dbias = NULL;
    if (!p->desc.bias)
        return NBHD_OK;
    if (p->desc.pass != NBHD_QK_BACKWARD && p->desc.pass != NBHD_AV && p->desc.pass != NBHD_AV_BACKWARD) {
        if (!args->bias.data)
            return nbhd_fail(NBHD_ERROR_INVALID, "args.bias is NULL; the problem has bias 1 and needs it");
        params->bias = args->bias.data;
    }
    if (gradient)
        params->dbias = args->dbias.data; /* optional */
    const nbhd_status status = check_table(p, params->bias, "args.bias", false, spans);
    return status ? status : check_table(p, params->dbias, "args.dbias", true, spans);
}

nbhd_status nbhd_params_bind(const struct nbhd_problem *p, const nbhd_args *given, bool gaps,
                             struct nbhd_params *params)
{
    nbhd_args args;
    nbhd_status status = nbhd_args_copy(&args, given);
    if (status)
        return status;
    const nbhd_desc *d = &p->desc;
    struct spans spans = {.gaps = gaps};
    memset(params, 0, sizeof *params);
    for (int i = 0; i < NBHD_TENSOR_ROWS; i++) {
        const char use = use_of(p, &nbhd_tensor_rows[i]);
        if (use == ' ')
            continue;
        const nbhd_tensor *tensor = (const nbhd_tensor *)(const void *)((const char *)&args + nbhd_tensor_rows[i].arg);
        struct nbhd_view *view = (struct nbhd_view *)(void *)((char *)params + nbhd_tensor_rows[i].view);
        const struct shape s = shape_for(p, nbhd_tensor_rows[i].form);
        status = bind(p, tensor, nbhd_tensor_rows[i].name, use == 'r' ? READ : use == 'w' ? WRITE : OPTIONAL, &s, view);
        const bool written = use == 'w' || (use == 'o' && d->pass == NBHD_FORWARD);
        if (!status && view->data) {
            struct span span = span_of(&s, tensor, view, gaps);
            span.name = nbhd_tensor_rows[i].name;
            span.written = written;
            status = add_apart(&spans, span);
        }
        if (status)
            return status;
    }
    if ((status = bind_tables(p, &args, &spans, params)))
        return status;
    memcpy(params->axis, p->axis, sizeof params->axis);
    params->batch = d->batch;
    params->heads = d->heads;
    params->kv_heads = d->kv_heads;
    params->head_dim = d->head_dim;
    params->head_dim_v = d->head_dim_v;
    params->extra = d->extra;
    params->scale = d->scale;
    params->flags = (int)p->flags;
    return NBHD_OK;
}
