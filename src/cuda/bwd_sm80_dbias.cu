/* The sm80 backward, the gradient of the table of biases. Host half: bwd_sm80.c. The other kernels: bwd_sm80.cu,
 * bwd_sm80_dq.cu.
 *
 * An entry is the sum of dS over all pairs at one distance. A CTA computes dS of a box of queries and a box of keys as
 * the kernel for dQ does, puts it into shared memory, and then a thread sums up all pairs of the box at one distance
 * and adds them to the CTA's own table. A CTA takes every parts-th tile of a head; in the end the tables of a head are
 * added. So each sum has one order, and nothing is atomic.
 *
 *     shared memory:  | as in device/grad_sm80.cuh | dS: ROWS x (N + 1) floats |
 *     workspace:      | statistics | tables: [heads][parts][entries] floats | */
#define NBHD_STREAMS 2
#define NBHD_INVERSE 0
#include "device/grad_sm80.cuh"

#define DS_PITCH (NBHD_N + 1)

struct sums {
    float *table; /* of the CTA */
    float *ds;    /* of a box: [row][DS_PITCH] */
};

/* Puts columns first, first + 1 ... of a box of the warp's rows into shared memory. */
NBHD_FN void store_part(float *ds, scores s, int first)
{
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *to = ds + row_number(m, i / 2) * DS_PITCH + first + ((int)threadIdx.x & 3) * 2 + i % 2;
#pragma unroll
            for (int j = 0; j < NBHD_PART / 8; j++)
                to[8 * j] = s[m][j][i];
        }
}

/* All pairs of a row and a column of the box that are e apart in the box. */
NBHD_FN float sum_at_distance(const float *ds, const int *rows, const int *columns, const int *e)
{
    int begin[3], end[3];
    float sum = 0;
#pragma unroll
    for (int a = 0; a < 3; a++) {
        begin[a] = nbhd_max(0, -e[a]);
        end[a] = nbhd_min(rows[a], columns[a] - e[a]);
    }
#pragma unroll 1
    for (int x = begin[0]; x < end[0]; x++)
#pragma unroll 1
        for (int y = begin[1]; y < end[1]; y++) {
            int row = (x * rows[1] + y) * rows[2] + begin[2];
            int column = ((x + e[0]) * columns[1] + y + e[1]) * columns[2] + begin[2] + e[2];
            const float *from = ds + row * DS_PITCH + column;
#pragma unroll 2
            for (int z = begin[2]; z < end[2]; z++, from += DS_PITCH + 1)
                sum += *from;
        }
    return sum;
}

/* Adds a box to the table. Distances past the table are of pairs that do not see each other. */
NBHD_FN void add_box(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct tables *tab,
                     struct sums *sums, const int *at)
{
    const int *rows = b->row_box, *columns = tab->box, *origin = tab->place.origin;
    int width = rows[2] + columns[2] - 1, height = rows[1] + columns[1] - 1, depth = rows[0] + columns[0] - 1;
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < width * height * depth; i += THREADS) {
        int e[3] = {i / (width * height), i / width % height, i % width}, x[3], inside = 1;
#pragma unroll
        for (int a = 0; a < 3; a++) {
            e[a] -= rows[a] - 1;
            x[a] = at[a] - origin[a] + e[a] + p->axis[a].window - 1;
            inside &= x[a] >= 0 && x[a] < 2 * p->axis[a].window - 1;
        }
        if (inside)
            sums->table[bias_place(p, x[0], x[1], x[2])] += sum_at_distance(sums->ds, rows, columns, e);
    }
}

NBHD_FN void step(const struct nbhd_params *p, const struct nbhd_boxes_sm80 *b, const struct memory *mem,
                  struct sums *sums, int turn, const int *at, int flags)
{
    if (__syncthreads_and(flags & BOX_SKIP))
        return;
#pragma unroll 1
    for (int first = 0; first < NBHD_N; first += NBHD_PART) {
        const struct part c = {turn, first, flags & BOX_MASK, at};
        scores s, ds;
        if (flags & BOX_SKIP) {
#pragma unroll
            for (int i = 0; i < TILES * NBHD_PART / 2; i++)
                (&ds[0][0][0])[i] = 0;
        } else {
            probabilities(s, p, b, mem, &c);
            gradients(ds, s, mem, &c);
        }
        store_part(sums->ds, ds, first);
    }
    __syncthreads(); /* the next box is computed after the walk's barrier */
    add_box(p, b, mem->tab, sums, at);
}

/* What the dQ kernel has left of a tile's queries. */
NBHD_FN void load_stats(const struct nbhd_params *p, const struct memory *mem, const char *stats)
{
    const struct place *t = &mem->tab->place;
    for (int r = (int)threadIdx.x; r < NBHD_ROWS; r += THREADS) {
        unsigned row = mem->tab->row[r];
        float2 both = make_float2(0, 0);
        if (!(row & NBHD_ROW_ABSENT))
            both = *(const float2 *)(stats + row_stats_offset(p, t, row));
        *(float2 *)(mem->stats + 8 * r) = both;
    }
}

/* CTA x: part x / heads of head x % heads. */
extern "C" __global__ void __launch_bounds__(THREADS, NBHD_CTAS)
    nbhd_bwd_sm80_dbias(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_boxes_sm80 b,
                        const char *stats, float *tables)
{
    extern __shared__ __align__(16) char shared[];
    const struct memory mem = lay_out(shared);
    int head = (int)blockIdx.x % p.heads, part = (int)blockIdx.x / p.heads, parts = (int)gridDim.x / p.heads;
    int entries = bias_entries(&p), boxes = b.tiles[0] * b.tiles[1] * b.tiles[2];
    int tiles = boxes * p.batch * p.axis[0].dilation * p.axis[1].dilation * p.axis[2].dilation;
    struct sums sums = {tables + ((long long)head * parts + part) * entries, (float *)mem.rest};
    for (int i = (int)threadIdx.x; i < entries; i += THREADS)
        sums.table[i] = 0;
#pragma unroll 1
    for (int i = part; i < tiles; i += parts) {
        struct place t = place_at(&p, &b, p.heads, (i / boxes * p.heads + head) * boxes + i % boxes);
        if (is_past_end(&t))
            continue;
        __syncthreads(); /* no warp is at the tile before */
        load_queries(&p, &b, &t, &mem);
        load_stats(&p, &mem, stats);
        enter_grid(&p, &b, mem.tab, 0);
        fill_biases(&p, mem.tab, mem.biases, head, 1);
        __syncthreads();
        walk(&p, &b, &mem, &sums);
    }
}

/* A thread for each entry of all heads. */
extern "C" __global__ void __launch_bounds__(256)
    nbhd_bwd_sm80_dbias_sum(const __grid_constant__ struct nbhd_params p, const float *tables, int parts)
{
    int entries = bias_entries(&p), i = (int)(blockIdx.x * 256 + threadIdx.x);
    if (i >= entries * p.heads)
        return;
    const float *from = tables + (long long)(i / entries) * parts * entries + i % entries;
    double sum = p.flags & NBHD_PARAMS_ADD ? p.dbias[i] : 0;
    for (int part = 0; part < parts; part++)
        sum += from[(long long)part * entries];
    p.dbias[i] = (float)sum;
}
