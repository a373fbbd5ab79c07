/* Forward for small windows. A tile is up to FWD_ROWS neighbouring query rows (along axis 1) of VF queries each (along
 * axis 2): a vector per row, or half a vector where so few are left. Scores are made by permute.inc.h, from lines that
 * fwd_lines.inc.h keeps. The second product needs no lanes of queries: with the head's dimensions in the lanes, V is
 * read and O written as they lie:
 *
 *     O[r][lane][dims] += P[j][r][lane] * V[key of lane, j][dims]
 *
 * Only visible pairs are ever computed there, so what lies outside a window may be NaN. */

/* Where up to FWD_ROWS query rows of one head begin: token 0 of axis 2. */
struct row_set {
    int rows;
    const char *q[FWD_ROWS];
    char *o[FWD_ROWS], *lse[FWD_ROWS];
};

/* A task's view of the problem. */
struct permute_task {
    const struct nbhd_params *p;
    const struct nbhd_fwd *f;
    int batch, kv_first, kv_head; /* kv_first: of the task's group */
    struct nbhd_cell cell[2];
    struct nbhd_range keys; /* key positions of axis 2 */
    int blocks;
    struct lane_block *block;
    int *token; /* [keys]: token of a key position */
    bool near;  /* the tokens of axis 2 are neighbours: */
    struct nbhd_range near_q, near_k;
    /* Keys. */
    long long *tag; /* [group][ring 0][ring 1]: which elements of axis 0 and 1 a slot's line is of */
    float *lines, *values;
    long long v_lane_step; /* bytes from key to key: of lane_block.key in packed values, else of .token */
    long long v_step;      /* bytes from column to column */
    const char *extra_v;
    long long extra_v_step, extra_v_head;
    /* The tile being computed. */
    const float *bias; /* table of the head */
    float *keys_row; /* extra keys of a run, unpacked from 16 bits */
    struct key_run *runs;
    int run_count;
    float *qt, *s, *o, *maximum, *sum, *alpha;
    struct look_ahead *ahead;
};

/* ---- scores ---- */

/* The vectors that hold rows [begin, end). */
static struct nbhd_range vectors_of(const struct lane_block *b, int begin, int end)
{
    return nbhd_range_of(begin >> b->shared, (end + b->shared) >> b->shared);
}

/* Bits of the lanes of vector v whose rows see the run. */
static unsigned lanes_of(const struct lane_block *b, const struct key_run *run, int v)
{
    const int row = VF >> b->shared;
    const unsigned begin = (unsigned)nbhd_max(run->begin * row - v * VF, 0);
    const unsigned end = (unsigned)nbhd_min(run->end * row - v * VF, VF);
    return V_ALL >> (VF - end) & V_ALL << begin;
}

static void window_scores(const struct permute_task *t, const struct lane_block *b, const struct key_run *run)
{
    const struct nbhd_range v = vectors_of(b, run->begin, run->end);
    look_up_product(b, t->qt + v.begin * VF, run->line, t->f->line_step, t->p->head_dim,
                    t->s + run->entry * ROW_WIDTH + v.begin * VF, v.end - v.begin, run->columns, t->f->columns);
}

/* Row i of the extra keys of a run as float32. */
static const float *extra_row(const struct permute_task *t, const char *row, int i)
{
    const int d = t->p->head_dim;
    if (t->f->dtype == NBHD_F32)
        return (const float *)row;
    float *to = t->keys_row + i * ((d + VF - 1) / VF * VF);
    unpack_row(to, row, t->f->dtype, d);
    return to;
}

static void extra_scores(const struct permute_task *t, const struct key_run *run)
{
    const float *k[FWD_BLOCK];
    for (int i = 0; i < run->columns; i++)
        k[i] = extra_row(t, run->k + i * t->p->extra_k.axis[2], i);
    for (int v = 0; v < FWD_ROWS; v += V_STRIP)
        qk_panel(t->qt + v * VF, t->p->head_dim, k, run->columns, t->s + run->entry * ROW_WIDTH + v * VF, ROW_WIDTH,
                 V_STRIP, v == 0, NULL);
}

/* Bits of the lanes whose windows have a column j. */
static unsigned lanes_with(const struct lane_block *b, int j)
{
    unsigned bits = 0;
    for (int l = 0; l < VF; l++)
        bits |= (unsigned)(j < b->count[l]) << l;
    return bits;
}

/* Scores of columns that a lane's window does not have, and of rows that do not see the run, become -inf. */
static void mask_run(const struct permute_task *t, const struct lane_block *b, const struct key_run *run)
{
    const struct nbhd_range vectors = vectors_of(b, run->begin, run->end);
    for (int v = vectors.begin; v < vectors.end; v++) {
        const unsigned rows = lanes_of(b, run, v);
        for (int j = 0; j < run->columns; j++) {
            const unsigned bits = b->ragged ? rows & lanes_with(b, j) : rows;
            float *s = t->s + (run->entry + j) * ROW_WIDTH + v * VF;
            if (bits != V_ALL)
                v_store(s, v_select(bits, v_load(s), v_set1(-INFINITY)));
        }
    }
}

/* s = factor * s + log2(e) * bias. */
static void bias_run(const struct permute_task *t, const struct lane_block *b, const struct key_run *run, float factor)
{
    const int table_row = 2 * t->p->axis[2].window - 1;
    const struct nbhd_range vectors = vectors_of(b, run->begin, run->end);
    for (int j = 0; j < run->columns; j++) {
        const unsigned with = lanes_with(b, j);
        for (int v = vectors.begin; v < vectors.end; v++) {
            float *s = t->s + (run->entry + j) * ROW_WIDTH + v * VF;
            vf bias = v_zero();
            if (run->line) {
                const float *table = t->bias + run->bias - (v << b->shared) * table_row + j;
                const unsigned bits = with & lanes_of(b, run, v);
                bias = b->even_bias && bits == V_ALL ? v_set1(table[b->bias[0]])
                                                     : v_gather(table, v_iload(b->bias), bits);
            }
            v_store(s, v_fma(v_load(s), v_set1(factor), v_mul(bias, v_set1(LOG2E))));
        }
    }
}

/* ---- softmax of the runs whose scores are held, one vector of queries ---- */

static void softmax_vector(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n,
                           int v, float factor)
{
    const int first = v << b->shared, end = (v + 1) << b->shared; /* rows of queries */
    vf old = v_load(t->maximum + v * VF), m = v_set1(-INFINITY), other = m;
    for (const struct key_run *run = runs; run < runs + n; run++) {
        const float *s = t->s + run->entry * ROW_WIDTH + v * VF;
        const int columns = run->begin < end && first < run->end ? run->columns : 0;
        int j = 0;
        for (; j + 1 < columns; j += 2) {
            m = v_max(v_load(s + j * ROW_WIDTH), m);
            other = v_max(v_load(s + (j + 1) * ROW_WIDTH), other);
        }
        if (j < columns)
            m = v_max(v_load(s + j * ROW_WIDTH), m);
    }
    m = v_max(v_mul(v_max(m, other), v_set1(factor)), old);
    vf alpha = v_exp2(v_sub(old, m)), sum = v_mul(alpha, v_load(t->sum + v * VF));
    for (const struct key_run *run = runs; run < runs + n; run++) {
        float *s = t->s + run->entry * ROW_WIDTH + v * VF;
        const int columns = run->begin < end && first < run->end ? run->columns : 0;
        for (int j = 0; j < columns; j++) {
            vf x = v_exp2(v_fms(v_load(s + j * ROW_WIDTH), v_set1(factor), m));
            sum = v_add(sum, x);
            v_store(s + j * ROW_WIDTH, x);
        }
    }
    v_store(t->maximum + v * VF, m);
    v_store(t->alpha + v * VF, alpha);
    v_store(t->sum + v * VF, sum);
}

/* ---- output ---- */

/* Where one lane finds its columns of a run. */
struct lane_columns {
    long long key, step; /* bytes from the run's first value to the lane's; from column to column */
    const float *p;      /* entry 0's probabilities of row 0 */
    int count;
};

/* One column: p[r * row] is row r's probability. */
V_FN void pv_column(vf acc[V_OUT_ROWS][V_OUT_DIMS], const char *v, const float *p, const int begin, const int end,
                    const int row, const int dims)
{
    vf value[V_OUT_DIMS];
#pragma GCC unroll 4
    for (int i = 0; i < dims; i++)
        value[i] = v_keep(v_load((const float *)v + i * VF));
#pragma GCC unroll 4
    for (int r = begin; r < end; r++) {
        vf weight = v_set1(p[r * row]);
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            acc[r][i] = v_fma(weight, value[i], acc[r][i]);
    }
}

/* Runs that rows [begin, end) see. Fewer than 4 sums would wait for each other: each is made as two. */
V_FN void pv_runs(vf acc[V_OUT_ROWS][V_OUT_DIMS], const struct key_run *run, int n, const struct lane_columns *at,
                  const int begin, const int end, const int row, const int dims)
{
    const bool twice = (end - begin) * dims < 4;
    const long long step = at->step;
    const int count = at->count;
    vf other[V_OUT_ROWS][V_OUT_DIMS];
#pragma GCC unroll 4
    for (int r = begin; r < end && twice; r++)
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            other[r][i] = v_zero();
    for (const struct key_run *last = run + n; run < last; run++) {
        const char *v = run->v + at->key;
        const float *p = at->p + run->entry * ROW_WIDTH;
        int j = 0;
        for (; j + 1 < count && twice; j += 2, v += 2 * step, p += 2 * ROW_WIDTH) {
            pv_column(acc, v, p, begin, end, row, dims);
            pv_column(other, v + step, p + ROW_WIDTH, begin, end, row, dims);
        }
        for (; j < count; j++, v += step, p += ROW_WIDTH)
            pv_column(acc, v, p, begin, end, row, dims);
    }
#pragma GCC unroll 4
    for (int r = begin; r < end && twice; r++)
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            acc[r][i] = v_add(acc[r][i], other[r][i]);
}

/* One lane's output of V_OUT_ROWS rows, the first of them `from`, from some runs, for `dims` vectors of the head from
 * `column` on. The first portion of the runs begins it, the last one writes it; in between it waits in t->o. row: lanes
 * from a row to the next. */
V_FN void pv_lane(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n, int lane,
                  int from, int column, const struct row_set *to, bool first, bool last, const int row,
                  const int dims)
{
    const bool all = V_OUT_ROWS == FWD_ROWS;
    const int top = all ? 0 : from;
    vf acc[V_OUT_ROWS][V_OUT_DIMS];
    const int o_step = VF * t->f->value_width;
    float *o = t->o + top * o_step + lane * t->f->value_width + column;
#pragma GCC unroll 4
    for (int r = 0; r < V_OUT_ROWS; r++)
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            acc[r][i] = first ? v_zero()
                              : v_mul(v_set1(t->alpha[(top + r) * row + lane]), v_load(o + r * o_step + i * VF));
    const int part = top / V_OUT_ROWS;
    const long long key = t->f->pack_values ? b->key[lane] : b->token[lane];
    const struct lane_columns of_window = {column * (long long)sizeof(float) + key * t->v_lane_step, t->v_step,
                                           t->s + top * row + lane, b->count[lane]};
    for (const struct key_run *run = runs, *const end = runs + n; run < end;) {
        const int alike = run->seen[part].alike;
        struct lane_columns at = of_window;
        if (!run->line) {
            at.key = column * (long long)sizeof(float);
            at.step = t->extra_v_step;
            at.count = run->columns;
        }
        switch (run->seen[part].rows) { /* none of these: no row */
        case 0 * 8 + 1: pv_runs(acc, run, alike, &at, 0, 1, row, dims); break;
        case 0 * 8 + 2: pv_runs(acc, run, alike, &at, 0, 2, row, dims); break;
        case 1 * 8 + 2: pv_runs(acc, run, alike, &at, 1, 2, row, dims); break;
#if V_OUT_ROWS > 2
        case 0 * 8 + 3: pv_runs(acc, run, alike, &at, 0, 3, row, dims); break;
        case 0 * 8 + 4: pv_runs(acc, run, alike, &at, 0, 4, row, dims); break;
        case 1 * 8 + 3: pv_runs(acc, run, alike, &at, 1, 3, row, dims); break;
        case 1 * 8 + 4: pv_runs(acc, run, alike, &at, 1, 4, row, dims); break;
        case 2 * 8 + 3: pv_runs(acc, run, alike, &at, 2, 3, row, dims); break;
        case 2 * 8 + 4: pv_runs(acc, run, alike, &at, 2, 4, row, dims); break;
        case 3 * 8 + 4: pv_runs(acc, run, alike, &at, 3, 4, row, dims); break;
#endif
        }
        run += alike;
    }
    const int columns = t->p->head_dim_v - column;
#pragma GCC unroll 4
    for (int r = 0; r < V_OUT_ROWS; r++) {
        if (!last) {
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                v_store(o + r * o_step + i * VF, acc[r][i]);
        } else if (top + r < to->rows) {
            char *out = to->o[top + r] + b->query[lane] * t->p->o.axis[2];
            const vf factor = v_set1(t->sum[(top + r) * row + lane]); /* its inverse: see permute_tile */
            float *past = (float *)out + column; /* where f->stream says float32, aligned */
            const bool stream = t->f->stream && (uintptr_t)past % sizeof(vf) == 0 && columns >= dims * VF;
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                if (stream)
                    v_stream(past + i * VF, v_mul(factor, acc[r][i]));
                else
                    v_store_as(out, t->f->dtype, column + i * VF, v_mul(factor, acc[r][i]),
                               nbhd_min(columns - i * VF, VF));
        }
    }
}

V_FN void pv_portion(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n,
                     int lane, int top, const struct row_set *to, bool first, bool last, const int row)
{
    for (int column = 0; column < t->f->value_width;) {
        const int dims = nbhd_min((t->f->value_width - column) / VF, V_OUT_DIMS);
        switch (dims) {
        case 1: pv_lane(t, b, runs, n, lane, top, column, to, first, last, row, 1); break;
        case 2: pv_lane(t, b, runs, n, lane, top, column, to, first, last, row, 2); break;
#if V_OUT_DIMS > 2
        case 3: pv_lane(t, b, runs, n, lane, top, column, to, first, last, row, 3); break;
        case 4: pv_lane(t, b, runs, n, lane, top, column, to, first, last, row, 4); break;
#endif
        }
        column += dims * VF;
    }
}

/* Functions of their own: each is many loops. */
static __attribute__((noinline)) void pv_whole_rows(const struct permute_task *t, const struct lane_block *b,
                                                    const struct key_run *runs, int n, int lane, int top,
                                                    const struct row_set *to, bool first, bool last)
{
    pv_portion(t, b, runs, n, lane, top, to, first, last, VF);
}

static __attribute__((noinline)) void pv_shared_rows(const struct permute_task *t, const struct lane_block *b,
                                                     const struct key_run *runs, int n, int lane, int top,
                                                     const struct row_set *to, bool first, bool last)
{
    pv_portion(t, b, runs, n, lane, top, to, first, last, VF / 2);
}

/* ---- a tile ---- */

static void tile_begin(const struct permute_task *t, const struct lane_block *b, const struct row_set *from)
{
    const char *q[ROW_WIDTH];
    const int vectors = vectors_of(b, 0, from->rows).end, row = VF >> b->shared;
    for (int r = 0; r < from->rows; r++)
        for (int l = 0; l < VF; l++) /* of a shared vector, the next row overwrites the upper half */
            q[r * row + l] = from->q[r] + b->query[l] * t->p->q.axis[2];
    pack_queries(t->qt, ROW_WIDTH, q, t->f->dtype, vectors * VF, vectors, t->p->head_dim, t->p->scale < 0.0f);
    for (int v = 0; v < ROW_WIDTH; v += VF) {
        v_store(t->maximum + v, v_set1(-FLT_MAX));
        v_store(t->sum + v, v_zero());
        v_store(t->alpha + v, v_zero());
    }
}

/* After the last softmax: the logsumexp out, and sum becomes its inverse. */
static void tile_sums(const struct permute_task *t, const struct lane_block *b, const struct row_set *to)
{
    for (int v = 0; v < vectors_of(b, 0, to->rows).end; v++) {
        const int first = v << b->shared, row = VF >> b->shared;
        const int lanes = b->shared ? nbhd_min((to->rows - first) * row, VF) : b->lanes; /* shared: repeated ones too */
        float *sum = t->sum + v * VF;
        char *out[VF];
        for (int l = 0; l < lanes && t->p->lse.data; l++)
            out[l] = to->lse[first + (l >= row)] + b->query[l] * t->p->lse.axis[2];
        if (t->p->lse.data)
            store_lse(out, lanes, 1, t->maximum + v * VF, sum);
        v_store(sum, v_div(v_set1(1.0f), v_load(sum)));
    }
}

/* Portions of the runs whose scores fit t->s, one after another: scores, softmax, output. */
static void permute_tile(const struct permute_task *t, const struct lane_block *b, const struct row_set *rows)
{
    const float factor = fabsf(t->p->scale) * LOG2E;
    const int beats = t->run_count * 2;
    tile_begin(t, b, rows);
    for (int at = 0, end; at < t->run_count; at = end) {
        const struct key_run *runs = t->runs;
        for (end = at; end == at || (end < t->run_count && runs[end].entry > 0); end++) {
            if (runs[end].line)
                window_scores(t, b, &runs[end]);
            else
                extra_scores(t, &runs[end]);
            if (t->p->bias)
                bias_run(t, b, &runs[end], factor);
            if ((b->ragged || b->shared) && runs[end].line)
                mask_run(t, b, &runs[end]);
            ahead_beat(t->ahead, at + end, beats);
        }
        for (int v = 0; v < vectors_of(b, 0, rows->rows).end; v++)
            softmax_vector(t, b, runs + at, end - at, v, t->p->bias ? 1.0f : factor);
        const bool first = at == 0, last = end == t->run_count;
        if (last)
            tile_sums(t, b, rows);
        for (int lane = 0; lane < b->lanes; lane++) {
            for (int top = 0; top < rows->rows; top += V_OUT_ROWS)
                if (b->shared)
                    pv_shared_rows(t, b, runs + at, end - at, lane, top, rows, first, last);
                else
                    pv_whole_rows(t, b, runs + at, end - at, lane, top, rows, first, last);
            ahead_beat(t->ahead, at + end + (end - at) * (lane + 1) / b->lanes, beats);
        }
    }
}
