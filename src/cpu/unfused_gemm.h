/* How the GEMM-based unfused passes cut a problem into tiles: decided by unfused_gemm.c, obeyed by
 * unfused_gemm.inc.h. */
#ifndef NBHD_CPU_UNFUSED_GEMM_H
#define NBHD_CPU_UNFUSED_GEMM_H

#include "cpu/grid.h"
#include "cpu/unfused.h"

#define GEMM_LANES 64 /* most rows of a tile */
#define GEMM_RUN   64 /* most rows of the other side that are multiplied at once, consecutive on axis 2 */

struct nbhd_gemm {
    int products, threads;
    struct nbhd_gemm_tiling {
        struct nbhd_grid grid[3];
        long long tasks; /* tiles over batch and heads */
    } tiling[2];         /* of each product */
    int pad;             /* floats of a padded row: a multiple of 16 */
    size_t at_b, at_c;   /* offsets of B and C in a thread's scratch; A is first */
    size_t scratch;      /* bytes a thread */
    size_t table;        /* where the partial sums of the bias' gradient begin */
};

bool nbhd_gemm_refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT]);
int nbhd_gemm_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room, int vf);
nbhd_status nbhd_gemm_build(struct nbhd_plan *plan);
void nbhd_gemm_drop(struct nbhd_plan *plan);

#endif
