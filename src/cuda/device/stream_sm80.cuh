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
 * Tokens are fetched with an address per row (rows_sm80.cuh), so strides, dilation and views of any kind cost nothing;
 * columns past the union are 0 in shared memory and masked. A periodic axis is walked unwrapped; addresses wrap.
 *
 * Parameters: NBHD_ROWS, NBHD_N, NBHD_WARPS, NBHD_STREAMS (tensors of the columns), NBHD_INVERSE (1: rows are keys,
 * columns are the queries that see them), NBHD_WRAPS (device/problem.cuh). */
#ifndef NBHD_DEVICE_STREAM_SM80_CUH
#define NBHD_DEVICE_STREAM_SM80_CUH

#include "device/boxes_sm80.cuh"
#include "device/many.cuh"
#include "device/problem.cuh"
#include "device/mma_sm80.cuh"

#define THREADS   (32 * NBHD_WARPS)
#define WARP_ROWS (NBHD_ROWS / NBHD_WARPS)

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
#if NBHD_WRAPS
    int circle[3]; /* elements after which the grid goes on at its first; 0: it does not */
#endif
};

NBHD_FN int place_size(struct nbhd_axis a, int group)
{
#if NBHD_INVERSE
    if (a.keys != a.length)
        return a.keys;
#endif
    return nbhd_group_size(a, group);
}

/* Row boxes of an axis, in its largest dilation group. */
NBHD_FN int row_tiles(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, int axis)
{
#if NBHD_MANY
    return (place_size(p->axis[axis], 0) + b->row_box[axis] - 1) / b->row_box[axis];
#else
    return b->tiles[axis];
#endif
}

/* Tile x: the first axis runs fastest (one head's keys stay in L2), then the last; heads and groups outside. */
NBHD_FN struct place place_at(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, int heads, int x)
{
    struct place t;
    int tiles0 = row_tiles(p, b, 0), tiles1 = row_tiles(p, b, 1), tiles2 = row_tiles(p, b, 2);
    t.origin[0] = x % tiles0 * b->row_box[0], x /= tiles0;
    t.origin[2] = x % tiles2 * b->row_box[2], x /= tiles2;
    t.origin[1] = x % tiles1 * b->row_box[1], x /= tiles1;
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

/* Whether it is past the end of its dilation group, which has fewer elements than the first. */
NBHD_FN int is_past_end(const struct place *t)
{
    return t->origin[0] >= t->size[0] || t->origin[1] >= t->size[1] || t->origin[2] >= t->size[2];
}

NBHD_FN struct place row_place(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, struct nbhd_turn turn,
                               int heads)
{
    return place_at(p, b, heads, b->reverse ? turn.blocks - 1 - turn.block : turn.block);
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

/* Of tokens first..last of the row box. Out of reach of every box where there is no such token. */
NBHD_FN int4 rows_limit(const struct nbhd_boxes_sm80 *b, const struct place *t, const struct tables *tab, int axis,
                        int first, int last)
{
    int tokens = b->row_box[0] * b->row_box[1] * b->row_box[2];
    if (axis == 3)
        return make_int4(-(1 << 30), 1 << 30, -(1 << 30), 1 << 30);
    if (first >= tokens)
        return make_int4(0, 0, 0, 0);
    unsigned low = box_coordinates(b->row_box, first), high = box_coordinates(b->row_box, nbhd_min(last, tokens - 1));
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
        tab->limit[warp][i & 7] = rows_limit(b, t, tab, i & 3, all ? 0 : warp * WARP_ROWS / b->pack,
                                             all ? NBHD_ROWS : ((warp + 1) * WARP_ROWS - 1) / b->pack);
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

NBHD_FN void set_circle(const struct nbhd_params *p, struct tables *tab, int axis, int extra)
{
#if NBHD_WRAPS
    tab->circle[axis] = !extra && p->axis[axis].edge == NBHD_EDGE_PERIODIC ? tab->place.size[axis] : 0;
#endif
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

#if !NBHD_INVERSE
/* ---- grids of keys, for rows that are queries: 0 the windows, 1 the extra keys ---- */

/* Eight threads: for K and for V, steps on three axes and the base. */
NBHD_FN void set_grid(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, struct tables *tab, int extra)
{
    const struct place *t = &tab->place;
    int i = (int)fresh_thread(), s = i >> 2, a = i & 3;
    if (i >= 8)
        return;
    const struct nbhd_view *view = extra ? s ? &p->extra_v : &p->extra_k : s ? &p->v : &p->k;
    if (a < 3) {
        tab->step[s][a] = extra ? (a == 2 ? view->axis[2] : 0) : p->axis[a].dilation * view->axis[a];
        set_circle(p, tab, a, extra);
        return;
    }
    const char *base = view->data + t->batch * view->batch + t->head / b->group * view->head;
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
    set_grid(p, b, tab, extra);
    finish_grid(b, tab);
}
#endif

#endif
