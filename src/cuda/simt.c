/* See simt.h. */
#include <limits.h>
#include "cuda/simt.h"

enum { THREADS = 256, REGISTERS = 96 }; /* REGISTERS: 32-bit ones that accumulators may take */

int nbhd_simt_rows(const struct nbhd_problem *problem, int width)
{
    const int words = problem->desc.dtype == NBHD_F64 ? 2 : 1;
    const int chunk = words == 2 ? 32 : 64; /* columns of a stage: a thread has 4 words of it */
    int rows = words == 2 ? 2 : 4;
    while (rows > 1 && rows * ((width + chunk - 1) / chunk) * 4 > REGISTERS)
        rows /= 2;
    return rows;
}

/* Doubles, again and again, the axis where that enlarges the union of windows least in proportion. */
void nbhd_simt_box(const struct nbhd_problem *problem, int tokens, int box[3])
{
    box[0] = box[1] = box[2] = 1;
    for (int volume = 1; volume < tokens; volume *= 2) {
        int best = -1;
        double least = 3;
        for (int i = 0; i < 3; i++) {
            const struct nbhd_axis *a = &problem->axis[i];
            const int group = (a->keys > a->length ? a->keys : a->length) / a->dilation;
            const double apart = box[i] < a->stride ? 0 : 1; /* queries of one stride group share a window */
            const double growth = (a->window + apart * (2 * box[i] - 1)) / (a->window + apart * (box[i] - 1));
            if (box[i] < group && growth <= least) {
                least = growth;
                best = i;
            }
        }
        if (best < 0)
            return;
        box[best] *= 2;
    }
}

void nbhd_simt_options(struct nbhd_options *options, const struct nbhd_problem *problem, int rows, const int box[3])
{
    nbhd_options_problem(options, problem, false);
    nbhd_option(options, "-DNBHD_ROWS=%d -DNBHD_TILE0=%d -DNBHD_TILE1=%d -DNBHD_TILE2=%d", rows, box[0], box[1], box[2]);
}

struct nbhd_cuda_grid nbhd_simt_grid(const struct nbhd_problem *problem, const int box[3], bool of_keys)
{
    double tiles = (double)problem->desc.batch * (of_keys ? problem->desc.kv_heads : problem->desc.heads);
    for (int i = 0; i < 3; i++) {
        const struct nbhd_axis *a = &problem->axis[i];
        const int largest = ((of_keys ? a->keys : a->length) + a->dilation - 1) / a->dilation;
        tiles *= (double)((largest + box[i] - 1) / box[i]) * a->dilation;
    }
    const unsigned blocks = tiles < INT_MAX ? (unsigned)tiles : INT_MAX;
    return (struct nbhd_cuda_grid){.blocks = {blocks, 1, 1}, .threads = {THREADS, 1, 1}};
}
