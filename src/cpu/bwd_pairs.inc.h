/* Backward in bfloat16 with products of pairs, in tiles of tiles.inc.h. Up to BWD_TILES tiles that see about the same
 * keys go through them together, so that a block of keys is packed once for all and its dK and dV, sums over all of
 * their queries, are added to memory once:
 *
 *     for each block of keys:    K, V and K^T in the order of products
 *         for each tile:         S^T, dP^T -> P^T, dS^T, rounded to bfloat16;  dQ^T += K^T dS^T
 *         dV += P^T dO and dK += dS^T Q, over all tiles
 *
 * What a query does not see has P = dS = 0; a zero does not silence a NaN or infinity on the other side of a product.
 * So keys' rows that are not finite count as NaN in scores and as zeros in dQ, and such rows of Q and dO as zeros, with
 * a NaN for the logsumexp. Included by bwd_amx.inc.h. */

/* A tile on its way through its keys. */
struct bwd_slot {
    struct tile tile;
    struct key_walk walk;
    bool whole; /* all lanes see all keys of the box */
    bool fresh; /* dqt is not there yet */
    uint16_t *qt, *dt; /* Q and dO, see pair_dims */
    uint16_t *q, *d;   /* see pair_rows */
    uint16_t *p, *ds;  /* P^T and dS^T of a block: [halves][WALK_KEYS][UNIT] */
    float *dqt;        /* [d][64] */
    float *lse, *delta; /* [64] */
    struct key_block *own, *keys; /* the block at hand, as the tile sees it: own, or the first tile's */
};

struct bwd_pairs {
    const struct bwd_task *task;
    struct bwd_slot slot[BWD_TILES];
    struct bwd_block *block;
    uint16_t *k, *v;   /* of a block: [WALK_KEYS][d] */
    uint16_t *columns; /* see turn_keys; a UNIT of keys after the other */
    uint16_t *pairs;   /* dS^T of half a tile */
    float *s;          /* two units' S^T and dP^T */
};

/* ---- a tile, in and out ---- */

static int whole_lanes(const struct tile *t) { return (t->lanes + UNIT - 1) / UNIT * UNIT; }

/* Asks for what slot_load will read. */
static void slot_ask(const struct bwd_task *task, const struct tile *t)
{
    const struct bwd_call *c = task->call;
    const struct nbhd_params *p = c->p;
    const struct nbhd_view *views[3] = {&p->q, &p->dout, &p->o};
    const int bytes[3] = {p->head_dim * 2, p->head_dim_v * 2, p->head_dim_v * 2};
    for (int i = 0; i < (task->first ? 3 : 2); i++)
        for (int lane = 0; lane < t->lanes; lane++) {
            const char *row = nbhd_view_at(views[i], t->batch, t->token[lane], t->head[lane]);
            for (int at = 0; at < bytes[i]; at += 64)
                __builtin_prefetch(row + at, 0, 2);
        }
}

/* Rows are first copied to where a block's will be. */
static void slot_load(const struct bwd_pairs *g, struct bwd_slot *x)
{
    const struct bwd_task *task = g->task;
    const struct bwd_call *c = task->call;
    const struct nbhd_params *p = c->p;
    const int lanes = whole_lanes(&x->tile), width = padded(p->head_dim), width_v = padded(p->head_dim_v);
    char *from[FWD_LANES];
    lane_rows(&x->tile, &p->lse, from);
    for (int lane = 0; lane < lanes; lane++) {
        const bool there = lane < x->tile.lanes;
        x->lse[lane] = there ? *(const float *)(const void *)from[lane] * LOG2E : 0;
        x->delta[lane] = there ? find_delta(task, x->tile.token[lane], x->tile.head[lane]) : 0;
    }
    for (int which = 0; which < 2; which++) {
        const int n = which ? p->head_dim_v : p->head_dim, to = which ? width_v : width;
        uint16_t *const rows = which ? g->v : g->k;
        lane_rows(&x->tile, which ? &p->dout : &p->q, from);
        for (int lane = 0; lane < x->tile.lanes; lane++)
            if (copy_row(rows + lane * to, (const uint16_t *)(const void *)from[lane], n))
                x->lse[lane] = NAN;
        memset(rows + x->tile.lanes * to, 0, (size_t)((lanes - x->tile.lanes) * to) * sizeof *rows);
        pair_dims(rows, lanes, to, which ? x->dt : x->qt);
        pair_rows(rows, lanes, to, which ? x->d : x->q);
    }
    x->fresh = true;
}

/* dq out: stored, or added to what earlier rounds have summed. */
static void slot_store(const struct bwd_task *task, const struct bwd_slot *x)
{
    const struct bwd_call *c = task->call;
    const bool add = !task->first;
    const int dtype = c->b->sum_dq ? NBHD_F32 : c->dtype;
    const vf scale = v_set1(c->p->scale);
    char *rows[FWD_LANES];
    lane_rows(&x->tile, &c->dq, rows);
    for (int v = 0; v < whole_lanes(&x->tile); v += VF)
        for (int i = 0; i < c->p->head_dim; i += VF) {
            const int n = nbhd_min(c->p->head_dim - i, VF);
            vf part[VF];
            for (int j = 0; j < VF; j++)
                part[j] = x->fresh ? v_zero() : v_mul(scale, v_load(x->dqt + (i + j) * FWD_LANES + v));
            v_transpose(part);
            for (int l = 0; l < VF; l++) { /* see v_pair_mix_low */
                const int lane = v / UNIT * UNIT + v % UNIT / 4 + l / 4 * 8 + l % 4;
                if (lane < x->tile.lanes)
                    v_store_as(rows[lane], dtype, i, add ? v_add(part[l], v_load_as(rows[lane], dtype, i, n)) : part[l],
                               n);
            }
        }
}

/* ---- a block ---- */

static void pack_block(const struct bwd_pairs *g)
{
    const struct nbhd_params *p = g->task->call->p;
    const struct key_block *b = &g->block->keys;
    const int width = padded(p->head_dim), width_v = padded(p->head_dim_v);
    for (int first = 0; first < b->count; first += UNIT) {
        const int n = nbhd_min(UNIT, b->count - first);
        uint16_t *const k = g->k + first * width, *const v = g->v + first * width_v;
        uint32_t odd = 0;
        for (int i = 0; i < n; i++) {
            const uint16_t *value = (const uint16_t *)(const void *)b->v[first + i];
            odd |= (uint32_t)copy_row(k + i * width, (const uint16_t *)(const void *)b->k[first + i], p->head_dim) << i;
            if (copy_row(v + i * width_v, value, p->head_dim_v))
                fill_odd(v + i * width_v, width_v);
        }
        memset(k + n * width, 0, (size_t)((UNIT - n) * width) * sizeof *k);
        memset(v + n * width_v, 0, (size_t)((UNIT - n) * width_v) * sizeof *v);
        turn_keys(k, width, g->columns + first * width);
        for (int i = 0; i < n && odd >> i; i++)
            if (odd >> i & 1)
                fill_odd(k + i * width, width);
    }
}

/* seen[i]: who of the queries from `lane` on sees key first + i; NULL: all see all. */
static const uint64_t *unit_seen(const struct bwd_slot *x, int first, int lane, uint64_t seen[UNIT])
{
    const struct key_block *b = x->keys;
    const int n = nbhd_min(UNIT, b->count - first);
    bool all = n == UNIT;
    for (int i = 0; i < UNIT; i++) {
        const uint64_t bits = i >= n ? 0 : x->whole ? x->tile.everyone : b->bits[first + i];
        all &= bits == x->tile.everyone;
        seen[i] = bits >> lane;
    }
    return all ? NULL : seen;
}

/* Adds dS to the bias table's gradient, lane by lane: lanes may share an entry. */
static void unit_bias_gradient(const struct bwd_task *task, const struct bwd_slot *x, int first, int lane,
                               const float *ds)
{
    const struct bwd_call *c = task->call;
    const struct key_block *b = x->keys;
    float *const sums = bias_sums(c, task->batch, task->slot);
    for (int i = first; i < nbhd_min(first + UNIT, b->count); i++, ds += UNIT) {
        if (!b->bias[i])
            continue;
        const long long at = b->bias[i] - c->p->bias;
        for (int l = lane; l < nbhd_min(lane + UNIT, x->tile.lanes); l++)
            if (b->bits[i] >> l & 1)
                sums[at + x->tile.bias[l]] += c->p->scale * ds[l - lane];
    }
}

/* The half's share of dQ^T; its queries begin at `lane`. */
static void half_dq(const struct bwd_pairs *g, struct bwd_slot *x, int lane, int groups)
{
    const int width = padded(g->task->call->p->head_dim);
    for (int i = 0; i < width; i += UNIT)
        unit_dq(g->columns + i * UNIT, UNIT * width, g->pairs, groups, x->dqt + i * FWD_LANES + lane, x->fresh);
}

/* What is left to do with a unit whose scores were found. */
static void finish_unit(const struct bwd_pairs *g, struct bwd_slot *x, struct unit_weights *w, int unit, int groups)
{
    const int lane = unit / groups * UNIT;
    weigh_rest(w);
    if (w->keep)
        unit_bias_gradient(g->task, x, unit % groups * UNIT, lane, w->ds);
    if (unit % groups == groups - 1)
        half_dq(g, x, lane, groups);
}

/* P^T and dS^T of a block and a tile, and its share of dQ^T: a unit's weights beside the next one's scores. */
static void slot_block(const struct bwd_pairs *g, struct bwd_slot *x)
{
    const struct nbhd_params *p = g->task->call->p;
    const struct key_block *b = x->keys;
    const int width = padded(p->head_dim), width_v = padded(p->head_dim_v), groups = (b->count + UNIT - 1) / UNIT;
    const int units = groups * (whole_lanes(&x->tile) / UNIT);
    const float factor = p->scale * LOG2E;
    uint64_t seen[2][UNIT];
    struct unit_weights w = {.next = UNIT};
    for (int u = 0; u < units; u++) {
        const int first = u % groups * UNIT, lane = u / groups * UNIT, at = lane * WALK_KEYS + first * UNIT;
        float *const s = g->s + u % 2 * 2 * UNIT * UNIT, *const ds = s + UNIT * UNIT;
        find_scores(g->k + first * width, x->qt + lane * width, width, s, &w);
        find_scores(g->v + first * width_v, x->dt + lane * width_v, width_v, ds, &w);
        if (u)
            finish_unit(g, x, &w, u - 1, groups);
        if (p->bias)
            strip_bias(b, first, nbhd_min(first + UNIT, b->count), &x->tile, factor, s, UNIT, lane / VF,
                       nbhd_min(UNIT / VF, x->tile.vectors - lane / VF));
        w = (struct unit_weights){.s = s, .ds = ds, .lse = x->lse + lane, .delta = x->delta + lane, .p = x->p + at,
                                  .x = x->ds + at, .pairs = g->pairs + first / UNIT * 2 * TILE,
                                  .seen = unit_seen(x, first, lane, seen[u % 2]), .factor = p->bias ? 1.0f : factor,
                                  .keep = p->dbias != NULL};
    }
    finish_unit(g, x, &w, units - 1, groups);
    x->fresh = false;
}

/* The rows that unit_add will add to, asked for beside the products before it: they come from far away. */
struct sums_ahead {
    float *const *rows;
    int keys, column, next, step; /* next row; rows to a call */
};

V_FN void ask_sums(struct sums_ahead *a)
{
    const int end = nbhd_min(a->next + a->step, a->keys);
    for (; a->next < end; a->next++) {
        __builtin_prefetch(a->rows[a->next] + a->column, 1);
        __builtin_prefetch(a->rows[a->next] + a->column + VF, 1);
    }
}

/* rows[key][width] += over the queries of n tiles: of P^T and dO, or of dS^T and Q. */
static void block_sums(const struct bwd_pairs *g, struct bwd_slot *const *slots, int n, bool values)
{
    const struct nbhd_params *p = g->task->call->p;
    const struct key_block *b = &g->block->keys;
    const int width = values ? p->head_dim_v : p->head_dim;
    float *const *const rows = values ? g->block->dv : g->block->dk;
    for (int first = 0; first < b->count; first += UNIT)
        for (int column = 0; column < width; column += UNIT) {
            struct sums_ahead ahead = {.rows = rows + first, .keys = nbhd_min(UNIT, b->count - first),
                                       .column = column, .step = UNIT / HALVES / n};
            TILE_FENCE();
            sums_zero();
            for (int i = 0; i < n; i++) {
                const struct bwd_slot *x = slots[i];
                const uint16_t *left = (values ? x->p : x->ds) + first * UNIT;
                const uint16_t *right = (values ? x->d : x->q) + column * UNIT;
                for (int lane = 0; lane < x->tile.lanes; lane += UNIT) {
                    sums_add(left, TILE_STEP, right, right + TILE);
                    ask_sums(&ahead);
                    left += WALK_KEYS * UNIT;
                    right += UNIT * padded(width);
                }
            }
            sums_store(g->s, UNIT * 4);
            TILE_FENCE();
            unit_add(rows + first, ahead.keys, column, width, values ? 1.0f : p->scale, g->s);
        }
}

/* ---- tiles together ---- */

/* The keys of the block that slot 0 has are those of the next block of this slot too, seen by its lanes. */
static void slot_keys(const struct nbhd_params *p, struct bwd_slot *x, struct key_block *first)
{
    x->keys = x->whole ? first : x->own;
    if (!x->whole)
        walk_block(p, &x->tile, &x->walk, x->own);
    else if (nbhd_counters)
        nbhd_count_visits(first->count - first->extra, 0);
}

/* Each lane sees all keys of the box. */
static bool sees_all(const struct tile *t)
{
    bool all = true;
    for (int a = 0; a < 3; a++) {
        const struct tile_axis *x = &t->axis[a];
        all &= x->keys[0].end >= x->any.end && x->keys[x->count - 1].begin <= x->any.begin;
    }
    return all;
}

/* The first n slots' tiles, through the box around their keys. */
static void run_slots(struct bwd_pairs *g, int n)
{
    const struct bwd_task *task = g->task;
    const struct nbhd_params *p = task->call->p;
    for (int i = 0; i < n; i++) {
        struct bwd_slot *x = &g->slot[i];
        if (i + 1 < n)
            slot_ask(task, &x[1].tile);
        slot_load(g, x);
        x->walk = walk_begin(p, &x->tile);
        if (!task->first)
            x->walk.extra = p->extra;
        x->whole = !p->bias && sees_all(&x->tile);
        x->keys = &g->block->keys;
    }
    while (next_block(task, &g->slot[0].tile, &g->slot[0].walk, g->block)) {
        struct bwd_slot *seeing[BWD_TILES];
        int some = 0;
        for (int i = 0; i < n; i++) {
            if (i)
                slot_keys(p, &g->slot[i], &g->block->keys);
            if (g->slot[i].keys->seen)
                seeing[some++] = &g->slot[i];
        }
        if (!some) /* a corner of the box */
            continue;
        pack_block(g);
        for (int i = 0; i < some; i++)
            slot_block(g, seeing[i]);
        block_sums(g, seeing, some, true);
        block_sums(g, seeing, some, false);
    }
    for (int i = 0; i < n; i++)
        slot_store(task, &g->slot[i]);
}

/* Tiles that go through their keys together, from the one in slot 0 on; `after` becomes the one after these, *more
 * whether there is one. */
static int take_slots(struct bwd_pairs *g, long long *number, struct tile *after, bool *more)
{
    struct nbhd_range box[3];
    tile_box(&g->slot[0].tile, box);
    long long fewest = box_keys(box);
    int n = 1;
    for (;; n++) {
        *more = find_tile(g->task, number, after);
        if (!*more || n == g->task->call->b->together || !stretch_box(box, &fewest, after, FWD_STRETCH))
            break;
        g->slot[n].tile = *after;
    }
    for (int i = 0; i < n; i++)
        for (int a = 0; a < 3; a++) {
            struct tile_axis *x = &g->slot[i].tile.axis[a];
            x->any = box[a];
            x->twice = g->task->call->p->axis[a].edge == NBHD_EDGE_PERIODIC && x->any.end - x->any.begin > x->cell.size;
        }
    return n;
}

static void place_slot(struct bwd_slot *x, const struct nbhd_bwd_slot *at, char *slot)
{
    x->qt = (uint16_t *)(void *)(slot + at->qt);
    x->dt = (uint16_t *)(void *)(slot + at->dt);
    x->q = (uint16_t *)(void *)(slot + at->q);
    x->d = (uint16_t *)(void *)(slot + at->d);
    x->p = (uint16_t *)(void *)(slot + at->p);
    x->ds = (uint16_t *)(void *)(slot + at->ds);
    x->dqt = (float *)(void *)(slot + at->dqt);
    x->lse = (float *)(void *)(slot + at->lanes);
    x->delta = x->lse + FWD_LANES;
    x->own = (struct key_block *)(void *)(slot + at->own);
}

static void bwd_do_task(const struct bwd_task *task, const struct bwd_task *next, char *scratch)
{
    const struct nbhd_bwd *b = task->call->b;
    struct bwd_pairs g = {.task = task,
                          .block = (struct bwd_block *)(void *)(scratch + b->at_block),
                          .k = (uint16_t *)(void *)(scratch + b->at_keys),
                          .v = (uint16_t *)(void *)(scratch + b->at_values),
                          .columns = (uint16_t *)(void *)(scratch + b->at_columns),
                          .pairs = (uint16_t *)(void *)(scratch + b->at_pairs),
                          .s = (float *)(void *)(scratch + b->at_s)};
    (void)next;
    for (int i = 0; i < b->together; i++)
        place_slot(&g.slot[i], &b->slot, scratch + b->at_slots + (size_t)i * b->slot.size);
    const unsigned state = v_flush_begin();
    tile_begin();
    struct tile after = {.batch = task->batch, .kv_head = task->kv_head};
    long long number = 0;
    for (bool more = find_tile(task, &number, &after); more;) {
        g.slot[0].tile = after;
        run_slots(&g, take_slots(&g, &number, &after, &more));
    }
    tile_end();
    v_flush_end(state);
}
