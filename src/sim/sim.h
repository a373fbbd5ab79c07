/* What the files of src/sim/ share: a checked problem with a tiling, its counts per axis, and their product. */
#ifndef NBHD_SIM_SIM_H
#define NBHD_SIM_SIM_H

#include "core/kernel.h"
#include "core/tiles.h"
#include "nbhd_sim.h"

/* Tiles are kept as the problem's axes are: leading axes of extent 1. */
struct nbhd_sim_case {
    struct nbhd_problem problem;
    int tiling, warpgroups, split_axis; /* split_axis: the one that warpgroups divide */
    int q_tile[3], kv_tile[3];
    int q_rows, kv_rows, resident, mask_steps; /* as in nbhd_sim_tiles */
};

/* What an axis contributes: counts multiply over axes. split: as visited, summed over the warpgroups' parts. */
struct nbhd_sim_axis {
    double outer, visited, full, visited_max, split, pairs, total;
};

/* count.c */
nbhd_status nbhd_sim_case_init(struct nbhd_sim_case *c, const nbhd_desc *desc, const nbhd_sim_tiles *tiles);
struct nbhd_sim_axis nbhd_sim_axis_count(struct nbhd_axis a, int q_tile, int kv_tile, bool dynamic, bool inverse,
                                         int parts);

nbhd_status nbhd_sim_case_count(const struct nbhd_sim_case *c, nbhd_sim_counts *counts);
/* Of a flat tiling: counts has tiles_outer, visited_max, tiles_total and pairs; visited, full are sums over query
 * tiles. */
void nbhd_sim_finish_flat(const struct nbhd_sim_case *c, double visited, double full, nbhd_sim_counts *counts);

/* flat.c: the same for runs of flattened tokens, whose axes do not separate. */
nbhd_status nbhd_sim_flat_count(const struct nbhd_sim_case *c, nbhd_sim_counts *counts);

/* model.c */
nbhd_status nbhd_sim_device_check(nbhd_sim_device *to, const nbhd_sim_device *from);
nbhd_status nbhd_sim_model_check(const nbhd_sim_device *device, const nbhd_desc *desc); /* can it price this? */
double nbhd_sim_model_ms(const nbhd_sim_device *device, const struct nbhd_sim_case *c, const nbhd_sim_counts *counts);

/* boxes.c: boxes of `tokens` tokens over axes of these lengths, no extent longer than its axis. */
struct nbhd_sim_box {
    int extent[3];
};
#define NBHD_SIM_BOXES 512
/* From three axes, as boxes have them, to the problem's own, as nbhd_sim_tiles has them. */
void nbhd_sim_box_to(const struct nbhd_problem *problem, const struct nbhd_sim_box *box, int extent[3]);

/* A checked request for a choice of tilings. */
struct nbhd_sim_request {
    struct nbhd_problem problem;
    nbhd_sim_tiles tiles;
    int q_tokens, kv_tokens, q_boxes, kv_boxes;
    struct nbhd_sim_box q_box[NBHD_SIM_BOXES], kv_box[NBHD_SIM_BOXES];
};
nbhd_status nbhd_sim_request_init(struct nbhd_sim_request *r, const nbhd_desc *desc, const nbhd_sim_tiles *tiles,
                                  int q_tokens, int kv_tokens);

static inline double nbhd_sim_volume(const int extent[3]) { return (double)extent[0] * extent[1] * extent[2]; }

#endif
