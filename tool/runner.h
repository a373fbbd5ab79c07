/* A plan with all that it takes to run it on tensors in host memory: workspace, and on a GPU the copies. */
#ifndef NBHD_TOOL_RUNNER_H
#define NBHD_TOOL_RUNNER_H

#include "problem.h"
#include "slots.h"

struct runner {
    nbhd_desc desc; /* whose tensors they are: of a ragged batch problem_tensors() */
    nbhd_device device;
    nbhd_plan *plan;
    double plan_ms; /* what planning took, run-time compilation included */
    void *workspace;
    void *copy[SLOT_COUNT]; /* on a GPU */
};

/* Exit status; the sentence of a failure has been told. kernel NULL: the planner chooses. */
int runner_open(struct runner *runner, const nbhd_desc *desc, nbhd_device device, const char *kernel);
/* The same for a pass of a problem that may be a ragged batch, packed. */
int runner_open_problem(struct runner *runner, const struct problem *problem, int pass, nbhd_device device,
                        const char *kernel);
int runner_execute(struct runner *runner, const nbhd_args *args);
/* Sends, executes and fetches; args in host memory, contiguous. */
int runner_run(struct runner *runner, const nbhd_args *args);
void runner_close(struct runner *runner);

#endif
