/* The frame of bwd_sm90_dq.cu: a CTA that holds a tile of queries and streams the boxes of keys that they
 * see. Where the tile lies, its tables in shared memory, the threads that load the boxes, masks, and rows out.
 *
 * Tiles, boxes and rows of shared memory are as in fwd_sm90.cu, but a CTA has one tile.
 *
 * A mask is one or two more k-steps of Q K^T (struct nbhd_key_box): it adds -2^100 per axis on which a query does not
 * see a key (-2^30 in float16: there scores must stay below 2^29). Problems of one axis and the tail of extra keys are
 * masked bit by bit instead. Only boxes that reach past what all rows of a warpgroup see are masked at all.
 *
 * The kernel defines, before it includes this: K_STAGES, V_STAGES: boxes of K, of V, in flight, the first no fewer. */
#ifndef NBHD_DEVICE_QUERIES_SM90_CUH
#define NBHD_DEVICE_QUERIES_SM90_CUH

#ifndef NBHD_HEAD_DIM
#error "NBHD_HEAD_DIM: of q and k, a multiple of 8 up to 256"
#endif
#ifndef NBHD_HEAD_DIM_V
#error "NBHD_HEAD_DIM_V: of v and o, a multiple of 8 up to 256"
#endif
#ifndef NBHD_DTYPE
#error "NBHD_DTYPE: 1 for float16, 2 for bfloat16; goes with NBHD_MMA_TYPE"
#endif
#ifndef NBHD_N
#error "NBHD_N: keys of a box, a multiple of 16 up to 256"
#endif
#ifndef NBHD_QK
#error "NBHD_QK: the instruction of Q K^T, wgmma_ss_n<N>"
#endif
#ifndef NBHD_GROUPS
#error "NBHD_GROUPS: consumer warpgroups, 1 to 3"
#endif
#ifndef NBHD_CTAS
#error "NBHD_CTAS: CTAs per multiprocessor"
#endif
#ifndef NBHD_STAGES
#error "NBHD_STAGES: boxes of K, and of V, in flight"
#endif
#ifndef NBHD_MASK_STEPS
#error "NBHD_MASK_STEPS: masks of boxes as more columns of the product: their number / 16, 0 to 2"
#endif
#ifndef NBHD_MASK
#error "NBHD_MASK: the instruction of those columns, wgmma_rs_n<N>"
#endif
#ifndef NBHD_MASK_BITS
#error "NBHD_MASK_BITS: 1 where keys are masked by their number: boxes of 1 x 1 x N, extra keys"
#endif
#ifndef NBHD_MAPS
#error "NBHD_MAPS: room for maps in the arguments: slices x shapes of key boxes"
#endif
#if !defined(NBHD_REGISTERS_LOAD) || !defined(NBHD_REGISTERS_MATH)
#error "NBHD_REGISTERS_LOAD, NBHD_REGISTERS_MATH: per thread of the loading and of the consumer warpgroups"
#endif

#define NBHD_DILATED 1

#include "nbhd_params.h"
#include "device/boxes_sm90.cuh"
#include "device/ptx.cuh"
#include "device/scores_sm90.cuh"
#include "device/tma_sm90.cuh"
#include "device/wgmma_sm90.cuh"

#define QK_STEPS ((NBHD_HEAD_DIM + 15) / 16)
#define PV_STEPS ((NBHD_HEAD_DIM_V + 15) / 16)
#define QK_CHUNKS ((NBHD_HEAD_DIM + 63) / 64)
#define PV_CHUNKS ((NBHD_HEAD_DIM_V + 63) / 64)
#define Q_ROWS (64 * NBHD_GROUPS)
#define K_BYTES (QK_CHUNKS * NBHD_N * 128)
#define V_BYTES (PV_CHUNKS * NBHD_N * 128)
#define MASK_BYTES (NBHD_MASK_STEPS * NBHD_N * 32)
#define THREADS (128 * (NBHD_GROUPS + 1))

struct maps {
    struct nbhd_tensor_map q[NBHD_MAPS], kv[2][NBHD_MAPS], extra[2]; /* kv, extra: of K, of V; kv[slice][shape] */
};

/* Where this CTA's tile lies: origin in elements of its dilation group, and the group. */
struct place {
    int origin[3], group[3], size[3], shift[3]; /* shift: selects the group and the batch in the maps' coordinates */
    int batch, head, kv_head;
};

/* Beside the tiles in shared memory. [2]: of K, of V. */
struct tables {
    unsigned long long q_full, full[2][K_STAGES], empty[2][K_STAGES];
    int4 box[K_STAGES];          /* of each K stage: origin on the three axes, flags */
    unsigned row[Q_ROWS];        /* as in struct nbhd_boxes */
    unsigned origin[K_STAGES][4]; /* of each K stage: as find_mask takes it, in both halves */
    int2 window[Q_ROWS + 2];     /* keys seen from each coordinate of the query box, axis after axis */
    int2 any[3], all[NBHD_GROUPS][3]; /* keys that some row of the tile, that all rows of a warpgroup see, per axis */
    struct place place;          /* here, since no role has the registers for it */
    int shape;                   /* of this tile's key boxes */
    unsigned scratch;
};

NBHD_STATIC_ASSERT(sizeof(struct tables) <= NBHD_SM90_TABLES(NBHD_GROUPS, K_STAGES), "the host counts on it");

#include "device/query_tiles_sm90.cuh"

NBHD_FN struct place tile_place(const struct nbhd_params *p, const struct nbhd_boxes *b)
{
    struct place t;
    int x = b->reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    int slice = b->slice_begin + blockIdx.z;
    t.origin[0] = x % b->tiles[0], x /= b->tiles[0];
    t.origin[2] = x % b->tiles[2];
    t.origin[1] = x / b->tiles[2];
    for (int a = 2; a >= 0; a--) {
        t.origin[a] *= b->q_box[a];
        t.group[a] = 0;
        t.size[a] = p->axis[a].length;
        if (p->axis[a].dilation > 1) {
            t.group[a] = slice % p->axis[a].dilation;
            slice /= p->axis[a].dilation;
            t.size[a] = nbhd_group_size(p->axis[a], t.group[a]);
        }
    }
    t.batch = slice;
    for (int a = 0; a < 3; a++) /* rank 3 with a batch is sliced, so group or batch is 0 */
        t.shift[a] = b->sliced ? 0 : t.group[a] + (a == 0 ? t.batch : 0);
    t.head = blockIdx.y * b->pack;
    t.kv_head = p->heads == p->kv_heads ? t.head : t.head / (p->heads / p->kv_heads);
    return t;
}

/* Part of q_full's copies: the tile's rows of Q or of a gradient of O, `chunks` of 64 columns. */
NBHD_FN void load_rows(const struct nbhd_boxes *b, const struct place *t, const struct tables *tab,
                       const struct nbhd_tensor_map *map, unsigned tile, int chunks)
{
    for (int c = 0; c < chunks; c++)
        tma_load_5d(tile + c * (Q_ROWS * 128), map, smem_address(&tab->q_full), 64 * c, t->head,
                    map_coordinate(b, t, t->origin, 2), map_coordinate(b, t, t->origin, 1),
                    map_coordinate(b, t, t->origin, 0));
}

/* Axes, as bits 4g + a, on which warpgroup g needs a mask for the box at origin. */
NBHD_FN int mask_flags(const struct nbhd_key_box *k, const struct tables *tab, const int *origin)
{
    int flags = k->tokens < NBHD_N ? 4 * NBHD_SM90_ALL_GROUPS : 0; /* columns past the box */
#pragma unroll 1
    for (int g = NBHD_GROUPS - 1; g >= 0; g--)
#pragma unroll
        for (int a = 0; a < 3; a++) {
            int2 all = tab->all[g][a];
            flags |= (origin[a] < all.x || origin[a] + k->extent[a] > all.y) << (4 * g + a);
        }
    return flags;
}

/* One loading thread: all boxes of K (v = 0) or V (v = 1) that the tile needs, extra keys first. K's also tells the
 * consumers where each box lies and what mask it needs. tiles: the first stage; map, extra: K's or V's.
 * All that a box needs is worked out before its stage is free: the consumers wait for what comes after. */
NBHD_FN void load_boxes(const struct nbhd_boxes *b, struct tables *tab, int v, unsigned tiles, int extra_keys,
                        const struct nbhd_tensor_map *map, const struct nbhd_tensor_map *extra)
{
    const struct nbhd_key_box *k = &b->shape[tab->shape];
    int origin[3], stage = 0, phase = 1, flags;
    int chunks = v ? PV_CHUNKS : QK_CHUNKS, stages = v ? V_STAGES : K_STAGES, kv_head = tab->place.kv_head;
    for (int at = 0; at < extra_keys; at += NBHD_N) {
        unsigned full = smem_address(&tab->full[v][stage]), dst = tiles + stage * chunks * (NBHD_N * 128);
        mbar_wait(smem_address(&tab->empty[v][stage]), phase);
        if (!v)
            tab->box[stage] = make_int4(0, 0, at, extra_flags(extra_keys - at));
        mbar_arrive_expect(full, chunks * NBHD_N * 128);
        for (int c = 0; c < chunks; c++)
            tma_load_5d(dst + c * NBHD_N * 128, extra, full, 64 * c, kv_head, at, tab->place.batch, 0);
        if (++stage == stages)
            stage = 0, phase ^= 1;
    }
    for (int a = 0; a < 3; a++)
        origin[a] = tab->any[a].x;
    do {
        unsigned full = smem_address(&tab->full[v][stage]), dst = tiles + stage * chunks * (NBHD_N * 128);
        int4 box = make_int4(origin[0], origin[1], origin[2], 0);
        unsigned from_union[3];
        for (int a = 0; a < 3; a++)
            from_union[a] = (unsigned)(origin[a] - tab->any[a].x + MASK_BIAS) * 0x10001;
        int x0 = map_coordinate(b, &tab->place, origin, 0), x1 = map_coordinate(b, &tab->place, origin, 1),
            x2 = map_coordinate(b, &tab->place, origin, 2);
        flags = is_last_box(k, tab->any, origin) ? NBHD_SM90_LAST : 0;
        box.w = v ? 0 : flags | mask_flags(k, tab, origin);
        next_box(k, tab->any, origin);
        mbar_wait(smem_address(&tab->empty[v][stage]), phase);
        if (!v) {
            tab->box[stage] = box;
            for (int a = 0; a < 3; a++)
                tab->origin[stage][a] = from_union[a];
        }
        mbar_arrive_expect(full, chunks * k->tokens * 128);
#pragma unroll 1 /* unrolled, some kernels of narrow queries and wide values spill */
        for (int c = 0; c < chunks; c++)
            tma_load_5d(dst + c * NBHD_N * 128, map, full, 64 * c, kv_head, x2, x1, x0);
        if (++stage == stages)
            stage = 0, phase ^= 1;
    } while (!flags);
}

/* The bits of a box of consecutive keys that one row sees; q: the lane's quarter. */
NBHD_FN word row_bits(const struct nbhd_boxes *b, const struct tables *tab, int4 box, int extra_keys, unsigned row,
                      int q)
{
    if (box.w & NBHD_SM90_EXTRA)
        return bits_below(extra_keys - box.z, q);
    int2 window = tab->window[b->q_box[0] + b->q_box[1] + coordinate(row, 2)];
    int end = nbhd_min(window.y - box.z, b->shape[0].tokens);
    return bits_below(end, q) & ~bits_below(window.x - box.z, q);
}

/* What a thread knows of its part of the queries' mask columns. An A operand of a step has four columns of it: 2q,
 * 2q + 1, 2q + 8, 2q + 9. For each: the column's axis, and the bounds between which a box's origin on that axis must
 * lie for the column's key to be seen by the thread's rows, as 0x8000 - bound, row 1's in the upper half. A sum
 * with an origin then has the sign bit of a half set where the origin has reached the bound. */
#define MASK_PROBES (4 * NBHD_MASK_STEPS + !NBHD_MASK_STEPS)
struct probes {
    unsigned begin[MASK_PROBES], end[MASK_PROBES], axis[MASK_PROBES];
};

NBHD_FN void find_probes(struct probes *p, const struct nbhd_boxes *b, const struct tables *tab, unsigned row0,
                         unsigned row1, int q)
{
    const struct nbhd_key_box *k = &b->shape[tab->shape];
#pragma unroll
    for (int i = 0; i < 4 * NBHD_MASK_STEPS; i++) {
        int column = i / 4 * 16 + 2 * q + i % 2 + (i & 2) * 4;
        p->axis[i] = 0;
        p->begin[i] = 0x80008000; /* seen from anywhere */
        p->end[i] = column == k->mask_at[3] ? 0x80008000 : 0; /* or from nowhere: keys past the box */
        for (int a = 0, first = 0; a < 3; first += b->q_box[a++]) {
            int x = column - k->mask_at[a];
            if (k->mask_at[a] < 0 || x < 0 || x >= k->extent[a])
                continue;
            int shift = tab->any[a].x + x - MASK_BIAS;
            int2 w0 = tab->window[first + coordinate(row0, a)], w1 = tab->window[first + coordinate(row1, a)];
            p->axis[i] = a;
            p->begin[i] = 0x80008000 - (w0.x - shift) - ((unsigned)(w1.x - shift) << 16);
            p->end[i] = 0x80008000 - (w0.y - shift) - ((unsigned)(w1.y - shift) << 16);
        }
    }
}

/* The A operands of the mask columns for the box in this stage. */
NBHD_FN void find_mask(unsigned *a, const struct probes *p, const struct tables *tab, int stage)
{
#pragma unroll
    for (int i = 0; i < 2 * NBHD_MASK_STEPS; i++) { /* a pair of columns, for both rows */
        unsigned unseen[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            unsigned origin = tab->origin[stage][p->axis[2 * i + c]];
            unseen[c] = ~(origin + p->begin[2 * i + c]) | (origin + p->end[2 * i + c]);
        }
        mask_operands(a + 2 * i, unseen[0], unseen[1]);
    }
}

/* Issues the mask's part of S for the box in `stage`; to be committed. keys: the keys' columns, see write_mask_keys. */
NBHD_FN void issue_mask(float *s, const struct probes *p, const struct tables *tab, int stage, unsigned keys)
{
    unsigned a[MASK_PROBES];
    find_mask(a, p, tab, stage);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_MASK_STEPS; i++)
        NBHD_MASK(s, a + 4 * i, wgmma_k_major_32(keys + i * NBHD_N * 32), 1);
}

/* The keys' mask columns: tiles of 16 columns, a key's 32 bytes a row, 32-byte swizzle (address bit 4 ^= bit 7). */
NBHD_FN void write_mask_keys(const struct nbhd_key_box *k, unsigned keys)
{
    for (int i = threadIdx.x; i < 2 * NBHD_MASK_STEPS * NBHD_N; i += THREADS) {
        int piece = i / NBHD_N, key = i % NBHD_N; /* 8 columns of a key */
        int one[3] = {key / (k->extent[1] * k->extent[2]), key / k->extent[2] % k->extent[1], key % k->extent[2]};
        unsigned words[4] = {0, 0, 0, 0};
        for (int a = 0; a < 4; a++) {
            int column = k->mask_at[a] + (a < 3 ? one[a] : 0) - 8 * piece;
            int is_set = k->mask_at[a] >= 0 && (a == 3) == (key >= k->tokens);
            for (int w = 0; w < 4; w++)
                if (is_set && column >> 1 == w)
                    words[w] |= MASK_ONE << 16 * (column & 1);
        }
        st_shared_v4(keys + piece / 2 * (NBHD_N * 32) + key * 32 + ((piece & 1) << 4 ^ (key & 4) << 2),
                     make_uint4(words[0], words[1], words[2], words[3]));
    }
}

/* How this warpgroup masks a box: not at all, by more columns of the product, or bit by bit. */
#define BY_COLUMNS 1
#define BY_BITS 2

NBHD_FN int box_flags(int4 box, int group)
{
    int how = NBHD_MASK_STEPS && !(box.w & NBHD_SM90_EXTRA) ? BY_COLUMNS : NBHD_MASK_BITS ? BY_BITS : 0;
    return __shfl_sync(~0u, box.w >> 4 * group & 7 ? how : 0, 0); /* uniform */
}

/* Writes a warp's 16 rows from shared memory, eight lanes a row, 16 bytes each. stage: [chunk][Q_ROWS][128 bytes] from
 * the warp's first row on, swizzled; number: of that row. */
NBHD_FN void copy_rows_out(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct tables *tab,
                           const struct nbhd_view *view, unsigned stage, int number, int dim)
{
    int lane = threadIdx.x & 31;
    int x[3];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int at = 4 * i + (lane >> 3), piece = lane & 7;
        unsigned row = tab->row[number + at];
        if (!row_token(p, b, &tab->place, row, number + at, x))
            continue;
        char *dst = row_address(view, &tab->place, row, x) + 16 * piece;
#pragma unroll
        for (int c = 0; c < (dim + 63) / 64; c++)
            if (64 * c + 8 * piece < dim)
                *(uint4 *)(dst + 128 * c) =
                    ld_shared_v4(stage + c * (Q_ROWS * 128) + at * 128 + ((piece ^ at & 7) << 4));
    }
}

/* The shape of key boxes that covers the tile's union with the fewest. Called by one warp; a lane tries one shape. */
NBHD_FN int best_shape(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct place *t)
{
    int lane = threadIdx.x & 31, count = 1;
    const struct nbhd_key_box *k = &b->shape[nbhd_min(lane, b->shapes - 1)];
    for (int a = 0; a < 3; a++) {
        struct nbhd_range q = nbhd_range_of(t->origin[a], nbhd_min(t->origin[a] + b->q_box[a], t->size[a]));
        struct nbhd_range keys = nbhd_tile_any(p->axis[a], t->size[a], q);
        count *= (keys.end - keys.begin + k->extent[a] - 1) / k->extent[a];
    }
    int key = lane < b->shapes ? count * 32 + lane : 0x7fffffff;
    for (int step = 16; step > 0; step /= 2)
        key = nbhd_min(key, __shfl_xor_sync(~0u, key, step));
    return key & 31;
}

/* By one warp. */
NBHD_FN void choose_shape(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct place *t,
                          struct tables *tab)
{
    int shape = b->shapes > 1 ? best_shape(p, b, t) : 0;
    if ((threadIdx.x & 31) == 0)
        tab->shape = shape;
}

/* By one thread, which may then load rows. */
NBHD_FN void prepare_barriers(const struct nbhd_boxes *b, const struct place *t, struct tables *tab)
{
    mbar_init(smem_address(&tab->q_full), 1);
    for (int i = 0; i < K_STAGES; i++)
        for (int v = 0; v < 2; v++) {
            mbar_init(smem_address(&tab->full[v][i]), 1);
            mbar_init(smem_address(&tab->empty[v][i]), 4 * NBHD_GROUPS); /* one lane of each consumer warp */
        }
    mbar_fence_init();
    tab->place = *t;
}

/* The tables that all roles read, by all threads. */
NBHD_FN void prepare_rows(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct place *t,
                          struct tables *tab)
{
    int thread = threadIdx.x;
    for (int i = thread; i < Q_ROWS; i += THREADS)
        tab->row[i] = b->row[i];
    for (int a = 0, first = 0; a < 3; first += b->q_box[a++])
        for (int i = thread; i < b->q_box[a]; i += THREADS) {
            struct nbhd_range keys = nbhd_keys(p->axis[a], t->size[a], nbhd_min(t->origin[a] + i, t->size[a] - 1));
            tab->window[first + i] = make_int2(keys.begin, keys.end);
        }
}

/* The tile's union and the warpgroups' intersections, read off the windows by one thread per axis. */
NBHD_FN void prepare_bounds(const struct nbhd_boxes *b, struct tables *tab)
{
    int a = threadIdx.x;
    if (a >= 3)
        return;
    const int2 *window = tab->window + (a > 0) * b->q_box[0] + (a > 1) * b->q_box[1];
    tab->any[a] = make_int2(window[0].x, window[b->q_box[a] - 1].y);
    for (int g = 0; g < NBHD_GROUPS; g++)
        tab->all[g][a] = make_int2(window[coordinate(b->high[g], a)].x, window[coordinate(b->low[g], a)].y);
}

/* What depends on the shape that choose_shape chose. Rows past the box meet zero probabilities, so they must not be
 * NaN. */
NBHD_FN void prepare_shape(const struct nbhd_boxes *b, struct tables *tab, unsigned k_tiles, unsigned mask_keys)
{
    const struct nbhd_key_box *k = &b->shape[tab->shape];
    int unused = (NBHD_N - k->tokens) * 8; /* 16-byte pieces per chunk */
    for (int i = threadIdx.x; i < unused * (K_STAGES * QK_CHUNKS + V_STAGES * PV_CHUNKS); i += THREADS)
        st_shared_v4(k_tiles + i / unused * (NBHD_N * 128) + k->tokens * 128 + i % unused * 16,
                     make_uint4(0, 0, 0, 0));
    write_mask_keys(k, mask_keys);
    fence_proxy_async();
}

#endif
