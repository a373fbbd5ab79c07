/* What the host halves of the sm80 kernels share: the choice of boxes, and what a launch needs of the arguments. */
#ifndef NBHD_CUDA_SM80_H
#define NBHD_CUDA_SM80_H

#include "cuda/cuda.h"
#include "cuda/device/boxes_sm80.cuh"

/* The shape of a kernel's work: what stays in a CTA and what is streamed past it. */
struct nbhd_sm80_shape {
    int rows, warps; /* rows of a CTA */
    int n;           /* columns of a step */
    bool inverse;    /* rows are keys, columns the queries that see them */
    bool packs;      /* a CTA may compute several query heads of a key/value head */
    double setup;    /* what a CTA costs besides its steps, in steps */
};

/* What boxes make of a problem, all of it: column boxes that CTAs walk; of these times warps, those that a warp does
 * not skip, and those where its rows see all columns, so it needs no mask. All counted exactly; the last two where the
 * rows of a warp are a box of powers of two, else estimated. */
struct nbhd_sm80_work {
    double ctas, steps, visited, full;
    double cost; /* in steps of a warp: its rows against n columns */
};

/* Fills row_box, column_box, tiles and pack with the boxes of least cost; returns what they make. */
struct nbhd_sm80_work nbhd_sm80_boxes(const struct nbhd_problem *problem, const struct nbhd_sm80_shape *shape,
                                      struct nbhd_boxes_sm80 *boxes);

/* A way to compile a kernel. */
struct nbhd_sm80_variant {
    int rows, warps, n, stages;
};

/* What a problem needs of a variant, and what comes of it. */
struct nbhd_sm80_choice {
    const struct nbhd_sm80_variant *variant;
    struct nbhd_boxes_sm80 boxes;
    int resident; /* CTAs on a multiprocessor */
    double ms;
};

/* A kernel as the choice sees it. accumulators: registers that hold sums and scores, of variant v; shared: bytes. */
struct nbhd_sm80_kernel {
    const struct nbhd_sm80_variant *variants;
    int count;
    bool inverse, packs;
    int width;             /* multiply-adds for a row and a column */
    int most_accumulators; /* with more the kernel spills */
    int others;            /* registers of a thread besides */
    int fixed;             /* bytes of shared memory besides */
    int (*accumulators)(const struct nbhd_sm80_variant *v, const nbhd_desc *desc);
    int (*shared)(const struct nbhd_sm80_variant *v, const nbhd_desc *desc);
};

/* The variants that fit the machine, each with its best boxes, the one that should be fastest first. Fills up to
 * room of them, at most NBHD_SM80_VARIANTS; returns their number. */
enum { NBHD_SM80_VARIANTS = 8 };
int nbhd_sm80_choose(struct nbhd_sm80_choice *choices, int room, const struct nbhd_problem *problem,
                     const struct nbhd_sm80_kernel *kernel, const struct nbhd_cuda_machine *machine);

/* CTAs of a launch: row boxes x heads x batch x dilation groups, as row_place counts them. INT_MAX + 1.0 or more:
 * too many. */
double nbhd_sm80_blocks(const struct nbhd_problem *problem, const struct nbhd_boxes_sm80 *boxes, int heads);

/* The same for many sequences, whose first blocks it sets. inverse: of boxes of keys. */
double nbhd_sm80_many(const struct nbhd_problem *problem, const struct nbhd_boxes_sm80 *boxes, bool inverse, int heads,
                      struct nbhd_parts *parts);
/* What a kernel for many sequences has of shared memory besides: their parameters. */
static inline int nbhd_sm80_fixed(const struct nbhd_problem *problem)
{
    return problem->flags & NBHD_PROBLEM_MANY ? (int)sizeof(struct nbhd_params) : 0;
}

/* Bytes of struct tables (device/stream_sm80.cuh), or a little more. */
int nbhd_sm80_tables(const struct nbhd_sm80_variant *v, int streams);
static inline int nbhd_sm80_padded(int dim) { return (dim + 15) / 16 * 16; }
/* Bytes from row to row in shared memory, of head_dim or head_dim_v. */
int nbhd_sm80_pitch(const nbhd_desc *desc, int dim);
/* Of struct biases; 0 without a bias. */
int nbhd_sm80_biases(const struct nbhd_sm80_variant *v, const nbhd_desc *desc);

/* The options that every sm80 kernel has. */
void nbhd_sm80_options(struct nbhd_options *options, const nbhd_desc *desc, const struct nbhd_sm80_choice *choice);

/* Whether the rows of all these views can be moved in pieces of 16 bytes. Absent views pass. */
bool nbhd_sm80_wide(const nbhd_desc *desc, const struct nbhd_view *const *views, int count);

/* What every sm80 kernel refuses. */
bool nbhd_sm80_refuses(const struct nbhd_problem *problem, char why[NBHD_TEXT]);

#endif
