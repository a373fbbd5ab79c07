/* Tiles of queries whose keys are broadcast: which tokens they are, the walk over their keys in blocks, and which of
 * them go through their keys together. Included by broadcast.inc.h. */

/* One axis of a tile: the keys that each of its coordinates sees, and which lanes have which coordinate. */
struct tile_axis {
    struct nbhd_cell cell;
    struct nbhd_range any, all;
    int count; /* coordinates */
    bool twice; /* a periodic axis, shorter than any: some keys are in it twice */
    int low, high; /* coordinates below low have ended before the current key, those from high on have not begun */
    struct nbhd_range keys[FWD_LANES];
    uint64_t before[FWD_LANES + 1]; /* lanes whose coordinate is less than i */
};

struct tile {
    struct tile_axis axis[3];
    int lanes, vectors;
    uint64_t everyone;
    int token[FWD_LANES][3], head[FWD_LANES];
    int bias[FWD_LANES]; /* what lane l adds to the index into the bias table */
    const float *bias_base; /* of a key at element 0 of every axis and the tile's first query */
    long long bias_step[3];
    struct nbhd_range heads;
    int batch, kv_head;
};

/* The keys of a tile in the order of memory, extra keys first. */
struct key_walk {
    const char *k, *v;
    long long k_step[3], v_step[3];
    int at[3], extra;
    uint64_t row_bits;
};

/* ---- a tile's keys ---- */

#ifndef WALK_KEYS
#define WALK_KEYS FWD_BLOCK /* keys of a block */
#endif

/* Lanes that see key `key` of this axis. Keys are asked for in ascending order. */
static uint64_t axis_bits(struct tile_axis *a, int key)
{
    if (key == a->any.begin)
        a->low = a->high = 0;
    while (a->low < a->count && a->keys[a->low].end <= key)
        a->low++;
    while (a->high < a->count && a->keys[a->high].begin <= key)
        a->high++;
    return a->before[a->high] & ~a->before[a->low];
}

/* After axis_bits: the first key from there on that other lanes see. */
static int axis_change(const struct tile_axis *a)
{
    int key = INT_MAX;
    if (a->low < a->count)
        key = a->keys[a->low].end;
    if (a->high < a->count)
        key = nbhd_min(key, a->keys[a->high].begin);
    return key;
}

static void walk_row(struct key_walk *w, struct tile *t)
{
    w->row_bits = axis_bits(&t->axis[0], w->at[0]) & axis_bits(&t->axis[1], w->at[1]);
}

static struct key_walk walk_begin(const struct nbhd_params *p, struct tile *t)
{
    struct key_walk w;
    w.k = p->k.data + t->batch * p->k.batch + t->kv_head * p->k.head;
    w.v = p->v.data + t->batch * p->v.batch + t->kv_head * p->v.head;
    for (int a = 0; a < 3; a++) {
        w.k_step[a] = p->k.axis[a] * p->axis[a].dilation;
        w.v_step[a] = p->v.axis[a] * p->axis[a].dilation;
        w.k += p->k.axis[a] * t->axis[a].cell.group;
        w.v += p->v.axis[a] * t->axis[a].cell.group;
        w.at[a] = t->axis[a].any.begin;
    }
    w.extra = 0;
    walk_row(&w, t);
    return w;
}

static void walk_extra(const struct nbhd_params *p, const struct tile *t, struct key_walk *w, struct key_block *b)
{
    const char *k = p->extra_k.data + t->batch * p->extra_k.batch + t->kv_head * p->extra_k.head;
    const char *v = p->extra_v.data + t->batch * p->extra_v.batch + t->kv_head * p->extra_v.head;
    for (; w->extra < p->extra && b->count < WALK_KEYS; w->extra++, b->count++) {
        b->k[b->count] = (const float *)(k + w->extra * p->extra_k.axis[2]);
        b->v[b->count] = (const float *)(v + w->extra * p->extra_v.axis[2]);
        b->bias[b->count] = NULL;
        b->bits[b->count] = b->seen = t->everyone;
        memcpy(b->token[b->count], (const int[3]){0, 0, w->extra}, sizeof *b->token);
    }
}

/* Without those of a band that the tile does not see, though kernels of pairs multiply them where its block begins or
 * ends among them. */
static void count_block(const struct tile *t, const struct key_block *b)
{
    long long seen = 0, masked = 0;
    for (int i = b->extra; i < b->count; i++) {
        seen += b->bits[i] != 0;
        masked += b->bits[i] && b->bits[i] != t->everyone;
    }
    nbhd_count_visits(seen, masked);
}

/* Of the walk along an axis at element at. A block ends there, so that none holds a key twice: its gradients are added
 * to memory several keys at a time. */
static bool walk_seam(const struct tile_axis *x, int at) { return x->twice && nbhd_image(x->cell.size, at) == at; }

/* Fills the block with the next keys; false if there are none. */
static bool walk_block(const struct nbhd_params *p, struct tile *t, struct key_walk *w, struct key_block *b)
{
    struct tile_axis *x = &t->axis[2];
    b->count = 0;
    b->masked = false;
    b->seen = 0;
    if (w->extra < p->extra)
        walk_extra(p, t, w, b);
    b->extra = b->count;
    int element[2], token[2];
    bool seam = false;
    while (b->count < WALK_KEYS && w->at[0] < t->axis[0].any.end && !seam) {
        for (int a = 0; a < 2; a++)
            element[a] = nbhd_wrap(p->axis[a], t->axis[a].cell.size, w->at[a]);
        const char *k = w->k + element[0] * w->k_step[0] + element[1] * w->k_step[1];
        const char *v = w->v + element[0] * w->v_step[0] + element[1] * w->v_step[1];
        const float *bias = NULL;
        if (t->bias_base)
            bias = t->bias_base + w->at[0] * t->bias_step[0] + w->at[1] * t->bias_step[1];
        for (int a = 0; a < 2; a++)
            token[a] = t->axis[a].cell.group + element[a] * p->axis[a].dilation;
        int end = nbhd_min(x->any.end, w->at[2] + WALK_KEYS - b->count);
        while (w->at[2] < end && !seam) {
            const uint64_t bits = w->row_bits & axis_bits(x, w->at[2]);
            const int change = nbhd_min(end, axis_change(x));
            const int stop = w->at[2] + nbhd_together(p->axis[2], x->cell.size, w->at[2], change);
            int at = nbhd_wrap(p->axis[2], x->cell.size, w->at[2]);
            b->masked |= bits != t->everyone;
            b->seen |= bits;
            for (; w->at[2] < stop; w->at[2]++, at++, b->count++) {
                b->k[b->count] = (const float *)(k + at * w->k_step[2]);
                b->v[b->count] = (const float *)(v + at * w->v_step[2]);
                b->bias[b->count] = bias ? bias + w->at[2] : NULL;
                b->bits[b->count] = bits;
                b->token[b->count][0] = token[0];
                b->token[b->count][1] = token[1];
                b->token[b->count][2] = x->cell.group + at * p->axis[2].dilation;
            }
            seam = walk_seam(x, w->at[2]);
        }
        if (w->at[2] < x->any.end)
            break;
        w->at[2] = x->any.begin;
        const bool next = ++w->at[1] == t->axis[1].any.end;
        if (next) {
            w->at[1] = t->axis[1].any.begin;
            w->at[0]++;
        }
        seam |= walk_seam(&t->axis[!next], w->at[!next]);
        if (w->at[0] < t->axis[0].any.end)
            walk_row(w, t);
    }
    if (nbhd_counters)
        count_block(t, b);
    return b->count > 0;
}

/* Keys and values of a block copied as float32, in rows of whole vectors: a key, its value; the next key `step` floats
 * from there. */
static inline void unpack_block(struct key_block *b, int dtype, int d, int dv, int step, float *to)
{
    for (int i = 0; i < b->count; i++, to += step) {
        float *v = to + (d + VF - 1) / VF * VF;
        unpack_row(to, (const char *)b->k[i], dtype, d);
        unpack_row(v, (const char *)b->v[i], dtype, dv);
        b->k[i] = to;
        b->v[i] = v;
    }
}

/* ---- a tile ---- */

static void tile_axis_init(struct tile_axis *x, struct nbhd_axis a, struct nbhd_cell cell)
{
    x->cell = cell;
    x->count = cell.q.end - cell.q.begin;
    x->low = x->high = 0;
    for (int i = 0; i < x->count; i++)
        x->keys[i] = nbhd_keys(a, cell.size, cell.q.begin + i);
    x->any = nbhd_range_of(x->keys[0].begin, x->keys[x->count - 1].end);
    x->twice = a.edge == NBHD_EDGE_PERIODIC && x->any.end - x->any.begin > cell.size;
    for (int i = 0; i <= x->count; i++)
        x->before[i] = 0;
}

/* Address of each lane's row of a tensor. */
static void lane_rows(const struct tile *t, const struct nbhd_view *view, char *rows[FWD_LANES])
{
    for (int lane = 0; lane < t->lanes; lane++)
        rows[lane] = nbhd_view_at(view, t->batch, t->token[lane], t->head[lane]);
}

/* Lanes run over heads, then axis 0, 1, 2 of what the tile really has: they are dense. */
static void tile_lanes(struct tile *t, const struct nbhd_params *p)
{
    const struct tile_axis *x = t->axis;
    int lane = 0;
    int table[4] = {0, 0, 0, 1}; /* elements of the bias table that a step on axis a is, [-1]: heads */
    for (int a = 2; a >= 0; a--)
        table[a] = (2 * p->axis[a].window - 1) * table[a + 1];
    for (int h = t->heads.begin; h < t->heads.end; h++)
        for (int i = 0; i < x[0].count; i++)
            for (int j = 0; j < x[1].count; j++)
                for (int k = 0; k < x[2].count; k++, lane++) {
                    int at[3] = {i, j, k};
                    int bias = (h - t->heads.begin) * table[0];
                    for (int a = 0; a < 3; a++) {
                        t->token[lane][a] = x[a].cell.group + (x[a].cell.q.begin + at[a]) * p->axis[a].dilation;
                        bias -= at[a] * table[a + 1];
                        t->axis[a].before[at[a] + 1] |= 1ull << lane;
                    }
                    t->head[lane] = h;
                    t->bias[lane] = bias;
                }
    t->lanes = lane;
    t->vectors = (lane + VF - 1) / VF;
    t->everyone = lane == 64 ? ~0ull : (1ull << lane) - 1;
    for (; lane < t->vectors * VF; lane++)
        t->bias[lane] = 0;
    for (int a = 0; a < 3; a++)
        for (int i = 0; i < x[a].count; i++)
            t->axis[a].before[i + 1] |= t->axis[a].before[i];
    t->bias_base = NULL;
    if (p->bias) {
        t->bias_base = p->bias + (long long)t->heads.begin * table[0];
        for (int a = 0; a < 3; a++) {
            t->bias_step[a] = table[a + 1];
            t->bias_base += (p->axis[a].window - 1 - x[a].cell.q.begin) * (long long)table[a + 1];
        }
    }
}

/* Tile number i of batch, kv head, heads of that kv head, axes; the last axis fastest. */
static inline void tile_number(struct tile *t, const struct nbhd_params *p, const struct nbhd_fwd *f, long long i)
{
    for (int a = 2; a >= 0; a--) {
        tile_axis_init(&t->axis[a], p->axis[a], nbhd_grid_cell(&f->grid[a], (int)(i % f->grid[a].count)));
        i /= f->grid[a].count;
    }
    const int share = p->heads / p->kv_heads, first = (int)(i % f->head_tiles) * f->head_tile;
    i /= f->head_tiles;
    t->kv_head = (int)(i % p->kv_heads);
    t->batch = (int)(i / p->kv_heads);
    t->heads = nbhd_range_of(t->kv_head * share + first, t->kv_head * share + nbhd_min(first + f->head_tile, share));
    tile_lanes(t, p);
}

/* All lanes of the tile see the same keys. */
static inline bool sees_alike(const struct tile *t)
{
    bool alike = true;
    for (int a = 0; a < 3; a++) {
        const struct tile_axis *x = &t->axis[a];
        alike &= x->keys[0].end == x->any.end && x->keys[x->count - 1].begin == x->any.begin;
    }
    return alike;
}

/* The box of keys around those of a tile's lanes. */
static inline void tile_box(const struct tile *t, struct nbhd_range box[3])
{
    for (int a = 0; a < 3; a++)
        box[a] = t->axis[a].any;
}

static inline long long box_keys(const struct nbhd_range box[3])
{
    long long keys = 1;
    for (int a = 0; a < 3; a++)
        keys *= box[a].end - box[a].begin;
    return keys;
}

/* Stretches the box to the tile's keys as well; false, and the box as it was, if it then held too many keys that one of
 * the tiles does not see: over so many percent of the tile with the fewest. */
static inline bool stretch_box(struct nbhd_range box[3], long long *fewest, const struct tile *t, int percent)
{
    struct nbhd_range old[3], own[3];
    tile_box(t, own);
    memcpy(old, box, sizeof old);
    for (int a = 0; a < 3; a++)
        box[a] = nbhd_range_of(nbhd_min(box[a].begin, own[a].begin), nbhd_max(box[a].end, own[a].end));
    *fewest = *fewest < box_keys(own) ? *fewest : box_keys(own);
    if (box_keys(box) * 100 <= *fewest * percent)
        return true;
    memcpy(box, old, sizeof old);
    return false;
}

/* Same batch, heads and groups of dilated axes: keys of one are those of the other, or its neighbours. */
static inline bool same_sequence(const struct tile *a, const struct tile *b)
{
    bool same = a->batch == b->batch && a->kv_head == b->kv_head;
    for (int i = 0; i < 3; i++)
        same &= a->axis[i].cell.group == b->axis[i].cell.group;
    return same;
}

/* Tiles from number `first` on to where `tile` points; returns how many go through their keys together: up to `end`
 * and `most` that see the same keys; or in a band, that see nearly the same: these then all walk the box around them,
 * and have keys there that none of their lanes sees. Bands begin at multiples of their length, so that sums are made in
 * the same blocks however the tiles are shared out to threads. */
static inline int take_tiles(struct tile *const *tile, int most, const struct nbhd_params *p, const struct nbhd_fwd *f,
                             long long first, long long end)
{
    const int percent = f->band > 1 ? FWD_STRETCH : 100;
    int n = 1;
    tile_number(tile[0], p, f, first);
    struct nbhd_range box[3];
    tile_box(tile[0], box);
    long long fewest = box_keys(box);
    if (f->band > 1)
        most = f->band - (int)(first % f->band);
    for (; n < most && first + n < end; n++) {
        tile_number(tile[n], p, f, first + n);
        if (!same_sequence(tile[0], tile[n]) || !stretch_box(box, &fewest, tile[n], percent))
            break;
    }
    for (int i = 0; i < n; i++)
        for (int a = 0; a < 3; a++)
            tile[i]->axis[a].any = box[a];
    return n;
}
