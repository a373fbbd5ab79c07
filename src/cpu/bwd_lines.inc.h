/* The permuted backward's other half: a task walks the boxes of its region step by step (a step is up to FWD_ROWS query
 * rows at one element of axis 0), keeps the lines of K and V that the steps see in a ring of slots, and hands tiles to
 * permute_tile. Rows of K of 16-bit or odd widths are unpacked beside their lines.
 *
 *     for boxes of b->tile queries, for groups of kv heads
 *         for elements of axis 0                      a slot's line stays as long as the windows move on
 *             for steps of FWD_ROWS queries of axis 1
 *                 for b->group kv heads               neighbours in memory: they share pages, which are many
 *                     for the heads that share the keys, for blocks of VF queries of axis 2: a tile */

/* ---- lines, runs ---- */

static float *k_rows_at(const struct bwd_box *x, long long slot)
{
    return x->k_rows + slot * x->task->call->b->positions * x->task->call->b->width;
}

static long long slot_of(const struct bwd_box *x, const int e[2])
{
    return ring_slot(x->task->call->b->ring, x->member, e);
}

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
    pack_line(v, p->v.axis[2], x->token, keys, c->dtype, p->head_dim_v, x->v_lines + line * p->head_dim_v,
              c->b->line_step);
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

static struct bwd_keys *append(struct bwd_box *x, int columns, int begin, int end)
{
    struct bwd_keys *run = &x->run[x->runs++];
    run->columns = columns;
    run->begin = begin;
    run->end = end;
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
    float **const to[] = {&x->qt, &x->dt,  &x->q,       &x->d,       &x->dq,     &x->s,
                          &x->ds, &x->lse, &x->k_lines, &x->v_lines, &x->k_rows, &x->extra_k};
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

static struct bwd_step step_at(const struct bwd_task *t, const struct nbhd_range q[3], int kv_head, int z, int y)
{
    return (struct bwd_step){t, {q[0], q[1], q[2]}, kv_head, z, y, nbhd_min(q[1].end - y, FWD_ROWS)};
}

static struct bwd_step first_step(const struct bwd_task *t)
{
    struct nbhd_range q[3];
    for (int a = 0; a < 3; a++) {
        const struct nbhd_range all = t->region[a].q;
        q[a] = nbhd_range_of(all.begin, nbhd_min(all.begin + t->call->b->tile[a], all.end));
    }
    return step_at(t, q, t->kv_head, q[0].begin, q[1].begin);
}

/* Moves on, along axis 1, then 0, then to the next heads, then to the next box; false if there is none. */
static bool next_step(struct bwd_step *s)
{
    const struct nbhd_bwd *b = s->task->call->b;
    struct nbhd_range q[3] = {s->q[0], s->q[1], s->q[2]};
    if (s->y + FWD_ROWS < q[1].end)
        *s = step_at(s->task, q, s->kv_head, s->z, s->y + FWD_ROWS);
    else if (s->z + 1 < q[0].end)
        *s = step_at(s->task, q, s->kv_head, s->z + 1, q[1].begin);
    else if (s->kv_head + b->group < s->task->kv_head + b->heads)
        *s = step_at(s->task, q, s->kv_head + b->group, q[0].begin, q[1].begin);
    else {
        int a = 2;
        for (; a >= 0; a--) {
            const struct nbhd_range all = s->task->region[a].q;
            const bool more = q[a].end < all.end;
            q[a].begin = more ? q[a].end : all.begin;
            q[a].end = nbhd_min(q[a].begin + b->tile[a], all.end);
            if (more)
                break;
        }
        *s = step_at(s->task, q, s->task->kv_head, q[0].begin, q[1].begin);
        return a >= 0;
    }
    return true;
}

static bool same_box(const struct bwd_step *a, const struct bwd_step *b)
{
    bool same = a->task == b->task && a->kv_head == b->kv_head;
    for (int i = 0; i < 3; i++)
        same = same && a->q[i].begin == b->q[i].begin;
    return same;
}

/* Tokens of a tensor's rows at elements e of axis 0 and 1, of all heads of a group. */
static void ahead_heads(struct bwd_box *x, const struct bwd_step *s, const struct nbhd_view *view, const int e[2],
                        int heads, int width, int element, struct nbhd_range tokens)
{
    const struct bwd_task *t = s->task;
    const int share = heads == t->call->p->heads ? t->call->p->heads / t->call->p->kv_heads : 1;
    const int count = t->call->b->group * share, bytes = width * element, together = view->head == bytes ? count : 1;
    for (int head = 0; head < count; head += together)
        ahead_add(x->ahead, row_at(t, view, e, s->kv_head * share + head) + tokens.begin * view->axis[2], view->axis[2],
                  NULL, tokens.end - tokens.begin, together * bytes);
}

/* Lists what the step will be the first to read and write; where dilation groups are cut up along axis 2, all of it. */
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
        keys = near_keys(a, q);
    }
    int e[2] = {s->z, s->y};
    for (; e[1] < s->y + s->rows; e[1]++) {
        ahead_heads(x, s, &p->dout, e, p->heads, p->head_dim_v, element, q);
        ahead_heads(x, s, &p->o, e, p->heads, p->head_dim_v, element, q);
        ahead_heads(x, s, &p->q, e, p->heads, p->head_dim, element, q);
        if (!c->b->stream)
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
        for (int i = 0; i < x->blocks; i++, x->ahead->tile++)
            permute_tile(x, &x->block[i], s->z, s->y, s->rows);
    }
}

static void begin_box(struct bwd_box *x, const struct bwd_step *s)
{
    const struct bwd_call *c = x->task->call;
    x->keys = find_keys(c->p->axis[2], s->q[2], x->token);
    x->blocks = make_blocks(c->p->axis[2], s->q[2], x->keys.begin, false, x->block);
    for (int a = 0; a < 2; a++)
        x->cell[a] = (struct nbhd_cell){x->task->region[a].group, x->task->region[a].size, s->q[a]};
    for (int i = 0; i < c->b->group * c->b->ring[0] * c->b->ring[1]; i++)
        x->tag[i] = NO_LINE;
    for (x->member = 0; x->member < c->b->group; x->member++) {
        x->kv_head = s->kv_head + x->member;
        pack_extra(x);
    }
}

/* All kv heads of the group. next: the step that follows, if any. */
static void permute_group(struct bwd_box *x, const struct bwd_step *now, const struct bwd_step *next)
{
    const struct bwd_task *t = x->task;
    const struct nbhd_params *p = t->call->p;
    for (x->member = 0; x->member < t->call->b->group; x->member++) {
        x->kv_head = now->kv_head + x->member;
        list_runs(x, now->z, now->y, now->rows);
        if (x->member == 0) {
            /* Boxes along axis 0, and AVX2, gain nothing amid lanes. */
            ahead_clear(x->ahead, t->call->b->group * (p->heads / p->kv_heads) * x->blocks,
                        V_FAST_LOOKUP && t->call->b->tile[0] == 1);
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
    struct bwd_step now = first_step(task), next = now;
    begin_box(&x, &now);
    for (bool more = true; more; now = next) {
        more = next_step(&next);
        const struct bwd_step other = after ? first_step(after) : next;
        permute_group(&x, &now, more ? &next : after ? &other : NULL);
        if (more && !same_box(&now, &next))
            begin_box(&x, &next);
    }
    v_stream_end();
}
