/* The GEMM-based unfused passes. A tile is a box of up to GEMM_LANES rows of the side that stays (queries, or keys
 * where keys are written). The other side is visited in runs: consecutive elements along axis 2 at one place on axes 0
 * and 1. To each run belong just the rows of the tile that see it on axes 0 and 1, so work is wasted on axis 2 only: a
 * small GEMM
 *
 *     scores:   C[q][run]   = A[q][d] B[d][run]       A, B packed transposed, C scattered to the rows of scores
 *     queries:  C[q][d]    += A[q][run] B[run][d]     A gathered from the rows of scores, 0 where q does not see a key
 *     keys:     C[k][d]    += A[k][run] B[run][d]     the same, the run being queries
 *
 * 0 times an infinity or NaN is not 0: a tile whose sums are not all finite is computed again by the naive algorithm,
 * which touches visible pairs only. Included after unfused_naive.inc.h. */
#include "cpu/unfused_gemm.h"
#include "cpu/unfused_products.inc.h"

/* ---- tiles ---- */

struct tile_axis {
    int group, size; /* dilation group, and the queries in it */
    struct nbhd_range rows, other;
    struct nbhd_range sees[GEMM_LANES]; /* of each row */
    struct nbhd_range now;              /* rows, counted from the first, that see the run's place on this axis */
};

struct tile {
    const struct nbhd_product *p;
    struct tile_axis axis[3];
    int n[3], lanes, batch, head;
    char *row[GEMM_LANES];    /* scores, queries: each lane's row of scores */
    float *a, *b, *c;
    int pad;
};

/* A run of the other side: element at[] and n - 1 more along axis 2. */
struct run {
    int at[3], n;
};

V_FN void tile_axis_init(struct tile_axis *x, struct nbhd_axis a, struct nbhd_cell cell, bool of_keys)
{
    x->group = cell.group;
    x->size = nbhd_group_size(a, cell.group);
    x->rows = cell.q;
    const int n = cell.q.end - cell.q.begin;
    for (int i = 0; i < n; i++)
        x->sees[i] = of_keys ? nbhd_queries(a, x->size, cell.q.begin + i) : nbhd_keys(a, x->size, cell.q.begin + i);
    x->other = nbhd_range_of(x->sees[0].begin, x->sees[n - 1].end);
}

/* Which rows see the place `at`: an interval whose ends never decrease as the place goes up. */
V_FN void move_to(struct tile_axis *x, int n, int at)
{
    if (at == x->other.begin)
        x->now = nbhd_range_of(0, 0);
    while (x->now.begin < n && x->sees[x->now.begin].end <= at)
        x->now.begin++;
    while (x->now.end < n && x->sees[x->now.end].begin <= at)
        x->now.end++;
}

V_FN long long tile_offset(const struct tile *t, const struct nbhd_view *v, const int e[3], int head)
{
    long long offset = t->batch * v->batch + head * v->head;
    for (int i = 0; i < 3; i++)
        offset += (e[i] * (long long)t->p->axis[i].dilation + t->axis[i].group) * v->axis[i];
    return offset;
}

V_FN long long run_step(const struct tile *t, const struct nbhd_view *v) { return v->axis[2] * t->p->axis[2].dilation; }

V_FN int lane_of(const struct tile *t, int i, int j, int k) { return (i * t->n[1] + j) * t->n[2] + k; }

/* Addresses of the tile's rows in a view, in the order of lanes. */
V_FN void lane_rows(const struct tile *t, const struct nbhd_view *v, char *rows[GEMM_LANES])
{
    int lane = 0, e[3];
    for (int i = 0; i < t->n[0]; i++)
        for (int j = 0; j < t->n[1]; j++)
            for (int k = 0; k < t->n[2]; k++) {
                e[0] = t->axis[0].rows.begin + i, e[1] = t->axis[1].rows.begin + j, e[2] = t->axis[2].rows.begin + k;
                rows[lane++] = v->data + tile_offset(t, v, e, t->head);
            }
}

/* B as the run's rows of a view: in place where whole vectors of float lie there, else packed. */
V_FN const float *run_rows(const struct tile *t, const struct nbhd_view *v, const struct run *r, int head, int dtype,
                           long long *ld)
{
    const char *first = v->data + tile_offset(t, v, r->at, head);
    const long long step = run_step(t, v);
    if (dtype == NBHD_F32 && t->p->width % VF == 0) {
        *ld = step / (long long)sizeof(float);
        return (const float *)(const void *)first;
    }
    pack_rows(t->b, t->pad, first, step, r->n, t->p->width, dtype);
    *ld = t->pad;
    return t->b;
}

/* ---- scores ---- */

/* Row of queries (i, j) of the tile: writes what it sees of the run from C to its rows of scores. */
V_FN void scatter_row(const struct tile *t, const struct run *r, int i, int j, int dtype)
{
    const struct nbhd_product *p = t->p;
    const struct tile_axis *x = t->axis;
    const int first[3] = {x[0].sees[i].begin, x[1].sees[j].begin, 0};
    const long long entry = entry_of(p, r->at, first);
    for (int k = 0; k < t->n[2]; k++) {
        const struct nbhd_range sees = x[2].sees[k];
        const int begin = nbhd_max(sees.begin, r->at[2]), end = nbhd_min(sees.end, r->at[2] + r->n);
        const int lane = lane_of(t, i, j, k);
        if (begin >= end)
            continue;
        const float *bias = NULL;
        if (p->bias) {
            const int key[3] = {r->at[0], r->at[1], begin};
            const struct line l = {.element = {x[0].rows.begin + i, x[1].rows.begin + j, x[2].rows.begin + k}};
            bias = p->bias + table_at(p, &l, key, t->head);
        }
        store_scores(t->row[lane], dtype, entry + begin - sees.begin, t->c + lane * GEMM_RUN + begin - r->at[2], bias,
                     end - begin);
    }
}

V_FN void run_scores(const struct tile *t, const struct run *r, int dtype)
{
    const struct nbhd_product *p = t->p;
    const int nv = (r->n + VF - 1) / VF, j = t->axis[1].now.begin, rows = t->axis[1].now.end - j;
    const char *keys[GEMM_RUN];
    keys[0] = p->key.data + tile_offset(t, &p->key, r->at, kv_head_of(p, t->head));
    for (int k = 1; k < r->n; k++)
        keys[k] = keys[k - 1] + run_step(t, &p->key);
    pack_transposed(t->b, nv * VF, keys, r->n, p->width, dtype, 1.0f);
    for (int i = t->axis[0].now.begin; i < t->axis[0].now.end; i++) {
        const int lane = lane_of(t, i, j, 0);
        multiply_columns(t->c + lane * GEMM_RUN, GEMM_RUN, t->a + lane, t->b, nv * VF, rows * t->n[2], nv, p->width,
                         false);
        for (int y = j; y < j + rows; y++)
            scatter_row(t, r, i, y, dtype);
    }
}

V_FN void begin_scores(struct tile *t, int dtype)
{
    const struct nbhd_product *p = t->p;
    char *queries[GEMM_LANES];
    lane_rows(t, &p->query, queries);
    lane_rows(t, &p->scores, t->row);
    pack_transposed(t->a, GEMM_LANES, (const char *const *)queries, t->lanes, p->width, dtype, p->scale);
    for (int lane = 0; lane < t->lanes; lane++) {
        const int at[3] = {lane / (t->n[1] * t->n[2]), lane / t->n[2] % t->n[1], lane % t->n[2]};
        bool whole = true;
        for (int i = 0; i < 3; i++)
            whole = whole && t->axis[i].sees[at[i]].end - t->axis[i].sees[at[i]].begin == p->axis[i].window;
        if (!whole)
            fill_scores(p, t->row[lane], dtype);
    }
}

/* ---- queries ---- */

/* A[lane][run]: the lane's scores of the run's keys, 0 where it does not see one. What load_weights writes past a
 * lane's scores lies in later lanes, which are written after. */
V_FN void gather_row(const struct tile *t, const struct run *r, int i, int j, int dtype)
{
    const struct tile_axis *x = t->axis;
    const int first[3] = {x[0].sees[i].begin, x[1].sees[j].begin, 0};
    const long long entry = entry_of(t->p, r->at, first);
    for (int k = 0; k < t->n[2]; k++) {
        const struct nbhd_range sees = x[2].sees[k];
        const int begin = nbhd_max(sees.begin, r->at[2]), end = nbhd_min(sees.end, r->at[2] + r->n);
        const int lane = lane_of(t, i, j, k);
        float *to = t->a + lane * GEMM_RUN;
        if (begin > r->at[2] || end < r->at[2] + r->n)
            for (int at = 0; at < r->n; at += VF)
                v_store(to + at, v_zero());
        if (begin < end)
            load_weights(t->row[lane], dtype, entry + begin - sees.begin, end - begin, to + begin - r->at[2]);
    }
}

V_FN void run_queries(const struct tile *t, const struct run *r, int dtype)
{
    const struct nbhd_product *p = t->p;
    const int nv = (p->width + VF - 1) / VF, j = t->axis[1].now.begin, rows = t->axis[1].now.end - j;
    long long ld;
    const float *b = run_rows(t, &p->key, r, kv_head_of(p, t->head), dtype, &ld);
    for (int i = t->axis[0].now.begin; i < t->axis[0].now.end; i++) {
        const int lane = lane_of(t, i, j, 0);
        for (int y = j; y < j + rows; y++)
            gather_row(t, r, i, y, dtype);
        multiply_rows(t->c + lane * t->pad, t->pad, t->a + lane * GEMM_RUN, b, ld, rows * t->n[2], nv, r->n, true);
    }
}

/* ---- keys ---- */

/* A[query][lane] for row i of the tile on axis 0, rows now on axis 1: the query's score of the lane's key. */
V_FN void gather_query(const struct tile *t, const char *scores, const int q[3], int i, float *to, int dtype)
{
    const struct nbhd_product *p = t->p;
    const struct tile_axis *x = t->axis;
    const int n = t->n[2], j = x[1].now.begin, rows = x[1].now.end - j;
    const struct nbhd_range sees = nbhd_keys(p->axis[2], x[2].size, q[2]);
    const int begin = nbhd_max(sees.begin, x[2].rows.begin), end = nbhd_min(sees.end, x[2].rows.end);
    const int first[3] = {nbhd_keys(p->axis[0], x[0].size, q[0]).begin,
                          nbhd_keys(p->axis[1], x[1].size, q[1]).begin, 0};
    const int key[3] = {x[0].rows.begin + i, x[1].rows.begin + j, 0};
    const long long entry = entry_of(p, key, first) + begin - sees.begin;
    if (end - begin < n)
        for (int at = 0; at < rows * n; at += VF)
            v_store(to + at, v_zero());
    for (int y = 0; y < rows && begin < end; y++) {
        const long long from = entry + y * (long long)p->axis[2].window;
        if (n == 1)
            to[y] = row_element(scores + from * (long long)nbhd_dtype_size(dtype), dtype, 0);
        else
            load_weights(scores, dtype, from, end - begin, to + y * n + begin - x[2].rows.begin);
    }
}

V_FN void run_keys(const struct tile *t, const struct run *r, int head, int dtype)
{
    const struct nbhd_product *p = t->p;
    const int nv = (p->width + VF - 1) / VF, j = t->axis[1].now.begin, rows = t->axis[1].now.end - j;
    long long ld;
    const float *b = run_rows(t, &p->query, r, head, dtype, &ld);
    for (int i = t->axis[0].now.begin; i < t->axis[0].now.end; i++) {
        const int lane = lane_of(t, i, j, 0);
        const char *scores = p->scores.data + tile_offset(t, &p->scores, r->at, head);
        for (int k = 0; k < r->n; k++, scores += run_step(t, &p->scores)) {
            const int q[3] = {r->at[0], r->at[1], r->at[2] + k};
            gather_query(t, scores, q, i, t->a + k * GEMM_LANES, dtype);
        }
        multiply_columns(t->c + lane * t->pad, t->pad, t->a, b, ld, rows * t->n[2], nv, r->n, true);
    }
}

/* ---- a tile from begin to end ---- */

/* C to the rows that the product writes; a tile that is not all finite is computed again pair by pair. */
V_FN void end_sums(const struct tile *t, int dtype)
{
    const struct nbhd_product *p = t->p;
    const bool of_keys = p->kind == WRITES_KEYS;
    char *rows[GEMM_LANES];
    vf odd = v_zero();
    lane_rows(t, of_keys ? &p->key : &p->query, rows);
    for (int lane = 0; lane < t->lanes; lane++)
        for (int i = 0; i < p->width; i += VF) {
            const vf x = v_load(t->c + lane * t->pad + i);
            odd = v_fma(x, v_zero(), odd);
            row_store(rows[lane], dtype, i, v_mul(v_set1(p->scale), x), nbhd_min(p->width - i, VF));
        }
    if (!v_is_nan(odd))
        return;
    for (int lane = 0; lane < t->lanes; lane++) {
        const int at[3] = {lane / (t->n[1] * t->n[2]), lane / t->n[2] % t->n[1], lane % t->n[2]};
        struct line l = {.batch = t->batch, .head = t->head};
        for (int i = 0; i < 3; i++) {
            l.x[i] = (t->axis[i].rows.begin + at[i]) * p->axis[i].dilation + t->axis[i].group;
            line_axis(p, &l, i, of_keys);
        }
        naive_sums(p, &l, dtype);
    }
}

V_FN void each_run(struct tile *t, int dtype, int head)
{
    struct tile_axis *x = t->axis;
    struct run r;
    for (r.at[0] = x[0].other.begin; r.at[0] < x[0].other.end; r.at[0]++) {
        move_to(&x[0], t->n[0], r.at[0]);
        for (r.at[1] = x[1].other.begin; r.at[1] < x[1].other.end; r.at[1]++) {
            move_to(&x[1], t->n[1], r.at[1]);
            if (x[1].now.begin >= x[1].now.end)
                continue;
            for (r.at[2] = x[2].other.begin; r.at[2] < x[2].other.end; r.at[2] += GEMM_RUN) {
                r.n = nbhd_min(x[2].other.end - r.at[2], GEMM_RUN);
                if (t->p->kind == WRITES_SCORES)
                    run_scores(t, &r, dtype);
                else if (t->p->kind == WRITES_QUERIES)
                    run_queries(t, &r, dtype);
                else
                    run_keys(t, &r, head, dtype);
            }
        }
    }
}

V_FN void gemm_tile(struct tile *t, int dtype)
{
    const struct nbhd_product *p = t->p;
    const int share = p->heads / p->kv_heads;
    if (p->kind == WRITES_SCORES) {
        begin_scores(t, dtype);
        each_run(t, dtype, t->head);
        return;
    }
    memset(t->c, 0, sizeof(float) * (size_t)(t->lanes * t->pad));
    if (p->kind == WRITES_QUERIES) {
        lane_rows(t, &p->scores, t->row);
        each_run(t, dtype, t->head);
    } else {
        for (int head = t->head * share; head < (t->head + 1) * share; head++)
            each_run(t, dtype, head);
    }
    end_sums(t, dtype);
}

struct gemm_call {
    const struct nbhd_gemm *gemm;
    const struct nbhd_gemm_tiling *tiling;
    const struct nbhd_product *product;
    char *workspace;
};

static void gemm_task(void *context, long long task, int thread)
{
    const struct gemm_call *call = context;
    const struct nbhd_product *p = call->product;
    const bool of_keys = p->kind == WRITES_KEYS;
    const int heads = of_keys ? p->kv_heads : p->heads;
    char *scratch = call->workspace + (size_t)thread * call->gemm->scratch;
    struct tile t = {.p = p, .pad = call->gemm->pad, .lanes = 1};
    t.a = (float *)(void *)scratch;
    t.b = (float *)(void *)(scratch + call->gemm->at_b);
    t.c = (float *)(void *)(scratch + call->gemm->at_c);
    for (int i = 2; i >= 0; i--) {
        const struct nbhd_grid *grid = &call->tiling->grid[i];
        tile_axis_init(&t.axis[i], p->axis[i], nbhd_grid_cell(grid, (int)(task % grid->count)), of_keys);
        t.n[i] = t.axis[i].rows.end - t.axis[i].rows.begin;
        t.lanes *= t.n[i];
        task /= grid->count;
    }
    t.head = (int)(task % heads);
    t.batch = (int)(task / heads);
    switch (p->dtype) {
    case NBHD_F16: gemm_tile(&t, NBHD_F16); return;
    case NBHD_BF16: gemm_tile(&t, NBHD_BF16); return;
    default: gemm_tile(&t, NBHD_F32); return;
    }
}

static nbhd_status gemm_run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace,
                            void *stream)
{
    const struct nbhd_gemm *gemm = plan->state;
    struct nbhd_product products[2];
    const int count = nbhd_unfused_products(plan, params, products);
    (void)stream;
    for (int i = 0; i < count; i++) {
        struct gemm_call call = {gemm, &gemm->tiling[i], &products[i], workspace};
        nbhd_parallel(gemm->threads, gemm->tiling[i].tasks, gemm_task, &call);
    }
    if (params->dbias)
        differentiate_bias(plan, &products[0], params, (char *)workspace + gemm->table);
    return NBHD_OK;
}

static int gemm_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room)
{
    return nbhd_gemm_configs(problem, configs, room, VF);
}

#define GEMM_OPS {nbhd_gemm_refuse, gemm_configs, nbhd_gemm_build, gemm_run, nbhd_gemm_drop}
