/* How the vector backward cuts a problem into tasks and lays out its workspace: decided once, when planning, by
 * bwd_plan.c; obeyed by bwd.inc.h. */
#ifndef NBHD_CPU_BWD_PLAN_H
#define NBHD_CPU_BWD_PLAN_H

#include "core/kernel.h"
#include "cpu/bwd_rounds.h"
#include "cpu/fwd_plan.h"

#define BWD_TILES 8 /* most broadcast tiles of pairs that go through the same keys together */

/* Where the parts of a tile of pairs lie, in bytes; all of them. */
struct nbhd_bwd_slot {
    size_t qt, dt, q, d, p, ds, dqt, lanes, own, size;
};

struct nbhd_bwd {
    int variant, threads;
    int tile[3];               /* queries of a broadcast tile, or most of a box of permuted ones, on each axis */
    int head_tile, head_tiles; /* query heads of one kv head that share a tile; such tiles per kv head */
    struct nbhd_axis cut[3];   /* what rounds cut up: the problem's axes; axis 2 in positions if dilated and permuted */
    struct nbhd_rounds axis[3];
    int rounds, slots;         /* products over the axes */
    int group;                 /* kv heads that go step by step together; more than 1 only where permuted */
    int heads;                 /* kv heads of a task, groups of them box by box: on this no bit depends */
    int parts;                 /* kv_heads / heads */
    long long tasks;           /* of a round */
    bool sum_dq;               /* dq is summed over rounds */
    bool slot_sums;            /* slots have sums of extra keys or of the bias table */
    long long table;           /* entries of a head's bias table; 0: its gradient may not be asked for */
    int width, width_v;        /* head_dim and head_dim_v in whole vectors */
    int strip;                 /* broadcast: columns of a strip of the tile's rows */
    int panel;                 /* and floats of the transposed ones that a product goes through at once */
    int together;              /* pairs: tiles whose parts have room in the scratch */
    struct nbhd_bwd_slot slot;
    /* Permute. */
    int columns;   /* window columns that a microkernel takes at once */
    int ring[2];   /* slots of lines, per element of axis 0 and 1 */
    int positions; /* most key positions of a line */
    int line_step; /* floats from one element to the next in lines */
    bool stream;   /* float32 tensors that outgrow the caches: dq is written past them */
    bool unpack;   /* rows of K are unpacked: see build_permute */
    /* The workspace: shared parts first, then each thread's scratch. Offsets in bytes. */
    size_t at_dq, at_dk, at_dv; /* float32 sums of 16-bit gradients, contiguous */
    size_t at_delta;            /* float32 [batch][axes][heads], where dq is summed over rounds */
    size_t at_extra;            /* [batch][kv_heads][slots][extra][head_dim + head_dim_v] */
    size_t at_bias;             /* [batch][slots][heads][table] */
    size_t at_done;             /* a byte for each task */
    size_t at_scratch, scratch; /* scratch: bytes a thread */
    /* Offsets into a thread's scratch. */
    size_t at_qt, at_dt, at_dqt, at_q, at_d, at_s, at_ds, at_lanes, at_block, at_zeros, at_keys;
    size_t at_k_lines, at_v_lines, at_token, at_tags, at_runs, at_extra_keys, at_ahead;
    size_t at_slots, at_values, at_columns, at_pairs;
};

/* What the planner must know of an instruction set. */
struct nbhd_bwd_machine {
    struct nbhd_fwd_machine fwd;
    double product; /* cycles of a vector's multiply-adds */
    double load;    /* cycles of an element of a tile's rows, in and out */
    int strip;      /* V_STRIP * VF */
    size_t run;     /* sizeof(struct bwd_keys) */
    size_t block;   /* sizeof(struct bwd_block) */
};

int nbhd_bwd_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room,
                     const struct nbhd_bwd_machine *machine);
nbhd_status nbhd_bwd_build(struct nbhd_plan *plan, const struct nbhd_bwd_machine *machine);
void nbhd_bwd_drop(struct nbhd_plan *plan);

#endif
