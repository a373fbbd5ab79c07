/* nbhd_sim: what a tiling of a problem costs, before any kernel runs.   SPDX-License-Identifier: MIT
 *
 * Counts the key tiles that each query tile visits, from the same functions that the kernels use, and from them the
 * honest bounds of a speedup over self attention, the settings that are perfectly block-sparse, and, through a model of
 * a device, times. docs/simulator.md derives every number.
 *
 *     nbhd_desc desc = NBHD_DESC_INIT;
 *     nbhd_sim_tiles tiles = NBHD_SIM_TILES_INIT;
 *     nbhd_sim_counts counts = NBHD_SIM_COUNTS_INIT;
 *     nbhd_desc_parse(&desc, "fwd bf16 h24 d128 30x48x80 w18x24x24 s16x8x8");
 *     tiles.q_tile[0] = 4, tiles.q_tile[1] = 8, tiles.q_tile[2] = 8;
 *     tiles.kv_tile[0] = 2, tiles.kv_tile[1] = 8, tiles.kv_tile[2] = 8;
 *     if (nbhd_sim_count(&desc, &tiles, &counts)) puts(nbhd_last_error());
 *     else printf("%.2f\n", counts.bound_tile); // 11.11
 *
 * Nothing here needs a plan, a device or a tensor. Every function may be called by any thread at any time. */
#ifndef NBHD_SIM_H
#define NBHD_SIM_H

#include "nbhd.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How key tiles lie. */
typedef enum nbhd_sim_tiling {
    NBHD_SIM_STATIC = 0,   /* boxes on a fixed grid */
    NBHD_SIM_DYNAMIC = 1,  /* boxes that start where the union of the query tile's windows starts */
    NBHD_SIM_PERMUTED = 2, /* as static, on tokens copied beforehand so that a box is contiguous in memory */
    NBHD_SIM_FLAT = 3      /* runs of consecutive flattened tokens; visited if any pair of the tile is visible */
} nbhd_sim_tiling;
#define NBHD_SIM_TILINGS 4
NBHD_API const char *nbhd_sim_tiling_name(int tiling); /* "static"; NULL if there is no such tiling */

/* One tiling. Extents per axis of the problem, in tokens of one dilation group; a flat tiling has only [0]. */
typedef struct nbhd_sim_tiles {
    size_t size; /* sizeof(nbhd_sim_tiles) */
    int tiling;  /* nbhd_sim_tiling */
    int q_tile[3], kv_tile[3];
    int warpgroups; /* parts of a query tile, along its slowest axis that they divide, each of which skips the key tiles
                       that it does not see itself; default 1 */
    /* How a kernel computes them: for the model of time alone. */
    int q_rows, kv_rows; /* rows that a tile is padded to; default: none, as many as its tokens */
    int resident;        /* query tiles that a worker computes at once; default 1 */
    int mask_steps;      /* how many times the device's price a mask costs; default 1 */
} nbhd_sim_tiles;
#define NBHD_SIM_TILES_INIT {sizeof(nbhd_sim_tiles), 0, {0, 0, 0}, {0, 0, 0}, 0, 0, 0, 0, 0}

/* Per (batch, head); multiply by both for the whole problem. On a backward line the roles change, as in the kernels:
 * a key tile stays and visits the query tiles that see it. */
typedef struct nbhd_sim_counts {
    size_t size;            /* sizeof(nbhd_sim_counts) */
    double tiles_outer;     /* query tiles (backward: key tiles) */
    double visited_mean;    /* key tiles (backward: query tiles) that one of them visits, extra keys' included */
    double visited_max;     /* the worst of them */
    double tiles_total;     /* the same for self attention in this tiling: all tiles there are */
    double computed_mean;   /* visited_mean less what warpgroups skip */
    double masked_fraction; /* share of visited tiles that need a mask */
    double work_ratio;      /* pairs in visited tiles over visible pairs: 1 is perfect */
    double computed_ratio;  /* the same of computed_mean */
    double bound_flop;      /* speedup over self attention if only visible pairs cost: n / mean window */
    double bound_tile;      /* tiles_total / visited_max: the published simulator's bound */
    double bound_mean;      /* self attention's least possible tiles over visited tiles: what a balanced kernel may
                               reach; never more than bound_flop */
    int block_sparse;       /* 1: no visited tile needs a mask */
    double pairs;           /* visible (query, key) pairs */
} nbhd_sim_counts;
#define NBHD_SIM_COUNTS_INIT {sizeof(nbhd_sim_counts), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

/* INVALID: desc or tiles have a field out of range. UNSUPPORTED: a flat tiling of a backward pass, or one of so many
 * tokens that counting would take minutes (2^31 steps). */
NBHD_API nbhd_status nbhd_sim_count(const nbhd_desc *desc, const nbhd_sim_tiles *tiles, nbhd_sim_counts *counts);

/* The tiling that a plan's kernel works in. UNSUPPORTED where that is none of the simulator's: one query at a time,
 * several shapes of key box, several heads in a tile. */
NBHD_API nbhd_status nbhd_sim_plan_tiles(const nbhd_plan *plan, nbhd_sim_tiles *tiles);

/* One query's tile on one axis, for pictures: all ranges are elements of its dilation group; element e is the token
 * group + dilation * e, on a periodic axis of e modulo `elements`: there ranges may begin before 0 and end after them.
 * Boxes only: a flat tiling is UNSUPPORTED. On a backward line the roles change: `query` is a key, and the ranges but
 * the first are of queries. */
typedef struct nbhd_sim_tile {
    size_t size; /* sizeof(nbhd_sim_tile) */
    int group, dilation, elements, keys; /* elements: queries of the group; keys: its keys */
    int q_begin, q_end;                  /* the query tile */
    int any_begin, any_end;              /* keys that some query of it sees: the union */
    int all_begin, all_end;              /* keys that all of them see; may be empty */
    int grid_begin, kv_tile, visited;    /* key tile i is [grid_begin + i * kv_tile, + kv_tile), i < visited */
} nbhd_sim_tile;
#define NBHD_SIM_TILE_INIT {sizeof(nbhd_sim_tile), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
NBHD_API nbhd_status nbhd_sim_tile_of(const nbhd_desc *desc, const nbhd_sim_tiles *tiles, int axis, int query,
                                      nbhd_sim_tile *tile);

/* A model of which attention takes `share` (0 to 1) of the time and makes `steps` passes, the first `dense_steps` of
 * them with self attention: its speedup when the others' attention becomes `speedup` times faster. 0 if an argument is
 * out of its range. */
NBHD_API double nbhd_sim_end_to_end(double share, int steps, int dense_steps, double speedup);

/* ---- a model of time: docs/simulator.md ---- */
/* Ceilings of a device and prices of a kernel on it. Rates in 10^12 a second, times in microseconds. */
typedef struct nbhd_sim_device {
    size_t size;        /* sizeof(nbhd_sim_device) */
    int processors;     /* workers that take a query tile each: multiprocessors, or threads */
    double matrix;      /* multiply-adds count two */
    double softmax;     /* scores a second: exponentials and what goes with them, not hidden behind the products */
    double mask;        /* masked scores a second */
    double step;        /* us a visited tile */
    double tile;        /* us a query tile: load, write back */
    double launch;      /* us a call */
    double l2, memory;  /* bytes */
    int element;        /* bytes of an element in the kernels that this prices: others are UNSUPPORTED; 0: any */
    double peak;        /* as matrix, where softmax is wholly hidden: the ceiling of large head_dim; 0: none */
} nbhd_sim_device;
#define NBHD_SIM_DEVICE_INIT {sizeof(nbhd_sim_device), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
/* Known devices, each a chip with a kind of kernel: "h200" (forward, wgmma), "h200-sm80" (forward, mma.sync),
 * "h200-bwd" (backward, wgmma). INVALID names those there are. */
NBHD_API nbhd_status nbhd_sim_device_get(nbhd_sim_device *device, const char *name);

/* Predicted milliseconds of one call, forward or backward. */
NBHD_API nbhd_status nbhd_sim_predict(const nbhd_sim_device *device, const nbhd_desc *desc, const nbhd_sim_tiles *tiles,
                                      double *ms);

/* One measurement. */
typedef struct nbhd_sim_sample {
    nbhd_desc desc;
    nbhd_sim_tiles tiles;
    double ms;
} nbhd_sim_sample;

/* Reads measurements from the text of a CSV table. The first row names the columns, in any order: line (a problem
 * line), ms (or ms_median, ms_min), and optionally q_tile, kv_tile (2x8x8), tiling (default dynamic), warpgroups,
 * q_rows, kv_rows, resident, mask_steps; others are ignored. Where there are no tiles, their extents are 0. INVALID
 * names the row. */
NBHD_API nbhd_status nbhd_sim_samples_parse(const char *text, nbhd_sim_sample *samples, int room, int *count);

/* Fits matrix, softmax, mask, step and tile to measurements, starting from (and, where the measurements say little,
 * staying near) the values in *device. error_median, error_max: relative, of the fitted model on the samples. */
NBHD_API nbhd_status nbhd_sim_fit(nbhd_sim_device *device, const nbhd_sim_sample *samples, int count,
                                  double *error_median, double *error_max);

/* ---- search ---- */
/* A window, a stride and a tiling with what it costs; ms is 0 without a device. */
typedef struct nbhd_sim_setting {
    nbhd_desc desc;
    nbhd_sim_tiles tiles;
    nbhd_sim_counts counts;
    double ms;
} nbhd_sim_setting;

/* All sensible tilings of a problem, best first: by ms where a device is given, else by bound_mean. tiles: those fields
 * that are not 0 are kept (tile extents all or none). q_tokens, kv_tokens: tokens of a tile, 0 for 128. tilings: bits
 * 1 << nbhd_sim_tiling. Writes up to room settings, *count of them. */
NBHD_API nbhd_status nbhd_sim_rank(const nbhd_desc *desc, const nbhd_sim_tiles *tiles, unsigned tilings, int q_tokens,
                                   int kv_tokens, const nbhd_sim_device *device, nbhd_sim_setting *settings, int room,
                                   int *count);

/* What to look for. Of desc, the axes, heads and so on are used; its windows and strides are what is sought. */
typedef struct nbhd_sim_search {
    size_t size;                         /* sizeof(nbhd_sim_search) */
    int window_min[3], window_max[3];    /* default: a sixteenth of the axis, but 2 at least, and the axis */
    double sparsity, tolerance;          /* wanted share of pairs left out, extra keys aside, and how far from it;
                                            default any, 0.02 */
    double efficiency;                   /* least useful share of a visited tile, extra keys and what reaches past an
                                            axis' end aside; default 0.9; 1 for perfectly block-sparse only */
    int q_tokens, kv_tokens;             /* tokens of a tile; default 128 */
} nbhd_sim_search;
#define NBHD_SIM_SEARCH_INIT {sizeof(nbhd_sim_search), {0, 0, 0}, {0, 0, 0}, 0, 0, 0, 0, 0}

/* Windows, strides and tilings that waste little, perfectly block-sparse ones first among equals; sorted by bound_mean,
 * then by the smaller stride. tiles and tilings as in nbhd_sim_rank, box tilings and whole query tiles only; ms stays
 * 0. *considered (may be NULL): how many settings were looked at. */
NBHD_API nbhd_status nbhd_sim_find(const nbhd_desc *desc, const nbhd_sim_tiles *tiles, unsigned tilings,
                                   const nbhd_sim_search *search, nbhd_sim_setting *settings, int room, int *count,
                                   double *considered);

#ifdef __cplusplus
}
#endif
#endif
