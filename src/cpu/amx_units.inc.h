/* Keys and values in units (struct nbhd_fwd_units), as the tiles want them, that a thread keeps from one set of tiles
 * to the next. A unit is copied when a tile first needs it: tiles of the same keys, and windows that overlap, find it
 * there. Rows of many heads lie far apart and fall into few sets of the caches; copies do not. */

struct unit_cache {
    int next;                     /* the slot that is given away next */
    int block;                    /* number of the one at hand */
    int slot[FWD_MOST_UNITS];     /* of each unit of the sequence; -1: none */
    int unit[FWD_MOST_KEPT];      /* of each slot; -1: none */
    int last_block[FWD_MOST_KEPT]; /* that used the slot */
};

/* The units of a sequence. */
struct unit_grid {
    const char *k, *v;
    long long k_step[3], v_step[3];
    int size[3], count[3]; /* keys along an axis, units */
};

static struct unit_grid units_of(const struct nbhd_params *p, const struct nbhd_fwd *f, const struct tile *t)
{
    struct unit_grid g;
    g.k = p->k.data + t->batch * p->k.batch + t->kv_head * p->k.head;
    g.v = p->v.data + t->batch * p->v.batch + t->kv_head * p->v.head;
    for (int a = 0; a < 3; a++) {
        const struct nbhd_axis axis = p->axis[a];
        g.k_step[a] = p->k.axis[a] * axis.dilation;
        g.v_step[a] = p->v.axis[a] * axis.dilation;
        g.k += p->k.axis[a] * t->axis[a].cell.group;
        g.v += p->v.axis[a] * t->axis[a].cell.group;
        g.size[a] = nbhd_keys_of_group(axis, t->axis[a].cell.size);
        g.count[a] = (g.size[a] + f->units.shape[a] - 1) / f->units.shape[a];
    }
    return g;
}

/* A bit for each of the unit's keys that there is: at the end of an axis some may lack. */
static uint32_t unit_keys(const struct unit_grid *g, const int shape[3], const int at[3])
{
    uint32_t bits = 0;
    int n[3];
    for (int a = 0; a < 3; a++)
        n[a] = nbhd_min(shape[a], g->size[a] - at[a] * shape[a]);
    for (int x = 0; x < n[0]; x++)
        for (int y = 0; y < n[1]; y++)
            bits |= (uint32_t)((1ull << n[2]) - 1) << (x * shape[1] + y) * shape[2];
    return bits;
}

static void unit_copy(const struct unit_grid *g, const int shape[3], const int at[3], const struct nbhd_params *p,
                      uint16_t *to)
{
    const uint32_t keys = unit_keys(g, shape, at);
    const float *k[GROUP], *v[GROUP];
    for (int i = 0; i < GROUP; i++) {
        const long long x = at[0] * shape[0] + i / shape[2] / shape[1], y = at[1] * shape[1] + i / shape[2] % shape[1];
        const long long z = at[2] * shape[2] + i % shape[2];
        const bool there = keys >> i & 1;
        k[i] = there ? (const float *)(g->k + x * g->k_step[0] + y * g->k_step[1] + z * g->k_step[2]) : NULL;
        v[i] = there ? (const float *)(g->v + x * g->v_step[0] + y * g->v_step[1] + z * g->v_step[2]) : NULL;
    }
    pack_keys(k, GROUP, p->head_dim, to);
    pack_values(v, GROUP, p->head_dim_v, to + GROUP * padded(p->head_dim));
}

/* If the tile is of another sequence than those before it, none of its units is there. */
static void begin_sequence(struct pair_scratch *c, const struct nbhd_fwd *f, const struct tile *t)
{
    const int sequence[5] = {t->batch, t->kv_head, t->axis[0].cell.group, t->axis[1].cell.group,
                             t->axis[2].cell.group};
    struct unit_cache *cache = c->unit_state;
    if (!memcmp(c->sequence, sequence, sizeof sequence))
        return;
    memcpy(c->sequence, sequence, sizeof sequence);
    cache->next = cache->block = 0;
    for (int i = 0; i < FWD_MOST_UNITS; i++)
        cache->slot[i] = -1;
    for (int i = 0; i < f->units.slots; i++)
        cache->unit[i] = cache->last_block[i] = -1;
}

/* The unit's keys, then its values; copied, if they are not there, in place of those that were copied longest ago and
 * are not of this block. */
static const uint16_t *unit_find(struct pair_scratch *c, const struct nbhd_params *p, const struct nbhd_fwd *f,
                                 const struct unit_grid *g, const int at[3])
{
    struct unit_cache *cache = c->unit_state;
    int *const slot = &cache->slot[(at[0] * g->count[1] + at[1]) * g->count[2] + at[2]];
    const bool there = *slot >= 0;
    while (*slot < 0) {
        const int next = cache->next;
        cache->next = next + 1 < f->units.slots ? next + 1 : 0;
        if (cache->last_block[next] == cache->block)
            continue;
        if (cache->unit[next] >= 0)
            cache->slot[cache->unit[next]] = -1;
        cache->unit[next] = (int)(slot - cache->slot);
        *slot = next;
    }
    uint16_t *const data = c->units + (size_t)*slot * (size_t)f->units.size;
    cache->last_block[*slot] = cache->block;
    if (!there)
        unit_copy(g, f->units.shape, at, p, data);
    return data;
}

/* n tiles that see the same keys. A window of FWD_GROUPS units is one block: outputs are made in one go. */
static void run_units(struct pair_slot *slots, int n, const struct nbhd_params *p, const struct nbhd_fwd *f,
                      struct pair_scratch *c)
{
    const struct tile *t = &slots[0].tile;
    const struct unit_grid grid = units_of(p, f, t);
    uint32_t seen[FWD_GROUPS][FWD_LANES];
    int begin[3], end[3], at[3], units = 1;
    begin_sequence(c, f, t);
    c->blocks->count = 0; /* nothing is asked for ahead: it costs the products as much as it saves */
    c->ahead = (struct pair_ahead){.b = c->blocks, .beats = 1};
    for (int a = 0; a < 3; a++) {
        at[a] = begin[a] = t->axis[a].any.begin / f->units.shape[a];
        end[a] = (t->axis[a].any.end + f->units.shape[a] - 1) / f->units.shape[a];
        units *= end[a] - begin[a];
    }
    for (int i = 0; i < n; i++)
        slot_begin(&slots[i], p);
    const int blocks = (units + FWD_GROUPS - 1) / FWD_GROUPS;
    for (int block = 0, unit = 0; block < blocks; block++) {
        const int stop = (int)((long long)units * (block + 1) / blocks);
        int groups = 0;
        for (c->unit_state->block++; unit < stop; unit++, groups++) {
            const uint32_t keys = unit_keys(&grid, f->units.shape, at);
            c->k[groups] = unit_find(c, p, f, &grid, at);
            c->v[groups] = c->k[groups] + GROUP * padded(p->head_dim);
            c->seen[groups] = keys == ~0u ? NULL : seen[groups];
            for (int i = 0; i < FWD_LANES && keys != ~0u; i++)
                seen[groups][i] = keys;
            for (int a = 2; a >= 0 && ++at[a] == end[a]; a--)
                at[a] = begin[a];
        }
        for (int i = 0; i < n; i++)
            groups_block(&slots[i], i + 1 < n ? &slots[i + 1] : NULL, p, c, groups);
    }
    struct nbhd_range box[3];
    tile_box(t, box);
    for (int i = 0; i < n; i++) {
        if (nbhd_counters)
            nbhd_count_visits(box_keys(box), 0);
        slot_end(&slots[i], p);
    }
}

static void pair_slots(struct pair_slot *slots, int n, const struct nbhd_params *p, const struct nbhd_fwd *f,
                       struct pair_scratch *c)
{
    if (f->units.slots)
        run_units(slots, n, p, f, c);
    else
        run_slots(slots, n, p, c);
}
