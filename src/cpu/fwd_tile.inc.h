/* A tile of the permuted forward, from queries to outputs. Outputs are probabilities times values, the head's
 * dimensions in the lanes: of one lane of queries at a time, rows that see a key row together; or, where V_OUT_LANES
 * neighbouring lanes have the same windows or each begins a key after the one before, of these together, and a row of V
 * is loaded once for all. */

/* ---- one lane ---- */

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

/* Elements of bf16 from `column` on, n or `dims` vectors of them, made of values that unpack_mixed has unpacked. */
V_FN void store_mixed(char *row, int column, const vf *x, int n, const int dims, bool stream)
{
    uint16_t *to = (uint16_t *)(void *)row + column;
#pragma GCC unroll 4
    for (int i = 0; i < dims; i += 2, n -= 2 * VF, to += 2 * VF) {
        if (i + 1 < dims && n >= 2 * VF) {
            const vf both = v_join_bf16(x[i], x[i + 1]);
            if (stream && (uintptr_t)to % sizeof(vf) == 0)
                v_stream((float *)(void *)to, both);
            else
                v_store((float *)(void *)to, both);
            continue;
        }
        v_store_bf16(to, x[i], nbhd_min(n, VF));
        if (i + 1 < dims)
            v_store_bf16(to + VF, x[i + 1], nbhd_min(n - VF, VF));
    }
}

/* Writes `dims` vectors of one lane's output, those from `column` on, to query row r. */
V_FN void pv_write(const struct permute_task *t, const struct lane_block *b, const vf *sum, int lane, int r, int column,
                   const struct row_set *to, const int row, const int dims)
{
    const int columns = t->p->head_dim_v - column;
    char *out = to->o[r] + b->query[lane] * t->p->o.axis[2];
    const vf factor = v_set1(t->sum[r * row + lane]); /* its inverse: see permute_tile */
    float *past = (float *)out + column; /* where f->stream says float32, aligned */
    const bool stream = t->f->stream && (uintptr_t)past % sizeof(vf) == 0 && columns >= dims * VF;
    vf x[V_OUT_DIMS];
#pragma GCC unroll 4
    for (int i = 0; i < dims; i++)
        x[i] = v_mul(factor, sum[i]);
    if (t->f->dtype == NBHD_BF16)
        return store_mixed(out, column, x, columns, dims, t->f->stream);
#pragma GCC unroll 4
    for (int i = 0; i < dims; i++)
        if (stream)
            v_stream(past + i * VF, x[i]);
        else
            v_store_as(out, t->f->dtype, column + i * VF, x[i], nbhd_min(columns - i * VF, VF));
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
#pragma GCC unroll 4
    for (int r = 0; r < V_OUT_ROWS; r++) {
        if (!last) {
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                v_store(o + r * o_step + i * VF, acc[r][i]);
        } else if (top + r < to->rows)
            pv_write(t, b, acc[r], lane, top + r, column, to, row, dims);
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

/* ---- V_OUT_LANES lanes ---- */
#if V_LANE_ROWS > 0

/* One key, whose row of values is at v, for lanes [first, end) of the rows: lane l's probability lies l * step floats
 * past lane 0's. */
V_FN void pv_key(vf acc[V_LANE_ROWS][V_OUT_LANES][2], const char *v, const float *p, const int first, const int end,
                 const int step, const int row_begin, const int row_end, const int row, const int dims)
{
    vf value[2];
#pragma GCC unroll 4
    for (int i = 0; i < dims; i++)
        value[i] = v_keep(v_load((const float *)v + i * VF));
#pragma GCC unroll 4
    for (int r = row_begin; r < row_end; r++)
#pragma GCC unroll 4
        for (int l = first; l < end; l++) {
            const vf weight = v_set1(p[r * row + l * step]);
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                acc[r][l][i] = v_fma(weight, value[i], acc[r][l][i]);
        }
}

/* All columns of a run. straight: lane l's first key is lane 0's key l, so some lanes alone see the first and last. */
V_FN void pv_columns(vf acc[V_LANE_ROWS][V_OUT_LANES][2], const char *v, long long v_step, const float *p, int columns,
                     const bool straight, const int begin, const int end, const int row, const int dims)
{
    const int step = straight ? 1 - ROW_WIDTH : 1, rim = straight ? V_OUT_LANES - 1 : 0;
#pragma GCC unroll 4
    for (int l = 1; l <= rim; l++, v += v_step, p += ROW_WIDTH)
        pv_key(acc, v, p, 0, l, step, begin, end, row, dims);
    for (int j = rim; j < columns; j++, v += v_step, p += ROW_WIDTH)
        pv_key(acc, v, p, 0, V_OUT_LANES, step, begin, end, row, dims);
#pragma GCC unroll 4
    for (int l = 1; l <= rim; l++, v += v_step, p += ROW_WIDTH)
        pv_key(acc, v, p, l, V_OUT_LANES, step, begin, end, row, dims);
}

/* As pv_lane for V_OUT_LANES lanes from `lane` on, V_LANE_ROWS rows and 1 or 2 vectors. */
V_FN void pv_lanes(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n,
                   int lane, int top, int column, const struct row_set *to, bool first, bool last, const int row,
                   const int dims)
{
    vf acc[V_LANE_ROWS][V_OUT_LANES][2];
    const int o_row = VF * t->f->value_width, o_lane = t->f->value_width;
    float *o = t->o + top * o_row + lane * o_lane + column;
#pragma GCC unroll 4
    for (int r = 0; r < V_LANE_ROWS; r++)
#pragma GCC unroll 4
        for (int l = 0; l < V_OUT_LANES; l++)
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                acc[r][l][i] = first ? v_zero()
                                     : v_mul(v_set1(t->alpha[(top + r) * row + lane + l]),
                                             v_load(o + r * o_row + l * o_lane + i * VF));
    const long long key = (t->f->pack_values ? b->key[lane] : b->token[lane]) * t->v_lane_step;
    for (const struct key_run *run = runs, *const end = runs + n; run < end; run++) {
        const int row_begin = nbhd_max(run->begin - top, 0), row_end = nbhd_min(run->end - top, V_LANE_ROWS);
        if (row_begin >= row_end)
            continue;
        const bool straight = run->line && b->group[lane / V_OUT_LANES] == LANES_STRAIGHT;
        const char *v = run->v + column * (long long)sizeof(float) + (run->line ? key : 0);
        const long long v_step = run->line ? t->v_step : t->extra_v_step;
        const float *p = t->s + run->entry * ROW_WIDTH + top * row + lane;
        const bool whole = row_end - row_begin == V_LANE_ROWS;
        if (straight && whole)
            pv_columns(acc, v, v_step, p, run->columns, true, 0, V_LANE_ROWS, row, dims);
        else if (straight && row_begin == 0)
            pv_columns(acc, v, v_step, p, run->columns, true, 0, 1, row, dims);
        else if (straight)
            pv_columns(acc, v, v_step, p, run->columns, true, V_LANE_ROWS - 1, V_LANE_ROWS, row, dims);
        else if (whole)
            pv_columns(acc, v, v_step, p, run->columns, false, 0, V_LANE_ROWS, row, dims);
        else if (row_begin == 0)
            pv_columns(acc, v, v_step, p, run->columns, false, 0, 1, row, dims);
        else
            pv_columns(acc, v, v_step, p, run->columns, false, V_LANE_ROWS - 1, V_LANE_ROWS, row, dims);
    }
#pragma GCC unroll 4
    for (int r = 0; r < V_LANE_ROWS; r++)
#pragma GCC unroll 4
        for (int l = 0; l < V_OUT_LANES; l++)
            if (!last) {
#pragma GCC unroll 4
                for (int i = 0; i < dims; i++)
                    v_store(o + r * o_row + l * o_lane + i * VF, acc[r][l][i]);
            } else if (top + r < to->rows)
                pv_write(t, b, acc[r][l], lane + l, top + r, column, to, row, dims);
}

/* All rows of a tile. */
V_FN void pv_group(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n,
                   int lane, const struct row_set *to, bool first, bool last, const int row)
{
    for (int column = 0; column < t->f->value_width; column += 2 * VF)
        for (int top = 0; top < to->rows; top += V_LANE_ROWS) {
            if (t->f->value_width - column > VF)
                pv_lanes(t, b, runs, n, lane, top, column, to, first, last, row, 2);
            else
                pv_lanes(t, b, runs, n, lane, top, column, to, first, last, row, 1);
            ahead_some(t->ahead);
        }
}

static __attribute__((noinline)) void pv_whole_group(const struct permute_task *t, const struct lane_block *b,
                                                     const struct key_run *runs, int n, int lane,
                                                     const struct row_set *to, bool first, bool last)
{
    pv_group(t, b, runs, n, lane, to, first, last, VF);
}

static __attribute__((noinline)) void pv_shared_group(const struct permute_task *t, const struct lane_block *b,
                                                      const struct key_run *runs, int n, int lane,
                                                      const struct row_set *to, bool first, bool last)
{
    pv_group(t, b, runs, n, lane, to, first, last, VF / 2);
}

/* All rows of a tile and V_OUT_LANES lanes, if they see keys alike; else nothing. */
static bool pv_together(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n,
                        int lane, const struct row_set *to, bool first, bool last)
{
    if (lane % V_OUT_LANES || b->group[lane / V_OUT_LANES] == LANES_MIXED)
        return false;
    if (b->shared)
        pv_shared_group(t, b, runs, n, lane, to, first, last);
    else
        pv_whole_group(t, b, runs, n, lane, to, first, last);
    return true;
}
#else
static bool pv_together(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n,
                        int lane, const struct row_set *to, bool first, bool last)
{
    (void)t, (void)b, (void)runs, (void)n, (void)lane, (void)to, (void)first, (void)last;
    return false;
}
#endif

/* Outputs from `lane` on; returns of how many lanes. */
static int pv_some(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n,
                   int lane, const struct row_set *to, bool first, bool last)
{
    if (pv_together(t, b, runs, n, lane, to, first, last))
        return V_OUT_LANES;
    for (int top = 0; top < to->rows; top += V_OUT_ROWS)
        if (b->shared)
            pv_shared_rows(t, b, runs, n, lane, top, to, first, last);
        else
            pv_whole_rows(t, b, runs, n, lane, top, to, first, last);
    return 1;
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
    tile_begin(t, b, rows);
    ahead_tile(t->ahead, t->run_count * 2);
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
            ahead_beat(t->ahead, at + end);
        }
        for (int v = 0; v < vectors_of(b, 0, rows->rows).end; v++) {
            softmax_vector(t, b, runs + at, end - at, v, t->p->bias ? 1.0f : factor);
            ahead_some(t->ahead);
        }
        const bool first = at == 0, last = end == t->run_count;
        if (last)
            tile_sums(t, b, rows);
        for (int lane = 0; lane < b->lanes;) {
            lane += pv_some(t, b, runs + at, end - at, lane, rows, first, last);
            ahead_beat(t->ahead, at + end + (end - at) * lane / b->lanes);
        }
    }
}
