/* The rows of the float32 dQ that a tile of bwd_sm90.cu clears for a head to come, and those of a head that is done,
 * which it converts: by the loading warp that has nothing to load, beside the products. The copy engine moves them, as
 * an instruction of this warp is one that the others cannot issue.
 *
 * A unit is all tiles of a key/value head of a batch element. Tiles are numbered unit after unit, and a CTA takes the
 * next number when it begins, so that all tiles of lower numbers have begun. It waits (await_count) only for tiles of
 * units before its own, for sums that these have cleared or added. Hence the tile of the lowest number that is not done
 * waits for nobody, and all come to an end, however many CTAs run at a time and in whatever order they are started.
 *
 *     shared memory, the kernel's own: | a row of zeros | 2 chunks of TEND_ROWS rows | */
#ifndef NBHD_DEVICE_TEND_SM90_CUH
#define NBHD_DEVICE_TEND_SM90_CUH

#include "device/sums_sm90.cuh"

#define TEND_ROWS 4
#define TEND_LANES (NBHD_HEAD_DIM > 64 ? 32 : NBHD_HEAD_DIM > 32 ? 16 : 8) /* of a row, four columns each */
#define SUM_BYTES (NBHD_HEAD_DIM * 4)

/* The place in the grid of the next tile that nobody has begun. For the whole CTA. */
NBHD_FN uint3 next_tile(const struct nbhd_bwd_boxes *b, struct tables *tab)
{
    uint3 at;
    if (threadIdx.x == 0)
        tab->scratch = take_number(&b->counts[2 * b->units]);
    __syncthreads();
    at.x = tab->scratch % gridDim.x;
    at.z = tab->scratch / gridDim.x;
    at.y = at.z % gridDim.y;
    at.z = at.z / gridDim.y - b->slice_begin; /* units are slices of heads, as there is no dilation */
    return at;
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
    uint4 x = ld_shared_v4(row + fresh_thread() % TEND_LANES * 16);
    return make_uint2(pack(__uint_as_float(x.x) * scale, __uint_as_float(x.y) * scale),
                      pack(__uint_as_float(x.z) * scale, __uint_as_float(x.w) * scale));
}

/* By a warp. full: two barriers of one arrival. */
NBHD_FN void convert_part(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct part *t,
                          unsigned chunks, unsigned full)
{
    const float *sum = sum_address(p, b->sums, t->batch, t->head, t->first);
    struct query q = query_at(p, t->first + (fresh_thread() & 31) / TEND_LANES);
    char *dq = p->dq.data + t->batch * p->dq.batch + t->head * p->dq.head;
    int left = t->rows;
    if ((fresh_thread() & 31) == 0 && left > 0)
        load_chunk(p, sum, nbhd_min(TEND_ROWS, left), chunks, full, 0);
#pragma unroll 1
    for (int i = 0; left > 0; i++, left -= TEND_ROWS) {
        sum += TEND_ROWS * NBHD_HEAD_DIM * p->heads;
        if ((fresh_thread() & 31) == 0 && left > TEND_ROWS)
            load_chunk(p, sum, nbhd_min(TEND_ROWS, left - TEND_ROWS), chunks, full, i + 1);
        mbar_wait(full + (i & 1) * 8, i >> 1 & 1);
#pragma unroll 1
        for (int r = (fresh_thread() & 31) / TEND_LANES; r < TEND_ROWS; r += 32 / TEND_LANES) {
            char *row = dq + place_of(&p->dq, &q) + fresh_thread() % TEND_LANES * 8;
            if (r < left && fresh_thread() % TEND_LANES * 4 < NBHD_HEAD_DIM)
                *(uint2 *)row = convert(chunks + ((i & 1) * TEND_ROWS + r) * SUM_BYTES, p->scale);
            step_query(p, &q, 32 / TEND_LANES);
        }
        __syncwarp(); /* all have read the chunk, which the next but one overwrites */
    }
}

/* By a warp. memory: as above. */
NBHD_FN void tend_sums(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab,
                       unsigned memory)
{
    int unit = unit_of(p, tab), lane = threadIdx.x & 31;
    if (unit + b->lag < b->units) {
        for (int i = lane; i < SUM_BYTES / 16; i += 32)
            st_shared_v4(memory + i * 16, make_uint4(0, 0, 0, 0));
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) {
            struct part t = part_of(p, b, tab, unit + b->lag);
            clear_part(p, b, &t, memory);
            count_up(&b->counts[unit + b->lag]);
        }
        __syncwarp();
    }
    if (unit >= b->lag) {
        struct part t = part_of(p, b, tab, unit - b->lag);
        await_count(&b->counts[b->units + unit - b->lag], gridDim.x);
        convert_part(p, b, &t, memory + SUM_BYTES, smem_address(&tab->own[0]));
    }
}

#endif
