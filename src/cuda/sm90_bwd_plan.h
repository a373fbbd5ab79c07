/* The choice of boxes for bwd_sm90: which keys a tile holds, which boxes of queries pass by.
 * Knows the geometry and a model of the chip's time; calls nothing of CUDA, so it is tested without a GPU. */
#ifndef NBHD_CUDA_SM90_BWD_PLAN_H
#define NBHD_CUDA_SM90_BWD_PLAN_H

#include "core/kernel.h"
#include "device/bwd_boxes_sm90.cuh"

/* How dQ is computed: by somebody else; added up beside dK and dV, in float32 or, so that the order does not matter, in
 * integers. */
enum { NBHD_DQ_APART = 0, NBHD_DQ_ADDED = 1, NBHD_DQ_INTEGERS = 2 };

struct nbhd_sm90_bwd_plan {
    int groups, ctas;          /* consumer warpgroups; CTAs of a multiprocessor */
    int blocks;                /* of 64 keys: a tile's */
    int apart;                 /* 1: one warpgroup has dV, one dK; 0: each has both, of a block of its own */
    int n;                     /* queries that a step has room for */
    int adds_dq;               /* NBHD_DQ_ADDED or NBHD_DQ_INTEGERS; 0: somebody else computes it */
    int k_box[3], shapes;
    int q_box[NBHD_BWD_SM90_SHAPES][3], mask_at[NBHD_BWD_SM90_SHAPES][3]; /* as in struct nbhd_query_box */
    int mask_steps, mask_bits; /* NBHD_MASK_STEPS, NBHD_MASK_BITS of the kernel */
    int sliced;                /* as in struct nbhd_bwd_boxes */
    double tiles, boxes, full_boxes; /* of one head: key tiles; boxes visited; of these without a mask */
    double seen;               /* boxes that a block of 64 keys sees, in the mean; it skips the others */
    double ms;                 /* predicted */
};

/* Fills up to room plans, best first by the model; returns their number. 0: nothing fits. */
int nbhd_sm90_bwd_plans(const struct nbhd_problem *problem, int adds_dq, int multiprocessors, int shared_max,
                        struct nbhd_sm90_bwd_plan *plans, int room);
int nbhd_sm90_bwd_by_ms(const void *a, const void *b); /* of two plans, for qsort */
/* What the kernel is told of a plan; but for slice_begin, lse and delta. */
void nbhd_sm90_bwd_boxes(struct nbhd_bwd_boxes *boxes, const struct nbhd_problem *problem,
                         const struct nbhd_sm90_bwd_plan *plan);
/* Registers of a consumer thread. */
int nbhd_sm90_bwd_registers(const struct nbhd_sm90_bwd_plan *plan);
/* Bytes of shared memory of a CTA. */
int nbhd_sm90_bwd_shared(const struct nbhd_problem *problem, const struct nbhd_sm90_bwd_plan *plan);

#endif
