/* What the parts of the forward's planner say to each other. The cost model is in cycles of a core that starts one
 * multiply-add vector a cycle; its constants were fitted to measurements (docs/notes/cpu-forward.md) and need to be
 * right only in ratio. */
#ifndef NBHD_CPU_FWD_CHOICE_H
#define NBHD_CPU_FWD_CHOICE_H

#include "cpu/fwd_plan.h"

#define NBHD_CYCLES_PER_MS 3.6e6

/* Cycles to wait for a vector of a scattered key that is not asked for ahead of time. */
enum { FAR_CYCLES = 26 };

/* One way to cut a problem. */
struct nbhd_fwd_choice {
    int extent[3];    /* queries of a tile, or of a task (on axis 2 positions) */
    int heads, chunk; /* of a tile, or kv heads of a task; see struct nbhd_fwd, 0 if keys are broadcast */
    double cycles;    /* a batch entry and kv head; HUGE_VAL: impossible */
};

struct nbhd_fwd_choice nbhd_fwd_choose_broadcast(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m);
struct nbhd_fwd_choice nbhd_fwd_choose_permute(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *m,
                                               int threads);
struct nbhd_config nbhd_fwd_config_of(const struct nbhd_problem *problem, int variant,
                                      const struct nbhd_fwd_choice *choice, int threads);

/* Fill f as the configuration says. */
void nbhd_fwd_build_broadcast(const struct nbhd_problem *problem, const struct nbhd_config *config, struct nbhd_fwd *f,
                              const struct nbhd_fwd_machine *m);
/* Decides f->units, of tiles as f->grid cuts them, and places them. */
void nbhd_fwd_choose_units(const struct nbhd_problem *problem, struct nbhd_fwd *f, const struct nbhd_fwd_machine *m);
nbhd_status nbhd_fwd_build_permute(const struct nbhd_problem *problem, const struct nbhd_config *config,
                                   struct nbhd_fwd *f, const struct nbhd_fwd_machine *m);

/* Whether permuted rows write float32 results past the caches: so many sets of q, k, v and o outgrow them (the backward
 * has two, with dout and the gradients), or permuted keys are forced. */
bool nbhd_tensors_stream(const struct nbhd_problem *problem, int sets);

/* See nbhd_fwd_force. */
int nbhd_fwd_forced(void);

#endif
