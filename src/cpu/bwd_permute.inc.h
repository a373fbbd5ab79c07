/* Backward for small windows. A tile is up to FWD_ROWS neighbouring query rows (along axis 1) of VF queries each (along axis 2):
 * a vector per row. S and dP are made with lanes of queries by permute.inc.h, from Q, dO and lines of K and V:
 *
 *     S[j][r]  += Qt[d][r]  * Kline[d][start[lane] + j]
 *     dP[j][r] += dOt[d][r] * Vline[d][start[lane] + j]
 *
 * The other three have lanes of head dimensions, one query lane after another; K is read and dK, dV are added to where they lie:
 *
 *     dQ[r][lane] += sum over j of dS[j][r][lane] * K[key of lane, j]
 *     dV[key of lane, j] += sum over r of P[j][r][lane] * dO[r][lane]          dK with dS and Q likewise
 *
 * Rows that share a key share its loads and stores. Only visible pairs are computed there, so what lies outside a window may be
 * NaN. Where the lines come from: bwd_lines.inc.h. Included by bwd.inc.h. */

/* A row of keys that query rows [begin, end) of a tile see, or some extra keys. */
struct bwd_keys {
    const float *k_line, *v_line; /* NULL: extra keys */
    const char *k;                /* natural rows: of token 0 (or position 0, if unpacked), or the first extra key */
    char *dk, *dv;                /* of token 0, or the first extra key */
    const float *v;               /* extra keys only */
    long long bias;               /* element of the head's table for query row 0, column 0 */
    int begin, end, columns, entry;
};

/* Up to FWD_ROWS rows of queries from y on, at element z of axis 0, of a box of the task's region; axis 2 in positions. */
struct bwd_step {
    const struct bwd_task *task;
    struct nbhd_range q[3];
    int z, y, rows;
};

struct bwd_box {
    const struct bwd_task *task;
    struct nbhd_cell cell[2];       /* of axis 0 and 1 */
    struct nbhd_range keys;         /* positions on axis 2 */
    int kv_head, member, head;      /* member: of the task's group of kv heads */
    int blocks, runs, k_step;       /* k_step: bytes from key to key in unpacked rows; 0: K is read in place */
    struct lane_block *block;
    struct bwd_keys *run;
    int *token;     /* of key positions */
    long long *tag; /* of slots: e0 << 32 | e1 of the row of keys; -1: none */
    float *k_lines, *v_lines, *k_rows, *extra_k, *extra_v;
    float *qt, *dt, *q, *d, *dq; /* [dim][ROW_WIDTH] twice, [ROW_WIDTH][whole vectors] three times */
    float *s, *ds;               /* [FWD_BLOCK][ROW_WIDTH] */
    float *lse, *delta;
    struct look_ahead *ahead;
};

/* ---- scores ---- */

static void extra_scores(const struct bwd_keys *run, const float *xt, const float *keys, int width, int d, float *s)
{
    const float *rows[FWD_BLOCK];
    for (int i = 0; i < run->columns; i++)
        rows[i] = keys + i * width;
    for (int v = 0; v < FWD_ROWS; v += V_STRIP)
        qk_panel(xt + v * VF, d, rows, run->columns, s + run->entry * ROW_WIDTH + v * VF, ROW_WIDTH, V_STRIP, v == 0, NULL);
}

static void run_scores(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run)
{
    const struct bwd_call *c = x->task->call;
    if (run->k_line) {
        const int skip = run->begin * VF, at = run->entry * ROW_WIDTH + skip, rows = run->end - run->begin;
        const int step = c->b->line_step, most = c->b->columns;
        look_up_product(b, x->qt + skip, run->k_line, step, c->p->head_dim, x->s + at, rows, run->columns, most);
        look_up_product(b, x->dt + skip, run->v_line, step, c->p->head_dim_v, x->ds + at, rows, run->columns, most);
    } else {
        extra_scores(run, x->qt, (const float *)(const void *)run->k, c->b->width, c->p->head_dim, x->s);
        extra_scores(run, x->dt, run->v, c->b->width_v, c->p->head_dim_v, x->ds);
    }
}

/* S becomes P and dP dS, for the rows that see the run. */
static void run_weights(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run)
{
    const struct nbhd_params *p = x->task->call->p;
    const int table_row = 2 * p->axis[2].window - 1;
    const vf factor = v_set1(p->scale * LOG2E), scale = v_set1(p->scale);
    for (int j = 0; j < run->columns; j++) {
        unsigned bits = V_ALL;
        for (int l = 0; l < VF && b->ragged && run->k_line; l++)
            bits &= ~((unsigned)(j >= b->count[l]) << l);
        for (int r = run->begin; r < run->end; r++) {
            float *s = x->s + (run->entry + j) * ROW_WIDTH + r * VF, *ds = x->ds + (run->entry + j) * ROW_WIDTH + r * VF;
            vf shift = v_load(x->lse + r * VF);
            if (p->bias && run->k_line) {
                const float *table = p->bias + x->head * x->task->call->b->table + run->bias - r * table_row + j;
                shift = v_sub(shift, v_mul(v_gather(table, v_iload(b->bias), bits), v_set1(LOG2E)));
            }
            const vf weight = v_exp2(v_fms(v_load(s), factor, shift));
            const vf slope = v_mul(weight, v_fms(v_load(ds), scale, v_load(x->delta + r * VF)));
            v_store(s, v_select(bits, weight, v_zero()));
            v_store(ds, v_select(bits, slope, v_zero()));
        }
    }
}

/* Adds dS to the bias table's gradient, lane by lane: lanes may share an entry. */
static void run_bias_gradient(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run, float *sums)
{
    const int table_row = 2 * x->task->call->p->axis[2].window - 1;
    sums += x->head * x->task->call->b->table + run->bias;
    for (int r = run->begin; r < run->end; r++)
        for (int l = 0; l < b->lanes; l++) {
            const float *ds = x->ds + run->entry * ROW_WIDTH + r * VF + l;
            float *to = sums + b->bias[l] - r * table_row;
            for (int j = 0; j < b->count[l]; j++)
                to[j] += ds[j * ROW_WIDTH];
        }
}

/* ---- products with lanes of head dimensions ---- */

/* Where lane l's keys of a run lie: the first one's address, and bytes from each to the next. */
struct row_walk {
    char *row;
    long long step;
    int count;
};

static struct row_walk walk_keys(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run, int l)
{
    const struct nbhd_params *p = x->task->call->p;
    if (!run->k_line)
        return (struct row_walk){(char *)run->k, x->task->call->b->width * (long long)sizeof(float), run->columns};
    if (x->k_step)
        return (struct row_walk){(char *)run->k + b->key[l] * (long long)x->k_step, x->k_step, b->count[l]};
    return (struct row_walk){(char *)run->k + b->token[l] * p->k.axis[2], p->k.axis[2] * p->axis[2].dilation, b->count[l]};
}

static struct row_walk walk_sums(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run, int l,
                                 char *rows, const struct nbhd_view *view)
{
    const struct nbhd_params *p = x->task->call->p;
    if (!run->k_line)
        return (struct row_walk){rows, (p->head_dim + p->head_dim_v) * (long long)sizeof(float), run->columns};
    return (struct row_walk){rows + b->token[l] * view->axis[2], view->axis[2] * p->axis[2].dilation, b->count[l]};
}

/* acc[rows][dims] += sum over keys of weight[key][row] * keys[key][dims] */
V_FN void query_run(vf acc[FWD_ROWS][V_DIMS], struct row_walk w, const float *weight, const int begin, const int end,
                    const int dims)
{
    for (int j = 0; j < w.count; j++, w.row += w.step, weight += ROW_WIDTH) {
        vf key[V_DIMS];
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            key[i] = v_load((const float *)(const void *)w.row + i * VF);
#pragma GCC unroll 4
        for (int r = begin; r < end; r++) {
            const vf y = v_set1(weight[r * VF]);
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                acc[r][i] = v_fma(y, key[i], acc[r][i]);
        }
    }
}

/* keys[key][dims] += sum over rows of weight[key][row] * x[rows][dims]; the last vector has `last` elements. */
V_FN void key_run_sums(vf x[FWD_ROWS][V_DIMS], struct row_walk w, const float *weight, const int begin, const int end,
                       const int dims, const int last)
{
    for (int j = 0; j < w.count; j++, w.row += w.step, weight += ROW_WIDTH) {
        float *row = (float *)(void *)w.row;
        vf acc[V_DIMS];
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            acc[i] = load_up_to(row + i * VF, i + 1 < dims ? VF : last);
#pragma GCC unroll 4
        for (int r = begin; r < end; r++) {
            const vf y = v_set1(weight[r * VF]);
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                acc[i] = v_fma(y, x[r][i], acc[i]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            store_up_to(row + i * VF, acc[i], i + 1 < dims ? VF : last);
    }
}

#define EACH_ROW_RANGE(CASE) \
    CASE(0, 1) CASE(0, 2) CASE(0, 3) CASE(0, 4) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(2, 3) CASE(2, 4) CASE(3, 4)

/* A lane's dQ from a portion of runs: dims vectors from column on. */
V_FN void query_lane(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run, int runs, int l, int column,
                     const int dims)
{
    const int width = x->task->call->b->width;
    float *dq = x->dq + l * width + column;
    vf acc[FWD_ROWS][V_DIMS];
#pragma GCC unroll 4
    for (int r = 0; r < FWD_ROWS; r++)
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            acc[r][i] = v_load(dq + r * VF * width + i * VF);
    for (int n = 0; n < runs; n++, run++) {
        struct row_walk w = walk_keys(x, b, run, l);
        const float *weight = x->ds + run->entry * ROW_WIDTH + l;
        w.row += column * (long long)sizeof(float);
        switch (run->begin * 8 + run->end) {
#define CASE(begin, end) case begin * 8 + end: query_run(acc, w, weight, begin, end, dims); break;
            EACH_ROW_RANGE(CASE)
#undef CASE
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < FWD_ROWS; r++)
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            v_store(dq + r * VF * width + i * VF, acc[r][i]);
}

/* What a lane's queries add to dK (from dS and Q) or dV (from P and dO). */
struct key_side {
    const float *weights, *rows; /* [FWD_BLOCK][ROW_WIDTH]; [ROW_WIDTH][width] */
    const struct nbhd_view *view;
    int width, n; /* whole vectors; elements */
    bool values;
};

V_FN void key_lane(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run, int runs, int l, int column,
                   const struct key_side *side, const int dims, const int last)
{
    vf rows[FWD_ROWS][V_DIMS];
#pragma GCC unroll 4
    for (int r = 0; r < FWD_ROWS; r++)
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            rows[r][i] = v_load(side->rows + (r * VF + l) * side->width + column + i * VF);
    for (int n = 0; n < runs; n++, run++) {
        struct row_walk w = walk_sums(x, b, run, l, side->values ? run->dv : run->dk, side->view);
        const float *weight = side->weights + run->entry * ROW_WIDTH + l;
        w.row += column * (long long)sizeof(float);
        switch (run->begin * 8 + run->end) {
#define CASE(begin, end) case begin * 8 + end: key_run_sums(rows, w, weight, begin, end, dims, last); break;
            EACH_ROW_RANGE(CASE)
#undef CASE
        }
    }
}

/* beat: of 2 x->runs, at which this begins; it takes a third of the portion's. */
static void query_lanes(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run, int runs, int beat)
{
    const int width = x->task->call->b->width;
    for (int column = 0, dims; column < width; column += dims * VF) {
        dims = nbhd_min((width - column) / VF, V_DIMS);
        for (int l = 0; l < b->lanes; l++) {
            ahead_beat(x->ahead, 3 * b->lanes * beat + runs * l, 6 * b->lanes * x->runs);
            switch (dims) {
            case 1: query_lane(x, b, run, runs, l, column, 1); break;
            case 2: query_lane(x, b, run, runs, l, column, 2); break;
#if V_DIMS > 2
            case 3: query_lane(x, b, run, runs, l, column, 3); break;
            case 4: query_lane(x, b, run, runs, l, column, 4); break;
#endif
            }
        }
    }
}

static void key_lanes(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run, int runs,
                      const struct key_side *side, int beat)
{
    for (int column = 0, dims; column < side->width; column += dims * VF) {
        dims = nbhd_min((side->width - column) / VF, V_DIMS);
        const int last = nbhd_min(side->n - column - (dims - 1) * VF, VF);
        for (int l = 0; l < b->lanes; l++) {
            ahead_beat(x->ahead, 3 * b->lanes * beat + runs * l, 6 * b->lanes * x->runs);
            switch (dims) {
            case 1: key_lane(x, b, run, runs, l, column, side, 1, last); break;
            case 2: key_lane(x, b, run, runs, l, column, side, 2, last); break;
#if V_DIMS > 2
            case 3: key_lane(x, b, run, runs, l, column, side, 3, last); break;
            case 4: key_lane(x, b, run, runs, l, column, side, 4, last); break;
#endif
            }
        }
    }
}

/* ---- a tile ---- */

static void tile_token(const struct bwd_box *x, const struct lane_block *b, int z, int y, int r, int l, int token[3])
{
    const struct nbhd_axis *a = x->task->call->p->axis;
    token[0] = x->cell[0].group + z * a[0].dilation;
    token[1] = x->cell[1].group + (y + r) * a[1].dilation;
    token[2] = b->query[l];
}

/* xt[i][lane] = rows[lane][i], for one vector of lanes; row i starts ROW_WIDTH floats after the last. */
static void transpose_rows(float *xt, const float *rows, int width, int n)
{
    for (int i = 0; i < n; i += VF) {
        vf x[VF];
#pragma GCC unroll 16
        for (int l = 0; l < VF; l++)
            x[l] = v_load(rows + l * width + i);
        v_transpose(x);
#pragma GCC unroll 16
        for (int j = 0; j < VF; j++)
            if (i + j < n)
                v_store(xt + (i + j) * ROW_WIDTH, x[j]);
    }
}

/* Lanes past the last one are zeros, and never used. Rows past the last one are left as they are, for no run has them. */
static void load_rows(const struct bwd_box *x, const struct lane_block *b, int z, int y, int rows)
{
    const struct bwd_call *c = x->task->call;
    const struct nbhd_params *p = c->p;
    const int width = c->b->width, width_v = c->b->width_v, batch = x->task->batch;
    for (int r = 0; r < rows; r++) {
        for (int l = 0; l < b->lanes; l++) {
            const int lane = r * VF + l;
            int at[3];
            tile_token(x, b, z, y, r, l, at);
            const char *dout = nbhd_view_at(&p->dout, batch, at, x->head);
            float lse;
            memcpy(&lse, nbhd_view_at(&p->lse, batch, at, x->head), sizeof lse);
            x->lse[lane] = lse * LOG2E;
            x->delta[lane] = find_delta(x->task, at, x->head);
            unpack_row(x->q + lane * width, nbhd_view_at(&p->q, batch, at, x->head), c->dtype, p->head_dim);
            unpack_row(x->d + lane * width_v, dout, c->dtype, p->head_dim_v);
        }
        const int first = r * VF + b->lanes, rest = VF - b->lanes;
        memset(x->lse + first, 0, (size_t)rest * sizeof(float));
        memset(x->delta + first, 0, (size_t)rest * sizeof(float));
        memset(x->q + first * width, 0, (size_t)(rest * width) * sizeof(float));
        memset(x->d + first * width_v, 0, (size_t)(rest * width_v) * sizeof(float));
        transpose_rows(x->qt + r * VF, x->q + r * VF * width, width, p->head_dim);
        transpose_rows(x->dt + r * VF, x->d + r * VF * width_v, width_v, p->head_dim_v);
    }
    memset(x->dq, 0, (size_t)(ROW_WIDTH * width) * sizeof(float));
}

static void store_rows(const struct bwd_box *x, const struct lane_block *b, int z, int y, int rows)
{
    const struct bwd_call *c = x->task->call;
    for (int r = 0; r < rows; r++)
        for (int l = 0; l < b->lanes; l++) {
            int at[3];
            tile_token(x, b, z, y, r, l, at);
            char *row = nbhd_view_at(&c->dq, x->task->batch, at, x->head);
            for (int i = 0; i < c->p->head_dim; i += VF)
                v_store_as(row, c->dtype, i, v_load(x->dq + (r * VF + l) * c->b->width + i), nbhd_min(VF, c->p->head_dim - i));
        }
}

static void permute_tile(const struct bwd_box *x, const struct lane_block *b, int z, int y, int rows)
{
    const struct bwd_call *c = x->task->call;
    const struct nbhd_params *p = c->p;
    const struct key_side of_k = {x->ds, x->q, &c->dk, c->b->width, p->head_dim, false};
    const struct key_side of_v = {x->s, x->d, &c->dv, c->b->width_v, p->head_dim_v, true};
    load_rows(x, b, z, y, rows);
    const struct bwd_keys *run = x->run, *end = run + x->runs;
    while (run < end) {
        int n = 0;
        do {
            ahead_beat(x->ahead, (int)(run - x->run) + n, 2 * x->runs);
            run_scores(x, b, &run[n]);
            run_weights(x, b, &run[n]);
            if (p->dbias && run[n].k_line)
                run_bias_gradient(x, b, &run[n], bias_sums(c, x->task->batch, x->task->slot));
        } while (run + ++n < end && run[n].entry > 0);
        const int at = x->runs + (int)(run - x->run);
        key_lanes(x, b, run, n, &of_v, at);
        key_lanes(x, b, run, n, &of_k, at + n / 3);
        query_lanes(x, b, run, n, at + 2 * n / 3);
        run += n;
    }
    store_rows(x, b, z, y, rows);
}
