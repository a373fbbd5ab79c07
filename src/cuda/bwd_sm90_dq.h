/* dQ of the Hopper backward, for bwd_sm90.c: queries stationary, no atomics, so the same bits every time. */
#ifndef NBHD_CUDA_BWD_SM90_DQ_H
#define NBHD_CUDA_BWD_SM90_DQ_H

#include "core/kernel.h"

struct nbhd_bwd_sm90_dq;

/* True, with a sentence, if it does not take the problem. */
bool nbhd_bwd_sm90_dq_refuses(const struct nbhd_problem *problem, char why[NBHD_TEXT]);
/* Predicted time; 0 where it refuses. */
double nbhd_bwd_sm90_dq_ms(const struct nbhd_problem *problem);
/* What it builds must be dropped, also where it fails. */
nbhd_status nbhd_bwd_sm90_dq_build(struct nbhd_bwd_sm90_dq **dq, const struct nbhd_problem *problem);
/* Its tiles, as for nbhd_plan_describe; returns the length, less than room. */
size_t nbhd_bwd_sm90_dq_describe(const struct nbhd_bwd_sm90_dq *dq, char *text, size_t room);
/* Writes params->dq, over the keys of the grid and the extra keys. lse_log2: logsumexp * log2(e), delta: row sums of
 * O * dO less dlse; both [batch][heads][tokens], float32. All views are aligned to 16 bytes (nbhd_sm90_check_view). */
nbhd_status nbhd_bwd_sm90_dq_run(const struct nbhd_bwd_sm90_dq *dq, const struct nbhd_params *params,
                                 const float *lse_log2, const float *delta, void *stream);
void nbhd_bwd_sm90_dq_drop(struct nbhd_bwd_sm90_dq *dq); /* NULL is allowed */

#endif
