/* Backward for small windows. A tile is up to FWD_ROWS neighbouring query rows (along axis 1) of VF queries each (along axis 2):
 * a vector per row. S and dP are made with lanes of queries, a permute giving each lane its own key (as in fwd_permute.inc.h):
 *
 *     S[j][r]  += Qt[d][r]  * Kline[d][start[lane] + j]      line[d][position]: a row of K or V transposed
 *     dP[j][r] += dOt[d][r] * Vline[d][start[lane] + j]
 *
 * The other three have lanes of head dimensions, one query lane after another; K is read and dK, dV are added to where they lie:
 *
 *     dQ[r][lane] += sum over j of dS[j][r][lane] * K[key of lane, j]
 *     dV[key of lane, j] += sum over r of P[j][r][lane] * dO[r][lane]          dK with dS and Q likewise
 *
 * Rows that share a key share its loads and stores. Only visible pairs are computed there, so what lies outside a window may be
 * NaN. Positions count the tokens of axis 2 with its dilation groups end to end. The lines that the tiles at hand see are in a
 * ring of slots; rows of K of 16-bit or odd widths are unpacked beside them. Included by bwd.inc.h. */

enum { ROW_WIDTH = FWD_ROWS * VF };

/* VF queries along axis 2. Lanes past `lanes` repeat the last one. */
struct lane_block {
    int lanes;
    int base;      /* position of lane 0's first key in the lines */
    bool ragged;   /* some windows have fewer keys than the window */
    int start[VF]; /* position of the first key, less base */
    int count[VF]; /* keys */
    int query[VF]; /* token of the query */
    int key[VF];   /* position of the first key in the lines */
    int token[VF]; /* its token */
    int bias[VF];  /* column of the bias table for j = 0 */
};

/* A row of keys that query rows [begin, end) of a tile see, or some extra keys. */
struct bwd_keys {
    const float *k_line, *v_line; /* NULL: extra keys */
    const char *k;                /* natural rows: of token 0 (or position 0, if unpacked), or the first extra key */
    char *dk, *dv;                /* of token 0, or the first extra key */
    const float *v;               /* extra keys only */
    long long bias;               /* element of the head's table for query row 0, column 0 */
    int begin, end, columns, entry;
};

struct bwd_box {
    const struct bwd_task *task;
    struct nbhd_cell cell[2];       /* of axis 0 and 1 */
    struct nbhd_range keys;         /* positions on axis 2 */
    struct nbhd_range new_keys[2];  /* elements of axis 0 and 1 that the next step is the first to see */
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
};

/* ---- scores ---- */

/* s[columns][rows] = sum over i < d of xt[i][rows] * line[i][start[lane] + column] */
V_FN void permuted_micro(const float *xt, const float *line, int step, const int *start, int d, float *s, const int rows,
                         const int columns)
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
    for (int i = 0; i < d; i++, xt += ROW_WIDTH, line += step) {
        const vf low = v_load(line), high = v_load(line + VF);
        vf x[FWD_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            x[r] = v_load(xt + r * VF);
#pragma GCC unroll 8
        for (int j = 0; j < columns; j++) {
            const vf key = v_lookup(low, high, index[j]);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                acc[j][r] = v_fma(x[r], key, acc[j][r]);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            v_store(s + j * ROW_WIDTH + r * VF, acc[j][r]);
}

V_FN void permuted_columns(const float *xt, const float *line, int step, const int *start, int d, float *s, const int rows,
                           int columns)
{
    switch (columns) {
    case 1: permuted_micro(xt, line, step, start, d, s, rows, 1); return;
    case 2: permuted_micro(xt, line, step, start, d, s, rows, 2); return;
#if V_COLUMNS > 2
    case 3: permuted_micro(xt, line, step, start, d, s, rows, 3); return;
    case 4: permuted_micro(xt, line, step, start, d, s, rows, 4); return;
    case 5: permuted_micro(xt, line, step, start, d, s, rows, 5); return;
    case 6: permuted_micro(xt, line, step, start, d, s, rows, 6); return;
#endif
    default: return;
    }
}

/* One product of a run: s of its entries from transposed rows xt and a line. */
static void permuted_scores(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run, const float *xt,
                            const float *line, int d, float *s)
{
    const int step = x->task->call->b->line_step, rows = run->end - run->begin, most = x->task->call->b->columns;
    const int parts = (run->columns + most - 1) / most;
    s += run->entry * ROW_WIDTH + run->begin * VF;
    xt += run->begin * VF;
    line += b->base;
    for (int part = 0; part < parts; part++) {
        const int j = run->columns * part / parts, n = run->columns * (part + 1) / parts - j;
        switch (rows) {
        case 1: permuted_columns(xt, line + j, step, b->start, d, s + j * ROW_WIDTH, 1, n); break;
        case 2: permuted_columns(xt, line + j, step, b->start, d, s + j * ROW_WIDTH, 2, n); break;
        case 3: permuted_columns(xt, line + j, step, b->start, d, s + j * ROW_WIDTH, 3, n); break;
        default: permuted_columns(xt, line + j, step, b->start, d, s + j * ROW_WIDTH, 4, n); break;
        }
    }
}

static void extra_scores(const struct bwd_keys *run, const float *xt, const float *keys, int width, int d, float *s)
{
    const float *rows[FWD_BLOCK];
    for (int i = 0; i < run->columns; i++)
        rows[i] = keys + i * width;
    for (int v = 0; v < FWD_ROWS; v += V_STRIP)
        qk_panel(xt + v * VF, d, rows, run->columns, s + run->entry * ROW_WIDTH + v * VF, ROW_WIDTH, V_STRIP);
}

static void run_scores(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run)
{
    const struct bwd_call *c = x->task->call;
    if (run->k_line) {
        permuted_scores(x, b, run, x->qt, run->k_line, c->p->head_dim, x->s);
        permuted_scores(x, b, run, x->dt, run->v_line, c->p->head_dim_v, x->ds);
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

static void query_lanes(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run, int runs)
{
    const int width = x->task->call->b->width;
    for (int column = 0, dims; column < width; column += dims * VF) {
        dims = nbhd_min((width - column) / VF, V_DIMS);
        for (int l = 0; l < b->lanes; l++)
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

static void key_lanes(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run, int runs,
                      const struct key_side *side)
{
    for (int column = 0, dims; column < side->width; column += dims * VF) {
        dims = nbhd_min((side->width - column) / VF, V_DIMS);
        const int last = nbhd_min(side->n - column - (dims - 1) * VF, VF);
        for (int l = 0; l < b->lanes; l++)
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

/* Address of a tensor's row along axis 2, token 0, at key elements e of axis 0 and 1. */
static char *row_at(const struct bwd_box *x, const struct nbhd_view *view, const int e[2])
{
    const struct nbhd_axis *a = x->task->call->p->axis;
    const int token[3] = {x->cell[0].group + e[0] * a[0].dilation, x->cell[1].group + e[1] * a[1].dilation, 0};
    return nbhd_view_at(view, x->task->batch, token, x->kv_head);
}

static void fetch(const char *row, int bytes)
{
    for (int i = 0; i < bytes; i += 64)
        __builtin_prefetch(row + i);
}

/* A tile to come: the block, and its first row. */
struct next_tile {
    const struct lane_block *b;
    int z, y, rows; /* rows: 0 if there is none */
};

/* Asks for a part of what the next tile will read and write of queries: it comes from many pages, in no order that a machine
 * would guess. */
static void fetch_queries(const struct bwd_box *x, const struct next_tile *next, int part, int parts)
{
    const struct bwd_call *c = x->task->call;
    const struct nbhd_params *p = c->p;
    const int element = c->dtype == NBHD_F32 ? 4 : 2, width = p->head_dim * element, width_v = p->head_dim_v * element;
    const int lanes = next->rows * next->b->lanes;
    for (int lane = lanes * part / parts; lane < lanes * (part + 1) / parts; lane++) {
        int at[3];
        tile_token(x, next->b, next->z, next->y, lane / next->b->lanes, lane % next->b->lanes, at);
        fetch(nbhd_view_at(&p->dout, x->task->batch, at, x->head), width_v);
        fetch(nbhd_view_at(&p->o, x->task->batch, at, x->head), width_v);
        fetch(nbhd_view_at(&p->q, x->task->batch, at, x->head), width);
        fetch(nbhd_view_at(&c->dq, x->task->batch, at, x->head), width);
    }
}

/* And of the rows of keys that the next step along axis 1 will see first. */
static void fetch_keys(const struct bwd_box *x, int part, int parts)
{
    const struct bwd_call *c = x->task->call;
    const struct nbhd_params *p = c->p;
    const int element = c->dtype == NBHD_F32 ? 4 : 2, keys = x->keys.end - x->keys.begin;
    int e[2] = {x->new_keys[0].begin, 0};
    for (; e[0] < x->new_keys[0].end; e[0]++)
        for (e[1] = x->new_keys[1].begin; e[1] < x->new_keys[1].end; e[1]++) {
            const char *k = row_at(x, &p->k, e), *v = row_at(x, &p->v, e);
            const char *dk = row_at(x, &c->dk, e), *dv = row_at(x, &c->dv, e);
            for (int i = (int)((long long)keys * part / parts); i < (int)((long long)keys * (part + 1) / parts); i++) {
                fetch(k + x->token[i] * p->k.axis[2], p->head_dim * element);
                fetch(v + x->token[i] * p->v.axis[2], p->head_dim_v * element);
                fetch(dk + x->token[i] * c->dk.axis[2], p->head_dim * 4);
                fetch(dv + x->token[i] * c->dv.axis[2], p->head_dim_v * 4);
            }
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
            float lse, dlse = 0;
            memcpy(&lse, nbhd_view_at(&p->lse, batch, at, x->head), sizeof lse);
            if (p->dlse.data)
                memcpy(&dlse, nbhd_view_at(&p->dlse, batch, at, x->head), sizeof dlse);
            x->lse[lane] = lse * LOG2E;
            x->delta[lane] =
                p->scale * (dot_rows(dout, nbhd_view_at(&p->o, batch, at, x->head), c->dtype, p->head_dim_v) - dlse);
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

static void permute_tile(const struct bwd_box *x, const struct lane_block *b, int z, int y, int rows,
                         const struct next_tile *next)
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
            const int at = (int)(run - x->run) + n;
            fetch_queries(x, next, at, x->runs);
            fetch_keys(x, (int)(b - x->block) * x->runs + at, x->blocks * x->runs);
            run_scores(x, b, &run[n]);
            run_weights(x, b, &run[n]);
            if (p->dbias && run[n].k_line)
                run_bias_gradient(x, b, &run[n], bias_sums(c, x->task->batch, x->task->slot));
        } while (run + ++n < end && run[n].entry > 0);
        key_lanes(x, b, run, n, &of_v);
        key_lanes(x, b, run, n, &of_k);
        query_lanes(x, b, run, n);
        run += n;
    }
    store_rows(x, b, z, y, rows);
}

/* ---- a box: lines, blocks, runs ---- */

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

static void find_keys(struct bwd_box *x, struct nbhd_range queries)
{
    const struct nbhd_axis a = x->task->call->p->axis[2];
    const struct position first = position_of(a, queries.begin), last = position_of(a, queries.end - 1);
    x->keys.begin = queries.begin - first.element + nbhd_keys(a, first.size, first.element).begin;
    x->keys.end = queries.end - 1 - last.element + nbhd_keys(a, last.size, last.element).end;
    for (int i = x->keys.begin; i < x->keys.end; i++) {
        const struct position key = position_of(a, i);
        x->token[i - x->keys.begin] = key.group + key.element * a.dilation;
    }
}

static void make_block(struct bwd_box *x, struct lane_block *b, int first, int lanes)
{
    const struct nbhd_axis a = x->task->call->p->axis[2];
    b->lanes = lanes;
    b->ragged = false;
    for (int l = 0; l < VF; l++) {
        const int i = first + nbhd_min(l, lanes - 1);
        const struct position q = position_of(a, i);
        const struct nbhd_range keys = nbhd_keys(a, q.size, q.element);
        b->key[l] = i - q.element + keys.begin - x->keys.begin; /* q's group begins at i - q.element */
        if (l == 0)
            b->base = b->key[0];
        b->start[l] = b->key[l] - b->base;
        b->count[l] = keys.end - keys.begin;
        b->query[l] = q.group + q.element * a.dilation;
        b->token[l] = q.group + keys.begin * a.dilation;
        b->bias[l] = keys.begin - q.element + a.window - 1;
        b->ragged |= b->count[l] != a.window;
    }
}

/* line[i][position] = element i of the row of axis 2 at that position. */
static void pack_line(const struct bwd_box *x, const char *row, long long step, int n, float *line)
{
    const struct bwd_call *c = x->task->call;
    const int keys = x->keys.end - x->keys.begin;
    for (int at = 0; at < keys; at += VF) {
        for (int l = at + VF; l < nbhd_min(keys, at + 2 * VF); l++)
            fetch(row + x->token[l] * step, n * (c->dtype == NBHD_F32 ? 4 : 2));
        for (int i = 0; i < n; i += VF) {
            vf t[VF];
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++) /* past the end: the last key again, never looked up */
                t[l] = v_load_as(row + x->token[nbhd_min(at + l, keys - 1)] * step, c->dtype, i, nbhd_min(VF, n - i));
            v_transpose(t);
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++)
                if (i + l < n)
                    v_store(line + (i + l) * c->b->line_step + at, t[l]);
        }
    }
}

static float *k_rows_at(const struct bwd_box *x, long long slot)
{
    return x->k_rows + slot * x->task->call->b->positions * x->task->call->b->width;
}

/* The slot of a row of keys, filled if it held another. Rows of one tile never share a slot. */
static long long find_slot(const struct bwd_box *x, const int e[2])
{
    const struct bwd_call *c = x->task->call;
    const struct nbhd_params *p = c->p;
    const long long first = x->member * c->b->ring[0] + e[0] % c->b->ring[0], slot = first * c->b->ring[1] + e[1] % c->b->ring[1];
    const long long tag = (long long)e[0] << 32 | e[1], line = slot * c->b->line_step;
    if (x->tag[slot] == tag)
        return slot;
    x->tag[slot] = tag;
    const char *k = row_at(x, &p->k, e), *v = row_at(x, &p->v, e);
    pack_line(x, k, p->k.axis[2], p->head_dim, x->k_lines + line * p->head_dim);
    pack_line(x, v, p->v.axis[2], p->head_dim_v, x->v_lines + line * p->head_dim_v);
    for (int j = 0; j < x->keys.end - x->keys.begin && x->k_step; j++)
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
            run->k = x->k_step ? (const char *)k_rows_at(x, slot) : row_at(x, &p->k, e);
            run->dk = row_at(x, &c->dk, e);
            run->dv = row_at(x, &c->dv, e);
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

/* Rows of keys that the step at row y of axis 1 is the first to see; none where z changes before. */
static void find_new_keys(struct bwd_box *x, int z, int y)
{
    const struct nbhd_axis *a = x->task->call->p->axis;
    const int end = nbhd_min(y + FWD_ROWS, x->cell[1].q.end);
    x->new_keys[0] = x->new_keys[1] = nbhd_range_of(0, 0);
    if (y >= end)
        return;
    x->new_keys[0] = nbhd_keys(a[0], x->cell[0].size, z);
    if (z > x->cell[0].q.begin) /* the others were seen at z - 1 */
        x->new_keys[0].begin = nbhd_max(x->new_keys[0].begin, nbhd_keys(a[0], x->cell[0].size, z - 1).end);
    x->new_keys[1] = nbhd_range_of(nbhd_keys(a[1], x->cell[1].size, y - 1).end, nbhd_keys(a[1], x->cell[1].size, end - 1).end);
}

/* The tiles of a step, rows [y, y + rows), for one kv head. */
static void permute_step(struct bwd_box *x, int z, int y, int rows)
{
    const struct bwd_call *c = x->task->call;
    const int share = c->p->heads / c->p->kv_heads, first = x->kv_head * share;
    list_runs(x, z, y, rows);
    for (x->head = first; x->head < first + share; x->head++) {
        if (nbhd_counters)
            count_runs(x, rows);
        for (int i = 0; i < x->blocks; i++) {
            const bool last = i + 1 == x->blocks;
            const int below = nbhd_max(nbhd_min(x->cell[1].q.end - y - FWD_ROWS, FWD_ROWS), 0);
            const struct next_tile next = {&x->block[last ? 0 : i + 1], z, last ? y + FWD_ROWS : y, last ? below : rows};
            permute_tile(x, &x->block[i], z, y, rows, &next);
        }
    }
}

/* Neighbouring kv heads go along together: they share pages, and these are many. */
static void permute_box(struct bwd_box *x, struct nbhd_range positions)
{
    const struct bwd_call *c = x->task->call;
    find_keys(x, positions);
    x->blocks = (positions.end - positions.begin + VF - 1) / VF;
    for (int i = 0; i < x->blocks; i++)
        make_block(x, &x->block[i], positions.begin + i * VF, nbhd_min(VF, positions.end - positions.begin - i * VF));
    for (int i = 0; i < c->b->group * c->b->ring[0] * c->b->ring[1]; i++)
        x->tag[i] = -1;
    for (int z = x->cell[0].q.begin; z < x->cell[0].q.end; z++)
        for (int y = x->cell[1].q.begin; y < x->cell[1].q.end; y += FWD_ROWS) {
            const int rows = nbhd_min(x->cell[1].q.end - y, FWD_ROWS);
            find_new_keys(x, z, y + rows);
            for (x->member = 0; x->member < c->b->group; x->member++) {
                x->kv_head = x->task->kv_head + x->member;
                permute_step(x, z, y, rows);
            }
        }
}

static void bwd_permute_task(const struct bwd_task *task, char *scratch)
{
    const struct nbhd_bwd *b = task->call->b;
    struct bwd_box x = {.task = task};
    place_box(&x, scratch);
    for (x.member = 0; x.member < b->group; x.member++) {
        x.kv_head = task->kv_head + x.member;
        pack_extra(&x);
    }
    struct nbhd_range q[3];
    for (q[0].begin = task->region[0].q.begin; q[0].begin < task->region[0].q.end; q[0].begin += b->tile[0])
        for (q[1].begin = task->region[1].q.begin; q[1].begin < task->region[1].q.end; q[1].begin += b->tile[1])
            for (q[2].begin = task->region[2].q.begin; q[2].begin < task->region[2].q.end; q[2].begin += b->tile[2]) {
                for (int a = 0; a < 3; a++)
                    q[a].end = nbhd_min(q[a].begin + b->tile[a], task->region[a].q.end);
                for (int a = 0; a < 2; a++)
                    x.cell[a] = (struct nbhd_cell){task->region[a].group, task->region[a].size, q[a]};
                permute_box(&x, q[2]);
            }
}
