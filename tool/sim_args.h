/* Options that tell a tiling, shared by `nbhd sim` and `nbhd mask`. */
#ifndef NBHD_TOOL_SIM_ARGS_H
#define NBHD_TOOL_SIM_ARGS_H

#include <stdbool.h>

#include "args.h"
#include "nbhd_sim.h"

struct sim_args {
    struct extents q_tile, kv_tile;
    bool tilings[NBHD_SIM_TILINGS]; /* which were asked for */
    int warpgroups;
};

#define SIM_TILE_OPTIONS(a)                                                                                         \
    opt_extents("q-tile", 0, &(a)->q_tile, "AxB", "tokens of a query tile per axis"),                               \
        opt_extents("kv-tile", 0, &(a)->kv_tile, "AxB", "tokens of a key tile per axis"),                           \
        opt_flag("static", 0, &(a)->tilings[NBHD_SIM_STATIC], "key tiles on a fixed grid"),                         \
        opt_flag("dynamic", 0, &(a)->tilings[NBHD_SIM_DYNAMIC], "key tiles that start at each query tile's union"), \
        opt_flag("permuted", 0, &(a)->tilings[NBHD_SIM_PERMUTED],                                                   \
                 "a fixed grid over tokens copied into tile order first"),                                          \
        opt_flag("flat", 0, &(a)->tilings[NBHD_SIM_FLAT], "1-D tiles of the flattened tokens"),                     \
        opt_int("warpgroups", 0, &(a)->warpgroups, 1, 64, "N",                                                      \
                "parts of a query tile that skip key tiles on their own (1)")

/* The tile extents and the first tiling asked for (static if none), checked against the problem's rank only; extents
 * that were not given are 0. Exit status. */
int sim_args_tiles(const struct sim_args *a, const nbhd_desc *desc, nbhd_sim_tiles *tiles);
/* Of the option --name, whose numbers are of the problem's axes, to `to`; left alone if it was not given. */
int sim_args_extents(const char *name, const struct extents *from, int rank, int to[3]);
/* TOOL_USAGE, told, if more than one tiling was asked for: of what shows one. */
int sim_args_one_tiling(const struct sim_args *a);
/* Bits 1 << nbhd_sim_tiling of what was asked for; `otherwise` if nothing was. */
unsigned sim_args_tilings(const struct sim_args *a, unsigned otherwise);

/* "2x8x8" */
void sim_format_extents(const int extent[3], char text[48]);

#endif
