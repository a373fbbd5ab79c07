/* Tiles of queries in the backward, in whatever products: which of them are a task's, their blocks of keys with the
 * rows of sums. Included after bwd_common.inc.h and tiles.inc.h. */

/* Keys of a block and where their gradients are summed. */
struct bwd_block {
    struct key_block keys;
    float *dk[WALK_KEYS], *dv[WALK_KEYS];
};

static bool next_block(const struct bwd_task *task, struct tile *t, struct key_walk *walk, struct bwd_block *to)
{
    const struct bwd_call *c = task->call;
    const struct key_block *b = &to->keys;
    const bool some = walk_block(c->p, t, walk, &to->keys);
    for (int i = 0; i < b->count; i++) {
        const int *token = b->token[i];
        if (i < b->extra) {
            to->dk[i] = extra_dk(c, task->batch, task->kv_head, task->slot, token[2]);
            to->dv[i] = extra_dv(c, task->batch, task->kv_head, task->slot, token[2]);
        } else {
            to->dk[i] = (float *)(void *)nbhd_view_at(&c->dk, task->batch, token, task->kv_head);
            to->dv[i] = (float *)(void *)nbhd_view_at(&c->dv, task->batch, token, task->kv_head);
        }
    }
    return some;
}

/* A query's delta; if tasks of several rounds need it, made once. */
static float find_delta(const struct bwd_task *t, const int token[3], int head)
{
    const struct bwd_call *c = t->call;
    const struct nbhd_params *p = c->p;
    float *saved = c->delta.data ? (float *)(void *)nbhd_view_at(&c->delta, t->batch, token, head) : NULL;
    if (saved && !t->first)
        return *saved;
    const float delta = make_delta(c, nbhd_view_at(&p->o, t->batch, token, head),
                                   nbhd_view_at(&p->dout, t->batch, token, head),
                                   p->dlse.data ? nbhd_view_at(&p->dlse, t->batch, token, head) : NULL);
    if (saved)
        *saved = delta;
    return delta;
}

/* The keys of the task's regions only; false: there are none. */
static bool clip_keys(struct tile *t, const struct nbhd_region region[3])
{
    for (int a = 0; a < 3; a++) {
        t->axis[a].any.begin = nbhd_max(t->axis[a].any.begin, region[a].keys.begin);
        t->axis[a].any.end = nbhd_min(t->axis[a].any.end, region[a].keys.end);
    }
    bool some = true;
    for (int a = 0; a < 3; a++)
        some &= t->axis[a].any.begin < t->axis[a].any.end;
    if (!some)
        t->axis[0].any.end = t->axis[0].any.begin;
    return some;
}

/* The task's tile number *i of heads and axes, the last axis fastest, or the first after it that has work; *i becomes
 * the number after that. false: there is none. */
static bool find_tile(const struct bwd_task *task, long long *i, struct tile *t)
{
    const struct nbhd_params *p = task->call->p;
    const struct nbhd_bwd *b = task->call->b;
    const int share = p->heads / p->kv_heads, first = task->kv_head * share;
    for (;;) {
        long long n = (*i)++;
        for (int a = 2; a >= 0; a--) {
            const struct nbhd_region *r = &task->region[a];
            const int tiles = (r->q.end - r->q.begin + b->tile[a] - 1) / b->tile[a];
            const int begin = r->q.begin + (int)(n % tiles) * b->tile[a];
            n /= tiles;
            tile_axis_init(&t->axis[a], p->axis[a],
                           (struct nbhd_cell){r->group, r->size,
                                              nbhd_range_of(begin, nbhd_min(begin + b->tile[a], r->q.end))});
        }
        const int head = (int)n * b->head_tile;
        if (head >= share)
            return false;
        t->heads = nbhd_range_of(first + head, first + nbhd_min(head + b->head_tile, share));
        tile_lanes(t, p);
        if (clip_keys(t, task->region) || task->first)
            return true;
    }
}
