/* See simt.h. */
#include <limits.h>
#include <math.h>
#include "cuda/simt.h"

enum { THREADS = 256, REGISTERS = 96 }; /* REGISTERS: 32-bit ones that accumulators may take */

bool nbhd_simt_refuses(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    const struct nbhd_axis *a = problem->axis;
    const double plane = fmax((double)a[1].length * a[2].length, (double)a[1].keys * a[2].keys);
    if (plane > INT_MAX) /* indices inside one are ints */
        return nbhd_refuse(why, "its two inner axes have %.0f tokens together; 2147483647 are the most", plane);
    return false;
}

/* Slices are rounded up to a power of two, to compile less; rows are halved until the accumulators fit. */
struct nbhd_simt_registers nbhd_simt_registers(const struct nbhd_problem *problem, int tensors, int widest)
{
    const bool f64 = problem->desc.dtype == NBHD_F64;
    const int columns = f64 ? 32 : 64; /* of a slice: a thread has 4 registers of it */
    struct nbhd_simt_registers r = {f64 ? 2 : 4, 1};
    while (r.slices * columns < widest)
        r.slices *= 2;
    while (r.rows > 1 && r.rows * r.slices * 4 * tensors > REGISTERS)
        r.rows /= 2;
    return r;
}

/* Doubles, again and again, the axis where that enlarges the union of windows least in proportion. */
struct nbhd_simt_box nbhd_simt_box(const struct nbhd_problem *problem, int tokens)
{
    struct nbhd_simt_box box = {{1, 1, 1}};
    for (int volume = 1; volume < tokens; volume *= 2) {
        int best = -1;
        double least = 3;
        for (int i = 0; i < 3; i++) {
            const struct nbhd_axis *a = &problem->axis[i];
            const int longer = nbhd_max(a->keys, a->length), extent = box.extent[i];
            const int group = (longer + a->dilation - 1) / a->dilation; /* the largest */
            const int apart = extent < a->stride ? 0 : 1; /* queries of one stride group share a window */
            const double growth = (double)(a->window + apart * (2 * extent - 1)) / (a->window + apart * (extent - 1));
            if (extent < group && growth <= least) {
                least = growth;
                best = i;
            }
        }
        if (best < 0)
            break;
        box.extent[best] *= 2;
    }
    return box;
}

void nbhd_simt_options(struct nbhd_options *options, const struct nbhd_problem *problem, struct nbhd_simt_registers r)
{
    nbhd_option(options, "-DNBHD_DTYPE=%d -DNBHD_BIAS=%d -DNBHD_ROWS=%d -DNBHD_SLICES=%d", problem->desc.dtype,
                problem->desc.bias != 0, r.rows, r.slices);
    if (problem->flags & NBHD_PROBLEM_MANY)
        nbhd_option(options, "-DNBHD_MANY=1");
    nbhd_options_wraps(options, &problem->desc);
}

struct nbhd_cuda_grid nbhd_simt_grid(const struct nbhd_problem *problem, const struct nbhd_simt_box *box, bool of_keys)
{
    double tiles = (double)problem->desc.batch * (of_keys ? problem->desc.kv_heads : problem->desc.heads);
    for (int i = 0; i < 3; i++) {
        const struct nbhd_axis *a = &problem->axis[i];
        const int largest = ((of_keys ? a->keys : a->length) + a->dilation - 1) / a->dilation;
        tiles *= (double)((largest + box->extent[i] - 1) / box->extent[i]) * a->dilation;
    }
    const unsigned blocks = tiles < INT_MAX ? (unsigned)tiles : INT_MAX;
    return (struct nbhd_cuda_grid){.blocks = {blocks, 1, 1}, .threads = {THREADS, 1, 1}};
}

struct nbhd_cuda_grid nbhd_simt_many(const struct nbhd_problem *problem, const struct nbhd_simt_box *box, bool of_keys,
                                     int rows, struct nbhd_parts *parts)
{
    const int heads = of_keys ? problem->desc.kv_heads : problem->desc.heads;
    double blocks = 0;
    for (int s = 0; s < parts->count; s++) {
        struct nbhd_part *part = &parts->part[s];
        double tiles = 1;
        for (int i = 0; i < 3; i++) {
            const int dilation = problem->axis[i].dilation;
            const int largest = ((of_keys ? part->keys[i] : part->length[i]) + dilation - 1) / dilation;
            tiles *= (double)((largest + box->extent[i] - 1) / box->extent[i]) * dilation;
        }
        part->block = (int)blocks;
        blocks = fmin(blocks + heads * (tiles + (rows ? (problem->desc.extra + rows - 1) / rows : 0)), INT_MAX);
    }
    return (struct nbhd_cuda_grid){.blocks = {(unsigned)blocks, 1, 1}, .threads = {THREADS, 1, 1}};
}
