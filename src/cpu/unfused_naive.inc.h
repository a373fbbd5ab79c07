/* The naive unfused passes: each pair of a query and a key by itself, one dot product or one scaled row. The baseline
 * that the first papers measure against, and the reference in double where the vocabulary is one double
 * (unfused_scalar.c). Included after a vocabulary and row_load, row_store, row_element, real. A task is a row of
 * queries or keys along axis 2; every output is summed by one task in a fixed order. */
#include "cpu/threads.h"
#include "cpu/unfused.h"

enum { PIECE = 128, ROW_MAX = 512, COLUMNS = 4 }; /* COLUMNS: vectors of a row that are summed at once */

/* Where the task's row lies on axes 0 and 1: coordinates, dilation groups, and keys (or queries) of the other side. */
struct line {
    int batch, head, x[3], group[3], element[3], size[3];
    struct nbhd_range other[3];
};

V_FN void line_axis(const struct nbhd_product *p, struct line *l, int i, bool of_keys)
{
    const struct nbhd_axis a = p->axis[i];
    l->group[i] = l->x[i] % a.dilation;
    l->element[i] = l->x[i] / a.dilation;
    l->size[i] = nbhd_group_size(a, l->group[i]);
    l->other[i] = of_keys ? nbhd_queries(a, l->size[i], l->element[i]) : nbhd_keys(a, l->size[i], l->element[i]);
}

V_FN struct line line_of(const struct nbhd_product *p, long long task, bool of_keys)
{
    const int heads = of_keys ? p->kv_heads : p->heads;
    struct line l;
    for (int i = 1; i >= 0; i--) {
        const int extent = of_keys ? p->axis[i].keys : p->axis[i].length;
        l.x[i] = (int)(task % extent);
        task /= extent;
        line_axis(p, &l, i, of_keys);
    }
    l.head = (int)(task % heads);
    l.batch = (int)(task / heads);
    return l;
}

/* Byte offset in a view of element e[] of the line's groups. */
V_FN long long offset_of(const struct nbhd_product *p, const struct line *l, const struct nbhd_view *v, const int e[3],
                         int head)
{
    long long offset = l->batch * v->batch + head * v->head;
    for (int i = 0; i < 3; i++)
        offset += (nbhd_wrap(p->axis[i], l->size[i], e[i]) * (long long)p->axis[i].dilation + l->group[i]) * v->axis[i];
    return offset;
}

/* Elements along axis 2 from x on, before `end`, that lie one after the other; PIECE at most. */
V_FN int piece_of(const struct nbhd_product *p, const struct line *l, int x, int end)
{
    return nbhd_min(nbhd_together(p->axis[2], l->size[2], x, end), PIECE);
}

V_FN int kv_head_of(const struct nbhd_product *p, int head) { return head / (p->heads / p->kv_heads); }

/* Entry in a row of scores of key element k, seen by a query whose first keys are first[]; less axis 2. */
V_FN long long entry_of(const struct nbhd_product *p, const int k[3], const int first[3])
{
    return ((long long)(k[0] - first[0]) * p->axis[1].window + (k[1] - first[1])) * p->axis[2].window;
}

/* ---- scores = query . key ---- */

/* out[j] = q . row j, for n rows of keys that lie step bytes apart. q is padded with zeros. */
V_FN void dot_rows(const real *q, const char *key, long long step, int n, int width, int dtype, real *out)
{
    for (int j = 0; j < n; j++, key += step) {
        vf sum = v_zero();
        int i = 0;
        for (; i + VF <= width; i += VF)
            sum = v_fma(v_load(q + i), row_load(key, dtype, i, VF), sum);
        if (i < width)
            sum = v_fma(v_load(q + i), row_load(key, dtype, i, width - i), sum);
        out[j] = v_sum(sum);
    }
}

/* row[at + j] = in[j] + bias[j] */
V_FN void store_scores(char *row, int dtype, long long at, const real *in, const float *bias, int n)
{
    char *to = row + at * (long long)nbhd_dtype_size(dtype);
    for (int j = 0; j < n; j += VF) {
        const int part = n - j < VF ? n - j : VF;
        vf x = v_load_part(in + j, part);
        if (bias)
            x = v_add(x, row_load((const char *)bias, NBHD_F32, j, part));
        row_store(to, dtype, j, x, part);
    }
}

/* The head's table at the relative position of key element k to the line's query. */
V_FN long long table_at(const struct nbhd_product *p, const struct line *l, const int k[3], int head)
{
    long long at = head;
    for (int i = 0; i < 3; i++)
        at = at * (2 * p->axis[i].window - 1) + k[i] - l->element[i] + p->axis[i].window - 1;
    return at;
}

V_FN void fill_scores(const struct nbhd_product *p, char *row, int dtype)
{
    const int window = p->axis[0].window * p->axis[1].window * p->axis[2].window;
    for (int j = 0; j < window; j += VF)
        row_store(row, dtype, j, v_set1(p->fill), window - j < VF ? window - j : VF);
}

V_FN void scores_of_query(const struct nbhd_product *p, const struct line *l, int dtype)
{
    const struct nbhd_range *keys = l->other;
    const int first[3] = {keys[0].begin, keys[1].begin, keys[2].begin}, count = keys[2].end - keys[2].begin;
    const long long step = p->key.axis[2] * p->axis[2].dilation;
    const char *query = p->query.data + offset_of(p, l, &p->query, l->element, l->head);
    char *row = p->scores.data + offset_of(p, l, &p->scores, l->element, l->head);
    real q[ROW_MAX + VF], piece[PIECE];
    for (int i = 0; i < p->width; i += VF)
        v_store(q + i, v_mul(v_set1(p->scale), row_load(query, dtype, i, p->width - i < VF ? p->width - i : VF)));
    bool whole = true;
    for (int i = 0; i < 3; i++)
        whole = whole && keys[i].end - keys[i].begin == p->axis[i].window;
    if (!whole)
        fill_scores(p, row, dtype);
    int k[3];
    for (k[0] = keys[0].begin; k[0] < keys[0].end; k[0]++)
        for (k[1] = keys[1].begin; k[1] < keys[1].end; k[1]++)
            for (int j = 0, n; j < count; j += n) {
                k[2] = first[2] + j;
                n = piece_of(p, l, k[2], keys[2].end);
                const char *key = p->key.data + offset_of(p, l, &p->key, k, kv_head_of(p, l->head));
                const long long entry = entry_of(p, k, first) + j;
                const float *bias = p->bias ? p->bias + table_at(p, l, k, l->head) : NULL;
                if (dtype == NBHD_F32 && sizeof(real) == sizeof(float) && !bias) {
                    dot_rows(q, key, step, n, p->width, dtype, (real *)(void *)row + entry);
                } else {
                    dot_rows(q, key, step, n, p->width, dtype, piece);
                    store_scores(row, dtype, entry, piece, bias, n);
                }
            }
}

/* ---- query = sum of scores * key ---- */

/* acc += weight[j] * row j, columns i .. of the row, n rows step bytes apart. */
V_FN void add_rows(vf acc[COLUMNS], const real *weight, const char *row, long long step, int n, int i, int columns,
                   int dtype)
{
    for (int j = 0; j < n; j++, row += step) {
        const vf w = v_set1(weight[j]);
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) {
            const int left = columns - c * VF;
            if (left > 0)
                acc[c] = v_fma(w, row_load(row, dtype, i + c * VF, left < VF ? left : VF), acc[c]);
        }
    }
}

/* n scores from entry `at` on, as real. Writes whole vectors, zeros past n: the scalars are read at once, and a masked
 * store could not be forwarded to them. */
V_FN void load_weights(const char *row, int dtype, long long at, int n, real *out)
{
    const char *from = row + at * (long long)nbhd_dtype_size(dtype);
    for (int j = 0; j < n; j += VF)
        v_store(out + j, row_load(from, dtype, j, n - j < VF ? n - j : VF));
}

V_FN void store_columns(char *row, int dtype, int i, const vf acc[COLUMNS], int columns, float scale)
{
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) {
        const int left = columns - c * VF;
        if (left > 0)
            row_store(row, dtype, i + c * VF, v_mul(v_set1(scale), acc[c]), left < VF ? left : VF);
    }
}

/* Columns i .. i + columns - 1 of a query's row. */
V_FN void columns_of_query(const struct nbhd_product *p, const struct line *l, int i, int columns, int dtype)
{
    const struct nbhd_range *keys = l->other;
    const int first[3] = {keys[0].begin, keys[1].begin, keys[2].begin}, count = keys[2].end - keys[2].begin;
    const long long step = p->key.axis[2] * p->axis[2].dilation;
    const char *row = p->scores.data + offset_of(p, l, &p->scores, l->element, l->head);
    real piece[PIECE];
    vf acc[COLUMNS];
    for (int c = 0; c < COLUMNS; c++)
        acc[c] = v_zero();
    int k[3];
    for (k[0] = keys[0].begin; k[0] < keys[0].end; k[0]++)
        for (k[1] = keys[1].begin; k[1] < keys[1].end; k[1]++)
            for (int j = 0, n; j < count; j += n) {
                k[2] = first[2] + j;
                n = piece_of(p, l, k[2], keys[2].end);
                load_weights(row, dtype, entry_of(p, k, first) + j, n, piece);
                const char *key = p->key.data + offset_of(p, l, &p->key, k, kv_head_of(p, l->head));
                add_rows(acc, piece, key, step, n, i, columns, dtype);
            }
    store_columns(p->query.data + offset_of(p, l, &p->query, l->element, l->head), dtype, i, acc, columns, p->scale);
}

/* ---- key = sum of scores * query, over the inverse neighborhood ---- */

/* Adds n queries along axis 2 from element q[2] on, whose first keys there are begin[]; l is the key's line. */
V_FN void add_queries(const struct nbhd_product *p, const struct line *l, vf acc[COLUMNS], const int q[3], int head,
                      const int *begin, int n, int i, int columns, int dtype)
{
    const int first[3] = {nbhd_keys(p->axis[0], l->size[0], q[0]).begin,
                          nbhd_keys(p->axis[1], l->size[1], q[1]).begin, 0};
    const long long step = p->scores.axis[2] * p->axis[2].dilation;
    const char *row = p->scores.data + offset_of(p, l, &p->scores, q, head) +
                      (entry_of(p, l->element, first) + l->element[2]) * (long long)nbhd_dtype_size(dtype);
    real weight[PIECE];
    for (int j = 0; j < n; j++, row += step)
        weight[j] = row_element(row, dtype, -begin[j]);
    const char *query = p->query.data + offset_of(p, l, &p->query, q, head);
    add_rows(acc, weight, query, p->query.axis[2] * p->axis[2].dilation, n, i, columns, dtype);
}

V_FN void columns_of_key(const struct nbhd_product *p, const struct line *l, int i, int columns, int dtype)
{
    const struct nbhd_range *queries = l->other;
    const int share = p->heads / p->kv_heads;
    vf acc[COLUMNS];
    for (int c = 0; c < COLUMNS; c++)
        acc[c] = v_zero();
    int q[3], begin[PIECE];
    for (int from = queries[2].begin, n; from < queries[2].end; from += n) {
        n = piece_of(p, l, from, queries[2].end);
        for (int j = 0; j < n; j++)
            begin[j] = nbhd_keys(p->axis[2], l->size[2], from + j).begin;
        q[2] = from;
        for (int head = l->head * share; head < (l->head + 1) * share; head++)
            for (q[0] = queries[0].begin; q[0] < queries[0].end; q[0]++)
                for (q[1] = queries[1].begin; q[1] < queries[1].end; q[1]++)
                    add_queries(p, l, acc, q, head, begin, n, i, columns, dtype);
    }
    store_columns(p->key.data + offset_of(p, l, &p->key, l->element, l->head), dtype, i, acc, columns, p->scale);
}

/* ---- tasks ---- */

/* The row that a product other than of scores writes: the line's query or key. */
V_FN void naive_sums(const struct nbhd_product *p, const struct line *l, int dtype)
{
    for (int i = 0; i < p->width; i += COLUMNS * VF) {
        const int columns = nbhd_min(p->width - i, COLUMNS * VF);
        if (p->kind == WRITES_KEYS)
            columns_of_key(p, l, i, columns, dtype);
        else
            columns_of_query(p, l, i, columns, dtype);
    }
}

V_FN void naive_row(const struct nbhd_product *p, long long task, int dtype)
{
    const bool of_keys = p->kind == WRITES_KEYS;
    const struct nbhd_range segment = nbhd_segment(&task, of_keys ? p->axis[2].keys : p->axis[2].length);
    struct line l = line_of(p, task, of_keys);
    for (l.x[2] = segment.begin; l.x[2] < segment.end; l.x[2]++) {
        line_axis(p, &l, 2, of_keys);
        if (p->kind == WRITES_SCORES)
            scores_of_query(p, &l, dtype);
        else
            naive_sums(p, &l, dtype);
    }
}

static void naive_task(void *context, long long task, int thread)
{
    const struct nbhd_product *p = context;
    (void)thread;
    switch (p->dtype) {
    case NBHD_F64: naive_row(p, task, NBHD_F64); return;
    case NBHD_F16: naive_row(p, task, NBHD_F16); return;
    case NBHD_BF16: naive_row(p, task, NBHD_BF16); return;
    default: naive_row(p, task, NBHD_F32); return;
    }
}

/* ---- the gradient of the bias ---- */

struct table_call {
    struct nbhd_product product; /* for its scores: the gradient of them */
    real *partial;               /* [parts][heads][entries] */
    float *dbias;                /* [heads][entries] */
    long long entries;
    int parts;
    bool add; /* to what dbias holds */
};

static void add_to_table(const struct nbhd_product *p, const struct line *l, real *table)
{
    const struct nbhd_range *keys = l->other;
    const int first[3] = {keys[0].begin, keys[1].begin, keys[2].begin}, count = keys[2].end - keys[2].begin;
    const char *row = p->scores.data + offset_of(p, l, &p->scores, l->element, l->head);
    int k[3];
    k[2] = first[2];
    for (k[0] = keys[0].begin; k[0] < keys[0].end; k[0]++)
        for (k[1] = keys[1].begin; k[1] < keys[1].end; k[1]++) {
            const char *from = row + entry_of(p, k, first) * (long long)nbhd_dtype_size(p->dtype);
            real *to = table + table_at(p, l, k, 0);
            for (int j = 0; j < count; j += VF) {
                const int n = nbhd_min(count - j, VF);
                v_store_part(to + j, v_add(v_load_part(to + j, n), row_load(from, p->dtype, j, n)), n);
            }
        }
}

/* Task: one head's table over one part of the lines of queries. */
static void table_task(void *context, long long task, int thread)
{
    const struct table_call *c = context;
    const struct nbhd_product *p = &c->product;
    const int head = (int)(task % p->heads), part = (int)(task / p->heads);
    const long long lines = (long long)p->axis[0].length * p->axis[1].length, all = lines * p->batch;
    real *table = c->partial + task * c->entries;
    (void)thread;
    memset(table, 0, sizeof *table * (size_t)c->entries);
    for (long long i = all * part / c->parts; i < all * (part + 1) / c->parts; i++) {
        struct line l = line_of(p, (i / lines * p->heads + head) * lines + i % lines, false);
        for (l.x[2] = 0; l.x[2] < p->axis[2].length; l.x[2]++) {
            line_axis(p, &l, 2, false);
            add_to_table(p, &l, table);
        }
    }
}

static void sum_tables(void *context, long long head, int thread)
{
    const struct table_call *c = context;
    (void)thread;
    for (long long i = 0; i < c->entries; i++) {
        real sum = c->add ? (real)c->dbias[head * c->entries + i] : 0;
        for (int part = 0; part < c->parts; part++)
            sum += c->partial[(part * (long long)c->product.heads + head) * c->entries + i];
        c->dbias[head * c->entries + i] = (float)sum;
    }
}

static void differentiate_bias(const struct nbhd_plan *plan, const struct nbhd_product *p,
                               const struct nbhd_params *params, void *workspace)
{
    struct table_call call = {*p, workspace, params->dbias, nbhd_unfused_table_entries(&plan->problem),
                              nbhd_unfused_table_parts(&plan->problem), params->flags & NBHD_PARAMS_ADD};
    nbhd_parallel(plan->config.threads, (long long)call.parts * p->heads, table_task, &call);
    nbhd_parallel(plan->config.threads, p->heads, sum_tables, &call);
}

static nbhd_status naive_build(struct nbhd_plan *plan)
{
    return nbhd_unfused_build(plan, sizeof(real), "naive: each pair by itself");
}

static nbhd_status naive_run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace,
                             void *stream)
{
    struct nbhd_product products[2];
    const int count = nbhd_unfused_products(plan, params, products);
    (void)stream;
    for (int i = 0; i < count; i++) {
        struct nbhd_product *p = &products[i];
        const bool of_keys = p->kind == WRITES_KEYS;
        long long tasks = (long long)p->batch * (of_keys ? p->kv_heads : p->heads);
        for (int a = 0; a < 3; a++) {
            const int extent = of_keys ? p->axis[a].keys : p->axis[a].length;
            tasks *= a < 2 ? extent : nbhd_segments(extent);
        }
        nbhd_parallel(plan->config.threads, tasks, naive_task, p);
    }
    if (params->dbias)
        differentiate_bias(plan, &products[0], params, workspace);
    return NBHD_OK;
}

#define NAIVE_OPS {nbhd_unfused_refuse, nbhd_unfused_configs, naive_build, naive_run, NULL}
