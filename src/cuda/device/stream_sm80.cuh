/* What the sm80 kernels have in common: a CTA holds a box of tokens (rows) and streams the boxes of tokens (columns)
 * that they see, or by whom they are seen, through shared memory.
 *
 * A grid of columns is walked in boxes from the corner of the union of the rows' windows. Windows are products of
 * intervals, so all that is known of a box is known per axis:
 *     limit   per warp and for the CTA, on each axis: the union and the intersection of its rows' windows. A warp
 *             skips a box outside its union, and needs no mask inside its intersection.
 *     words   per coordinate of the row box, on each axis: which columns of the box at hand lie in its window. The
 *             mask of a row is the AND of three words. Bit 2 j + c of a lane's word is column 8 j + 2 q + c: what a
 *             lane holds of a row of an accumulator (mma_sm80.cuh).
 *     prefix  words of the columns whose coordinate on an axis is below x, for every x: an interval is two look-ups.
 * Tokens are fetched with an address per row, so strides, dilation and views of any kind cost nothing; columns past the
 * union are 0 in shared memory and masked.
 *
 * Rows in shared memory are an odd number of 16-byte pieces apart, so that ldmatrix has no bank conflicts.
 * Parameters: NBHD_ROWS, NBHD_N, NBHD_WARPS, NBHD_BF16, NBHD_STREAMS (tensors of the columns), NBHD_INVERSE (1: rows
 * are keys, columns are the queries that see them), NBHD_PIECES (16-byte pieces of the widest streamed row),
 * NBHD_PART (columns computed at once; all, unless it is defined). */
#ifndef NBHD_DEVICE_STREAM_SM80_CUH
#define NBHD_DEVICE_STREAM_SM80_CUH

#include "nbhd_params.h"
#include "device/boxes_sm80.cuh"
#include "device/mma_sm80.cuh"
#include "device/ptx.cuh"

#define THREADS   (32 * NBHD_WARPS)
#define WARP_ROWS (NBHD_ROWS / NBHD_WARPS)

/* So many lanes share a row when rows are copied; lane l of them copies piece l. */
#if NBHD_PIECES <= 2
#define LANES 2
#elif NBHD_PIECES <= 4
#define LANES 4
#elif NBHD_PIECES <= 8
#define LANES 8
#elif NBHD_PIECES <= 16
#define LANES 16
#else
#define LANES 32
#endif
#define ROW_STEP     (THREADS / LANES)
#define COLUMN_STEPS ((NBHD_N + ROW_STEP - 1) / ROW_STEP)

#define NBHD_ROW_ABSENT 0x80000000u /* of tables.row */

enum { BOX_SKIP = 1, BOX_MASK = 2, BOX_WORDS = 4, BOX_EDGE = 8 };

/* Where this CTA's rows lie: origin in elements of the dilation group, and the group. */
struct place {
    int origin[3], group[3], size[3]; /* size: row tokens of the group */
    int batch, head;
};

/* All in shared memory, also what is the same for all threads: registers are short. */
struct tables {
    struct place place;
    long long offset[NBHD_STREAMS][NBHD_N]; /* bytes from a box's first token to each column */
    unsigned column[NBHD_N];                /* coordinates, a byte each; no such column: 0x7f7f7f */
    unsigned row[NBHD_ROWS];                /* coordinates and packed head, a byte each, NBHD_ROW_ABSENT */
    int2 window[NBHD_ROWS + 2];             /* of each coordinate, axis after axis */
    unsigned words[2][4 * (NBHD_ROWS + 2)]; /* for two boxes in turn: [coordinate, as window][q] */
    unsigned prefix[4 * (NBHD_N + 5)];      /* [axis after axis, x][q] */
    int4 limit[NBHD_WARPS][8];              /* union, intersection: 3 axes of the warp; from 4: of the CTA */
    /* The grid at hand. */
    const char *base[NBHD_STREAMS];  /* token (0, 0, 0) of the dilation group */
    long long step[NBHD_STREAMS][3]; /* bytes to the next element */
    int box[3], begin[3], end[3];    /* extents of a box; the part of the grid to walk */
};

NBHD_FN int place_size(struct nbhd_axis a, int group)
{
#if NBHD_INVERSE
    if (a.keys != a.length)
        return a.keys;
#endif
    return nbhd_group_size(a, group);
}

/* From blockIdx.x: the first axis runs fastest (one head's keys stay in L2), then the last; heads and groups
 * outside. */
NBHD_FN struct place row_place(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, int heads)
{
    struct place t;
    int x = (int)(b->reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    t.origin[0] = x % b->tiles[0] * b->row_box[0], x /= b->tiles[0];
    t.origin[2] = x % b->tiles[2] * b->row_box[2], x /= b->tiles[2];
    t.origin[1] = x % b->tiles[1] * b->row_box[1], x /= b->tiles[1];
    heads /= b->pack;
    t.head = x % heads * b->pack, x /= heads;
#pragma unroll
    for (int a = 2; a >= 0; a--) {
        t.group[a] = x % p->axis[a].dilation, x /= p->axis[a].dilation;
        t.size[a] = place_size(p->axis[a], t.group[a]);
    }
    t.batch = x;
    return t;
}

NBHD_FN int byte_of(unsigned packed, int axis) { return (int)(packed >> 8 * axis & 0x7f); }

NBHD_FN unsigned box_coordinates(const int *box, int i)
{
    int slow = i / box[2];
    return (unsigned)(slow / box[1] | slow % box[1] << 8 | i % box[2] << 16);
}

/* The first of the three axes' entries in window and words. */
NBHD_FN int row_first(const struct nbhd_boxes_sm80 *b, int axis)
{
    return axis == 0 ? 0 : axis == 1 ? b->row_box[0] : b->row_box[0] + b->row_box[1];
}

NBHD_FN void fill_rows(const struct nbhd_boxes_sm80 *b, const struct place *t, struct tables *tab)
{
    if (threadIdx.x == 0)
        tab->place = *t;
    int used = b->row_box[0] * b->row_box[1] * b->row_box[2] * b->pack;
#pragma unroll 1
    for (int i = (int)fresh_thread(); i < NBHD_ROWS; i += THREADS) {
        int r = nbhd_min(i, used - 1);
        unsigned row = box_coordinates(b->row_box, r / b->pack);
        int absent = i >= used;
#pragma unroll
        for (int a = 0; a < 3; a++)
            absent |= t->origin[a] + byte_of(row, a) >= t->size[a];
        tab->row[i] = row | (unsigned)(r % b->pack) << 24 | (absent ? NBHD_ROW_ABSENT : 0);
    }
}

/* Windows of the row box's coordinates. extra: of so many keys without a position, seen whole; 0: on the grid. */
NBHD_FN void fill_windows(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct place *t,
                          struct tables *tab, int extra)
{
#pragma unroll 1
    for (int a = 0; a < 3; a++)
#pragma unroll 1
        for (int i = (int)fresh_thread(); i < b->row_box[a]; i += THREADS) {
            int x = nbhd_min(t->origin[a] + i, t->size[a] - 1), n = nbhd_group_size(p->axis[a], t->group[a]);
            struct nbhd_range w = NBHD_INVERSE ? nbhd_queries(p->axis[a], n, x) : nbhd_keys(p->axis[a], n, x);
            if (extra)
                w = nbhd_range_of(0, a == 2 ? extra : 1);
            tab->window[row_first(b, a) + i] = make_int2(w.begin, w.end);
        }
}

/* Of rows first..last. Out of reach of every box where there is no such row. */
NBHD_FN int4 rows_limit(const struct nbhd_boxes_sm80 *b, const struct place *t, const struct tables *tab, int axis,
                        int first, int last)
{
    int used = b->row_box[0] * b->row_box[1] * b->row_box[2] * b->pack;
    if (axis == 3)
        return make_int4(-(1 << 30), 1 << 30, -(1 << 30), 1 << 30);
    if (first >= used)
        return make_int4(0, 0, 0, 0);
    unsigned low = box_coordinates(b->row_box, first / b->pack);
    unsigned high = box_coordinates(b->row_box, nbhd_min(last, used - 1) / b->pack);
    int from = byte_of(low, axis), to = byte_of(high, axis);
    int whole = axis > 0 && byte_of(low, 0) != byte_of(high, 0); /* several slices of this axis */
    whole |= axis > 1 && byte_of(low, 1) != byte_of(high, 1);
    if (whole)
        from = 0, to = b->row_box[axis] - 1;
    if (t->origin[axis] + from >= t->size[axis])
        return make_int4(0, 0, 0, 0);
    const int2 *window = tab->window + row_first(b, axis);
    return make_int4(window[from].x, window[to].y, window[to].x, window[from].y);
}

NBHD_FN void fill_limits(const struct nbhd_boxes_sm80 *b, const struct place *t, struct tables *tab)
{
#pragma unroll 1
    for (int i = (int)fresh_thread(); i < 8 * NBHD_WARPS; i += THREADS) {
        int warp = i >> 3, all = i >> 2 & 1;
        tab->limit[warp][i & 7] =
            rows_limit(b, t, tab, i & 3, all ? 0 : warp * WARP_ROWS, all ? NBHD_ROWS - 1 : (warp + 1) * WARP_ROWS - 1);
    }
}

NBHD_FN void fill_columns(struct tables *tab, int box0, int box1, int box2)
{
    int box[3] = {box0, box1, box2};
#pragma unroll 1
    for (int i = (int)fresh_thread(); i < NBHD_N; i += THREADS)
        tab->column[i] = i < box0 * box1 * box2 ? box_coordinates(box, i) : 0x7f7f7f;
    if (threadIdx.x == 0)
        tab->box[0] = box0, tab->box[1] = box1, tab->box[2] = box2;
}

/* What follows from rows, windows, columns and steps; a barrier before it. */
NBHD_FN void fill_offsets(struct tables *tab)
{
#pragma unroll 1
    for (int i = (int)fresh_thread(); i < NBHD_N; i += THREADS) {
        unsigned c = tab->column[i] == 0x7f7f7f ? 0 : tab->column[i];
#pragma unroll
        for (int s = 0; s < NBHD_STREAMS; s++)
            tab->offset[s][i] =
                byte_of(c, 0) * tab->step[s][0] + byte_of(c, 1) * tab->step[s][1] + byte_of(c, 2) * tab->step[s][2];
    }
}

NBHD_FN void fill_union(const struct nbhd_boxes_sm80 *b, struct tables *tab)
{
    int a = (int)fresh_thread();
    if (a < 3) {
        const int2 *window = tab->window + row_first(b, a);
        tab->begin[a] = window[0].x;
        tab->end[a] = window[b->row_box[a] - 1].y;
    }
}

NBHD_FN void fill_prefix(struct tables *tab)
{
    int first1 = tab->box[0] + 1, first2 = first1 + tab->box[1] + 1, count = first2 + tab->box[2] + 1;
#pragma unroll 1
    for (int i = (int)fresh_thread(); i < 4 * count; i += THREADS) {
        int x = i >> 2, q = i & 3, axis = (x >= first1) + (x >= first2);
        x -= axis == 0 ? 0 : axis == 1 ? first1 : first2;
        unsigned word = 0;
        for (int e = 0; e < NBHD_N / 4; e++)
            word |= (unsigned)(byte_of(tab->column[8 * (e >> 1) + 2 * q + (e & 1)], axis) < x) << e;
        tab->prefix[i] = word;
    }
}

/* The second half of entering a grid, after windows, columns and steps. Between barriers. */
NBHD_FN void finish_grid(const struct nbhd_boxes_sm80 *b, struct tables *tab)
{
    __syncthreads();
    fill_prefix(tab);
    fill_limits(b, &tab->place, tab);
    fill_offsets(tab);
    fill_union(b, tab);
    __syncthreads();
}

/* What the calling warp must know of the box at `at`; at least BOX_SKIP if rows and box have nothing in common. */
NBHD_FN int box_flags(const struct tables *tab, const int *at)
{
    int slot = threadIdx.x & 7, axis = slot & 3;
    int4 limit = tab->limit[threadIdx.x >> 5][slot];
    int begin = axis == 0 ? at[0] : axis == 1 ? at[1] : at[2];
    int end = begin + tab->box[nbhd_min(axis, 2)];
    unsigned outside = __ballot_sync(~0u, begin >= limit.y || end <= limit.x);
    unsigned partial = __ballot_sync(~0u, begin < limit.z || end > limit.w);
    unsigned beyond = __ballot_sync(~0u, end > limit.y);
    int flags = (outside & 7 ? BOX_SKIP : 0) | (partial & 7 ? BOX_MASK : 0) | (partial & 0x70 ? BOX_WORDS : 0) |
                (beyond & 0x70 ? BOX_EDGE : 0);
    return tab->box[0] * tab->box[1] * tab->box[2] < NBHD_N ? flags | BOX_MASK | BOX_WORDS | BOX_EDGE : flags;
}

NBHD_FN void fill_words(const struct nbhd_boxes_sm80 *b, struct tables *tab, const int *at, int turn)
{
    int first1 = b->row_box[0], first2 = first1 + b->row_box[1], count = first2 + b->row_box[2];
    int prefix1 = tab->box[0] + 1, prefix2 = prefix1 + tab->box[1] + 1;
    for (int i = (int)threadIdx.x; i < 4 * count; i += THREADS) {
        int c = i >> 2, axis = (c >= first1) + (c >= first2);
        int origin = axis == 0 ? at[0] : axis == 1 ? at[1] : at[2], extent = tab->box[axis];
        const unsigned *prefix = tab->prefix + 4 * (axis == 0 ? 0 : axis == 1 ? prefix1 : prefix2) + (i & 3);
        int2 w = tab->window[c];
        int begin = nbhd_max(0, nbhd_min(w.x - origin, extent)), end = nbhd_max(0, nbhd_min(w.y - origin, extent));
        tab->words[turn][i] = prefix[4 * end] & ~prefix[4 * begin];
    }
}

/* The mask of a row, for the calling lane. */
NBHD_FN unsigned row_word(const struct nbhd_boxes_sm80 *b, const struct tables *tab, int turn, int number)
{
    unsigned row = tab->row[number];
    const unsigned *words = tab->words[turn] + (threadIdx.x & 3);
    return words[4 * byte_of(row, 0)] & words[4 * (b->row_box[0] + byte_of(row, 1))] &
           words[4 * (b->row_box[0] + b->row_box[1] + byte_of(row, 2))];
}

/* Moves at to the next box of the grid's part; 0 past the last. */
NBHD_FN int next_box(const struct tables *tab, int *at)
{
#pragma unroll
    for (int a = 2; a >= 0; a--) {
        at[a] += tab->box[a];
        if (at[a] < tab->end[a])
            return 1;
        at[a] = tab->begin[a];
    }
    return 0;
}

/* ---- moving rows. pitch: bytes between them in shared memory; width: elements of 2 bytes that a row has ---- */

/* A piece of a row whose address is any multiple of 2. */
NBHD_FN uint4 gather_piece(const char *from, int elements)
{
    unsigned part[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned low = 2 * i < elements ? ((const unsigned short *)from)[2 * i] : 0;
        unsigned high = 2 * i + 1 < elements ? ((const unsigned short *)from)[2 * i + 1] : 0;
        part[i] = low | high << 16;
    }
    return make_uint4(part[0], part[1], part[2], part[3]);
}

/* Where this thread's piece of the first row that it copies goes. */
NBHD_FN unsigned lane_piece(unsigned tile, int pitch)
{
    unsigned thread = fresh_thread();
    return tile + thread / LANES * (unsigned)pitch + thread % LANES * 16;
}

/* The last coordinates inside the union, for column_inside. */
NBHD_FN unsigned last_inside(const struct tables *tab, const int *at)
{
    unsigned last = 0x808080;
#pragma unroll
    for (int a = 0; a < 3; a++)
        last |= (unsigned)(nbhd_min(tab->end[a] - at[a], tab->box[a]) - 1) << 8 * a;
    return last;
}

/* A byte of `last` is at least that of the column: no borrow clears its highest bit. */
NBHD_FN int column_inside(const struct tables *tab, unsigned last, int column)
{
    return ((last - tab->column[column]) & 0x808080) == 0x808080;
}

/* Which of this thread's columns (bit i: column threadIdx.x / LANES + i ROW_STEP) lie in the union. */
NBHD_FN unsigned columns_inside(const struct tables *tab, const int *at, int flags)
{
    unsigned inside = 0, last;
    if (!(flags & BOX_EDGE))
        return ~0u;
    last = last_inside(tab, at);
#pragma unroll
    for (int i = 0; i < COLUMN_STEPS; i++) {
        int column = (int)threadIdx.x / LANES + i * ROW_STEP;
        if (NBHD_N % ROW_STEP == 0 || column < NBHD_N)
            inside |= (unsigned)column_inside(tab, last, column) << i;
    }
    return inside;
}

/* Elements of a row that lie in this thread's piece of it; -1 if the row has no such piece, padded to 16 elements. */
NBHD_FN int piece_elements(int width)
{
    int piece = (int)threadIdx.x % LANES;
    return piece < (width + 15) / 16 * 2 ? nbhd_max(0, nbhd_min(8, width - 8 * piece)) : -1;
}

/* The columns of the box at `at`, of one of the streams. */
NBHD_FN void load_columns(const struct tables *tab, int stream, char *tile, int pitch, int width, const int *at,
                          unsigned inside, int wide)
{
    const char *from = tab->base[stream] + at[0] * tab->step[stream][0] + at[1] * tab->step[stream][1] +
                       at[2] * tab->step[stream][2] + threadIdx.x % LANES * 16;
    const long long *offset = tab->offset[stream] + threadIdx.x / LANES;
    unsigned to = lane_piece(shared_address(tile), pitch);
    int elements = piece_elements(width);
    if (elements < 0)
        return;
    if (wide) {
#pragma unroll
        for (int i = 0; i < COLUMN_STEPS; i++)
            if (NBHD_N % ROW_STEP == 0 || (int)threadIdx.x / LANES + i * ROW_STEP < NBHD_N)
                cp_async_16(to + (unsigned)(i * ROW_STEP * pitch), from + offset[i * ROW_STEP],
                            inside >> i & 1 ? 2 * elements : 0);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < COLUMN_STEPS && (int)threadIdx.x / LANES + i * ROW_STEP < NBHD_N; i++)
        st_shared_v4(to + (unsigned)(i * ROW_STEP * pitch),
                     gather_piece(from + offset[i * ROW_STEP], inside >> i & 1 ? elements : 0));
}

NBHD_FN char *row_address(const struct nbhd_params *p, const struct nbhd_view *view, const struct place *t,
                          unsigned row)
{
    char *at = view->data + t->batch * view->batch + (t->head + byte_of(row, 3)) * view->head;
#pragma unroll
    for (int a = 0; a < 3; a++)
        at += (long long)((t->origin[a] + byte_of(row, a)) * p->axis[a].dilation + t->group[a]) * view->axis[a];
    return at;
}

NBHD_FN void load_rows(const struct nbhd_params *p, const struct nbhd_view *view, const struct place *t,
                       const struct tables *tab, unsigned to, int pitch, int width, int wide)
{
    int elements = piece_elements(width);
    to = lane_piece(to, pitch);
#pragma unroll 1
    for (int r = (int)threadIdx.x / LANES; r < NBHD_ROWS && elements >= 0; r += ROW_STEP) {
        unsigned row = tab->row[r];
        int there = row & NBHD_ROW_ABSENT ? 0 : elements;
        const char *from = there ? row_address(p, view, t, row) + threadIdx.x % LANES * 16 : view->data;
        if (wide)
            cp_async_16(to, from, 2 * there);
        else
            st_shared_v4(to, gather_piece(from, there));
        to += (unsigned)(ROW_STEP * pitch);
    }
}

/* The calling warp's rows, from shared memory to a tensor. from: of the warp's first row. */
NBHD_FN void store_warp_rows(const struct nbhd_params *p, const struct nbhd_view *view, const struct place *t,
                             const struct tables *tab, const char *from, int pitch, int width, int wide)
{
    int thread = (int)fresh_thread(), lane = thread & 31, first = (thread >> 5) * WARP_ROWS, piece = lane % LANES;
    int elements = nbhd_min(8, width - 8 * piece);
    for (int r = lane / LANES; r < WARP_ROWS; r += 32 / LANES) {
        unsigned row = tab->row[first + r];
        if (row & NBHD_ROW_ABSENT || elements <= 0)
            continue;
        char *to = row_address(p, view, t, row) + 16 * piece;
        const char *source = from + r * pitch + 16 * piece;
        if (wide)
            *(uint4 *)to = *(const uint4 *)source;
        else
            for (int e = 0; e < elements; e++)
                ((unsigned short *)to)[e] = ((const unsigned short *)source)[e];
    }
}

/* ---- products of a warp: fragments as in mma_sm80.cuh ---- */

#define PITCH(width) (((width) + 15) / 16 * 32 + 16)
#define TILES        (WARP_ROWS / 16) /* of 16 rows that a warp owns */

#if NBHD_BF16
#define MMA  mma_m16n8k16_bf16
#define PACK cvt_rn_bf16x2_f32
#else
#define MMA  mma_m16n8k16_f16
#define PACK cvt_rn_f16x2_f32
#endif

/* Columns of a box that are computed at once. */
#ifndef NBHD_PART
#define NBHD_PART NBHD_N
#endif

/* Of the warp's rows against these columns. */
typedef float scores[TILES][NBHD_PART / 8][4];

/* The number in the CTA of the calling lane's row i of the warp's tile m. */
NBHD_FN int row_number(int m, int i)
{
    return ((int)threadIdx.x >> 5) * WARP_ROWS + 16 * m + ((int)threadIdx.x >> 2 & 7) + 8 * i;
}

/* What the calling lane points ldmatrix_x4 at: 16 rows of 16 elements, as they are needed for A, or for B
 * transposed. */
NBHD_FN unsigned lane_rows(const char *tile, int pitch)
{
    int lane = (int)threadIdx.x & 31;
    return shared_address(tile) + (unsigned)((lane & 15) * pitch + (lane >> 4) * 16);
}

/* The same for B where rows are its columns. */
NBHD_FN unsigned lane_columns(const char *tile, int pitch)
{
    int lane = (int)threadIdx.x & 31;
    return shared_address(tile) + (unsigned)(((lane & 7) + (lane >> 4) * 8) * pitch + (lane >> 3 & 1) * 16);
}

/* s = A B^T: the warp's rows of the CTA's `rows` by the box `columns`, over 16 x steps elements. */
NBHD_FN void multiply_nt(scores s, const char *rows, int row_pitch, const char *columns, int column_pitch, int steps)
{
    unsigned from = lane_rows(rows + (threadIdx.x >> 5) * (WARP_ROWS * row_pitch), row_pitch);
    unsigned box = lane_columns(columns, column_pitch);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int j = 0; j < NBHD_PART / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[m][j][i] = 0;
#pragma unroll
    for (int d = 0; d < steps; d++) {
        unsigned a[TILES][4], f[4];
#pragma unroll
        for (int m = 0; m < TILES; m++)
            ldmatrix_x4(a[m], from + m * 16 * row_pitch + d * 32);
#pragma unroll
        for (int j = 0; j < NBHD_PART / 16; j++) {
            ldmatrix_x4(f, box + j * 16 * column_pitch + d * 32);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                MMA(s[m][2 * j], a[m], f[0], f[1]);
                MMA(s[m][2 * j + 1], a[m], f[2], f[3]);
            }
        }
    }
}

/* sum += S B: the box `columns`, 16 x steps elements wide. sum: [TILES][2 x steps][4]. */
NBHD_FN void multiply_nn(float *sum, scores s, const char *columns, int pitch, int steps)
{
    unsigned box = lane_rows(columns, pitch);
#pragma unroll
    for (int j = 0; j < NBHD_PART / 16; j++) {
        unsigned a[TILES][4], f[4];
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][i] = PACK(s[m][2 * j + i / 2][i % 2 * 2 + 1], s[m][2 * j + i / 2][i % 2 * 2]);
#pragma unroll
        for (int d = 0; d < steps; d++) {
            ldmatrix_x4_trans(f, box + j * 16 * pitch + d * 32);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                float *to = sum + 4 * (2 * steps * m + 2 * d);
                MMA(to, a[m], f[0], f[1]);
                MMA(to + 4, a[m], f[2], f[3]);
            }
        }
    }
}

/* Puts factor[m][i] times the warp's sums where its rows are in shared memory. */
NBHD_FN void stage_rows(const float *sum, float factor[TILES][2], char *rows, int pitch, int steps)
{
    unsigned thread = fresh_thread(), lane = thread & 31;
    char *to = rows + ((thread >> 5) * WARP_ROWS + (lane >> 2)) * pitch + (lane & 3) * 4;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int d = 0; d < 2 * steps; d++) {
                const float *x = sum + 4 * (2 * steps * m + d) + 2 * i;
                *(unsigned *)(to + (16 * m + 8 * i) * pitch + 16 * d) = PACK(x[1] * factor[m][i], x[0] * factor[m][i]);
            }
}

/* Puts value where a row does not see a column. first: of the box's columns, the one that s begins with. */
NBHD_FN void apply_mask(scores s, float value, const struct nbhd_boxes_sm80 *b, const struct tables *tab, int turn,
                        int first)
{
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unsigned word = row_word(b, tab, turn, row_number(m, i)) >> first / 4;
#pragma unroll
            for (int e = 0; e < NBHD_PART / 4; e++)
                if (!(word >> e & 1))
                    s[m][e / 2][2 * i + e % 2] = value;
        }
}

#if !NBHD_INVERSE
/* ---- grids of keys, for rows that are queries: 0 the windows, 1 the extra keys ---- */

/* Eight threads: for K and for V, steps on three axes and the base. */
NBHD_FN void set_grid(const struct nbhd_params *p, struct tables *tab, int extra)
{
    const struct place *t = &tab->place;
    int i = (int)fresh_thread(), s = i >> 2, a = i & 3;
    if (i >= 8)
        return;
    const struct nbhd_view *view = extra ? s ? &p->extra_v : &p->extra_k : s ? &p->v : &p->k;
    if (a < 3) {
        tab->step[s][a] = extra ? (a == 2 ? view->axis[2] : 0) : p->axis[a].dilation * view->axis[a];
        return;
    }
    const char *base = view->data + t->batch * view->batch + t->head / (p->heads / p->kv_heads) * view->head;
#pragma unroll
    for (int x = 0; x < 3; x++)
        base += extra ? 0 : t->group[x] * view->axis[x];
    tab->base[s] = base;
}

/* Fills the tables for a grid. Begins and ends with a barrier. */
NBHD_FN void enter_grid(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, struct tables *tab, int extra)
{
    __syncthreads();
    fill_windows(p, b, &tab->place, tab, extra ? p->extra : 0);
    fill_columns(tab, extra ? 1 : b->column_box[0], extra ? 1 : b->column_box[1], extra ? NBHD_N : b->column_box[2]);
    set_grid(p, tab, extra);
    finish_grid(b, tab);
}
#endif

#endif
