/* The masks of fwd_sm90's boxes, for a warpgroup that holds S of 64 rows in accumulator order. NBHD_* as in
 * fwd_sm90.cu.
 *
 * By columns: one or two more k-steps of Q K^T (struct nbhd_key_box). They add -2^100 per axis on which a query does
 * not see a key; -2^30 in float16: there scores must stay below 2^29.
 * By bits: problems of one axis, and the tail of extra keys. Keys past a box are set to -infinity one by one. */
#ifndef NBHD_DEVICE_MASK_SM90_CUH
#define NBHD_DEVICE_MASK_SM90_CUH

#define MASK_BYTES (NBHD_MASK_STEPS * NBHD_N * 32)
#define MASK_SLOTS (NBHD_SHAPES > 1 ? NBHD_TILES : 1) /* of keys' columns: one for each tile, or one for all */

/* How a warpgroup masks a box: the steps of more columns of the product that it needs, as bits; or bit by bit. flags:
 * of the box, uniform. */
#define BY_COLUMNS 7
#define BY_BITS 8

NBHD_FN int how_masked(int flags, int group)
{
    int need = flags >> 4 * group & 7;
    return NBHD_MASK_STEPS && !(flags & NBHD_SM90_EXTRA) ? need : NBHD_MASK_BITS && need ? BY_BITS : 0;
}

/* The steps of mask columns that axis `a` has, as bits; bit 0 if it has none. */
NBHD_FN int steps_of(const struct nbhd_key_box *k, int a)
{
    int first = k->mask_at[a];
    return NBHD_MASK_STEPS < 2 || first < 0 ? 1 : 1 << first / 16 | 1 << (first + k->extent[a] - 1) / 16;
}

/* Steps of mask columns, as bits from 4g on, that warpgroup g needs for the box at origin. */
NBHD_FN int mask_flags(const struct nbhd_key_box *k, const struct tile *t, const int *origin)
{
    int flags = 0;
#pragma unroll 1
    for (int g = NBHD_GROUPS - 1; g >= 0; g--)
#pragma unroll
        for (int a = 0; a < 3; a++) {
            int2 all = t->all[g][a];
            flags |= origin[a] < all.x || origin[a] + k->extent[a] > all.y ? steps_of(k, a) << 4 * g : 0;
        }
    return flags;
}

/* ---- bits ---- */

/* The bits of a box of consecutive keys that one row sees; window: the tile's; q: the lane's quarter. */
NBHD_FN word row_bits(const struct nbhd_boxes *b, const int2 *window, struct box box, int extra_keys, unsigned row,
                      int q)
{
    if (NBHD_EXTRA && box.flags & NBHD_SM90_EXTRA)
        return bits_below(extra_keys - box.begin, q);
    int2 keys = window[b->q_box[0] + b->q_box[1] + coordinate(row, 2)];
    return bits_below(keys.y - box.begin, q) & ~bits_below(keys.x - box.begin, q);
}

/* Columns from `keys` on, which are no keys: in the last NBHD_PAD blocks of 8. */
NBHD_FN void mask_padding(float *s, int keys, int q)
{
#pragma unroll
    for (int j = NBHD_N / 8 - NBHD_PAD; j < NBHD_N / 8; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            int is_key = 8 * j + 2 * q + c < keys;
            s[4 * j + c] = is_key ? s[4 * j + c] : MASKED;
            s[4 * j + 2 + c] = is_key ? s[4 * j + 2 + c] : MASKED;
        }
}

/* ---- columns ---- */

/* Writes a tile's columns: lane l the l-th. For each: where the windows of its axis begin, the axis, and what to add to
 * a box's origin for the column's key; for a column that is none, a window that holds everything. */
NBHD_FN void write_columns(const struct nbhd_boxes *b, struct tile *t, int2 *window)
{
    const struct nbhd_key_box *k = &b->shape[t->shape];
    int column = threadIdx.x & 31, first = 0, all = b->q_box[0] + b->q_box[1] + b->q_box[2];
    if (column >= MASK_COLUMNS)
        return;
    struct column c = {(short)all, 3, 0};
    for (int a = 0; a < 3; first += b->q_box[a++]) {
        int x = column - k->mask_at[a];
        if (k->mask_at[a] >= 0 && x >= 0 && x < k->extent[a])
            c.first = (short)first, c.axis = (short)a, c.shift = t->any[a].x + x - MASK_BIAS;
    }
    t->column[column] = c;
    if (column == 0)
        window[all] = make_int2(0, 0x8000);
}

/* What a lane of the loading warp needs for its column of each box: the column's axis, and what its origins count
 * from. */
NBHD_FN void find_column(const struct tile *t, int *axis, int *from)
{
    int column = threadIdx.x & 31;
    *axis = column < MASK_COLUMNS ? t->column[column].axis : 3;
    *from = *axis < 3 ? t->any[*axis].x - MASK_BIAS : 0;
}

/* A box's origin on the column's axis, in both halves of a word. */
NBHD_FN unsigned column_origin(const int *origin, int axis, int from)
{
    int at = axis == 0 ? origin[0] : axis == 1 ? origin[1] : axis == 2 ? origin[2] : 0;
    return (unsigned)(at - from) * 0x10001;
}

/* What a thread knows of its part of the queries' mask columns. An A operand of a step has four columns of it: 2q,
 * 2q + 1, 2q + 8, 2q + 9. For each: the bounds between which a box's origin on the column's axis must lie for the
 * column's key to be seen by the thread's rows, as 0x8000 - bound, row 1's in the upper half. A sum with an origin then
 * has the sign bit of a half set where the origin has reached the bound. */
#define MASK_PROBES (4 * NBHD_MASK_STEPS + !NBHD_MASK_STEPS)
struct probes {
    unsigned begin[MASK_PROBES], end[MASK_PROBES];
};

NBHD_FN int mask_column(int probe, int q) { return probe / 4 * 16 + 2 * q + probe % 2 + (probe & 2) * 4; }

NBHD_FN void find_probes(struct probes *p, const struct tile *t, const int2 *window, unsigned row0, unsigned row1,
                         int q)
{
    row0 &= 0xffffff, row1 &= 0xffffff; /* a column that is none has axis 3, coordinate 0 */
#pragma unroll
    for (int i = 0; i < 4 * NBHD_MASK_STEPS; i++) {
        struct column c = t->column[mask_column(i, q)];
        int2 w0 = window[c.first + coordinate(row0, c.axis)], w1 = window[c.first + coordinate(row1, c.axis)];
        p->begin[i] = 0x80008000 - (w0.x - c.shift) - ((unsigned)(w1.x - c.shift) << 16);
        p->end[i] = 0x80008000 - (w0.y - c.shift) - ((unsigned)(w1.y - c.shift) << 16);
    }
}

/* The A operands of a step's mask columns for the box with these origins. */
NBHD_FN void find_mask(unsigned *a, const struct probes *p, const unsigned *origin, int step, int q)
{
#pragma unroll
    for (int i = 2 * step; i < 2 * step + 2; i++) { /* a pair of columns, for both rows */
        uint2 at = *(const uint2 *)&origin[mask_column(2 * i, q)];
        unsigned unseen0 = ~(at.x + p->begin[2 * i]) | (at.x + p->end[2 * i]);
        unsigned unseen1 = ~(at.y + p->begin[2 * i + 1]) | (at.y + p->end[2 * i + 1]);
        mask_operands(a, unseen0, unseen1);
        a += 2;
    }
}

/* Issues the mask's part of S: the steps in `how`. keys: the keys' columns, see write_mask_keys. */
NBHD_FN void issue_mask(float *s, const struct probes *p, const unsigned *origin, unsigned keys, int how)
{
#pragma unroll
    for (int i = 0; i < NBHD_MASK_STEPS; i++)
        if (how >> i & 1) {
            unsigned a[4];
            find_mask(a, p, origin, i, threadIdx.x & 3);
            wgmma_fence();
            NBHD_MASK(s, a, wgmma_k_major_32(keys + i * NBHD_N * 32), 1);
            wgmma_commit();
        }
}

/* The keys' mask columns: tiles of 16 columns, a key's 32 bytes a row, 32-byte swizzle (address bit 4 ^= bit 7). */
NBHD_FN void write_mask_keys(const struct nbhd_key_box *k, unsigned keys, int thread, int threads)
{
#pragma unroll 1
    for (int key = thread; NBHD_MASK_STEPS && key < NBHD_N; key += threads) {
        int row = key / k->extent[2], at[3] = {row / k->extent[1], row % k->extent[1], key - row * k->extent[2]};
        unsigned to = keys + key * 32, swizzle = (key & 4) << 2;
#pragma unroll
        for (int piece = 0; piece < 2 * NBHD_MASK_STEPS; piece++)
            st_shared_v4(to + piece / 2 * (NBHD_N * 32) + piece % 2 * 16, make_uint4(0, 0, 0, 0));
#pragma unroll
        for (int a = 0; a < 3; a++) {
            int column = k->mask_at[a] + at[a];
            if (k->mask_at[a] >= 0 && key < k->tokens)
                st_shared_b16(to + column / 16 * (NBHD_N * 32) + (column % 16 * 2 ^ swizzle), MASK_ONE);
        }
    }
    fence_proxy_async();
}

#endif
