/* The planner: walks the table, takes the first kernel that does not refuse, and can say why it took none. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "core/kernel.h"
#include "core/plan.h"
#include "core/wisdom.h"

enum { WORKSPACE_ALIGN = 64 };

const char *nbhd_kernel_forced(const struct nbhd_problem *problem)
{
    const char *name = nbhd_env("NBHD_KERNEL");
    const struct nbhd_kernel *kernel = name ? nbhd_kernel_named(name) : NULL;
    return !kernel || (kernel->device == problem->device && kernel->pass == problem->desc.pass) ? name : NULL;
}

static nbhd_status choose_named(const struct nbhd_problem *problem, const char *name, const struct nbhd_kernel **chosen)
{
    char why[NBHD_TEXT] = "";
    *chosen = nbhd_kernel_named(name);
    if (!*chosen) {
        const char *forced = nbhd_env("NBHD_KERNEL");
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is '%s'; there is no kernel of that name (nbhd list shows them)",
                         forced && !strcmp(forced, name) ? "NBHD_KERNEL" : "kernel", name);
    }
    if (nbhd_kernel_refuses(*chosen, problem, why))
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "kernel %s refuses: %s", name, why);
    return NBHD_OK;
}

static nbhd_status choose(const struct nbhd_problem *problem, const struct nbhd_kernel **chosen)
{
    char reasons[NBHD_TEXT] = "";
    size_t used = 0;
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        char why[NBHD_TEXT] = "";
        if (!nbhd_kernel_refuses(k, problem, why)) {
            *chosen = k;
            return NBHD_OK;
        }
        if (k->device != problem->device || k->pass != problem->desc.pass)
            continue;
        nbhd_log(2, "%s refuses: %s", k->name, why);
        if (used < sizeof reasons)
            used += (size_t)snprintf(reasons + used, sizeof reasons - used, "%s%s: %s", used ? "; " : "", k->name, why);
    }
    char missing[NBHD_TEXT];
    if (nbhd_device_missing(problem->device, missing))
        return nbhd_fail(NBHD_ERROR_DEVICE, "device is cuda: %s", missing);
    if (!used)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "this build has no kernel for the pass %s on that device",
                         nbhd_pass_name(problem->desc.pass));
    return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "no kernel takes this problem. %s", reasons);
}

nbhd_status nbhd_plan_build(nbhd_plan **out, const struct nbhd_problem *problem, const struct nbhd_kernel *kernel,
                            const struct nbhd_config *config)
{
    nbhd_plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan of %zu bytes could not be allocated", sizeof *plan);
    plan->problem = *problem;
    plan->kernel = kernel;
    if (config)
        plan->config = *config;
    else
        kernel->ops->configs(problem, &plan->config, 1);
    nbhd_status status = kernel->ops->build(plan);
    if (status) {
        nbhd_plan_destroy(&plan);
        return status;
    }
    *out = plan;
    return NBHD_OK;
}

/* A picky kernel gets the best row that is not picky beside it, for tensors that it cannot read. */
static void add_reference(nbhd_plan *plan)
{
    char why[NBHD_TEXT];
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name && !plan->reference; k++) {
        if (k == plan->kernel || nbhd_kernel_refuses(k, &plan->problem, why))
            continue;
        if (nbhd_plan_build(&plan->reference, &plan->problem, k, NULL))
            nbhd_log(1, "%s is not there for unaligned tensors: %s", k->name, nbhd_last_error());
        else if (plan->reference->picky)
            nbhd_plan_destroy(&plan->reference);
    }
    if (!plan->reference)
        return;
    if (plan->reference->workspace > plan->workspace)
        plan->workspace = plan->reference->workspace;
    const size_t used = strlen(plan->describe);
    snprintf(plan->describe + used, sizeof plan->describe - used, "; unaligned tensors: %s",
             plan->reference->kernel->name);
}

/* What was measured before, by measuring if the caller asks for it, or by the order of the table. */
static nbhd_status build_best(nbhd_plan **plan, const struct nbhd_problem *problem)
{
    const struct nbhd_kernel *kernel = NULL;
    struct nbhd_config config;
    double ms;
    if (nbhd_wisdom_find(problem, &kernel, &config))
        return nbhd_plan_build(plan, problem, kernel, &config);
    if (problem->flags & NBHD_PLAN_MEASURE && problem->device == NBHD_DEVICE_CPU) {
        nbhd_status status = nbhd_tune(problem, &kernel, &config, &ms);
        if (!status)
            status = nbhd_wisdom_add(problem, kernel, &config, ms);
        return status ? status : nbhd_plan_build(plan, problem, kernel, &config);
    }
    const nbhd_status status = choose(problem, &kernel);
    return status ? status : nbhd_plan_build(plan, problem, kernel, NULL);
}

nbhd_status nbhd_plan_check(nbhd_device device, unsigned flags)
{
    if (device != NBHD_DEVICE_CPU && device != NBHD_DEVICE_CUDA)
        return nbhd_fail(NBHD_ERROR_INVALID, "device is %d; it must be 0 (cpu) or 1 (cuda)", (int)device);
    if (flags & ~(unsigned)(NBHD_PLAN_NO_JIT | NBHD_PLAN_MEASURE | NBHD_PLAN_DETERMINISTIC | NBHD_PLAN_ALIGNED))
        return nbhd_fail(NBHD_ERROR_INVALID, "flags is %u; it has a bit that this build does not know", flags);
    return NBHD_OK;
}

struct order {
    const struct nbhd_problem *problem;
    const char *kernel; /* NULL: the best, and another beside it if it is picky */
};

static nbhd_status make(nbhd_plan **plan, const void *context)
{
    const struct order *order = context;
    const struct nbhd_problem *problem = order->problem;
    const struct nbhd_kernel *named = NULL;
    nbhd_status status;
    if (order->kernel) {
        status = choose_named(problem, order->kernel, &named);
        return status ? status : nbhd_plan_build(plan, problem, named, NULL);
    }
    status = build_best(plan, problem);
    if (!status && (*plan)->picky && !(problem->flags & NBHD_PLAN_ALIGNED))
        add_reference(*plan);
    return status;
}

static nbhd_status state_problem(struct nbhd_problem *problem, const nbhd_desc *desc, nbhd_device device,
                                 unsigned flags)
{
    nbhd_status status = nbhd_problem_init(problem, desc);
    if (!status)
        status = nbhd_plan_check(device, flags);
    if (status)
        return status;
    nbhd_problem_order(problem);
    problem->device = device;
    problem->flags = flags;
    return NBHD_OK;
}

nbhd_status nbhd_plan_create_with(nbhd_plan **plan, const nbhd_desc *desc, nbhd_device device, unsigned flags,
                                  const char *kernel)
{
    if (!plan)
        return nbhd_fail(NBHD_ERROR_INVALID, "plan is NULL; it must point to where the plan goes");
    *plan = NULL;
    struct nbhd_problem problem;
    nbhd_status status = state_problem(&problem, desc, device, flags);
    if (status)
        return status;
    const struct order order = {&problem, kernel ? kernel : nbhd_kernel_forced(&problem)};
    status = nbhd_plan_make(plan, device, make, &order);
    if (!status)
        nbhd_log(1, "plan: %s %s", (*plan)->kernel->name, (*plan)->describe);
    return status;
}

nbhd_status nbhd_plan_create(nbhd_plan **plan, const nbhd_desc *desc, nbhd_device device, unsigned flags)
{
    return nbhd_plan_create_with(plan, desc, device, flags, NULL);
}

size_t nbhd_plan_workspace(const nbhd_plan *plan) { return plan ? plan->workspace : 0; }
const char *nbhd_plan_kernel(const nbhd_plan *plan) { return plan ? plan->kernel->name : ""; }
const char *nbhd_plan_describe(const nbhd_plan *plan) { return plan ? plan->describe : ""; }
double nbhd_plan_predicted_ms(const nbhd_plan *plan) { return plan ? plan->config.predicted_ms : 0; }

void nbhd_plan_destroy(nbhd_plan **plan)
{
    if (!plan || !*plan)
        return;
    nbhd_plan_destroy(&(*plan)->reference);
    if ((*plan)->ragged)
        nbhd_ragged_drop((*plan)->ragged);
    else if ((*plan)->kernel->ops->drop)
        (*plan)->kernel->ops->drop(*plan);
    free(*plan);
    *plan = NULL;
}

const char *nbhd_kernel_name(int i)
{
    for (int at = 0; nbhd_kernels[at].name; at++)
        if (at == i)
            return nbhd_kernels[at].name;
    return NULL;
}

nbhd_status nbhd_kernel_refusal_with(int i, const nbhd_desc *desc, nbhd_device device, unsigned flags, char *why,
                                     size_t capacity)
{
    struct nbhd_problem problem;
    const nbhd_status status = state_problem(&problem, desc, device, flags);
    if (status)
        return status;
    const char *name = nbhd_kernel_name(i);
    if (!name)
        return nbhd_fail(NBHD_ERROR_INVALID, "i is %d; there is no such kernel", i);
    char text[NBHD_TEXT] = "";
    nbhd_kernel_refuses(nbhd_kernel_named(name), &problem, text);
    snprintf(why, why ? capacity : 0, "%s", text);
    return NBHD_OK;
}

nbhd_status nbhd_kernel_refusal(int i, const nbhd_desc *desc, nbhd_device device, char *why, size_t capacity)
{
    return nbhd_kernel_refusal_with(i, desc, device, 0, why, capacity);
}

nbhd_status nbhd_plan_run(const nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const nbhd_status status = plan->kernel->ops->run(plan, params, workspace, stream);
    if (status == NBHD_ERROR_UNSUPPORTED && plan->reference)
        return plan->reference->kernel->ops->run(plan->reference, params, workspace, stream);
    return status;
}

nbhd_status nbhd_execute(const nbhd_plan *plan, const nbhd_args *args, void *workspace, void *stream)
{
    if (!plan || !args)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is NULL", plan ? "args" : "plan");
    if (plan->workspace && !workspace)
        return nbhd_fail(NBHD_ERROR_INVALID, "workspace is NULL; this plan needs %zu bytes", plan->workspace);
    if ((uintptr_t)workspace % WORKSPACE_ALIGN)
        return nbhd_fail(NBHD_ERROR_INVALID, "workspace is at %p; it must be aligned to %d bytes", workspace,
                         WORKSPACE_ALIGN);
    if (plan->ragged)
        return nbhd_ragged_execute(plan, args, workspace, stream);
    struct nbhd_params params;
    const nbhd_status status = nbhd_params_bind(&plan->problem, args, false, &params);
    return status ? status : nbhd_plan_run(plan, &params, workspace, stream);
}
