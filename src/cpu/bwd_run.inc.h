/* The phases of a vector backward, whatever its tasks do: zero the sums; tasks (bwd_rounds.h, bwd_order.h); add up what
 * they had to keep apart (extra keys, the bias table); round 16-bit results. Included by kernels after
 * bwd_common.inc.h and bwd_sums.inc.h. */

/* What the including file defines: a task, and the one that its thread will probably do next, or NULL. */
static void bwd_do_task(const struct bwd_task *task, const struct bwd_task *after, char *scratch);

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

static nbhd_status bwd_run(const struct nbhd_plan *plan, const struct nbhd_params *p, void *workspace, void *stream)
{
    const struct nbhd_bwd *b = plan->state;
    char *w = workspace;
    struct bwd_call c = {.p = p, .b = b, .dtype = plan->problem.desc.dtype, .dq = p->dq, .dk = p->dk, .dv = p->dv,
                         .extra = (float *)(void *)(w + b->at_extra), .bias = (float *)(void *)(w + b->at_bias),
                         .done = (atomic_uchar *)(w + b->at_done), .scratch = w + b->at_scratch};
    (void)stream;
    memset(w + b->at_done, 0, (size_t)(b->rounds * b->tasks));
    place_sums(&c, w);
    nbhd_parallel(b->threads, pieces(p, OF_KEYS), zero_task, &c);
    nbhd_parallel(b->threads, b->rounds * b->tasks, run_task, &c);
    if (p->extra)
        nbhd_parallel(b->threads, (long long)p->batch * p->kv_heads * p->extra, extra_task, &c);
    if (p->dbias)
        nbhd_parallel(b->threads, p->heads * b->table / (2 * p->axis[2].window - 1), bias_task, &c);
    if (c.dtype != NBHD_F32)
        nbhd_parallel(b->threads, pieces(p, OF_KEYS) + (b->sum_dq ? pieces(p, OF_QUERIES) : 0), round_off_task, &c);
    return NBHD_OK;
}
