/* Blocked products without tensor cores, on any GPU, in float (or double for f64): what the simt kernels are made of.
 *
 * 256 threads, 16 (ty) x 16 (tx), work on a tile of M stationary rows against chunks of N = 64 streamed rows.
 *   nt: acc[M][N]     += A[M][slice of head_dim] * B[N][the same slice]^T      A and B staged in slices of 32 columns
 *   nn: acc[M][width] += P[M][N] * B[N][width]                                 B staged in slices of 16 vectors
 * A thread owns rows ty + 16 i (i < NBHD_ROWS), and columns tx + 16 j of an nt product, vector tx of each nn slice.
 *
 * Shared memory:  stage.a | stage.p (never both alive)   stage.b   tables of the queries and keys at hand
 * Parameters: NBHD_DTYPE, NBHD_BIAS, NBHD_ROWS, NBHD_SLICES (of 16 vectors, of the wider head dimension's
 * accumulators), NBHD_WRAPS (device/problem.cuh). All else is known at run time only, so that a few dozen compilations
 * serve every problem. */
#ifndef NBHD_DEVICE_SIMT_CUH
#define NBHD_DEVICE_SIMT_CUH

#include "device/many.cuh"
#include "device/real.cuh"

#if !defined(NBHD_DTYPE) || !defined(NBHD_BIAS) || !defined(NBHD_ROWS) || !defined(NBHD_SLICES)
#error "a parameter is missing: see the head of device/simt.cuh"
#endif

#if NBHD_DTYPE == NBHD_F64
typedef double2 vector;
#else
typedef float4 vector;
#endif

#define THREADS 256
#define ROWS NBHD_ROWS
#define COLS 4
#define VEC ((int)(sizeof(vector) / sizeof(real)))
#define M (16 * ROWS)
#define N (16 * COLS)
#define SLICE 32          /* columns of an nt stage */
#define WIDE (16 * VEC)   /* columns of an nn stage */
#define A_PITCH (SLICE + VEC)
#define P_PITCH (N + VEC)
#define ACC (NBHD_SLICES * VEC) /* accumulators of a row */
#define MINUS_INFINITY (-__int_as_float(0x7f800000))

#define TX ((int)threadIdx.x % 16)
#define TY ((int)threadIdx.x / 16)

union simt_stage {
    __align__(16) real a[M * A_PITCH];
    __align__(16) real p[M * P_PITCH];
};

/* The tokens at hand of either side. rows: their data in two tensors, 0: no such token. */
struct simt_queries {
    int at[3][N], begin[3][N], end[3][N]; /* element in its group; the keys it sees, none for no token */
    char *rows[2][N];                     /* q, and o or dout */
    real lse[N], delta[N];
};
enum { ABSENT, GRID, EXTRA };
struct simt_keys {
    int at[3][N], kind[N];
    char *rows[2][N]; /* k and v */
};

struct simt_shared {
    union simt_stage stage;
    __align__(16) real b[N * (A_PITCH > WIDE ? A_PITCH : WIDE)];
    struct simt_queries q;
    struct simt_keys k;
};

/* ---- arithmetic ---- */
#if NBHD_DTYPE == NBHD_F64
NBHD_FN real simt_exp(real x) { return exp(x); }
NBHD_FN real simt_log(real x) { return log(x); }
NBHD_FN real simt_max(real x, real y) { return fmax(x, y); }
#else
NBHD_FN real simt_exp(real x) { return expf(x); }
NBHD_FN real simt_log(real x) { return logf(x); }
NBHD_FN real simt_max(real x, real y) { return fmaxf(x, y); }
#endif

/* ---- staging: columns from..from + columns of rows, 0 where there is no such row or column ---- */
/* A thread keeps to a column. */
NBHD_STATIC_ASSERT(THREADS % SLICE == 0 && THREADS % WIDE == 0, "the threads stage whole rows");

NBHD_FN void simt_stage(real *to, int pitch, int columns, int count, char *const *rows, int from, int width)
{
    const int d = (int)threadIdx.x % columns, inside = from + d < width;
#pragma unroll 4
    for (int r = (int)threadIdx.x / columns; r < count; r += THREADS / columns) {
        const char *row = rows[r];
        to[r * pitch + d] = row && inside ? simt_load(row, from + d) : (real)0;
    }
}

/* acc[i][j] += A[ty + 16 i] . B[tx + 16 j] over the staged slice. */
NBHD_FN void simt_nt_slice(real acc[ROWS][COLS], const real *a, const real *b)
{
#pragma unroll 1
    for (int d = 0; d < SLICE; d += VEC) {
        __align__(16) real x[ROWS][VEC];
        __align__(16) real y[COLS][VEC];
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            *(vector *)x[i] = *(const vector *)&a[(TY + 16 * i) * A_PITCH + d];
#pragma unroll
        for (int j = 0; j < COLS; j++)
            *(vector *)y[j] = *(const vector *)&b[(TX + 16 * j) * A_PITCH + d];
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < COLS; j++)
#pragma unroll
                for (int v = 0; v < VEC; v++)
                    acc[i][j] += x[i][v] * y[j][v];
    }
}

/* acc = A B^T over all of width. Ends synchronized: the stage may be overwritten. */
NBHD_FN void simt_nt(real acc[ROWS][COLS], struct simt_shared &s, char *const *a, char *const *b, int width)
{
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < COLS; j++)
            acc[i][j] = 0;
#pragma unroll 1
    for (int from = 0; from < width; from += SLICE) {
        simt_stage(s.stage.a, A_PITCH, SLICE, M, a, from, width);
        simt_stage(s.b, A_PITCH, SLICE, N, b, from, width);
        __syncthreads();
        simt_nt_slice(acc, s.stage.a, s.b);
        __syncthreads();
    }
}

/* acc[i][first + v] += P[ty + 16 i] . B[.][tx VEC + v] over the staged slice. */
NBHD_FN void simt_nn_slice(real acc[ROWS][ACC], int first, const real *p, const real *b)
{
#pragma unroll 2
    for (int k = 0; k < N; k += VEC) {
        __align__(16) real x[ROWS][VEC];
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            *(vector *)x[i] = *(const vector *)&p[(TY + 16 * i) * P_PITCH + k];
#pragma unroll
        for (int n = 0; n < VEC; n++) {
            __align__(16) real y[VEC];
            *(vector *)y = *(const vector *)&b[(k + n) * WIDE + TX * VEC];
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int v = 0; v < VEC; v++)
                    acc[i][first + v] += x[i][n] * y[v];
        }
    }
}

/* acc += P B for all columns of rows, P being in the stage. Begins and ends synchronized. */
NBHD_FN void simt_nn(real acc[ROWS][ACC], struct simt_shared &s, char *const *rows, int width)
{
#pragma unroll
    for (int slice = 0; slice < NBHD_SLICES; slice++)
        if (slice * WIDE < width) {
            simt_stage(s.b, WIDE, WIDE, N, rows, slice * WIDE, width);
            __syncthreads();
            simt_nn_slice(acc, slice * VEC, s.stage.p, s.b);
            __syncthreads();
        }
}

/* Writes acc times factor[i] to the rows. */
NBHD_FN void simt_write(const real acc[ROWS][ACC], char *const *rows, const real factor[ROWS], int width)
{
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        char *row = rows[TY + 16 * i];
#pragma unroll
        for (int slice = 0; slice < NBHD_SLICES; slice++)
#pragma unroll
            for (int v = 0; v < VEC; v++) {
                int d = slice * WIDE + TX * VEC + v;
                if (row && d < width)
                    simt_store(row, d, acc[i][slice * VEC + v] * factor[i]);
            }
    }
}

NBHD_FN void simt_clear(real acc[ROWS][ACC])
{
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int v = 0; v < ACC; v++)
            acc[i][v] = 0;
}

/* ---- tiles ---- */
/* A box of stationary tokens of one dilation group, for one head of one batch entry. */
struct simt_tile {
    struct nbhd_axis axis[3];
    int batch, head, group[3], size[3]; /* size: elements of the group */
    struct nbhd_range box[3];           /* elements */
    int empty;                          /* this group has no such tile */
};

/* Extents of the box of stationary tokens; M of them at most. The same in src/cuda/simt.h. */
struct nbhd_simt_box {
    int extent[3];
};

/* Tiles of the grid with lengths per axis: every group has as many as the largest one. of_keys: cross attention's
 * keys. */
NBHD_FN int simt_tiles(struct nbhd_axis a, int extent, int of_keys)
{
    int largest = ((of_keys ? a.keys : a.length) + a.dilation - 1) / a.dilation;
    return (largest + extent - 1) / extent * a.dilation;
}

NBHD_FN long long simt_tile_count(const struct nbhd_params &p, const struct nbhd_simt_box &box, int of_keys)
{
    long long count = 1;
    for (int i = 0; i < 3; i++)
        count *= simt_tiles(p.axis[i], box.extent[i], of_keys);
    return count;
}

NBHD_FN struct simt_tile simt_tile_at(const struct nbhd_params &p, const struct nbhd_simt_box &box, long long index,
                                       int heads, int of_keys)
{
    struct simt_tile t;
    t.empty = 0;
#pragma unroll
    for (int i = 2; i >= 0; i--) {
        struct nbhd_axis a = p.axis[i];
        int tiles = simt_tiles(a, box.extent[i], of_keys), at = (int)(index % tiles);
        index /= tiles;
        int per_group = tiles / a.dilation;
        t.axis[i] = a;
        t.group[i] = at / per_group;
        t.size[i] = a.keys == a.length ? nbhd_group_size(a, t.group[i]) : of_keys ? a.keys : a.length;
        t.box[i].begin = at % per_group * box.extent[i];
        t.box[i].end = nbhd_min(t.box[i].begin + box.extent[i], t.size[i]);
        t.empty |= t.box[i].begin >= t.box[i].end;
    }
    t.head = (int)(index % heads);
    t.batch = (int)(index / heads);
    return t;
}

/* Token i of a box, axis 2 fastest, as elements; 0 past its end. Dividing in 32 bits where that does is shorter. */
NBHD_FN int simt_token(const struct nbhd_range box[3], long long i, int at[3])
{
    const int width = box[2].end - box[2].begin, height = box[1].end - box[1].begin;
    const long long plane = (long long)width * height;
    const int slab = (int)(i / plane), rest = (int)(i - slab * plane);
    at[0] = box[0].begin + slab;
    at[1] = box[1].begin + rest / width;
    at[2] = box[2].begin + rest % width;
    return at[0] < box[0].end;
}

NBHD_FN long long simt_volume(const struct nbhd_range box[3])
{
    return (long long)(box[0].end - box[0].begin) * (box[1].end - box[1].begin) * (box[2].end - box[2].begin);
}

NBHD_FN int simt_place(const struct simt_tile &t, int axis, int at)
{
    return nbhd_place(t.axis[axis], t.size[axis], t.group[axis], at);
}

/* The row of element at of the tile's group in view v. */
NBHD_FN char *simt_row(const struct nbhd_view &v, const struct simt_tile &t, const int at[3], int head)
{
    return v.data + nbhd_offset(v, t.batch, simt_place(t, 0, at[0]), simt_place(t, 1, at[1]), simt_place(t, 2, at[2]),
                                head);
}

/* Entry i of the query table: element at, which sees what the mask says; there: whether there is such a query. */
NBHD_FN void simt_set_query(struct simt_queries &q, int i, const struct simt_tile &t, const int at[3], int there)
{
#pragma unroll
    for (int axis = 0; axis < 3; axis++) {
        struct nbhd_range r = nbhd_range_of(0, 0);
        if (there)
            r = nbhd_keys(t.axis[axis], t.size[axis], at[axis]);
        q.at[axis][i] = at[axis];
        q.begin[axis][i] = r.begin;
        q.end[axis][i] = r.end;
    }
}

NBHD_FN void simt_set_key(struct simt_keys &k, int i, const int at[3], int kind)
{
    k.kind[i] = kind;
#pragma unroll
    for (int axis = 0; axis < 3; axis++)
        k.at[axis][i] = kind == GRID ? at[axis] : -(1 << 30); /* in no range */
}

/* The table of the N keys from `first` on of a tile of queries: those of the box any, grid of them, then the extra
 * ones. Begins where no thread reads the table any more; the caller synchronizes after it. */
NBHD_FN void simt_load_keys(struct simt_shared &s, const struct nbhd_params &p, const struct simt_tile &t,
                            const struct nbhd_range any[3], long long grid, long long first, int kv_head)
{
    int i = (int)threadIdx.x, at[3] = {0, 0, 0}, kind = ABSENT;
    if (i >= N)
        return;
    char *k = 0, *v = 0;
    if (first + i < grid) {
        kind = GRID;
        simt_token(any, first + i, at);
        k = simt_row(p.k, t, at, kv_head);
        v = simt_row(p.v, t, at, kv_head);
    } else if (first + i - grid < p.extra) {
        int e = (int)(first + i - grid);
        kind = EXTRA;
        k = p.extra_k.data + nbhd_offset(p.extra_k, t.batch, 0, 0, e, kv_head);
        v = p.extra_v.data + nbhd_offset(p.extra_v, t.batch, 0, 0, e, kv_head);
    }
    simt_set_key(s.k, i, at, kind);
    s.k.rows[0][i] = k;
    s.k.rows[1][i] = v;
}

NBHD_FN int simt_visible(const struct simt_shared &s, int query, int key)
{
    int inside = 1;
#pragma unroll
    for (int axis = 0; axis < 3; axis++) {
        const int begin = s.q.begin[axis][query];
        inside &= (unsigned)(s.k.at[axis][key] - begin) < (unsigned)(s.q.end[axis][query] - begin);
    }
    return inside | (s.k.kind[key] == EXTRA & s.q.end[0][query] > s.q.begin[0][query]);
}

/* The head's bias at the relative position of a visible key of the grid. */
NBHD_FN real simt_bias(const struct nbhd_params &p, const struct simt_shared &s, int head, int query, int key)
{
    long long at = head;
#pragma unroll
    for (int axis = 0; axis < 3; axis++) {
        int window = p.axis[axis].window;
        at = at * (2 * window - 1) + s.k.at[axis][key] - s.q.at[axis][query] + window - 1;
    }
    return p.bias[at];
}

/* The score that softmax sees, of a product q.k. */
NBHD_FN real simt_score(const struct nbhd_params &p, const struct simt_shared &s, int head, int query, int key,
                        real dot)
{
    if (!simt_visible(s, query, key))
        return MINUS_INFINITY;
    real score = dot * (real)p.scale;
#if NBHD_BIAS
    if (s.k.kind[key] == GRID)
        score += simt_bias(p, s, head, query, key);
#endif
    return score;
}

/* Products become scores. by_key: of the keys' rows with the queries' columns. */
NBHD_FN void simt_scores(real score[ROWS][COLS], const struct simt_shared &s, const struct nbhd_params &p, int head,
                         int by_key)
{
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < COLS; j++) {
            int row = TY + 16 * i, column = TX + 16 * j;
            score[i][j] = by_key ? simt_score(p, s, head, column, row, score[i][j])
                                 : simt_score(p, s, head, row, column, score[i][j]);
        }
}

/* Over the 16 threads that share rows. */
NBHD_FN real simt_row_max(real x)
{
    for (int mask = 8; mask > 0; mask /= 2)
        x = simt_max(x, __shfl_xor_sync(0xffffffff, x, mask));
    return x;
}

NBHD_FN real simt_row_sum(real x)
{
    for (int mask = 8; mask > 0; mask /= 2)
        x += __shfl_xor_sync(0xffffffff, x, mask);
    return x;
}

#endif
