/* What a CTA that holds a tile of keys (keys_sm90.cuh) does before the first box of queries: its tables, the bounds of
 * the queries that see its keys, the shape of their boxes, the load of its keys, the queries' mask columns. */
#ifndef NBHD_DEVICE_KEY_SETUP_SM90_CUH
#define NBHD_DEVICE_KEY_SETUP_SM90_CUH

#include "device/keys_sm90.cuh"

/* The shape of query boxes that covers the tile's union with the fewest. */
NBHD_FN int best_shape(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct place *t)
{
    int length[3], best = 0, least = 0;
#pragma unroll 1
    for (int a = 0; a < 3; a++) {
        int origin = of_axis(t->origin, a), queries = of_axis(t->queries, a);
        int last = nbhd_min(origin + b->k_box[a], of_axis(t->keys, a)) - 1;
        int count = nbhd_queries(p->axis[a], queries, last).end - nbhd_queries(p->axis[a], queries, origin).begin;
        length[0] = a == 0 ? count : length[0];
        length[1] = a == 1 ? count : length[1];
        length[2] = count;
    }
#pragma unroll 1
    for (int i = 0; i < b->shapes; i++) {
        int count = 1;
        for (int a = 0; a < 3; a++)
            count *= (length[a] + b->shape[i].extent[a] - 1) / b->shape[i].extent[a];
        if (i == 0 || count < least)
            best = i, least = count;
    }
    return best;
}

NBHD_FN void load_keys(const struct nbhd_bwd_boxes *b, const struct memory *m, const struct maps *maps, int slice)
{
    const struct tables *tab = m->tab;
    const struct place *t = &tab->place;
    unsigned full = smem_address(&tab->kv_full);
    mbar_arrive_expect(full, (K_CHUNKS + V_CHUNKS) * b->rows * 128);
    for (int c = 0; c < K_CHUNKS; c++)
        tma_load_5d(m->k + c * ROWS * 128, &maps->k[slice], full, 64 * c, t->kv_head, t->origin[2], t->origin[1],
                    slowest(b, tab, t->origin));
    for (int c = 0; c < V_CHUNKS; c++)
        tma_load_5d(m->v + c * ROWS * 128, &maps->v[slice], full, 64 * c, t->kv_head, t->origin[2], t->origin[1],
                    slowest(b, tab, t->origin));
}

NBHD_FN void prepare(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct place *t,
                     struct tables *tab)
{
    int thread = threadIdx.x;
    if (thread == 32) /* each shape has maps of its own */
        tab->shape = NBHD_MAPS > 1 && b->shapes > 1 ? best_shape(p, b, t) : 0;
    if (thread == 0) {
        mbar_init(smem_address(&tab->kv_full), 1);
        for (int i = 0; i < STAGES; i++) {
            mbar_init(smem_address(&tab->q_full[i]), 1);
            mbar_init(smem_address(&tab->do_full[i]), 33); /* the copy engine's thread; each lane for its statistics */
            mbar_init(smem_address(&tab->q_empty[i]), 4 * NBHD_GROUPS); /* one lane of each consumer warp */
            mbar_init(smem_address(&tab->do_empty[i]), 4 * NBHD_GROUPS);
        }
        mbar_fence_init();
        tab->place = *t;
    }
    int first[3] = {0, b->k_box[0], b->k_box[0] + b->k_box[1]};
#pragma unroll 1 /* here and below: what runs once a CTA is compiled once */
    for (int i = thread; i < ROWS; i += THREADS)
        tab->row[i] = b->row[i];
#pragma unroll 1
    for (int i = thread; i < SLOTS * NBHD_N; i += THREADS) /* rows past a box: never loaded */
        tab->lse[0][i] = tab->delta[0][i] = 0;
#pragma unroll 1
    for (int i = thread; i < first[2] + b->k_box[2]; i += THREADS) {
        int a = (i >= first[1]) + (i >= first[2]), key = of_axis(t->origin, a) + i - of_axis(first, a);
        struct nbhd_range seen = nbhd_range_of(NOWHERE, 0);
        if (key < of_axis(t->keys, a))
            seen = nbhd_queries(p->axis[a], of_axis(t->queries, a), key);
        tab->window[i] = make_int2(seen.begin, seen.end);
    }
}

/* Leaves the queries of this part, of a tile's union on the axis that is shared out. */
NBHD_FN void take_part(const struct nbhd_bwd_boxes *b, const struct place *t, int2 *any)
{
    int begin = any->x + t->part * b->part_queries, end = begin + b->part_queries;
    if (t->part == b->parts - 1 || end > any->y)
        end = any->y;
    *any = make_int2(begin < end ? begin : NOWHERE, end); /* none: one box far outside */
}

/* The tile's union and the warpgroups' intersections, read off the windows by one thread per axis. */
NBHD_FN void prepare_bounds(const struct nbhd_bwd_boxes *b, struct tables *tab)
{
    int a = threadIdx.x;
    if (a >= 3)
        return;
    const int2 *window = tab->window + (a > 0) * b->k_box[0] + (a > 1) * b->k_box[1];
    int last = nbhd_min(b->k_box[a], tab->place.keys[a] - tab->place.origin[a]) - 1;
    tab->any[a] = make_int2(window[0].x, window[last].y);
    if (tab->place.split >= 0 && a == b->part_axis)
        take_part(b, &tab->place, &tab->any[a]);
    for (int g = 0; g < BLOCKS; g++) {
        int2 all = make_int2(window[coordinate(b->high[g], a)].x, window[coordinate(b->low[g], a)].y);
        tab->all[g][a] = 64 * (g + 1) > b->rows ? make_int2(NOWHERE, 0) : all;
        int low = coordinate(b->low[g], a), high = nbhd_min(coordinate(b->high[g], a), last);
        tab->some[g][a] = low > last ? make_int2(NOWHERE, 0) : make_int2(window[low].x, window[high].y);
    }
}

/* Zeros in the rows past the boxes, which no copy fills. */
NBHD_FN void clear_rows(unsigned tiles, int chunks, int rows, int used)
{
    int unused = (rows - used) * 8; /* 16-byte pieces of a chunk */
#pragma unroll 1
    for (int i = threadIdx.x; i < unused * chunks; i += THREADS)
        st_shared_v4(tiles + i / unused * (rows * 128) + used * 128 + i % unused * 16, make_uint4(0, 0, 0, 0));
}

/* The queries' one-hot columns: tiles of 16 columns, a query's 32 bytes a row, 32-byte swizzle (address bit 4 ^= bit
 * 7). */
NBHD_FN void write_mask_queries(const struct nbhd_query_box *q, unsigned queries)
{
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * NBHD_MASK_STEPS * NBHD_N; i += THREADS) {
        int piece = i / NBHD_N, r = i % NBHD_N; /* 8 columns of a query */
        int at[3] = {r / (q->extent[1] * q->extent[2]), r / q->extent[2] % q->extent[1], r % q->extent[2]};
        unsigned words[4] = {0, 0, 0, 0};
        for (int a = 0; a < 3; a++) {
            int column = q->mask_at[a] + at[a] - 8 * piece;
            for (int w = 0; w < 4; w++)
                if (q->mask_at[a] >= 0 && r < q->queries && column >> 1 == w)
                    words[w] |= MASK_ONE << 16 * (column & 1);
        }
        st_shared_v4(queries + piece / 2 * (NBHD_N * 32) + r * 32 + ((piece & 1) << 4 ^ (r & 4) << 2),
                     make_uint4(words[0], words[1], words[2], words[3]));
    }
}

/* What depends on the shape that was chosen. */
NBHD_FN void prepare_shape(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct memory *m)
{
    const struct nbhd_query_box *q = &b->shape[m->tab->shape];
    if (threadIdx.x == 0)
        m->tab->q = *q;
#pragma unroll 1
    for (int i = threadIdx.x; i < q->queries; i += THREADS) {
        int at[3] = {i / (q->extent[1] * q->extent[2]), i / q->extent[2] % q->extent[1], i % q->extent[2]};
        int distance = 0;
        for (int a = 0; a < 3; a++)
            distance = distance * p->axis[a].length + at[a] * p->axis[a].dilation;
        m->tab->query[i] = make_int2(at[0] | at[1] << 8 | at[2] << 16, distance);
    }
    clear_rows(m->q, STAGES * (K_CHUNKS + V_CHUNKS), NBHD_N, q->queries);
    if (NBHD_MASK_STEPS)
        write_mask_queries(q, m->queries);
}

/* All that comes before the first box of a tile. False where there is none: in a dilation group with fewer elements
 * than the first. */
NBHD_FN int set_up(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct maps *maps,
                   const struct memory *m, struct place t)
{
    if (t.origin[0] >= t.keys[0] || t.origin[1] >= t.keys[1] || t.origin[2] >= t.keys[2])
        return 0;
    prepare(p, b, &t, m->tab);
    if (threadIdx.x == 0) /* the tables are made meanwhile */
        load_keys(b, m, maps, t.slice);
    clear_rows(m->k, K_CHUNKS + V_CHUNKS, ROWS, b->rows);
    __syncthreads();
    prepare_bounds(b, m->tab);
    prepare_shape(p, b, m);
    fence_proxy_async();
    __syncthreads();
    return 1;
}

#endif
