/* The warps of fwd_sm90 that prepare tiles and load boxes: what they tell the consumers stands in struct tables.
 * NBHD_* as in fwd_sm90.cu. */
#ifndef NBHD_DEVICE_LOADERS_SM90_CUH
#define NBHD_DEVICE_LOADERS_SM90_CUH

struct maps {
    struct nbhd_tensor_map q[NBHD_MAPS], kv[2][NBHD_MAPS], extra[2]; /* kv, extra: of K, of V; kv[slice][shape] */
};

/* ---- the preparing warp ---- */

/* The shape of key boxes that covers the tile's union with the fewest; a lane tries one shape. */
NBHD_FN int best_shape(const struct nbhd_boxes *b, const struct tile *t)
{
    int lane = threadIdx.x & 31, count = 1;
    const struct nbhd_key_box *k = &b->shape[nbhd_min(lane, NBHD_SHAPES - 1)];
    for (int a = 0; a < 3; a++)
        count *= (t->any[a].y - t->any[a].x + k->extent[a] - 1) / k->extent[a];
    int key = lane < NBHD_SHAPES ? count * 32 + lane : 0x7fffffff;
    for (int step = 16; step > 0; step /= 2)
        key = nbhd_min(key, __shfl_xor_sync(~0u, key, step));
    return key & 31;
}

/* The windows of the query box's coordinates, by `threads` threads. */
NBHD_FN void write_windows(const struct nbhd_params *p, const struct nbhd_boxes *b, int2 *window,
                           const struct place *at, int thread, int threads)
{
    int q0 = b->q_box[0], q1 = q0 + b->q_box[1];
#pragma unroll 1
    for (int i = thread; i < q1 + b->q_box[2]; i += threads) {
        int a = (i >= q0) + (i >= q1), x = at->origin[a] + i - (a > 1 ? q1 : a > 0 ? q0 : 0);
        struct nbhd_range keys = nbhd_keys(axis_of(p, b, at->slice, a), at->size[a], nbhd_min(x, at->size[a] - 1));
        window[i] = make_int2(keys.begin, keys.end);
    }
}

/* The tile's union and the warpgroups' intersections, read off the windows by one lane per axis. */
NBHD_FN void write_bounds(const struct nbhd_boxes *b, struct tile *t, const int2 *window)
{
    int a = threadIdx.x & 31;
    NBHD_PIN_R(&a, 1); /* else what follows from it has registers from tile to tile */
    if (a >= 3)
        return;
    window += (a > 0) * b->q_box[0] + (a > 1) * b->q_box[1];
    t->any[a] = make_int2(window[0].x, window[b->q_box[a] - 1].y);
    for (int g = 0; g < NBHD_GROUPS; g++)
        t->all[g][a] = make_int2(window[coordinate(b->high[g], a)].x, window[coordinate(b->low[g], a)].y);
}

/* Whether the last chunk of a head is cut off. */
#define CAN_BE_FLAT (NBHD_HEAD_DIM % 64 != 0 || NBHD_HEAD_DIM_V % 64 != 0)

NBHD_FN void load_q_box(const struct nbhd_boxes *b, struct tables *tab, const struct place *at,
                        const struct nbhd_tensor_map *maps, unsigned q_tiles, int stage)
{
    unsigned full = smem_address(&tab->q_full[stage]), tile = q_tiles + stage * Q_BYTES;
    int x[3], flat = CAN_BE_FLAT ? b->flat[0] : 0;
    for (int a = 0; a < 3; a++)
        x[a] = map_coordinate(b, at, at->origin, a);
    mbar_arrive_expect(full, QK_CHUNKS * b->rows * 128);
    for (int c = 0; c < QK_CHUNKS; c++)
        tma_load_5d(tile + c * (Q_ROWS * 128), maps + map_of(b, at), full, 64 * c + at->head * flat,
                    flat ? 0 : at->head, x[2], x[1], x[0]);
}

/* For each tile of the CTA its tables, then its Q, which may have to wait for the tile before. Of the first tile, which
 * nothing overlaps, all threads have written the windows, and Q is on its way: begin_cta. */
NBHD_FN void prepare_tiles(const struct nbhd_params *p, const struct nbhd_boxes *b, struct tables *tab,
                           const struct nbhd_tensor_map *q_maps, unsigned q_tiles, unsigned mask_keys)
{
    int lane = threadIdx.x & 31;
    for (int n = 0; n < tab->tiles; n++) {
        int slot = n % NBHD_TILES;
        struct tile *t = &tab->tile[slot];
        int2 *window = windows_of(b, tab, slot);
        if (n > 0) {
            mbar_wait(smem_address(&tab->tile_empty[slot]), ~(n / NBHD_TILES) & 1);
            write_windows(p, b, window, &tab->place[n], lane, 32);
        }
        if (lane < (int)sizeof(struct place) / 4)
            ((int *)&t->place)[lane] = ((const int *)&tab->place[n])[lane];
        if (lane == 0) {
            t->more = n + 1 < tab->tiles;
#if NBHD_MANY
            t->o = view_of(b, tab->place[n].slice, &p->o, 3);
            t->lse = view_of(b, tab->place[n].slice, &p->lse, 4);
#endif
        }
        __syncwarp();
        write_bounds(b, t, window);
        __syncwarp();
        int shape = NBHD_SHAPES > 1 ? best_shape(b, t) : 0;
        if (NBHD_SHAPES > 1 && shape != t->shape) /* else the slot still holds its mask keys */
            write_mask_keys(&b->shape[shape], mask_keys + slot * MASK_BYTES, lane, 32);
        __syncwarp();
        if (lane == 0)
            t->shape = shape;
        __syncwarp();
        write_columns(b, t, window);
        __syncwarp();
        if (lane == 0)
            mbar_arrive(smem_address(&tab->tile_full[slot]));
        if (n > 0) {
            mbar_wait(smem_address(&tab->q_empty[n % NBHD_Q_STAGES]), ~(n / NBHD_Q_STAGES) & 1);
            if (lane == 0)
                load_q_box(b, tab, &tab->place[n], q_maps, q_tiles, n % NBHD_Q_STAGES);
        }
    }
}

/* ---- the loading warps ---- */

/* Where a loading warp stands in its ring of stages. v: 0 for K, 1 for V; tiles: the first stage. */
struct ring {
    unsigned tiles;
    int v, stage, phase;
};

/* Waits until the ring's stage is free for a box of `keys`. Rows past the box meet zero probabilities, so they must not
 * be NaN: they are zeroed, where a larger box was here before. */
NBHD_FN void open_stage(const struct ring *r, struct tables *tab, int keys)
{
    int chunks = r->v ? PV_CHUNKS : QK_CHUNKS, lane = threadIdx.x & 31;
    mbar_wait(smem_address(&tab->empty[r->v][r->stage]), r->phase);
    if (!NBHD_PAD)
        return;
    int stale = (tab->filled[r->v][r->stage] - keys) * 8; /* 16-byte pieces per chunk */
    __syncwarp();
    if (stale == 0)
        return;
    unsigned stage = r->tiles + r->stage * chunks * (NBHD_N * 128) + keys * 128;
    for (int c = 0; c < chunks; c++)
        for (int i = lane; i < stale; i += 32)
            st_shared_v4(stage + c * (NBHD_N * 128) + 16 * i, make_uint4(0, 0, 0, 0));
    fence_proxy_async();
    if (lane == 0)
        tab->filled[r->v][r->stage] = keys;
    __syncwarp();
}

NBHD_FN void next_stage(struct ring *r)
{
    if (++r->stage == NBHD_STAGES)
        r->stage = 0, r->phase ^= 1;
}

/* By one lane: the box of `keys` at coordinates x0..x2 of the map. flat: as in struct nbhd_boxes. */
NBHD_FN void load_box(const struct ring *r, struct tables *tab, const struct nbhd_tensor_map *map, int keys, int head,
                      int flat, int x0, int x1, int x2)
{
    int chunks = r->v ? PV_CHUNKS : QK_CHUNKS;
    unsigned full = smem_address(&tab->full[r->v][r->stage]), to = r->tiles + r->stage * chunks * (NBHD_N * 128);
    mbar_arrive_expect(full, chunks * keys * 128);
    for (int c = 0; c < chunks; c++)
        tma_load_5d(to + c * NBHD_N * 128, map, full, 64 * c + head * flat, flat ? 0 : head, x0, x1, x2);
}

/* A tile's extra keys. */
NBHD_FN void load_extra(struct ring *r, const struct tile *t, struct tables *tab, const struct nbhd_tensor_map *map,
                        int extra)
{
    for (int at = 0; at < extra; at += NBHD_N) {
        open_stage(r, tab, NBHD_N);
        if ((threadIdx.x & 31) == 0) {
            struct box box = {at, NBHD_N, extra_flags(extra - at)};
            if (!r->v)
                tab->box[r->stage] = box;
            load_box(r, tab, map, NBHD_N, t->place.kv_head, 0, at, t->place.batch, 0);
        }
        next_stage(r);
    }
}

/* A tile's boxes of keys on the grid; last: flags of the last. All that a box needs is worked out before its stage is
 * free: the consumers wait for what comes after. */
NBHD_FN void load_grid(struct ring *r, const struct nbhd_boxes *b, const struct tile *t, struct tables *tab,
                       const struct nbhd_tensor_map *map, int last)
{
    const struct nbhd_key_box *k = &b->shape[t->shape];
    int origin[3] = {t->any[0].x, t->any[1].x, t->any[2].x}, kv_head = t->place.kv_head, is_last, axis, from;
    int lane = threadIdx.x & 31;
    find_column(t, &axis, &from);
    do {
        unsigned column = column_origin(origin, axis, from);
        int x0 = map_coordinate(b, &t->place, origin, 0), x1 = map_coordinate(b, &t->place, origin, 1),
            x2 = map_coordinate(b, &t->place, origin, 2);
        is_last = is_last_box(k, t->any, origin);
        struct box box = {origin[2], k->tokens, 0};
        if (!r->v)
            box.flags = (is_last ? last : 0) | mask_flags(k, t, origin);
        next_box(k, t->any, origin);
        open_stage(r, tab, k->tokens);
        if (!r->v && lane < MASK_COLUMNS)
            tab->origin[r->stage][lane] = column;
        __syncwarp();
        if (lane == 0) {
            if (!r->v)
                tab->box[r->stage] = box;
            load_box(r, tab, map, k->tokens, kv_head, CAN_BE_FLAT ? b->flat[1 + r->v] : 0, x2, x1, x0);
        }
        next_stage(r);
    } while (!is_last);
}

/* One loading warp: all boxes of K (v = 0) or V (v = 1) that the CTA's tiles need, extra keys first. K's also tells the
 * consumers where each box lies and what mask it needs. A box's V is in the stage after its K's: there the consumers
 * need it a step later. */
NBHD_FN void load_boxes(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct maps *maps,
                        struct tables *tab, int v, unsigned tiles)
{
    struct ring r = {tiles, v, 0, 1};
    if (v) { /* the first step's, before any box's: nothing is loaded */
        if ((threadIdx.x & 31) == 0)
            mbar_arrive(smem_address(&tab->full[1][0]));
        next_stage(&r);
    }
    for (int n = 0, more = 1; more; n++) {
        const struct tile *t = &tab->tile[n % NBHD_TILES];
        mbar_wait(smem_address(&tab->tile_full[n % NBHD_TILES]), n / NBHD_TILES & 1);
        more = t->more;
        if (NBHD_EXTRA)
            load_extra(&r, t, tab, &maps->extra[v], p->extra);
        load_grid(&r, b, t, tab, &maps->kv[v][map_of(b, &t->place) * NBHD_SHAPES + t->shape],
                  NBHD_SM90_LAST | (more ? 0 : NBHD_SM90_FINAL));
    }
}

#endif
