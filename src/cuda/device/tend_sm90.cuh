/* The rows of the dQ in the workspace that a tile of bwd_sm90.cu clears for a head to come, and those of a head that is
 * done, which it converts: by the loading warp that has nothing to load, beside the products. The copy engine moves
 * them, as an instruction of this warp is one that the others cannot issue.
 *
 * A unit is all tiles of a key/value head of a batch element. Tiles are numbered unit after unit, and a CTA takes the
 * next number when it begins, so that all tiles of lower numbers have begun. It waits (await_count) only for those: of
 * units before its own, for sums that they have cleared or added; for parts of its tile. Hence the tile of the lowest
 * number that is not done waits for nobody, and all come to an end, however many CTAs run at a time and in whatever
 * order they are started.
 *
 *     shared memory, the kernel's own: | a row of zeros | 2 chunks of TEND_ROWS rows | */
#ifndef NBHD_DEVICE_TEND_SM90_CUH
#define NBHD_DEVICE_TEND_SM90_CUH

#include "device/sums_sm90.cuh"

#define TEND_ROWS 4
#define SUM_BYTES (NBHD_HEAD_DIM * 4)

/* The next tile that nobody has begun, or part of one. For the whole CTA. */
NBHD_FN struct place next_tile(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab)
{
    uint3 at;
    if (threadIdx.x == 0)
        tab->scratch = take_number(b->next);
    __syncthreads();
    unsigned number = tab->scratch, again = number < b->whole ? 0 : (number - b->whole) / b->last;
    number -= again * b->last;
    at.x = number % b->unit_tiles;
    at.z = number / b->unit_tiles;
    at.y = at.z % p->kv_heads;
    at.z = at.z / p->kv_heads - b->slice_begin; /* units are slices of heads, as there is no dilation */
    struct place t = tile_place(p, b, at);
    t.part = again;
    t.split = b->parts > 1 && number >= b->whole ? (int)(number - b->whole) : -1;
    return t;
}

NBHD_FN int unit_of(const struct nbhd_params *p, const struct tables *tab)
{
    return tab->place.batch * p->kv_heads + tab->place.kv_head;
}

/* This tile's part of a unit's rows: consecutive queries of one head. */
struct part {
    int batch, head, first, rows;
};

NBHD_FN struct part part_of(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct tables *tab,
                            int unit)
{
    int share = p->heads / p->kv_heads;
    struct part t;
    t.batch = unit / p->kv_heads;
    t.head = unit % p->kv_heads * share + tab->place.tile % share;
    t.first = tab->place.tile / share * b->part;
    t.rows = nbhd_min(b->part, queries_of(p) - t.first);
    return t;
}

/* By one thread. */
NBHD_FN void clear_part(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct part *t,
                        unsigned zeros)
{
    float *sum = sum_address(p, b->sums, t->batch, t->head, t->first);
#pragma unroll 1
    for (int i = 0; i < t->rows; i++, sum += NBHD_HEAD_DIM * p->heads)
        bulk_store(sum, zeros, SUM_BYTES);
    bulk_commit();
    bulk_wait_0();
}

/* Begins to load the i-th chunk, of `rows` rows from this one on; by one thread. */
NBHD_FN void load_chunk(const struct nbhd_params *p, const float *sum, int rows, unsigned chunks, unsigned full, int i)
{
    chunks += (i & 1) * TEND_ROWS * SUM_BYTES;
    full += (i & 1) * 8;
    mbar_arrive_expect(full, rows * SUM_BYTES);
#pragma unroll 1
    for (; rows > 0; rows--, chunks += SUM_BYTES, sum += NBHD_HEAD_DIM * p->heads)
        bulk_load(chunks, sum, SUM_BYTES, full);
}

/* This lane's four columns of a row in shared memory, times scale. */
NBHD_FN uint2 convert(unsigned row, float scale)
{
    uint4 x = ld_shared_v4(row + (fresh_thread() & 31) * 16);
    return make_uint2(pack(sum_of(x.x) * scale, sum_of(x.y) * scale), pack(sum_of(x.z) * scale, sum_of(x.w) * scale));
}

/* By a warp. full: two barriers of one arrival. */
NBHD_FN void convert_part(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct part *t,
                          unsigned chunks, unsigned full)
{
    const float *sum = sum_address(p, b->sums, t->batch, t->head, t->first);
    struct query q = query_at(p, t->first);
    char *dq = p->dq.data + t->batch * p->dq.batch + t->head * p->dq.head;
    int left = t->rows;
    unsigned number = (t->batch * p->heads + t->head) * queries_of(p) + t->first;
    if ((fresh_thread() & 31) == 0 && left > 0)
        load_chunk(p, sum, nbhd_min(TEND_ROWS, left), chunks, full, 0);
#pragma unroll 1
    for (int i = 0; left > 0; i++, left -= TEND_ROWS) {
        sum += TEND_ROWS * NBHD_HEAD_DIM * p->heads;
        if ((fresh_thread() & 31) == 0 && left > TEND_ROWS)
            load_chunk(p, sum, nbhd_min(TEND_ROWS, left - TEND_ROWS), chunks, full, i + 1);
        mbar_wait(full + (i & 1) * 8, i >> 1 & 1);
#pragma unroll 1
        for (int r = 0; r < TEND_ROWS && r < left; r++) {
            char *row = dq + place_of(&p->dq, &q) + (fresh_thread() & 31) * 8;
            if ((fresh_thread() & 31) * 4 < NBHD_HEAD_DIM)
                *(uint2 *)row = convert(chunks + ((i & 1) * TEND_ROWS + r) * SUM_BYTES,
                                        p->scale * weight_of(b->fineness, number));
            step_query(p, &q);
            number++;
        }
        __syncwarp(); /* all have read the chunk, which the next but one overwrites */
    }
}

/* By a warp. memory: as above. */
NBHD_FN void tend_sums(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab,
                       unsigned memory)
{
    if (tab->place.part)
        return; /* the first part does it */
    if (unit_of(p, tab) + b->lag < b->units) {
        for (int i = fresh_thread() & 31; i < SUM_BYTES / 16; i += 32)
            st_shared_v4(memory + i * 16, make_uint4(0, 0, 0, 0));
        fence_proxy_async();
        __syncwarp();
        if ((fresh_thread() & 31) == 0) {
            struct part t = part_of(p, b, tab, unit_of(p, tab) + b->lag);
            clear_part(p, b, &t, memory);
            count_up(&b->counts[unit_of(p, tab) + b->lag]);
        }
        __syncwarp();
    }
    int done = unit_of(p, tab) - b->lag;
    if (done < 0)
        return;
    struct part t = part_of(p, b, tab, done);
    await_count(&b->counts[b->units + done], b->unit_tiles);
    convert_part(p, b, &t, memory + SUM_BYTES, smem_address(&tab->own[0]));
    if (unit_of(p, tab) == b->lag && (fresh_thread() & 31) == 0)
        count_up(b->converted);
}

#endif
