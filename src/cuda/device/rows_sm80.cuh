/* Moving rows of tokens between tensors and shared memory, in pieces of 16 bytes, several lanes a row.
 *
 * Rows in shared memory are padded with zeros to 16 elements and are an odd number of pieces apart, so that ldmatrix,
 * and loads of a column of a fragment, have no bank conflicts.
 * Parameters: those of stream_sm80.cuh, NBHD_DTYPE, NBHD_HEAD_DIM and NBHD_HEAD_DIM_V. */
#ifndef NBHD_DEVICE_ROWS_SM80_CUH
#define NBHD_DEVICE_ROWS_SM80_CUH

#include "device/stream_sm80.cuh"

#if NBHD_DTYPE == NBHD_F32
#define ELEMENT 4 /* bytes */
typedef unsigned element;
#else
#define ELEMENT 2
typedef unsigned short element;
#endif
#define PIECE         (16 / ELEMENT) /* elements of a piece */
#define PADDED(width) (((width) + 15) / 16 * 16)
#define PITCH(width)  (PADDED(width) * ELEMENT + 16) /* bytes from row to row */
#define WIDEST        (NBHD_HEAD_DIM > NBHD_HEAD_DIM_V ? NBHD_HEAD_DIM : NBHD_HEAD_DIM_V)
#define PIECES        (PADDED(WIDEST) / PIECE)

/* So many lanes share a row; lane l of them copies piece l, and in a second round piece l + LANES. */
#if PIECES <= 2
#define LANES 2
#elif PIECES <= 4
#define LANES 4
#elif PIECES <= 8
#define LANES 8
#elif PIECES <= 16
#define LANES 16
#else
#define LANES 32
#endif
#define ROUNDS       ((PIECES + LANES - 1) / LANES)
#define ROW_STEP     (THREADS / LANES)
#define COLUMN_STEPS ((NBHD_N + ROW_STEP - 1) / ROW_STEP)

/* A piece of a row whose address is any multiple of an element. */
NBHD_FN uint4 gather_piece(const char *from, int elements)
{
    const element *x = (const element *)from;
    unsigned part[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if ELEMENT == 4
        part[i] = i < elements ? x[i] : 0;
#else
        unsigned low = 2 * i < elements ? x[2 * i] : 0, high = 2 * i + 1 < elements ? x[2 * i + 1] : 0;
        part[i] = low | high << 16;
#endif
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

/* Elements of a row that lie in this thread's piece of it; -1 if the row, padded, has no such piece. */
NBHD_FN int piece_elements(int width, int round)
{
    int piece = (int)threadIdx.x % LANES + round * LANES;
    return piece < PADDED(width) / PIECE ? nbhd_max(0, nbhd_min(PIECE, width - PIECE * piece)) : -1;
}

/* A box as addresses see it: its first element, and whether some of its columns are past the end of a circle. */
struct corner {
    int at[3], crosses;
};

NBHD_FN struct corner corner_of(const struct tables *tab, const int *at)
{
    struct corner c = {{at[0], at[1], at[2]}, 0};
#if NBHD_WRAPS
#pragma unroll
    for (int a = 0; a < 3; a++) {
        int n = tab->circle[a];
        if (n == 0)
            continue;
        c.at[a] += at[a] < 0 ? n : at[a] >= n ? -n : 0;
        c.crosses |= c.at[a] + tab->box[a] > n;
    }
#endif
    return c;
}

NBHD_FN const char *corner_address(const struct tables *tab, int stream, const struct corner *c)
{
    return tab->base[stream] + c->at[0] * tab->step[stream][0] + c->at[1] * tab->step[stream][1] +
           c->at[2] * tab->step[stream][2];
}

/* Bytes by which a column is before its place from there; of those outside the union, whatever. The union ends before
 * the third circle. */
NBHD_FN long long column_back(const struct tables *tab, int stream, const struct corner *c, int column)
{
    long long back = 0;
#if NBHD_WRAPS
    if (c->crosses) {
#pragma unroll
        for (int a = 0; a < 3; a++) {
            int n = tab->circle[a], x = c->at[a] + byte_of(tab->column[column], a);
            if (n && x >= n)
                back += (x >= 2 * n ? 2 * n : n) * tab->step[stream][a];
        }
    }
#endif
    return back;
}

/* The columns of the box at a corner, of one of the streams. */
NBHD_FN void load_columns(const struct tables *tab, int stream, char *tile, int pitch, int width,
                          const struct corner *corner, unsigned inside, int wide)
{
    const char *from = corner_address(tab, stream, corner) + threadIdx.x % LANES * 16;
    const long long *offset = tab->offset[stream] + threadIdx.x / LANES;
    const int first = (int)threadIdx.x / LANES;
    unsigned to = lane_piece(shared_address(tile), pitch);
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        int elements = piece_elements(width, round);
        if (elements < 0)
            return;
        if (wide && !corner->crosses) {
#pragma unroll
            for (int i = 0; i < COLUMN_STEPS; i++)
                if (NBHD_N % ROW_STEP == 0 || (int)threadIdx.x / LANES + i * ROW_STEP < NBHD_N)
                    cp_async_16(to + (unsigned)(i * ROW_STEP * pitch), from + offset[i * ROW_STEP],
                                inside >> i & 1 ? ELEMENT * elements : 0);
        } else if (wide) { /* few boxes, and few registers */
#pragma unroll 1
            for (int i = 0; i < COLUMN_STEPS && first + i * ROW_STEP < NBHD_N; i++)
                cp_async_16(to + (unsigned)(i * ROW_STEP * pitch),
                            from + offset[i * ROW_STEP] - column_back(tab, stream, corner, first + i * ROW_STEP),
                            inside >> i & 1 ? ELEMENT * elements : 0);
        } else {
#pragma unroll 1
            for (int i = 0; i < COLUMN_STEPS && (int)threadIdx.x / LANES + i * ROW_STEP < NBHD_N; i++)
                st_shared_v4(to + (unsigned)(i * ROW_STEP * pitch),
                             gather_piece(from + offset[i * ROW_STEP] -
                                              column_back(tab, stream, corner, first + i * ROW_STEP),
                                          inside >> i & 1 ? elements : 0));
        }
        from += 16 * LANES;
        to += 16 * LANES;
    }
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
                       const struct tables *tab, const char *tile, int pitch, int width, int wide)
{
    unsigned to = lane_piece(shared_address(tile), pitch);
#pragma unroll 1
    for (int r = (int)threadIdx.x / LANES; r < NBHD_ROWS; r += ROW_STEP) {
        unsigned row = tab->row[r];
        int there = !(row & NBHD_ROW_ABSENT);
        const char *from = there ? row_address(p, view, t, row) + threadIdx.x % LANES * 16 : view->data;
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            int elements = piece_elements(width, round);
            if (elements < 0)
                break;
            elements = there ? elements : 0;
            if (wide)
                cp_async_16(to + 16 * LANES * round, from + 16 * LANES * round, ELEMENT * elements);
            else
                st_shared_v4(to + 16 * LANES * round, gather_piece(from + 16 * LANES * round, elements));
        }
        to += (unsigned)(ROW_STEP * pitch);
    }
}

/* The calling warp's rows, from shared memory to a tensor. from: of the warp's first row. */
NBHD_FN void store_warp_rows(const struct nbhd_params *p, const struct nbhd_view *view, const struct place *t,
                             const struct tables *tab, const char *from, int pitch, int width, int wide)
{
    int thread = (int)fresh_thread(), lane = thread & 31, first = (thread >> 5) * WARP_ROWS;
    for (int r = lane / LANES; r < WARP_ROWS; r += 32 / LANES) {
        unsigned row = tab->row[first + r];
        if (row & NBHD_ROW_ABSENT)
            continue;
        char *to = row_address(p, view, t, row);
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            int piece = lane % LANES + round * LANES, elements = nbhd_min(PIECE, width - PIECE * piece);
            const char *source = from + r * pitch + 16 * piece;
            if (wide && elements > 0)
                *(uint4 *)(to + 16 * piece) = *(const uint4 *)source;
            else
                for (int e = 0; e < elements; e++)
                    ((element *)(to + 16 * piece))[e] = ((const element *)source)[e];
        }
    }
}

#endif
