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
 * NaN. The lines that the tiles at hand see are in a ring of slots; rows of K of 16-bit or odd widths are unpacked beside them.
 * Included by bwd.inc.h. */

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
    int tile, tiles; /* of this step */
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

/* What the next step reads, at beat number `beat` of `beats` of a tile's work. */
static void look_ahead(const struct bwd_box *x, int beat, int beats)
{
    ahead_ask(x->ahead, x->ahead->lines * ((long long)x->tile * beats + beat) / ((long long)x->tiles * beats));
}

/* beat: of 2 x->runs, at which this begins; it takes a third of the portion's. */
static void query_lanes(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run, int runs, int beat)
{
    const int width = x->task->call->b->width;
    for (int column = 0, dims; column < width; column += dims * VF) {
        dims = nbhd_min((width - column) / VF, V_DIMS);
        for (int l = 0; l < b->lanes; l++) {
            look_ahead(x, 3 * b->lanes * beat + runs * l, 6 * b->lanes * x->runs);
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
            look_ahead(x, 3 * b->lanes * beat + runs * l, 6 * b->lanes * x->runs);
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

/* Address of a tensor's row along axis 2, token 0, at elements e of axis 0 and 1. */
static char *row_at(const struct bwd_task *t, const struct nbhd_view *view, const int e[2], int head)
{
    const struct nbhd_axis *a = t->call->p->axis;
    const int token[3] = {t->region[0].group + e[0] * a[0].dilation, t->region[1].group + e[1] * a[1].dilation, 0};
    return nbhd_view_at(view, t->batch, token, head);
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
            look_ahead(x, (int)(run - x->run) + n, 2 * x->runs);
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

/* ---- a box: lines, runs ---- */

static float *k_rows_at(const struct bwd_box *x, long long slot)
{
    return x->k_rows + slot * x->task->call->b->positions * x->task->call->b->width;
}

static long long slot_of(const struct bwd_box *x, const int e[2])
{
    const int *ring = x->task->call->b->ring;
    return ((long long)x->member * ring[0] + e[0] % ring[0]) * ring[1] + e[1] % ring[1];
}

static long long tag_of(const int e[2]) { return (long long)e[0] << 32 | e[1]; }

/* The slot of a row of keys, filled if it held another. Rows of one tile never share a slot. */
static long long find_slot(const struct bwd_box *x, const int e[2])
{
    const struct bwd_call *c = x->task->call;
    const struct nbhd_params *p = c->p;
    const long long slot = slot_of(x, e), line = slot * c->b->line_step;
    if (x->tag[slot] == tag_of(e))
        return slot;
    x->tag[slot] = tag_of(e);
    const char *k = row_at(x->task, &p->k, e, x->kv_head), *v = row_at(x->task, &p->v, e, x->kv_head);
    const int keys = x->keys.end - x->keys.begin;
    pack_line(k, p->k.axis[2], x->token, keys, c->dtype, p->head_dim, x->k_lines + line * p->head_dim, c->b->line_step);
    pack_line(v, p->v.axis[2], x->token, keys, c->dtype, p->head_dim_v, x->v_lines + line * p->head_dim_v, c->b->line_step);
    for (int j = 0; j < keys && x->k_step; j++)
        unpack_row(k_rows_at(x, slot) + j * c->b->width, k + x->token[j] * p->k.axis[2], c->dtype, p->head_dim);
    return slot;
}

static float *extra_k_at(const struct bwd_box *x, int i)
{
    return x->extra_k + (x->member * x->task->call->p->extra + i) * (long long)x->task->call->b->width;
}

static float *extra_v_at(const struct bwd_box *x, int i)
{
    return x->extra_v + (x->member * x->task->call->p->extra + i) * (long long)x->task->call->b->width_v;
}

static void pack_extra(const struct bwd_box *x)
{
    const struct bwd_call *c = x->task->call;
    const struct nbhd_params *p = c->p;
    for (int i = 0; i < p->extra; i++) {
        const int at[3] = {0, 0, i};
        unpack_row(extra_k_at(x, i), nbhd_view_at(&p->extra_k, x->task->batch, at, x->kv_head), c->dtype,
                   p->head_dim);
        unpack_row(extra_v_at(x, i), nbhd_view_at(&p->extra_v, x->task->batch, at, x->kv_head), c->dtype,
                   p->head_dim_v);
    }
}

/* The next run; entry 0 begins a new portion, whose scores fit the buffer. */
static struct bwd_keys *append(struct bwd_box *x, int columns, int begin, int end)
{
    struct bwd_keys *run = &x->run[x->runs];
    run->entry = x->runs ? run[-1].entry + run[-1].columns : 0;
    if (run->entry + columns > FWD_BLOCK)
        run->entry = 0;
    run->columns = columns;
    run->begin = begin;
    run->end = end;
    x->runs++;
    return run;
}

static void list_extra_runs(struct bwd_box *x, int rows)
{
    const struct bwd_call *c = x->task->call;
    const struct bwd_task *t = x->task;
    for (int i = 0; i < c->p->extra; i += FWD_BLOCK) {
        struct bwd_keys *run = append(x, nbhd_min(c->p->extra - i, FWD_BLOCK), 0, rows);
        run->k_line = run->v_line = NULL;
        run->k = (const char *)extra_k_at(x, i);
        run->v = extra_v_at(x, i);
        run->dk = (char *)extra_dk(c, t->batch, x->kv_head, t->slot, i);
        run->dv = (char *)extra_dv(c, t->batch, x->kv_head, t->slot, i);
        run->bias = 0;
    }
}

/* The runs of query rows [y, y + rows) at element z of axis 0. */
static void list_runs(struct bwd_box *x, int z, int y, int rows)
{
    const struct bwd_call *c = x->task->call;
    const struct nbhd_params *p = c->p;
    const struct nbhd_range outer = nbhd_keys(p->axis[0], x->cell[0].size, z);
    const long long table_row = 2 * p->axis[2].window - 1, plane = (2 * p->axis[1].window - 1) * table_row;
    struct nbhd_range row_keys[FWD_ROWS];
    int e[2];
    for (int r = 0; r < rows; r++)
        row_keys[r] = nbhd_keys(p->axis[1], x->cell[1].size, y + r);
    x->runs = 0;
    list_extra_runs(x, rows);
    for (e[0] = outer.begin; e[0] < outer.end; e[0]++) {
        int begin = 0, end = 0;
        for (e[1] = row_keys[0].begin; e[1] < row_keys[rows - 1].end; e[1]++) {
            while (row_keys[begin].end <= e[1])
                begin++;
            while (end < rows && row_keys[end].begin <= e[1])
                end++;
            if (begin >= end)
                continue; /* between the windows of two rows */
            struct bwd_keys *run = append(x, p->axis[2].window, begin, end);
            const long long slot = find_slot(x, e), i = slot * c->b->line_step;
            run->k_line = x->k_lines + i * p->head_dim;
            run->v_line = x->v_lines + i * p->head_dim_v;
            run->k = x->k_step ? (const char *)k_rows_at(x, slot) : row_at(x->task, &p->k, e, x->kv_head);
            run->dk = row_at(x->task, &c->dk, e, x->kv_head);
            run->dv = row_at(x->task, &c->dv, e, x->kv_head);
            run->bias = (e[0] - z + p->axis[0].window - 1) * plane + (e[1] - y + p->axis[1].window - 1) * table_row;
        }
    }
}

static void place_box(struct bwd_box *x, char *scratch)
{
    const struct nbhd_bwd *b = x->task->call->b;
    float *const at[] = {(float *)(void *)(scratch + b->at_qt),      (float *)(void *)(scratch + b->at_dt),
                         (float *)(void *)(scratch + b->at_q),       (float *)(void *)(scratch + b->at_d),
                         (float *)(void *)(scratch + b->at_dqt),     (float *)(void *)(scratch + b->at_s),
                         (float *)(void *)(scratch + b->at_ds),      (float *)(void *)(scratch + b->at_lanes),
                         (float *)(void *)(scratch + b->at_k_lines), (float *)(void *)(scratch + b->at_v_lines),
                         (float *)(void *)(scratch + b->at_keys),    (float *)(void *)(scratch + b->at_extra_keys)};
    float **const to[] = {&x->qt, &x->dt, &x->q, &x->d, &x->dq, &x->s, &x->ds, &x->lse, &x->k_lines, &x->v_lines, &x->k_rows,
                          &x->extra_k};
    for (size_t i = 0; i < sizeof at / sizeof *at; i++)
        *to[i] = at[i];
    x->delta = x->lse + ROW_WIDTH;
    x->extra_v = x->extra_k + (size_t)b->group * (size_t)x->task->call->p->extra * (size_t)b->width;
    x->block = (struct lane_block *)(void *)(scratch + b->at_block);
    x->run = (struct bwd_keys *)(void *)(scratch + b->at_runs);
    x->token = (int *)(void *)(scratch + b->at_token);
    x->tag = (long long *)(void *)(scratch + b->at_tags);
    x->ahead = (struct look_ahead *)(void *)(scratch + b->at_ahead);
    x->k_step = b->unpack ? b->width * (int)sizeof(float) : 0;
}

static void count_runs(const struct bwd_box *x, int rows)
{
    long long visits = 0, masked = 0;
    for (int i = 0; i < x->runs; i++)
        if (x->run[i].k_line) {
            visits++;
            masked += x->run[i].begin > 0 || x->run[i].end < rows;
        }
    nbhd_count_visits(visits, masked);
}

/* ---- steps ---- */

static struct bwd_step step_at(const struct bwd_task *t, const struct nbhd_range q[3], int z, int y)
{
    return (struct bwd_step){t, {q[0], q[1], q[2]}, z, y, nbhd_min(q[1].end - y, FWD_ROWS)};
}

static struct bwd_step first_step(const struct bwd_task *t)
{
    struct nbhd_range q[3];
    for (int a = 0; a < 3; a++)
        q[a] = nbhd_range_of(t->region[a].q.begin, nbhd_min(t->region[a].q.begin + t->call->b->tile[a], t->region[a].q.end));
    return step_at(t, q, q[0].begin, q[1].begin);
}

/* Moves on, along axis 1, then 0, then to the next box; false if there is none. */
static bool next_step(struct bwd_step *s)
{
    struct nbhd_range q[3] = {s->q[0], s->q[1], s->q[2]};
    if (s->y + FWD_ROWS < q[1].end)
        *s = step_at(s->task, q, s->z, s->y + FWD_ROWS);
    else if (s->z + 1 < q[0].end)
        *s = step_at(s->task, q, s->z + 1, q[1].begin);
    else {
        const int *tile = s->task->call->b->tile;
        int a = 2;
        for (; a >= 0; a--) {
            const struct nbhd_range all = s->task->region[a].q;
            const bool more = q[a].end < all.end;
            q[a].begin = more ? q[a].end : all.begin;
            q[a].end = nbhd_min(q[a].begin + tile[a], all.end);
            if (more)
                break;
        }
        *s = step_at(s->task, q, q[0].begin, q[1].begin);
        return a >= 0;
    }
    return true;
}

static bool same_box(const struct bwd_step *a, const struct bwd_step *b)
{
    bool same = a->task == b->task;
    for (int i = 0; i < 3; i++)
        same = same && a->q[i].begin == b->q[i].begin;
    return same;
}

/* Rows of some tensors at elements e of axis 0 and 1, of all heads of a group: the tokens, neighbours if list is NULL. */
static void ahead_heads(struct bwd_box *x, const struct bwd_step *s, const struct nbhd_view *view, const int e[2], int heads,
                        int width, int element, struct nbhd_range tokens)
{
    const struct bwd_task *t = s->task;
    const int share = heads == t->call->p->heads ? t->call->p->heads / t->call->p->kv_heads : 1, count = t->call->b->group * share;
    const int bytes = width * element, together = view->head == bytes ? count : 1;
    for (int head = 0; head < count; head += together)
        ahead_add(x->ahead, row_at(t, view, e, t->kv_head * share + head) + tokens.begin * view->axis[2], view->axis[2], NULL,
                  tokens.end - tokens.begin, together * bytes);
}

/* Lists what the step will be the first to read and write. Where dilation groups are cut up along axis 2, all of the axis. */
static void list_ahead(struct bwd_box *x, const struct bwd_step *s, bool in_this_box)
{
    const struct bwd_call *c = x->task->call;
    const struct nbhd_params *p = c->p;
    const struct nbhd_axis a = p->axis[2];
    const struct nbhd_region *region = s->task->region;
    const int element = c->dtype == NBHD_F32 ? 4 : 2;
    struct nbhd_range q = nbhd_range_of(0, a.length), keys = q;
    if (a.dilation == 1) {
        q = s->q[2];
        keys = nbhd_range_of(nbhd_keys(a, a.length, q.begin).begin, nbhd_keys(a, a.length, q.end - 1).end);
    }
    int e[2] = {s->z, s->y};
    for (; e[1] < s->y + s->rows; e[1]++) {
        ahead_heads(x, s, &p->dout, e, p->heads, p->head_dim_v, element, q);
        ahead_heads(x, s, &p->o, e, p->heads, p->head_dim_v, element, q);
        ahead_heads(x, s, &p->q, e, p->heads, p->head_dim, element, q);
        ahead_heads(x, s, &c->dq, e, p->heads, p->head_dim, element, q);
    }
    const struct nbhd_range outer = nbhd_keys(p->axis[0], region[0].size, s->z);
    const int begin = nbhd_keys(p->axis[1], region[1].size, s->y).begin;
    const int end = nbhd_keys(p->axis[1], region[1].size, s->y + s->rows - 1).end;
    for (e[0] = outer.begin; e[0] < outer.end; e[0]++)
        for (e[1] = begin; e[1] < end; e[1]++) {
            if (in_this_box && x->tag[slot_of(x, e)] == tag_of(e))
                continue;
            ahead_heads(x, s, &p->k, e, p->kv_heads, p->head_dim, element, keys);
            ahead_heads(x, s, &p->v, e, p->kv_heads, p->head_dim_v, element, keys);
            ahead_heads(x, s, &c->dk, e, p->kv_heads, p->head_dim, 4, keys);
            ahead_heads(x, s, &c->dv, e, p->kv_heads, p->head_dim_v, 4, keys);
        }
}

/* ---- a task ---- */

/* The tiles of a step, for one kv head. */
static void permute_step(struct bwd_box *x, const struct bwd_step *s)
{
    const struct bwd_call *c = x->task->call;
    const int share = c->p->heads / c->p->kv_heads, first = x->kv_head * share;
    for (x->head = first; x->head < first + share; x->head++) {
        if (nbhd_counters)
            count_runs(x, s->rows);
        for (int i = 0; i < x->blocks; i++, x->tile++)
            permute_tile(x, &x->block[i], s->z, s->y, s->rows);
    }
}

static void begin_box(struct bwd_box *x, const struct bwd_step *s)
{
    const struct bwd_call *c = x->task->call;
    x->keys = find_keys(c->p->axis[2], s->q[2], x->token);
    x->blocks = make_blocks(c->p->axis[2], s->q[2], x->keys.begin, x->block);
    for (int a = 0; a < 2; a++)
        x->cell[a] = (struct nbhd_cell){x->task->region[a].group, x->task->region[a].size, s->q[a]};
    for (int i = 0; i < c->b->group * c->b->ring[0] * c->b->ring[1]; i++)
        x->tag[i] = -1;
    x->tiles = c->b->group * (c->p->heads / c->p->kv_heads) * x->blocks;
}

/* Neighbouring kv heads go along together: they share pages, and these are many. next: the step that follows, if any. */
static void permute_group(struct bwd_box *x, const struct bwd_step *now, const struct bwd_step *next)
{
    const struct bwd_task *t = x->task;
    x->tile = 0;
    for (x->member = 0; x->member < t->call->b->group; x->member++) {
        x->kv_head = t->kv_head + x->member;
        list_runs(x, now->z, now->y, now->rows);
        if (x->member == 0) {
            ahead_clear(x->ahead);
            if (next)
                list_ahead(x, next, same_box(now, next));
        }
        permute_step(x, now);
    }
}

/* after: a task that this thread is likely to do next, or NULL. */
static void bwd_permute_task(const struct bwd_task *task, const struct bwd_task *after, char *scratch)
{
    struct bwd_box x = {.task = task};
    place_box(&x, scratch);
    for (x.member = 0; x.member < task->call->b->group; x.member++) {
        x.kv_head = task->kv_head + x.member;
        pack_extra(&x);
    }
    struct bwd_step now = first_step(task), next = now;
    begin_box(&x, &now);
    for (bool more = true; more; now = next) {
        more = next_step(&next);
        const struct bwd_step other = after ? first_step(after) : next;
        permute_group(&x, &now, more ? &next : after ? &other : NULL);
        if (more && !same_box(&now, &next))
            begin_box(&x, &next);
    }
}
