/* A tile of the permuted backward: its rows of queries in; scores, weights and the products of bwd_permute.inc.h, a row
 * of keys at a time; dQ out. Included by bwd.inc.h. */

/* ---- scores ---- */

static void extra_scores(const struct bwd_keys *run, const float *xt, const float *keys, int width, int d, float *s)
{
    const float *rows[FWD_BLOCK];
    for (int i = 0; i < run->columns; i++)
        rows[i] = keys + i * width;
    for (int v = 0; v < FWD_ROWS; v += V_STRIP)
        qk_panel(xt + v * VF, d, rows, run->columns, s + v * VF, ROW_WIDTH, V_STRIP,
                 PANEL_FLOATS, v == 0, NULL);
}

static void run_scores(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run)
{
    const struct bwd_call *c = x->task->call;
    if (run->k_line) {
        const int skip = run->begin * VF, rows = run->end - run->begin;
        const int step = c->b->line_step, most = c->b->columns;
        look_up_product(b, x->qt + skip, run->k_line, step, c->p->head_dim, x->s + skip, rows, run->columns, most);
        ahead_some(x->ahead);
        look_up_product(b, x->dt + skip, run->v_line, step, c->p->head_dim_v, x->ds + skip, rows, run->columns, most);
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
        ahead_few(x->ahead);
        for (int l = 0; l < VF && b->ragged && run->k_line; l++)
            bits &= ~((unsigned)(j >= b->count[l]) << l);
        for (int r = run->begin; r < run->end; r++) {
            float *s = x->s + j * ROW_WIDTH + r * VF, *ds = x->ds + j * ROW_WIDTH + r * VF;
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
static void run_bias_gradient(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run,
                              float *sums)
{
    const int table_row = 2 * x->task->call->p->axis[2].window - 1;
    sums += x->head * x->task->call->b->table + run->bias;
    for (int r = run->begin; r < run->end; r++)
        for (int l = 0; l < b->lanes; l++) {
            const float *ds = x->ds + r * VF + l;
            float *to = sums + b->bias[l] - r * table_row;
            for (int j = 0; j < b->count[l]; j++)
                to[j] += ds[j * ROW_WIDTH];
        }
}

/* ---- rows in and out ---- */

/* Address of a tensor's row along axis 2, token 0, at elements e of axis 0 and 1. */
static char *row_at(const struct bwd_task *t, const struct nbhd_view *view, const int e[2], int head)
{
    const struct nbhd_axis *a = t->call->p->axis;
    int token[3] = {0, 0, 0};
    for (int i = 0; i < 2; i++)
        token[i] = t->region[i].group + nbhd_wrap(a[i], t->region[i].size, e[i]) * a[i].dilation;
    return nbhd_view_at(view, t->batch, token, head);
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

/* The tensors' rows of queries at element z of axis 0 and y of axis 1, token 0; dlse NULL if there is none. */
struct query_row {
    const char *q, *o, *dout, *lse, *dlse;
};

static struct query_row query_row(const struct bwd_box *x, int z, int y)
{
    const struct nbhd_params *p = x->task->call->p;
    const int e[2] = {z, y};
    return (struct query_row){row_at(x->task, &p->q, e, x->head), row_at(x->task, &p->o, e, x->head),
                              row_at(x->task, &p->dout, e, x->head), row_at(x->task, &p->lse, e, x->head),
                              p->dlse.data ? row_at(x->task, &p->dlse, e, x->head) : NULL};
}

/* Lanes past the last one are zeros, and never used. Rows past the last one are left as they are: no run has them. */
static void load_rows(const struct bwd_box *x, const struct lane_block *b, int z, int y, int rows)
{
    const struct bwd_call *c = x->task->call;
    const struct nbhd_params *p = c->p;
    const int width = c->b->width, width_v = c->b->width_v;
    for (int r = 0; r < rows; r++) {
        const struct query_row row = query_row(x, z, y + r);
        for (int l = 0; l < b->lanes; l++) {
            const int lane = r * VF + l;
            const long long token = b->query[l];
            const char *dout = row.dout + token * p->dout.axis[2];
            const char *dlse = row.dlse ? row.dlse + token * p->dlse.axis[2] : NULL;
            float lse;
            memcpy(&lse, row.lse + token * p->lse.axis[2], sizeof lse);
            x->lse[lane] = lse * LOG2E;
            unpack_row(x->q + lane * width, row.q + token * p->q.axis[2], c->dtype, p->head_dim);
            unpack_row(x->d + lane * width_v, dout, c->dtype, p->head_dim_v);
            x->delta[lane] = p->scale * make_delta(c, row.o + token * p->o.axis[2], dout, dlse);
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
    for (int r = 0; r < rows; r++) {
        char *dq = row_at(x->task, &c->dq, (const int[2]){z, y + r}, x->head);
        for (int l = 0; l < b->lanes; l++) {
            char *to = dq + b->query[l] * c->dq.axis[2];
            const float *from = x->dq + (r * VF + l) * c->b->width;
            const bool stream = c->b->stream && (uintptr_t)to % sizeof(vf) == 0;
            for (int i = 0; i < c->p->head_dim; i += VF)
                if (stream)
                    v_stream((float *)(void *)to + i, v_load(from + i));
                else
                    v_store_as(to, c->dtype, i, v_load(from + i), nbhd_min(VF, c->p->head_dim - i));
        }
    }
}

/* ---- a tile ---- */

static void permute_tile(const struct bwd_box *x, const struct lane_block *b, int z, int y, int rows)
{
    enum { BEATS = 3 }; /* of a run */
    const struct bwd_call *c = x->task->call;
    load_rows(x, b, z, y, rows);
    ahead_tile(x->ahead, BEATS * x->runs);
    for (int i = 0; i < x->runs; i++) {
        const struct bwd_keys *run = &x->run[i];
        run_scores(x, b, run);
        ahead_some(x->ahead);
        run_weights(x, b, run);
        if (c->p->dbias && run->k_line)
            run_bias_gradient(x, b, run, bias_sums(c, x->task->batch, x->task->slot));
        ahead_beat(x->ahead, BEATS * i + 1);
        const struct key_side of_v = {x->s, x->d, c->b->width_v, c->p->head_dim_v,
                                      sums_walk(x, b, run, run->dv, &c->dv), x->ahead};
        key_product(b, run, &of_v);
        ahead_beat(x->ahead, BEATS * i + 2);
        const struct key_side of_k = {x->ds, x->q, c->b->width, c->p->head_dim, sums_walk(x, b, run, run->dk, &c->dk),
                                      x->ahead};
        key_product(b, run, &of_k);
        ahead_beat(x->ahead, BEATS * i + 3);
        query_product(x, b, run);
        ahead_some(x->ahead);
    }
    store_rows(x, b, z, y, rows);
}
