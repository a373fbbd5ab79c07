/* The phases of a vector backward, whatever its tasks do: zero the sums; tasks (bwd_rounds.h, bwd_order.h); add up what
 * they had to keep apart (extra keys, the bias table); round 16-bit results. Included by kernels after
 * bwd_common.inc.h. */

/* What the including file defines: a task, and the one that its thread will probably do next, or NULL. */
static void bwd_do_task(const struct bwd_task *task, const struct bwd_task *after, char *scratch);

static void zero_rows(const struct bwd_call *c, const struct nbhd_view *view, int width, int batch, int y)
{
    const struct nbhd_params *p = c->p;
    const int keys = p->axis[2].keys, bytes = width * (int)sizeof(float);
    const int heads = view->head == bytes ? p->kv_heads : 1; /* in one piece */
    const int tokens = view->axis[2] == (long long)bytes * heads && heads == p->kv_heads ? keys : 1;
    for (int x = 0; x < p->axis[0].keys; x++)
        for (int z = 0; z < keys; z += tokens)
            for (int h = 0; h < p->kv_heads; h += heads)
                memset(nbhd_view_at(view, batch, (const int[3]){x, y, z}, h), 0,
                       (size_t)bytes * (size_t)heads * (size_t)tokens);
}

/* A task is a batch entry and a coordinate of axis 1, and a share of the workspace's sums. */
static long long zero_tasks(const struct nbhd_params *p)
{
    return (long long)p->batch * p->axis[1].keys;
}

static void zero_share(float *array, size_t count, long long task, long long tasks)
{
    const size_t begin = count / (size_t)tasks * (size_t)task;
    const size_t end = task + 1 == tasks ? count : begin + count / (size_t)tasks;
    memset(array + begin, 0, (end - begin) * sizeof *array);
}

static void zero_task(void *context, long long task, int thread)
{
    const struct bwd_call *c = context;
    const struct nbhd_params *p = c->p;
    const int rows = p->axis[1].keys, batch = (int)(task / rows), y = (int)(task % rows);
    const size_t slots = (size_t)p->batch * (size_t)c->b->slots;
    const size_t width = (size_t)(p->head_dim + p->head_dim_v);
    (void)thread;
    zero_rows(c, &c->dk, p->head_dim, batch, y);
    zero_rows(c, &c->dv, p->head_dim_v, batch, y);
    zero_share(c->extra, slots * (size_t)p->kv_heads * (size_t)p->extra * width, task, zero_tasks(p));
    zero_share(c->bias, slots * (size_t)p->heads * (size_t)c->b->table, task, zero_tasks(p));
}

/* False: that task is void. */
static bool find_task(const struct bwd_call *c, long long number, struct bwd_task *t)
{
    const struct nbhd_bwd *b = c->b;
    const struct nbhd_bwd_task at = nbhd_bwd_task_at(b, number);
    *t = (struct bwd_task){.call = c, .batch = at.batch, .kv_head = at.part * b->heads, .slot = at.slot, .first = true};
    for (int i = 0; i < 3; i++) {
        const struct nbhd_turn turn = at.turn[i];
        if (!nbhd_rounds_at(&b->axis[i], b->cut[i], turn.round, turn.slot, &t->region[i]))
            return false;
        t->first &= !b->axis[i].paired || turn.round == 0;
    }
    return true;
}

/* What a thread that does the task will do next, where threads take turns. */
static bool next_task(const struct bwd_call *c, long long number, struct bwd_task *t)
{
    const long long next = number + c->b->threads;
    return next < c->b->rounds * c->b->tasks && find_task(c, next, t);
}

static void run_task(void *context, long long number, int thread)
{
    const struct bwd_call *c = context;
    const struct nbhd_bwd *b = c->b;
    char *scratch = c->scratch + b->scratch * (size_t)thread;
    struct bwd_task t, after;
    const bool there = find_task(c, number, &t);
    nbhd_bwd_wait(b, number, c->done);
    if (there)
        bwd_do_task(&t, next_task(c, number, &after) ? &after : NULL, scratch);
    atomic_store_explicit(&c->done[number], 1, memory_order_release);
}

/* row = sum over slots of row i of the tables at `sums`, a slot's `step` floats after the last one's. */
static void sum_row(char *row, int dtype, const float *sums, size_t step, int slots, int width)
{
    for (int i = 0; i < width; i += VF) {
        const int n = nbhd_min(VF, width - i);
        vf sum = v_zero();
        for (int slot = 0; slot < slots; slot++)
            sum = v_add(sum, v_load_part(sums + (size_t)slot * step + i, n));
        v_store_as(row, dtype, i, sum, n);
    }
}

/* One extra key's gradients: sums over slots. */
static void extra_task(void *context, long long task, int thread)
{
    const struct bwd_call *c = context;
    const struct nbhd_params *p = c->p;
    const int e = (int)(task % p->extra), at[3] = {0, 0, e};
    const int kv_head = (int)(task / p->extra % p->kv_heads), batch = (int)(task / p->extra / p->kv_heads);
    const size_t step = (size_t)p->extra * (size_t)(p->head_dim + p->head_dim_v);
    (void)thread;
    sum_row(nbhd_view_at(&p->dextra_k, batch, at, kv_head), c->dtype, extra_dk(c, batch, kv_head, 0, e), step,
            c->b->slots, p->head_dim);
    sum_row(nbhd_view_at(&p->dextra_v, batch, at, kv_head), c->dtype, extra_dv(c, batch, kv_head, 0, e), step,
            c->b->slots, p->head_dim_v);
}

/* A row of the bias table's gradient: sums over batch and slots, of dS times the scale. */
static void bias_task(void *context, long long task, int thread)
{
    const struct bwd_call *c = context;
    const long long whole = c->p->heads * c->b->table, row = 2 * c->p->axis[2].window - 1;
    (void)thread;
    for (long long i = task * row; i < (task + 1) * row; i++) {
        double sum = 0;
        for (long long part = 0; part < (long long)c->p->batch * c->b->slots; part++)
            sum += (double)c->bias[part * whole + i];
        const double before = c->p->flags & NBHD_PARAMS_ADD ? (double)c->p->dbias[i] : 0;
        c->p->dbias[i] = (float)(before + sum / (double)c->p->scale);
    }
}

static void round_rows(const struct bwd_call *c, const struct nbhd_view *from, const struct nbhd_view *to, bool of_keys,
                       int heads, int width, int batch, int y)
{
    const struct nbhd_axis *a = c->p->axis;
    for (int x = 0; x < (of_keys ? a[0].keys : a[0].length); x++)
        for (int z = 0; z < (of_keys ? a[2].keys : a[2].length); z++)
            for (int h = 0; h < heads; h++) {
                const int at[3] = {x, y, z};
                const float *sums = (const float *)(const void *)nbhd_view_at(from, batch, at, h);
                for (int i = 0; i < width; i += VF) {
                    const int n = nbhd_min(VF, width - i);
                    v_store_as(nbhd_view_at(to, batch, at, h), c->dtype, i, v_load_part(sums + i, n), n);
                }
            }
}

/* 16-bit gradients from their float32 sums. */
static void round_off_task(void *context, long long task, int thread)
{
    const struct bwd_call *c = context;
    const struct nbhd_params *p = c->p;
    const int rows = nbhd_max(p->axis[1].length, p->axis[1].keys), batch = (int)(task / rows), y = (int)(task % rows);
    (void)thread;
    if (y < p->axis[1].keys) {
        round_rows(c, &c->dk, &p->dk, true, p->kv_heads, p->head_dim, batch, y);
        round_rows(c, &c->dv, &p->dv, true, p->kv_heads, p->head_dim_v, batch, y);
    }
    if (c->b->sum_dq && y < p->axis[1].length)
        round_rows(c, &c->dq, &p->dq, false, p->heads, p->head_dim, batch, y);
}

static struct nbhd_view sums_view(char *data, const struct nbhd_params *p, bool of_keys, int heads, int width)
{
    struct nbhd_view v = {.data = data, .head = (long long)width * (long long)sizeof(float)};
    long long step = v.head * heads;
    for (int i = 2; i >= 0; i--) {
        v.axis[i] = step;
        step *= of_keys ? p->axis[i].keys : p->axis[i].length;
    }
    v.batch = step;
    return v;
}

static nbhd_status bwd_run(const struct nbhd_plan *plan, const struct nbhd_params *p, void *workspace, void *stream)
{
    const struct nbhd_bwd *b = plan->state;
    char *w = workspace;
    struct bwd_call c = {.p = p, .b = b, .dtype = plan->problem.desc.dtype, .dq = p->dq, .dk = p->dk, .dv = p->dv,
                         .extra = (float *)(void *)(w + b->at_extra), .bias = (float *)(void *)(w + b->at_bias),
                         .done = (atomic_uchar *)(w + b->at_done), .scratch = w + b->at_scratch};
    (void)stream;
    memset(w + b->at_done, 0, (size_t)(b->rounds * b->tasks));
    if (c.dtype != NBHD_F32) {
        c.dk = sums_view(w + b->at_dk, p, true, p->kv_heads, p->head_dim);
        c.dv = sums_view(w + b->at_dv, p, true, p->kv_heads, p->head_dim_v);
        if (b->sum_dq)
            c.dq = sums_view(w + b->at_dq, p, false, p->heads, p->head_dim);
    }
    if (b->sum_dq)
        c.delta = sums_view(w + b->at_delta, p, false, p->heads, 1);
    nbhd_parallel(b->threads, zero_tasks(p), zero_task, &c);
    nbhd_parallel(b->threads, b->rounds * b->tasks, run_task, &c);
    if (p->extra)
        nbhd_parallel(b->threads, (long long)p->batch * p->kv_heads * p->extra, extra_task, &c);
    if (p->dbias)
        nbhd_parallel(b->threads, p->heads * b->table / (2 * p->axis[2].window - 1), bias_task, &c);
    const int rows = nbhd_max(p->axis[1].length, p->axis[1].keys);
    if (c.dtype != NBHD_F32)
        nbhd_parallel(b->threads, (long long)p->batch * rows, round_off_task, &c);
    return NBHD_OK;
}
