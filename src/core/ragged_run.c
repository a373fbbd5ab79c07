/* Ragged batches, execution: the sequences one after the other, side by side, or many to a launch. See ragged.h. */
#include <stdatomic.h>
#include <string.h>
#include "core/plan.h"
#include "core/ragged.h"
#include "cpu/threads.h"

static bool of_extra(const struct nbhd_tensor_row *row)
{
    return row->form == NBHD_FORM_EXTRA_K || row->form == NBHD_FORM_EXTRA_V;
}

/* Packed tensors have no batch axis, but shapes of problems do: one whose stride is not used, and is as aligned as the
 * others. */
static void insert_batch(nbhd_args *args)
{
    for (int i = 0; i < NBHD_TENSOR_ROWS; i++) {
        long long *stride = ((nbhd_tensor *)(void *)((char *)args + nbhd_tensor_rows[i].arg))->stride;
        if (of_extra(&nbhd_tensor_rows[i]) || !(stride[0] | stride[1]))
            continue;
        stride[2] = stride[1];
        stride[1] = stride[0];
    }
}

/* The block of all tensors becomes that of one sequence, whose plan has its axes in an order of its own. */
static void select_sequence(struct nbhd_params *params, const struct nbhd_ragged_plan *g, const struct nbhd_sequence *s)
{
    const struct nbhd_problem *problem = &g->plans[s->plan]->problem;
    for (int i = 0; i < NBHD_TENSOR_ROWS; i++) {
        const size_t offset = nbhd_tensor_rows[i].view;
        struct nbhd_view *view = (struct nbhd_view *)(void *)((char *)params + offset), given;
        if (!view->data)
            continue;
        nbhd_part_view(&s->part, g->padded, (int)(offset / sizeof *view), view);
        given = *view;
        for (int a = 0; a < problem->desc.rank && !of_extra(&nbhd_tensor_rows[i]); a++)
            view->axis[problem->at[a]] = given.axis[a + 3 - problem->desc.rank];
    }
    params->batch = 1;
    memcpy(params->axis, problem->axis, sizeof params->axis);
}

static nbhd_status run_sequence(const struct nbhd_ragged_plan *g, const struct nbhd_params *all, int part,
                                void *workspace, void *stream)
{
    struct nbhd_params params = *all;
    select_sequence(&params, g, &g->parts[part]);
    if (part)
        params.flags |= NBHD_PARAMS_ADD;
    return nbhd_plan_run(g->plans[g->parts[part].plan], &params, workspace, stream);
}

/* So many to a launch as its parameters have room for. */
static nbhd_status run_jointly(const struct nbhd_ragged_plan *g, const struct nbhd_params *all, void *workspace,
                               void *stream)
{
    struct nbhd_params params = *all;
    nbhd_status status = NBHD_OK;
    memcpy(params.axis, g->joint->problem.axis, sizeof params.axis); /* stride, dilation, edge */
    for (int first = 0; first < g->count && !status; first += NBHD_PARTS) {
        struct nbhd_parts parts = {.count = nbhd_min(g->count - first, NBHD_PARTS), .padded = g->padded};
        for (int i = 0; i < parts.count; i++)
            parts.part[i] = g->parts[first + i].part;
        status = g->joint->run_many(g->joint, &params, &parts, workspace, stream);
        if (status == NBHD_ERROR_UNSUPPORTED && g->joint->reference)
            status = g->joint->reference->run_many(g->joint->reference, &params, &parts, workspace, stream);
    }
    return status;
}

struct lanes {
    const struct nbhd_ragged_plan *g;
    const struct nbhd_params *all;
    char *workspace;
    atomic_int failed; /* the last status that was not 0 */
};

static void lane_task(void *context, long long task, int thread)
{
    struct lanes *c = context;
    char *workspace = c->g->lane ? c->workspace + (size_t)thread * c->g->lane : NULL;
    const int status = (int)run_sequence(c->g, c->all, c->g->wide + (int)task, workspace, NULL);
    if (status)
        atomic_store(&c->failed, status);
}

nbhd_status nbhd_ragged_execute(const nbhd_plan *plan, const nbhd_args *given, void *workspace, void *stream)
{
    const struct nbhd_ragged_plan *g = plan->ragged;
    struct nbhd_params params;
    nbhd_args args;
    nbhd_status status = nbhd_args_copy(&args, given);
    if (status)
        return status;
    args.size = sizeof args;
    if (!g->padded)
        insert_batch(&args);
    status = nbhd_params_bind(&plan->problem, &args, true, &params);
    if (g->joint && !status)
        return run_jointly(g, &params, workspace, stream);
    for (int i = 0; i < g->wide && !status; i++)
        status = run_sequence(g, &params, i, workspace, stream);
    if (status || g->wide == g->count)
        return status;
    struct lanes lanes = {.g = g, .all = &params, .workspace = workspace};
    nbhd_parallel(g->threads, g->count - g->wide, lane_task, &lanes);
    if (atomic_load(&lanes.failed)) /* its sentence is another thread's */
        return nbhd_fail((nbhd_status)atomic_load(&lanes.failed), "a sequence of the batch could not be computed: %s",
                         nbhd_status_name((nbhd_status)atomic_load(&lanes.failed)));
    return NBHD_OK;
}
