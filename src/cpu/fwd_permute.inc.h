/* Forward for small windows. A tile is up to FWD_ROWS neighbouring query rows (along axis 1) of VF queries each (along
 * axis 2): a vector per row. The windows of a row's queries begin at different keys; a permute gives each lane its own.
 *
 * Per task, the rows of K that its queries see are transposed once into lines: line[d][position]. Positions count the
 * tokens of axis 2 with the dilation groups one after another, for queries as for keys; so a group's keys are adjacent
 * whatever the dilation, and VF queries may straddle groups. Per key row, d and column j of the window:
 *
 *     table    = line[d][base + j .. base + j + 2 VF)     base: where the first lane's window begins
 *     S[j][r] += Q[d][r] * table[start[lane]]             for the rows r that see the key row, 1 to 4 of them
 *
 * Borders, stride and dilation are in start[] and cost nothing. The second product needs no lanes of queries: with the
 * head's dimensions in the lanes, V is read in place and O written as it lies:
 *
 *     O[r][lane][dims] += P[j][r][lane] * V[key of lane, j][dims]
 *
 * Only visible pairs are ever computed there, so what lies outside a window may be NaN. Included by fwd.inc.h. */

enum { ROW_WIDTH = FWD_ROWS * VF };

/* VF queries along axis 2. Lanes past `lanes` repeat the last one and are not stored. */
struct lane_block {
    int lanes;
    int base;       /* position of lane 0's first key in the lines */
    bool ragged;    /* some windows have fewer keys than others */
    bool straight;  /* each window begins one position after the previous lane's */
    bool even_bias; /* all lanes have the same relative positions */
    int start[VF];  /* position of the first key, less base */
    int count[VF];  /* keys */
    int token[VF];  /* of the query */
    int key[VF];    /* what v_lane_step turns into the address of the first value: token or position */
    int bias[VF];   /* column of the bias table for j = 0 */
};

/* A task's view of the problem. */
struct permute_task {
    const struct nbhd_params *p;
    const struct nbhd_fwd *f;
    struct nbhd_cell cell[2];
    struct nbhd_range any[2], keys; /* key elements of axis 0 and 1; key positions of axis 2 */
    int batch, kv_head, blocks;
    int line_step;         /* floats from d to d + 1 */
    long long v_lane_step; /* bytes from key to key in lane_block.key */
    long long v_step;      /* bytes from column to column */
    const char *extra_v;
    long long extra_v_step;
    struct lane_block *block;
    int *token; /* [keys]: token of a key position */
    float *lines, *values, *extra_values, *qt, *s, *o, *maximum, *sum, *alpha;
    struct key_run *runs;
};

/* ---- scores ---- */

/* s[columns][rows] = sum over i < d of qt[i][rows] * line[i][start[lane] + column] */
V_FN void qk_permuted(const float *qt, const float *line, int line_step, const int *start, int d, float *s,
                      const int rows, const int columns, const bool straight)
{
    vf acc[V_COLUMNS][FWD_ROWS];
    vi index[V_COLUMNS];
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++) {
        index[j] = v_imin(v_iadd(v_iload(start), v_iset1(j)), v_iset1(2 * VF - 1));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            acc[j][r] = v_zero();
    }
    for (int i = 0; i < d; i++, qt += ROW_WIDTH, line += line_step) {
        vf low = v_load(line), high = v_load(line + VF), q[FWD_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            q[r] = v_load(qt + r * VF);
#pragma GCC unroll 8
        for (int j = 0; j < columns; j++) {
            vf key = straight ? v_load(line + j) : v_lookup(low, high, index[j]);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                acc[j][r] = v_fma(q[r], key, acc[j][r]);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            v_store(s + j * ROW_WIDTH + r * VF, acc[j][r]);
}

V_FN void qk_columns(const float *qt, const float *line, int line_step, const int *start, int d, float *s,
                     const int rows, int columns, const bool straight)
{
    switch (columns) {
    case 1: qk_permuted(qt, line, line_step, start, d, s, rows, 1, straight); return;
    case 2: qk_permuted(qt, line, line_step, start, d, s, rows, 2, straight); return;
#if V_COLUMNS > 2
    case 3: qk_permuted(qt, line, line_step, start, d, s, rows, 3, straight); return;
    case 4: qk_permuted(qt, line, line_step, start, d, s, rows, 4, straight); return;
    case 5: qk_permuted(qt, line, line_step, start, d, s, rows, 5, straight); return;
    case 6: qk_permuted(qt, line, line_step, start, d, s, rows, 6, straight); return;
#endif
    default: return;
    }
}

V_FN void qk_rows(const float *qt, const float *line, int line_step, const int *start, int d, float *s, int rows,
                  int columns, const bool straight)
{
    switch (rows) {
    case 1: qk_columns(qt, line, line_step, start, d, s, 1, columns, straight); return;
    case 2: qk_columns(qt, line, line_step, start, d, s, 2, columns, straight); return;
    case 3: qk_columns(qt, line, line_step, start, d, s, 3, columns, straight); return;
    default: qk_columns(qt, line, line_step, start, d, s, 4, columns, straight); return;
    }
}

static void window_scores(const struct permute_task *t, const struct lane_block *b, const struct key_run *run)
{
    const int d = t->p->head_dim, most = t->f->columns;
    const int parts = (run->columns + most - 1) / most;
    float *s = t->s + run->entry * ROW_WIDTH + run->begin * VF;
    for (int part = 0; part < parts; part++) {
        const int j = run->columns * part / parts, end = run->columns * (part + 1) / parts;
        const float *line = run->line + b->base + j;
        if (!V_FAST_LOOKUP && b->straight)
            qk_rows(t->qt + run->begin * VF, line, t->line_step, b->start, d, s + j * ROW_WIDTH, run->end - run->begin,
                    end - j, true);
        else
            qk_rows(t->qt + run->begin * VF, line, t->line_step, b->start, d, s + j * ROW_WIDTH, run->end - run->begin,
                    end - j, false);
    }
}

static void extra_scores(const struct permute_task *t, const struct key_run *run)
{
    const float *k[FWD_BLOCK];
    for (int i = 0; i < run->columns; i++)
        k[i] = (const float *)(run->k + i * t->p->extra_k.axis[2]);
    for (int v = 0; v < FWD_ROWS; v += V_STRIP)
        qk_panel(t->qt + v * VF, t->p->head_dim, k, run->columns, t->s + run->entry * ROW_WIDTH + v * VF, ROW_WIDTH,
                 V_STRIP);
}

/* Scores of columns that a lane's window does not have become -inf. */
static void mask_run(const struct permute_task *t, const struct lane_block *b, const struct key_run *run)
{
    for (int j = 0; j < run->columns; j++) {
        unsigned bits = 0;
        for (int l = 0; l < VF; l++)
            bits |= (unsigned)(j < b->count[l]) << l;
        for (int r = run->begin; r < run->end && bits != V_ALL; r++) {
            float *s = t->s + (run->entry + j) * ROW_WIDTH + r * VF;
            v_store(s, v_select(bits, v_load(s), v_set1(-INFINITY)));
        }
    }
}

/* s = factor * s + log2(e) * bias. */
static void bias_run(const struct permute_task *t, const struct lane_block *b, const struct key_run *run, float factor)
{
    const int table_row = 2 * t->p->axis[2].window - 1;
    for (int j = 0; j < run->columns; j++) {
        unsigned bits = 0;
        for (int l = 0; l < VF; l++)
            bits |= (unsigned)(j < b->count[l]) << l;
        for (int r = run->begin; r < run->end; r++) {
            float *s = t->s + (run->entry + j) * ROW_WIDTH + r * VF;
            vf bias = v_zero();
            if (run->line) {
                const float *table = run->bias - r * table_row + j;
                bias = b->even_bias && bits == V_ALL ? v_set1(table[b->bias[0]])
                                                     : v_gather(table, v_iload(b->bias), bits);
            }
            v_store(s, v_fma(bias, v_set1(LOG2E), v_mul(v_load(s), v_set1(factor))));
        }
    }
}

/* ---- softmax of the runs whose scores are held, one query row ---- */

static void softmax_row(const struct permute_task *t, const struct key_run *runs, int n, int row, float factor)
{
    vf old = v_load(t->maximum + row * VF), m = v_set1(-INFINITY);
    for (const struct key_run *run = runs; run < runs + n; run++) {
        const float *s = t->s + run->entry * ROW_WIDTH + row * VF;
        for (int j = 0; j < run->columns && run->begin <= row && row < run->end; j++)
            m = v_max(v_load(s + j * ROW_WIDTH), m);
    }
    m = v_max(v_mul(m, v_set1(factor)), old);
    vf alpha = v_exp2(v_sub(old, m)), sum = v_mul(alpha, v_load(t->sum + row * VF));
    for (const struct key_run *run = runs; run < runs + n; run++) {
        float *s = t->s + run->entry * ROW_WIDTH + row * VF;
        for (int j = 0; j < run->columns && run->begin <= row && row < run->end; j++) {
            vf x = v_exp2(v_fms(v_load(s + j * ROW_WIDTH), v_set1(factor), m));
            sum = v_add(sum, x);
            v_store(s + j * ROW_WIDTH, x);
        }
    }
    v_store(t->maximum + row * VF, m);
    v_store(t->alpha + row * VF, alpha);
    v_store(t->sum + row * VF, sum);
}

/* ---- output ---- */

V_FN void pv_run(vf acc[FWD_ROWS][V_DIMS], const char *v, long long step, const float *p, int count, const int begin,
                 const int end, const int dims)
{
    for (int j = 0; j < count; j++, v += step, p += ROW_WIDTH) {
        vf value[V_DIMS];
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            value[i] = v_load((const float *)v + i * VF);
#pragma GCC unroll 4
        for (int r = begin; r < end; r++) {
            vf weight = v_set1(p[r * VF]);
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                acc[r][i] = v_fma(weight, value[i], acc[r][i]);
        }
    }
}

/* The rows' output of one lane, for `dims` vectors of the head from column on: o[row * o_step]. */
V_FN void pv_lane(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n, int lane,
                  int column, float *o, int o_step, const int dims)
{
    vf acc[FWD_ROWS][V_DIMS];
#pragma GCC unroll 4
    for (int r = 0; r < FWD_ROWS; r++) {
        vf alpha = v_set1(t->alpha[r * VF + lane]);
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            acc[r][i] = v_mul(alpha, v_load(o + r * o_step + i * VF));
    }
    for (const struct key_run *run = runs; run < runs + n; run++) {
        const bool extra = !run->line;
        const char *v = run->v + column * (long long)sizeof(float) + (extra ? 0 : b->key[lane] * t->v_lane_step);
        const long long step = extra ? t->extra_v_step : t->v_step;
        const int count = extra ? run->columns : b->count[lane];
        const float *p = t->s + run->entry * ROW_WIDTH + lane;
        switch (run->begin * 8 + run->end) {
        case 0 * 8 + 1: pv_run(acc, v, step, p, count, 0, 1, dims); break;
        case 0 * 8 + 2: pv_run(acc, v, step, p, count, 0, 2, dims); break;
        case 0 * 8 + 3: pv_run(acc, v, step, p, count, 0, 3, dims); break;
        case 0 * 8 + 4: pv_run(acc, v, step, p, count, 0, 4, dims); break;
        case 1 * 8 + 2: pv_run(acc, v, step, p, count, 1, 2, dims); break;
        case 1 * 8 + 3: pv_run(acc, v, step, p, count, 1, 3, dims); break;
        case 1 * 8 + 4: pv_run(acc, v, step, p, count, 1, 4, dims); break;
        case 2 * 8 + 3: pv_run(acc, v, step, p, count, 2, 3, dims); break;
        case 2 * 8 + 4: pv_run(acc, v, step, p, count, 2, 4, dims); break;
        case 3 * 8 + 4: pv_run(acc, v, step, p, count, 3, 4, dims); break;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < FWD_ROWS; r++)
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            v_store(o + r * o_step + i * VF, acc[r][i]);
}

static void pv_block(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n)
{
    const int width = t->f->value_width, o_step = VF * width;
    for (int column = 0; column < width;) {
        const int dims = nbhd_min((width - column) / VF, V_DIMS);
        for (int lane = 0; lane < b->lanes; lane++) {
            float *o = t->o + lane * width + column;
            switch (dims) {
            case 1: pv_lane(t, b, runs, n, lane, column, o, o_step, 1); break;
            case 2: pv_lane(t, b, runs, n, lane, column, o, o_step, 2); break;
#if V_DIMS > 2
            case 3: pv_lane(t, b, runs, n, lane, column, o, o_step, 3); break;
            case 4: pv_lane(t, b, runs, n, lane, column, o, o_step, 4); break;
#endif
            }
        }
        column += dims * VF;
    }
}

/* ---- a tile ---- */

static void tile_begin(const struct permute_task *t, const struct lane_block *b, int head, const int token[2][FWD_ROWS],
                       int rows)
{
    const struct nbhd_view *view = &t->p->q;
    const char *q[ROW_WIDTH];
    for (int r = 0; r < rows; r++) {
        const char *row = view->data + t->batch * view->batch + head * view->head + token[0][r] * view->axis[0] +
                          token[1][r] * view->axis[1];
        for (int l = 0; l < VF; l++)
            q[r * VF + l] = row + b->token[l] * view->axis[2];
    }
    pack_queries(t->qt, ROW_WIDTH, q, rows * VF, rows, t->p->head_dim, t->p->scale < 0.0f);
    for (int i = 0; i < ROW_WIDTH; i++) {
        t->maximum[i] = -FLT_MAX;
        t->sum[i] = 0.0f;
        t->alpha[i] = 0.0f;
    }
    memset(t->o, 0, (size_t)ROW_WIDTH * (size_t)t->f->value_width * sizeof(float));
}

static void tile_end(const struct permute_task *t, const struct lane_block *b, int head, const int token[2][FWD_ROWS],
                     int rows)
{
    const struct nbhd_view *view = &t->p->o, *lse = &t->p->lse;
    const int width = t->f->value_width, columns = t->p->head_dim_v;
    for (int r = 0; r < rows; r++) {
        char *row = view->data + t->batch * view->batch + head * view->head + token[0][r] * view->axis[0] +
                    token[1][r] * view->axis[1];
        for (int l = 0; l < b->lanes; l++) {
            float *to = (float *)(row + b->token[l] * view->axis[2]);
            const float *o = t->o + (r * VF + l) * width;
            vf factor = v_set1(1.0f / t->sum[r * VF + l]);
            for (int c = 0; c < columns; c += VF)
                v_store_part(to + c, v_mul(factor, v_load(o + c)), nbhd_min(columns - c, VF));
        }
        char *out[VF];
        for (int l = 0; l < VF && lse->data; l++)
            out[l] = lse->data + t->batch * lse->batch + head * lse->head + token[0][r] * lse->axis[0] +
                     token[1][r] * lse->axis[1] + b->token[l] * lse->axis[2];
        if (lse->data)
            store_lse(out, b->lanes, 1, t->maximum + r * VF, t->sum + r * VF);
    }
}

static void permute_tile(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n,
                         int rows)
{
    const float factor = fabsf(t->p->scale) * LOG2E;
    while (n > 0) {
        int now = 0;
        do {
            if (runs[now].line)
                window_scores(t, b, &runs[now]);
            else
                extra_scores(t, &runs[now]);
            if (t->p->bias)
                bias_run(t, b, &runs[now], factor);
            if (b->ragged && runs[now].line)
                mask_run(t, b, &runs[now]);
        } while (++now < n && runs[now].entry > 0);
        for (int r = 0; r < rows; r++)
            softmax_row(t, runs, now, r, t->p->bias ? 1.0f : factor);
        pv_block(t, b, runs, now);
        runs += now;
        n -= now;
    }
}

/* ---- a task: lines, blocks, runs ---- */

/* Element i of all groups laid end to end: its group, and its place in it. */
struct position {
    int group, element, size;
};

static struct position position_of(struct nbhd_axis a, int i)
{
    const int size = nbhd_group_size(a, 0), longs = a.length - (size - 1) * a.dilation;
    if (i < longs * size)
        return (struct position){i / size, i % size, size};
    i -= longs * size;
    return (struct position){longs + i / (size - 1), i % (size - 1), size - 1};
}

static void position_next(struct nbhd_axis a, struct position *x)
{
    if (++x->element == x->size) {
        x->element = 0;
        x->size = nbhd_group_size(a, ++x->group);
    }
}

static void make_blocks(struct permute_task *t, struct nbhd_range queries)
{
    const struct nbhd_axis a = t->p->axis[2];
    struct position x = position_of(a, queries.begin);
    t->blocks = (queries.end - queries.begin + VF - 1) / VF;
    for (int i = 0; i < t->blocks; i++) {
        struct lane_block *b = &t->block[i];
        const int first = queries.begin + i * VF;
        b->lanes = nbhd_min(queries.end - first, VF);
        b->ragged = false;
        b->straight = b->even_bias = true;
        for (int l = 0; l < VF; l++) {
            if (l >= b->lanes) {
                b->start[l] = b->start[l - 1], b->count[l] = b->count[l - 1], b->token[l] = b->token[l - 1];
                b->key[l] = b->key[l - 1], b->bias[l] = b->bias[l - 1];
                continue;
            }
            const struct nbhd_range keys = nbhd_keys(a, x.size, x.element);
            const int position = first + l - x.element + keys.begin; /* the group begins at first + l - element */
            if (l == 0)
                b->base = position - t->keys.begin;
            b->start[l] = position - t->keys.begin - b->base;
            b->count[l] = keys.end - keys.begin;
            b->token[l] = x.group + x.element * a.dilation;
            b->key[l] = t->f->pack_values ? position - t->keys.begin : x.group + keys.begin * a.dilation;
            b->bias[l] = keys.begin - x.element + a.window - 1;
            b->ragged |= b->count[l] != a.window;
            b->straight &= b->start[l] == l;
            b->even_bias &= b->bias[l] == b->bias[0];
            position_next(a, &x);
        }
    }
}

/* Key positions that the queries see, and their tokens. */
static void find_keys(struct permute_task *t, struct nbhd_range queries)
{
    const struct nbhd_axis a = t->p->axis[2];
    const struct position first = position_of(a, queries.begin), last = position_of(a, queries.end - 1);
    t->keys.begin = queries.begin - first.element + nbhd_keys(a, first.size, first.element).begin;
    t->keys.end = queries.end - 1 - last.element + nbhd_keys(a, last.size, last.element).end;
    struct position x = position_of(a, t->keys.begin);
    for (int i = 0; i < t->keys.end - t->keys.begin; i++) {
        t->token[i] = x.group + x.element * a.dilation;
        if (i + 1 < t->keys.end - t->keys.begin)
            position_next(a, &x);
    }
}

static void pack_line(const struct permute_task *t, const char *k, float *line)
{
    const int n = t->keys.end - t->keys.begin, d = t->p->head_dim;
    for (int i = 0; i < n; i += VF)
        for (int c = 0; c < d; c += VF) {
            const int part = nbhd_min(d - c, VF);
            vf x[VF];
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++) /* past the end: the last key again, never looked up */
                x[l] = v_load_part((const float *)(k + t->token[nbhd_min(i + l, n - 1)] * t->p->k.axis[2]) + c, part);
            v_transpose(x);
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++)
                if (l < part)
                    v_store(line + (c + l) * t->line_step + i, x[l]);
        }
}

/* n rows of V, whose tokens are token[], or 0, 1, .. if that is NULL. */
static void pack_values(const struct permute_task *t, const char *v, long long step, const int *token, int n, float *to)
{
    for (int i = 0; i < n; i++, to += t->f->value_width) {
        const float *row = (const float *)(v + (token ? token[i] : i) * step);
        for (int c = 0; c < t->p->head_dim_v; c += VF)
            v_store(to + c, v_load_part(row + c, nbhd_min(t->p->head_dim_v - c, VF)));
    }
}

/* Address of a tensor's row (all of axis 2) at elements e of axis 0 and 1. */
static const char *key_row(const struct permute_task *t, const struct nbhd_view *view, const int e[2])
{
    const char *row = view->data + t->batch * view->batch + t->kv_head * view->head;
    for (int a = 0; a < 2; a++)
        row += (t->cell[a].group + e[a] * (long long)t->p->axis[a].dilation) * view->axis[a];
    return row;
}

static size_t line_index(const struct permute_task *t, const int e[2])
{
    return (size_t)(e[0] - t->any[0].begin) * (size_t)(t->any[1].end - t->any[1].begin) + (size_t)(e[1] - t->any[1].begin);
}

static const char *extra_values(const struct permute_task *t)
{
    return t->p->extra_v.data + t->batch * t->p->extra_v.batch + t->kv_head * t->p->extra_v.head;
}

static void pack_keys(const struct permute_task *t)
{
    int e[2];
    for (e[0] = t->any[0].begin; e[0] < t->any[0].end; e[0]++)
        for (e[1] = t->any[1].begin; e[1] < t->any[1].end; e[1]++) {
            const size_t i = line_index(t, e);
            pack_line(t, key_row(t, &t->p->k, e), t->lines + i * t->f->line_size);
            if (t->f->pack_values)
                pack_values(t, key_row(t, &t->p->v, e), t->p->v.axis[2], t->token, t->keys.end - t->keys.begin,
                            t->values + i * t->f->values_size);
        }
    if (t->f->pack_values && t->p->extra)
        pack_values(t, extra_values(t), t->p->extra_v.axis[2], NULL, t->p->extra, t->extra_values);
}

/* Appends a run; entry 0 begins a new portion, whose scores fit the buffer. */
static struct key_run *append(const struct permute_task *t, int *n, int columns)
{
    struct key_run *run = &t->runs[*n];
    run->entry = *n ? run[-1].entry + run[-1].columns : 0;
    if (run->entry + columns > t->f->entries)
        run->entry = 0;
    run->columns = columns;
    ++*n;
    return run;
}

/* The runs of keys of query rows [y, y + rows) of axis 1 at element z of axis 0. */
static int list_runs(const struct permute_task *t, int head, int z, int y, int rows)
{
    const struct nbhd_params *p = t->p;
    struct nbhd_range row_keys[FWD_ROWS], outer = nbhd_keys(p->axis[0], t->cell[0].size, z);
    const long long row_size = 2 * p->axis[2].window - 1, plane = (2 * p->axis[1].window - 1) * row_size;
    const float *bias = p->bias ? p->bias + head * (2 * p->axis[0].window - 1) * plane : NULL;
    int n = 0, e[2];
    for (int r = 0; r < rows; r++)
        row_keys[r] = nbhd_keys(p->axis[1], t->cell[1].size, y + r);
    for (int at = 0; at < p->extra; at += t->f->entries) {
        struct key_run *run = append(t, &n, nbhd_min(p->extra - at, t->f->entries));
        run->line = run->bias = NULL;
        run->k = p->extra_k.data + t->batch * p->extra_k.batch + t->kv_head * p->extra_k.head + at * p->extra_k.axis[2];
        run->v = t->extra_v + at * t->extra_v_step;
        run->begin = 0;
        run->end = rows;
    }
    for (e[0] = outer.begin; e[0] < outer.end; e[0]++) {
        int begin = 0, end = 0;
        for (e[1] = row_keys[0].begin; e[1] < row_keys[rows - 1].end; e[1]++) {
            while (row_keys[begin].end <= e[1])
                begin++;
            while (end < rows && row_keys[end].begin <= e[1])
                end++;
            struct key_run *run = append(t, &n, p->axis[2].window);
            run->line = t->lines + line_index(t, e) * t->f->line_size;
            run->k = NULL;
            run->v = t->f->pack_values ? (const char *)(t->values + line_index(t, e) * t->f->values_size)
                                       : key_row(t, &p->v, e);
            run->bias = bias ? bias + (e[0] - z + p->axis[0].window - 1) * plane +
                                   (e[1] - y + p->axis[1].window - 1) * row_size
                             : NULL;
            run->begin = begin;
            run->end = end;
        }
    }
    return n;
}

/* A row of keys is visited by a tile of up to FWD_ROWS rows of queries at once, whatever is done along axis 2. */
static void count_rows(const struct key_run *runs, int n, int rows)
{
    long long visits = 0, masked = 0;
    for (int i = 0; i < n; i++)
        if (runs[i].line) { /* else extra keys */
            visits++;
            masked += runs[i].begin > 0 || runs[i].end < rows;
        }
    nbhd_count_visits(visits, masked);
}

static void permute_head(const struct permute_task *t, int head)
{
    const struct nbhd_axis *a = t->p->axis;
    for (int z = t->cell[0].q.begin; z < t->cell[0].q.end; z++)
        for (int y = t->cell[1].q.begin; y < t->cell[1].q.end; y += FWD_ROWS) {
            const int rows = nbhd_min(t->cell[1].q.end - y, FWD_ROWS);
            const int n = list_runs(t, head, z, y, rows);
            if (nbhd_counters)
                count_rows(t->runs, n, rows);
            int token[2][FWD_ROWS];
            for (int r = 0; r < rows; r++) {
                token[0][r] = t->cell[0].group + z * a[0].dilation;
                token[1][r] = t->cell[1].group + (y + r) * a[1].dilation;
            }
            for (int i = 0; i < t->blocks; i++) {
                tile_begin(t, &t->block[i], head, token, rows);
                permute_tile(t, &t->block[i], t->runs, n, rows);
                tile_end(t, &t->block[i], head, token, rows);
            }
        }
}

/* Task number i of batch, kv head, axes; the last axis fastest. All heads of the kv head share its lines. */
static void permute_task(const struct nbhd_params *p, const struct nbhd_fwd *f, long long task, char *scratch)
{
    struct permute_task t = {.p = p, .f = f};
    const struct nbhd_range queries = nbhd_grid_cell(&f->grid[2], (int)(task % f->grid[2].count)).q;
    task /= f->grid[2].count;
    for (int a = 1; a >= 0; a--) {
        t.cell[a] = nbhd_grid_cell(&f->grid[a], (int)(task % f->grid[a].count));
        t.any[a] = nbhd_tile_any(p->axis[a], t.cell[a].size, t.cell[a].q);
        task /= f->grid[a].count;
    }
    t.kv_head = (int)(task % p->kv_heads);
    t.batch = (int)(task / p->kv_heads);
    t.qt = (float *)(scratch + f->at_q);
    t.o = (float *)(scratch + f->at_o);
    t.s = (float *)(scratch + f->at_s);
    t.maximum = (float *)(scratch + f->at_lanes);
    t.sum = t.maximum + ROW_WIDTH;
    t.alpha = t.sum + ROW_WIDTH;
    t.block = (struct lane_block *)(scratch + f->at_block);
    t.token = (int *)(scratch + f->at_token);
    t.runs = (struct key_run *)(scratch + f->at_runs);
    t.lines = (float *)(scratch + f->at_lines);
    t.values = (float *)(scratch + f->at_values);
    t.extra_values = (float *)(scratch + f->at_extra);
    t.extra_v = f->pack_values ? scratch + f->at_extra : extra_values(&t);
    t.extra_v_step = f->pack_values ? f->value_width * (long long)sizeof(float) : p->extra_v.axis[2];
    t.line_step = f->line_step;
    t.v_lane_step = f->pack_values ? f->value_width * (long long)sizeof(float) : p->v.axis[2];
    t.v_step = f->pack_values ? t.v_lane_step : p->v.axis[2] * p->axis[2].dilation;
    find_keys(&t, queries);
    make_blocks(&t, queries);
    pack_keys(&t);
    const int share = p->heads / p->kv_heads;
    for (int head = t.kv_head * share; head < (t.kv_head + 1) * share; head++)
        permute_head(&t, head);
}
