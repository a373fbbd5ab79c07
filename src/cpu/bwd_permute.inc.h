/* Backward for small windows. A tile is up to FWD_ROWS neighbouring query rows (along axis 1) of VF queries each (along
 * axis 2): a vector per row. S and dP are made with lanes of queries by permute.inc.h, from Q, dO and lines of K and V:
 *
 *     S[j][r]  += Qt[d][r]  * Kline[d][start[lane] + j]
 *     dP[j][r] += dOt[d][r] * Vline[d][start[lane] + j]
 *
 * The other three have lanes of head dimensions, one query lane after another; K is read and dK, dV are added to where
 * they lie:
 *
 *     dQ[r][lane] += sum over j of dS[j][r][lane] * K[key of lane, j]
 *     dV[key of lane, j] += sum over r of P[j][r][lane] * dO[r][lane]          dK with dS and Q likewise
 *
 * All five of one row of keys before the next row, so that its P, dS and keys stay in the first-level cache, however
 * far apart keys lie. Rows that share a key share its loads and stores; its sums wait in registers until the lanes that
 * see it have passed. Only visible pairs are computed there, so what lies outside a window may be NaN. Where the lines
 * come from: bwd_lines.inc.h; a tile from queries to dQ: bwd_permute_tile.inc.h. Included by bwd.inc.h. */

/* A row of keys that query rows [begin, end) of a tile see, or some extra keys. */
struct bwd_keys {
    const float *k_line, *v_line; /* NULL: extra keys */
    const char *k;                /* natural rows: of token 0 (or position 0, if unpacked), or the first extra key */
    char *dk, *dv;                /* of token 0, or the first extra key */
    const float *v;               /* extra keys only */
    long long bias;               /* element of the head's table for query row 0, column 0 */
    int begin, end, columns;
};

/* Up to FWD_ROWS rows of queries from y on, at element z of axis 0, of a box of the task's region; axis 2 in positions.
 * Of a group of kv heads from kv_head on. */
struct bwd_step {
    const struct bwd_task *task;
    struct nbhd_range q[3];
    int kv_head, z, y, rows;
};

struct bwd_box {
    const struct bwd_task *task;
    struct nbhd_cell cell[2];       /* of axis 0 and 1 */
    struct nbhd_range keys;         /* positions on axis 2 */
    int kv_head, member, head;      /* member: of the step's group of kv heads */
    int blocks, runs, k_step;       /* k_step: bytes from key to key in unpacked rows; 0: K is read in place */
    struct lane_block *block;
    struct bwd_keys *run;
    int *token;     /* of key positions */
    long long *tag; /* of slots: of the row of keys, tag_of; NO_LINE: none */
    float *k_lines, *v_lines, *k_rows, *extra_k, *extra_v;
    float *qt, *dt, *q, *d, *dq; /* [dim][ROW_WIDTH] twice, [ROW_WIDTH][whole vectors] three times */
    float *s, *ds;               /* [FWD_BLOCK][ROW_WIDTH] */
    float *lse, *delta;
    struct look_ahead *ahead;
};

/* ---- products with lanes of head dimensions ---- */

/* Where a run's keys lie in a tensor: lane l's first one at row + at[l] * each, the next ones step bytes apart. (Keys
 * past a seam are nearer by circle[l] * each: key_lanes.) */
struct row_walk {
    char *row;
    const int *at;
    long long each, step;
};

static struct row_walk extra_walk(const struct lane_block *b, const char *row, int width)
{
    return (struct row_walk){(char *)row, b->key, 0, width * (long long)sizeof(float)};
}

static struct row_walk tensor_walk(const struct bwd_box *x, const struct lane_block *b, char *row,
                                   const struct nbhd_view *view)
{
    return (struct row_walk){row, b->token, view->axis[2], view->axis[2] * x->task->call->p->axis[2].dilation};
}

static struct row_walk sums_walk(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run,
                                 char *row, const struct nbhd_view *view)
{
    const struct nbhd_params *p = x->task->call->p;
    return run->k_line ? tensor_walk(x, b, row, view) : extra_walk(b, row, p->head_dim + p->head_dim_v);
}

static struct row_walk keys_walk(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run)
{
    if (!run->k_line)
        return extra_walk(b, run->k, x->task->call->b->width);
    if (x->k_step)
        return (struct row_walk){(char *)run->k, b->key, x->k_step, x->k_step};
    return tensor_walk(x, b, (char *)run->k, &x->task->call->p->k);
}

/* Keys of a run that lane l sees; how many of so many columns the next lane sees no more. */
V_FN int keys_of(const struct lane_block *b, const struct bwd_keys *run, int l)
{
    return run->k_line ? b->count[l] : run->columns;
}

V_FN int keys_passed(const struct lane_block *b, const struct bwd_keys *run, int l, int columns)
{
    if (l + 1 == b->lanes)
        return columns;
    return run->k_line ? nbhd_min(b->key[l + 1] - b->key[l], columns) : 0;
}

/* dq[rows][lane][dims] += sum over keys of weight[key][row][lane] * keys[key][dims] */
V_FN void query_lanes(const struct lane_block *b, const struct bwd_keys *run, struct row_walk w, const float *weight,
                      float *dq, int width, struct look_ahead *ahead, const int rows, const int dims)
{
    for (int l = 0; l < b->lanes; l++, dq += width) {
        if (V_FAST_LOOKUP)
            ahead_few(ahead);
        const char *row = w.row + w.at[l] * w.each;
        const float *y = weight + l;
        vf acc[FWD_ROWS][V_DIMS];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                acc[r][i] = v_load(dq + r * VF * width + i * VF);
        for (int j = keys_of(b, run, l); j > 0; j--, row += w.step, y += ROW_WIDTH) {
            vf key[V_DIMS];
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                key[i] = v_load((const float *)(const void *)row + i * VF);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const vf one = v_set1(y[r * VF]);
#pragma GCC unroll 4
                for (int i = 0; i < dims; i++)
                    acc[r][i] = v_fma(one, key[i], acc[r][i]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                v_store(dq + r * VF * width + i * VF, acc[r][i]);
    }
}

/* What a tile's queries add to dK (from dS and Q) or dV (from P and dO). */
struct key_side {
    const float *weights, *rows; /* [FWD_BLOCK][ROW_WIDTH]; [ROW_WIDTH][width] */
    int width, n;                /* whole vectors; elements */
    struct row_walk walk;
    struct look_ahead *ahead;
};

/* keys[key][dims] += sum over lanes and rows of weight[key][row][lane] * x[row][lane][dims], for columns
 * [from, from + columns) of the windows and dims vectors from `column` on. Sums stay in registers while lanes see their
 * keys, and are added to memory when the windows have moved on: once for a key, not for each lane. */
V_FN void key_lanes(const struct lane_block *b, const struct bwd_keys *run, const struct key_side *side, int from,
                    int column, const int rows, const int columns, const int dims)
{
    const float *weight = side->weights + from * ROW_WIDTH + run->begin * VF;
    const float *query = side->rows + run->begin * VF * side->width + column;
    const int last = nbhd_min(side->n - column - (dims - 1) * VF, VF);
    vf acc[V_KEYS][V_KEY_DIMS];
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++)
#pragma GCC unroll 4
        for (int i = 0; i < dims; i++)
            acc[j][i] = v_zero();
    for (int l = 0; l < b->lanes; l++, weight++, query += side->width) {
        int left = keys_of(b, run, l) - from;
        if (V_FAST_LOOKUP)
            ahead_few(side->ahead);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf x[V_KEY_DIMS];
#pragma GCC unroll 4
            for (int i = 0; i < dims; i++)
                x[i] = v_keep(v_load(query + r * VF * side->width + i * VF));
#pragma GCC unroll 8
            for (int j = 0; j < columns; j++) {
                const vf one = v_set1(weight[j * ROW_WIDTH + r * VF]);
#pragma GCC unroll 4
                for (int i = 0; i < dims && j < left; i++)
                    acc[j][i] = v_fma(one, x[i], acc[j][i]);
            }
        }
        char *key = side->walk.row + side->walk.at[l] * side->walk.each + from * side->walk.step;
        const long long circle = b->circle[l] * side->walk.each;
        int straight = b->seam[l] - from;
        key -= straight < 0 ? circle : 0;
        for (int n = keys_passed(b, run, l, columns); n > 0; n--, left--, straight--, key += side->walk.step) {
            key -= straight == 0 ? circle : 0;
            float *sums = (float *)(void *)key + column;
#pragma GCC unroll 4
            for (int i = 0; i < dims && left > 0; i++) {
                const int size = i + 1 < dims ? VF : last;
                store_up_to(sums + i * VF, v_add(load_up_to(sums + i * VF, size), acc[0][i]), size);
            }
#pragma GCC unroll 8
            for (int j = 0; j < columns; j++)
#pragma GCC unroll 4
                for (int i = 0; i < dims; i++)
                    acc[j][i] = j + 1 < columns ? acc[j + 1][i] : v_zero();
        }
    }
}

static void query_product(const struct bwd_box *x, const struct lane_block *b, const struct bwd_keys *run)
{
    const int width = x->task->call->b->width, rows = run->end - run->begin;
    struct row_walk w = keys_walk(x, b, run);
    for (int column = 0, dims; column < width; column += dims * VF, w.row += dims * VF * (int)sizeof(float)) {
        float *dq = x->dq + run->begin * VF * width + column;
        const float *weight = x->ds + run->begin * VF;
        dims = nbhd_min((width - column) / VF, V_DIMS);
        switch (rows * 8 + dims) {
#define CASE(rows, dims) case rows * 8 + dims: query_lanes(b, run, w, weight, dq, width, x->ahead, rows, dims); break;
            CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2)
#if V_DIMS > 2
            CASE(1, 3) CASE(2, 3) CASE(3, 3) CASE(4, 3) CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4)
#endif
#undef CASE
        }
    }
}

static void key_product(const struct lane_block *b, const struct bwd_keys *run, const struct key_side *side)
{
    const int rows = run->end - run->begin, parts = (run->columns + V_KEYS - 1) / V_KEYS;
    for (int column = 0, dims; column < side->width; column += dims * VF) {
        dims = nbhd_min((side->width - column) / VF, V_KEY_DIMS);
        for (int part = 0; part < parts; part++) {
            const int from = run->columns * part / parts, columns = run->columns * (part + 1) / parts - from;
            switch (rows * 32 + columns * 4 + dims) {
#define CASE(rows, columns, dims) \
    case rows * 32 + columns * 4 + dims: key_lanes(b, run, side, from, column, rows, columns, dims); break;
#define EACH_ROWS(columns, dims) \
    CASE(1, columns, dims) CASE(2, columns, dims) CASE(3, columns, dims) CASE(4, columns, dims)
                EACH_ROWS(1, 1) EACH_ROWS(2, 1) EACH_ROWS(3, 1) EACH_ROWS(4, 1) EACH_ROWS(5, 1)
                EACH_ROWS(1, 2) EACH_ROWS(2, 2) EACH_ROWS(3, 2) EACH_ROWS(4, 2) EACH_ROWS(5, 2)
#if V_KEYS > 5
                EACH_ROWS(6, 1) EACH_ROWS(7, 1) EACH_ROWS(6, 2) EACH_ROWS(7, 2)
#endif
#undef EACH_ROWS
#undef CASE
            }
        }
    }
}
