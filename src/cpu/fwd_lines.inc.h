/* The permuted forward's other half: a task walks its part of the grid step by step (a step is up to FWD_ROWS query
 * rows at one element of axis 0), keeps the lines of K that the steps see in a ring of slots, and hands tiles to
 * permute_tile.
 *
 *     for chunks of axis 1, f->chunk queries each
 *         for elements of axis 0                      a slot's line stays as long as the windows move on
 *             for steps of FWD_ROWS queries of the chunk
 *                 for f->group kv heads               neighbours in memory: whole pages are read at a time
 *                     for the heads that share the keys, for blocks of VF queries of axis 2: a tile */

/* ---- lines ---- */

/* n rows of V, whose tokens are token[], or 0, 1, .. if that is NULL. */
static void pack_values(const struct permute_task *t, const char *v, long long step, const int *token, int n, float *to)
{
    for (int i = 0; i < n; i++, to += t->f->value_width)
        unpack_mixed(to, v + (token ? token[i] : i) * step, t->f->dtype, t->p->head_dim_v);
}

/* Address of a tensor's row (all of axis 2) at elements e of axis 0 and 1. */
static const char *key_row(const struct permute_task *t, const struct nbhd_view *view, const int e[2])
{
    const char *row = view->data + t->batch * view->batch + t->kv_head * view->head;
    for (int a = 0; a < 2; a++) {
        const long long element = nbhd_wrap(t->p->axis[a], t->cell[a].size, e[a]);
        row += (t->cell[a].group + element * t->p->axis[a].dilation) * view->axis[a];
    }
    return row;
}

static size_t slot_of(const struct permute_task *t, const int e[2])
{
    return (size_t)ring_slot(t->f->ring, t->kv_head - t->kv_first, e);
}

/* The slot that holds the line of elements e, packed if it was not there. */
static size_t find_line(const struct permute_task *t, const int e[2])
{
    const size_t slot = slot_of(t, e);
    if (t->tag[slot] != tag_of(e)) {
        t->tag[slot] = tag_of(e);
        pack_line(key_row(t, &t->p->k, e), t->p->k.axis[2], t->token, t->keys.end - t->keys.begin, t->f->dtype,
                  t->p->head_dim, t->lines + slot * t->f->line_size, t->f->line_step);
        if (t->f->pack_values)
            pack_values(t, key_row(t, &t->p->v, e), t->p->v.axis[2], t->token, t->keys.end - t->keys.begin,
                        t->values + slot * t->f->values_size);
    }
    return slot;
}

/* ---- steps ---- */

struct step {
    int z, y, rows;
    struct nbhd_range outer, inner, row[FWD_ROWS]; /* keys of z; of all rows; of each */
};

static struct step step_at(const struct permute_task *t, int z, int y, int end)
{
    struct step s = {.z = z, .y = y, .rows = nbhd_min(end - y, FWD_ROWS)};
    s.outer = nbhd_keys(t->p->axis[0], t->cell[0].size, z);
    for (int r = 0; r < s.rows; r++)
        s.row[r] = nbhd_keys(t->p->axis[1], t->cell[1].size, y + r);
    s.inner = nbhd_range_of(s.row[0].begin, s.row[s.rows - 1].end);
    return s;
}

/* Moves to the step after s in the order of the head of this file; false if it was the last. */
static bool next_step(const struct permute_task *t, struct step *s)
{
    const struct nbhd_range z = t->cell[0].q, y = t->cell[1].q;
    const int chunk = y.begin + (s->y - y.begin) / t->f->chunk * t->f->chunk;
    const int end = nbhd_min(chunk + t->f->chunk, y.end);
    if (s->y + FWD_ROWS < end)
        *s = step_at(t, s->z, s->y + FWD_ROWS, end);
    else if (s->z + 1 < z.end)
        *s = step_at(t, s->z + 1, chunk, end);
    else if (end < y.end)
        *s = step_at(t, z.begin, end, nbhd_min(end + t->f->chunk, y.end));
    else
        return false;
    return true;
}

/* Appends a run; entry 0 begins a new portion, whose scores fit the buffer. */
static struct key_run *append(struct permute_task *t, int columns)
{
    struct key_run *run = &t->runs[t->run_count];
    run->entry = t->run_count ? run[-1].entry + run[-1].columns : 0;
    if (run->entry + columns > t->f->entries)
        run->entry = 0;
    run->columns = columns;
    t->run_count++;
    return run;
}

static void list_extra_runs(struct permute_task *t, int rows)
{
    const struct nbhd_params *p = t->p;
    for (int at = 0; at < p->extra; at += t->f->entries) {
        struct key_run *run = append(t, nbhd_min(p->extra - at, t->f->entries));
        run->line = NULL;
        run->bias = 0;
        run->k = p->extra_k.data + t->batch * p->extra_k.batch + t->kv_head * p->extra_k.head + at * p->extra_k.axis[2];
        run->v = t->extra_v + (t->kv_head - t->kv_first) * t->extra_v_head + at * t->extra_v_step;
        run->begin = 0;
        run->end = rows;
    }
}

/* Which rows of each part of a tile see the runs: see struct key_run. */
static void find_seen(struct permute_task *t)
{
    for (int i = t->run_count - 1; i >= 0; i--) {
        struct key_run *run = &t->runs[i];
        const bool follows = i + 1 < t->run_count && run[1].entry > 0 && run->line && run[1].line;
        for (int part = 0; part < FWD_ROWS / V_OUT_ROWS; part++) {
            const int top = part * V_OUT_ROWS;
            const int begin = nbhd_max(run->begin - top, 0), end = nbhd_min(run->end - top, V_OUT_ROWS);
            run->seen[part].rows = begin < end ? 8 * begin + end : 0;
            run->seen[part].alike = 1;
            if (follows && run[1].seen[part].rows == run->seen[part].rows)
                run->seen[part].alike += run[1].seen[part].alike;
        }
    }
}

static void list_runs(struct permute_task *t, const struct step *s)
{
    const struct nbhd_params *p = t->p;
    const long long row_size = 2 * p->axis[2].window - 1, plane = (2 * p->axis[1].window - 1) * row_size;
    int e[2];
    t->run_count = 0;
    list_extra_runs(t, s->rows);
    for (e[0] = s->outer.begin; e[0] < s->outer.end; e[0]++) {
        int begin = 0, end = 0;
        for (e[1] = s->inner.begin; e[1] < s->inner.end; e[1]++) {
            while (s->row[begin].end <= e[1])
                begin++;
            while (end < s->rows && s->row[end].begin <= e[1])
                end++;
            const size_t slot = find_line(t, e);
            struct key_run *run = append(t, p->axis[2].window);
            run->line = t->lines + slot * t->f->line_size;
            run->k = NULL;
            run->v = t->f->pack_values ? (const char *)(t->values + slot * t->f->values_size) : key_row(t, &p->v, e);
            run->bias =
                (e[0] - s->z + p->axis[0].window - 1) * plane + (e[1] - s->y + p->axis[1].window - 1) * row_size;
            run->begin = begin;
            run->end = end;
        }
    }
    find_seen(t);
}

/* Rows of a tensor along axis 2, token 0 of the first of `heads` heads at `data`; those tokens, or where they are not
 * neighbours the keys' alone. */
static void ahead_heads(struct permute_task *t, const struct nbhd_view *view, const char *data, int heads, int width,
                        struct nbhd_range tokens)
{
    const int bytes = width * (t->f->dtype == NBHD_F32 ? 4 : 2), together = view->head == bytes ? heads : 1;
    for (int head = 0; head < heads; head += together, data += view->head)
        if (t->near)
            ahead_add(t->ahead, data + tokens.begin * view->axis[2], view->axis[2], NULL, tokens.end - tokens.begin,
                      together * bytes);
        else
            ahead_add(t->ahead, data, view->axis[2], t->token, t->keys.end - t->keys.begin, together * bytes);
}

/* Lists what the next step, of the cell `of`, will be the first to see: queries, and keys without a line. */
static void list_ahead(struct permute_task *t, const struct permute_task *of, const struct step *next)
{
    const struct nbhd_params *p = t->p;
    const int share = p->heads / p->kv_heads, heads = nbhd_min(t->f->group, p->kv_heads - of->kv_first);
    int e[2], x[3] = {of->cell[0].group + next->z * p->axis[0].dilation, 0, 0};
    for (int r = 0; r < next->rows && t->near; r++) {
        x[1] = of->cell[1].group + (next->y + r) * p->axis[1].dilation;
        const char *q = nbhd_view_at(&p->q, of->batch, x, of->kv_first * share);
        ahead_heads(t, &p->q, q, heads * share, p->head_dim, of->near_q);
        if (t->f->stream)
            continue;
        const char *o = nbhd_view_at(&p->o, of->batch, x, of->kv_first * share);
        ahead_heads(t, &p->o, o, heads * share, p->head_dim_v, of->near_q);
    }
    for (e[0] = next->outer.begin; e[0] < next->outer.end; e[0]++)
        for (e[1] = next->inner.begin; e[1] < next->inner.end; e[1]++) {
            if (of == t && t->tag[slot_of(t, e)] == tag_of(e))
                continue;
            ahead_heads(t, &p->k, key_row(of, &p->k, e), heads, p->head_dim, of->near_k);
            ahead_heads(t, &p->v, key_row(of, &p->v, e), heads, p->head_dim_v, of->near_k);
        }
}

/* next: NULL if nothing follows. */
static void begin_ahead(struct permute_task *t, const struct permute_task *of, const struct step *next)
{
    const int kv_heads = nbhd_min(t->f->group, t->p->kv_heads - t->kv_first);
    ahead_clear(t->ahead, kv_heads * (t->p->heads / t->p->kv_heads) * t->blocks, false);
    if (next)
        list_ahead(t, of, next);
}

static struct row_set rows_of(const struct permute_task *t, const struct step *s, int head)
{
    const struct nbhd_params *p = t->p;
    struct row_set set = {.rows = s->rows};
    int x[3] = {t->cell[0].group + s->z * p->axis[0].dilation, 0, 0};
    for (int r = 0; r < s->rows; r++) {
        x[1] = t->cell[1].group + (s->y + r) * p->axis[1].dilation;
        set.q[r] = nbhd_view_at(&p->q, t->batch, x, head);
        set.o[r] = nbhd_view_at(&p->o, t->batch, x, head);
        set.lse[r] = p->lse.data ? nbhd_view_at(&p->lse, t->batch, x, head) : NULL;
    }
    return set;
}

/* A row of keys is visited by a tile of up to FWD_ROWS rows of queries at once, whatever is done along axis 2. */
static void count_rows(const struct permute_task *t, int rows)
{
    long long visits = 0, masked = 0;
    for (const struct key_run *run = t->runs; run < t->runs + t->run_count; run++)
        if (run->line) { /* else extra keys */
            visits++;
            masked += run->begin > 0 || run->end < rows;
        }
    nbhd_count_visits(visits, masked);
}

/* The tiles of one step and kv head. */
static void run_step(struct permute_task *t, const struct step *now)
{
    const struct nbhd_params *p = t->p;
    const int share = p->heads / p->kv_heads, first = t->kv_head * share;
    const long long table = (2ll * p->axis[0].window - 1) * (2 * p->axis[1].window - 1) * (2 * p->axis[2].window - 1);
    for (int head = first; head < first + share; head++) {
        const struct row_set rows = rows_of(t, now, head);
        t->bias = p->bias ? p->bias + head * table : NULL;
        if (nbhd_counters)
            count_rows(t, now->rows);
        for (int i = 0; i < t->blocks; i++, t->ahead->tile++)
            permute_tile(t, &t->block[i], &rows);
    }
}

static struct step first_step(const struct permute_task *t)
{
    const struct nbhd_range y = t->cell[1].q;
    return step_at(t, t->cell[0].q.begin, y.begin, nbhd_min(y.begin + t->f->chunk, y.end));
}

/* All steps of a cell; after: the cell that follows, to look ahead to, or NULL. */
static void walk_steps(struct permute_task *t, struct permute_task *after)
{
    const int kv_end = nbhd_min(t->kv_first + t->f->group, t->p->kv_heads);
    struct step now = first_step(t);
    for (bool more = true; more;) {
        struct permute_task *of = t;
        struct step next = now;
        more = next_step(t, &next);
        if (!more && after) {
            of = after;
            next = first_step(after);
        }
        for (t->kv_head = t->kv_first; t->kv_head < kv_end; t->kv_head++) {
            list_runs(t, &now);
            if (t->kv_head == t->kv_first)
                begin_ahead(t, of, more || of != t ? &next : NULL);
            run_step(t, &now);
        }
        now = next;
    }
}

/* Tokens of axis 2 that the queries are and see, if they lie side by side. */
static void find_near(struct permute_task *t, struct nbhd_range queries)
{
    const struct nbhd_axis a = t->p->axis[2];
    t->near = t->f->grid[2].count == 1 || a.dilation == 1;
    t->near_q = t->near_k = nbhd_range_of(0, a.length);
    if (t->f->grid[2].count > 1) {
        t->near_q = queries;
        t->near_k = near_keys(a, queries);
    }
}

/* Cell number i of batch, group of kv heads, axes; the last axis fastest. Returns its queries of axis 2. */
static struct nbhd_range locate(struct permute_task *t, long long i)
{
    const struct nbhd_fwd *f = t->f;
    const struct nbhd_range queries = nbhd_grid_cell(&f->grid[2], (int)(i % f->grid[2].count)).q;
    i /= f->grid[2].count;
    for (int a = 1; a >= 0; a--) {
        t->cell[a] = nbhd_grid_cell(&f->grid[a], (int)(i % f->grid[a].count));
        i /= f->grid[a].count;
    }
    const int groups = (t->p->kv_heads + f->group - 1) / f->group;
    t->kv_head = t->kv_first = (int)(i % groups) * f->group;
    t->batch = (int)(i / groups);
    find_near(t, queries);
    return queries;
}

static void find_extra_values(struct permute_task *t, float *packed)
{
    const struct nbhd_params *p = t->p;
    if (!p->extra)
        return;
    t->extra_v = p->extra_v.data + t->batch * p->extra_v.batch + t->kv_first * p->extra_v.head;
    t->extra_v_step = p->extra_v.axis[2];
    t->extra_v_head = p->extra_v.head;
    if (!t->f->pack_values)
        return;
    float *to = packed;
    for (int head = t->kv_first; head < nbhd_min(t->kv_first + t->f->group, p->kv_heads); head++) {
        pack_values(t, t->extra_v + (head - t->kv_first) * t->extra_v_head, t->extra_v_step, NULL, p->extra, to);
        to += (long long)p->extra * t->f->value_width;
    }
    t->extra_v = (const char *)packed;
    t->extra_v_step = t->f->value_width * (long long)sizeof(float);
    t->extra_v_head = p->extra * t->extra_v_step;
}

/* A task is f->run cells. */
static void permute_task(const struct nbhd_params *p, const struct nbhd_fwd *f, long long task, char *scratch)
{
    struct permute_task t = {.p = p, .f = f};
    t.block = (struct lane_block *)(scratch + f->at_block);
    t.token = (int *)(scratch + f->at_token);
    t.tag = (long long *)(scratch + f->at_tags);
    t.lines = (float *)(scratch + f->at_lines);
    t.values = (float *)(scratch + f->at_values);
    t.runs = (struct key_run *)(scratch + f->at_runs);
    t.ahead = (struct look_ahead *)(scratch + f->at_ahead);
    t.qt = (float *)(scratch + f->at_q);
    t.s = (float *)(scratch + f->at_s);
    t.o = (float *)(scratch + f->at_o);
    t.keys_row = (float *)(scratch + f->at_keys);
    t.maximum = (float *)(scratch + f->at_lanes);
    t.sum = t.maximum + ROW_WIDTH;
    t.alpha = t.sum + ROW_WIDTH;
    const long long value_bytes = f->value_width * (long long)sizeof(float);
    t.v_lane_step = f->pack_values ? value_bytes : p->v.axis[2];
    t.v_step = f->pack_values ? value_bytes : p->v.axis[2] * p->axis[2].dilation;
    const long long end = (task + 1) * f->run < f->tiles ? (task + 1) * f->run : f->tiles;
    for (long long i = task * f->run; i < end; i++) {
        const struct nbhd_range queries = locate(&t, i);
        if (i == task * f->run || f->grid[2].count > 1) {
            t.keys = find_keys(p->axis[2], queries, t.token);
            const bool share = p->axis[1].length > 1 && (V_FAST_LOOKUP || p->axis[2].dilation == 1);
            t.blocks = make_blocks(p->axis[2], queries, t.keys.begin, share, t.block);
        }
        for (int slot = 0; slot < f->group * f->ring[0] * f->ring[1]; slot++)
            t.tag[slot] = NO_LINE;
        find_extra_values(&t, (float *)(scratch + f->at_extra));
        struct permute_task after = t;
        if (i + 1 < end)
            locate(&after, i + 1);
        walk_steps(&t, i + 1 < end && t.near ? &after : NULL);
    }
    v_stream_end();
}
