/* The choice of boxes for fwd_sm90 and bwd_sm90_dq: which query box, which key boxes, which compiled variant of the
 * kernel. Knows the geometry and a model of the chip's time; calls nothing of CUDA, so it is tested without a GPU. */
#ifndef NBHD_CUDA_SM90_PLAN_H
#define NBHD_CUDA_SM90_PLAN_H

#include "core/kernel.h"
#include "device/boxes_sm90.cuh"

/* A compiled variant: consumer warpgroups of 64 rows each, keys per box, CTAs per multiprocessor. */
struct nbhd_sm90_variant {
    int groups, n, ctas, stages;
    int v_stages; /* of bwd_sm90_dq, where V's are not as many as K's */
};

struct nbhd_sm90_plan {
    struct nbhd_sm90_variant variant;
    int pack;                       /* query heads in a tile */
    int q_box[3];
    int shapes, k_box[NBHD_SM90_SHAPES][3];
    int mask_at[NBHD_SM90_SHAPES][4]; /* as in struct nbhd_key_box */
    int mask_steps, mask_bits, pad;   /* NBHD_MASK_STEPS, NBHD_MASK_BITS, NBHD_PAD of the kernel */
    int q_stages, slots;              /* NBHD_Q_STAGES, NBHD_TILES */
    int sliced;                     /* as in struct nbhd_boxes */
    int many;                       /* NBHD_MANY: of a ragged batch, one map for each sequence */
    double tiles, boxes, full_boxes; /* of one head block: query tiles; key boxes visited; of these without a mask */
    double longest;                  /* boxes of the tile that has most */
    double ms;                      /* predicted */
};

/* A kernel as the search sees it. */
enum { NBHD_SM90_VARIANTS = 48 };
struct nbhd_sm90_kernel {
    int (*variants)(const nbhd_desc *desc, struct nbhd_sm90_variant list[NBHD_SM90_VARIANTS]);
    /* Bytes of shared memory of a CTA. */
    int (*shared)(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan);
    /* Whether a consumer thread's registers suffice: what compiles without spills. */
    int (*has_registers)(const nbhd_desc *desc, const struct nbhd_sm90_plan *plan);
    /* Predicted time of a plan whose boxes are counted. */
    double (*ms)(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan, int multiprocessors);
    int pad_columns; /* 1: keys past a box have a column of the mask; 0: the kernel sees to them (plan->pad) */
    int takes_many;  /* 1: of NBHD_PROBLEM_MANY it makes a plan for sequences of any lengths */
};
extern const struct nbhd_sm90_kernel nbhd_sm90_forward, nbhd_sm90_dq;

enum { NBHD_SM90_MASKED = 32000 }; /* most keys of an axis that columns of a mask can tell apart: 15 bits */

/* Fills up to room plans, best first by the model; returns their number. 0: nothing fits. */
int nbhd_sm90_plans(const struct nbhd_sm90_kernel *kernel, const struct nbhd_problem *problem, int multiprocessors,
                    int shared_max, struct nbhd_sm90_plan *plans, int room);
/* Batch elements x dilation groups x blocks of heads: how often the plan's tiles are computed. */
double nbhd_sm90_slices(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan);

/* fwd_sm90_plan.c: */
/* nbhd_boxes.strip where so many CTAs run at once. */
int nbhd_sm90_strip(const struct nbhd_problem *problem, const struct nbhd_boxes *boxes, int resident);
/* How many tiles a CTA should take, at most, for the L2 of this size. */
int nbhd_sm90_most_tiles(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan, int l2_bytes);
/* Who computes which of a launch's tiles, `work` in all, in rounds of `resident` CTAs that take `most` tiles at most.
 * Returns the number of CTAs. */
int nbhd_sm90_share(struct nbhd_boxes *boxes, const struct nbhd_sm90_plan *plan, int most, int work, int resident);
/* Bytes of shared memory of a CTA. */
int nbhd_sm90_shared(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan);

#endif
