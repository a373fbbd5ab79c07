/* How the vector forward cuts a problem into tiles and which of its two algorithms runs: decided once, when planning,
 * by fwd_plan.c; obeyed by fwd_broadcast.inc.h and fwd_permute.inc.h. */
#ifndef NBHD_CPU_FWD_PLAN_H
#define NBHD_CPU_FWD_PLAN_H

#include <stdint.h>
#include "core/kernel.h"
#include "cpu/grid.h"

#define FWD_LANES 64 /* queries in a broadcast tile: one bit each */
#define FWD_BLOCK 96 /* keys whose scores are held at once, a multiple of 6: 24 KiB */
#define FWD_ROWS  4  /* query rows of a permuted tile, a vector each */

/* One broadcast block: keys of a tile, in place. */
struct key_block {
    int count;
    bool masked; /* some key is not seen by all lanes */
    const float *k[FWD_BLOCK], *v[FWD_BLOCK];
    const float *bias[FWD_BLOCK]; /* NULL: none */
    uint64_t bits[FWD_BLOCK];     /* lanes that see the key */
};

enum { NBHD_FWD_BROADCAST = 0, NBHD_FWD_PERMUTE = 1 };

struct nbhd_fwd {
    int variant, threads;
    struct nbhd_grid grid[3];
    int head_tile, head_tiles; /* query heads of one kv head that share a tile; such tiles per kv head */
    long long tiles, tasks;    /* tasks are runs of tiles */
    int run;                   /* tiles in a task */
    /* Broadcast: offsets into a thread's scratch. */
    size_t at_q, at_o, at_s, at_lanes, at_block, at_zeros;
    size_t scratch; /* bytes a thread */
};

bool nbhd_fwd_refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT]);
int nbhd_fwd_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room, int vf);
nbhd_status nbhd_fwd_build(struct nbhd_plan *plan, int vf);
void nbhd_fwd_drop(struct nbhd_plan *plan);

#endif
