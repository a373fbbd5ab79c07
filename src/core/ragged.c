/* Ragged batches, planning: a plan for each distinct grid, or one for all, and a list of the sequences, which of the
 * plans computes each and where its tokens lie. ragged_run.c walks over them. Kernels know nothing of it: a sequence is
 * to them a problem of batch 1 with strides.
 *
 * On the CPU a sequence that is a good part of the whole has all threads; the others go side by side, a thread each. A
 * GPU takes them one by one in the order of the stream, so they can share a workspace. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "core/plan.h"
#include "core/ragged.h"
#include "cpu/threads.h"

/* ---- the sequences in order ---- */

static int by_grid(const void *a, const void *b)
{
    const struct nbhd_sequence *x = a, *y = b;
    const int order = memcmp(x->lengths, y->lengths, sizeof x->lengths);
    return order ? order : x->index - y->index;
}

static int by_work(const void *a, const void *b)
{
    const struct nbhd_sequence *x = a, *y = b;
    return x->flops > y->flops ? -1 : x->flops < y->flops ? 1 : x->index - y->index;
}

static nbhd_desc desc_of(const struct nbhd_request *r, const struct nbhd_sequence *s)
{
    nbhd_desc d = r->desc;
    d.batch = 1;
    for (int i = 0; i < d.rank; i++) {
        d.length[i] = s->lengths[i];
        d.kv_length[i] = s->lengths[3 + i];
    }
    return d;
}

static nbhd_status about(const struct nbhd_request *r, const struct nbhd_sequence *s, nbhd_status status)
{
    char grid[64] = "";
    for (int i = 0; i < r->desc.rank; i++)
        snprintf(grid + strlen(grid), sizeof grid - strlen(grid), "%s%d", i ? "x" : "", s->lengths[i]);
    return nbhd_fail(status, "sequence %d, of %s tokens: %.400s", s->index, grid, nbhd_last_error());
}

/* Numbers the distinct grids, and tells the work of each. A table of biases and rows of scores have one shape for
 * all. */
static nbhd_status sort_grids(const struct nbhd_request *r, struct nbhd_sequence *list, struct nbhd_ragged_plan *g)
{
    struct nbhd_problem first, problem;
    qsort(list, (size_t)g->count, sizeof *list, by_grid);
    for (int i = 0; i < g->count; i++) {
        struct nbhd_sequence *s = &list[i];
        if (i && !memcmp(s->lengths, s[-1].lengths, sizeof s->lengths)) {
            s->plan = s[-1].plan;
            s->flops = s[-1].flops;
            s->part = s[-1].part;
            continue;
        }
        const nbhd_desc d = desc_of(r, s);
        const nbhd_status status = nbhd_problem_init(&problem, &d);
        if (status)
            return about(r, s, status);
        first = i ? first : problem;
        for (int a = 0; a < d.rank && (d.bias || d.pass > NBHD_BACKWARD); a++)
            if (problem.desc.window[a] != first.desc.window[a])
                return nbhd_fail(NBHD_ERROR_INVALID,
                                 "window[%d] is 0, so %d in sequence %d and %d in sequence %d; with %s it "
                                 "must be the same in all",
                                 a, first.desc.window[a], list[0].index, problem.desc.window[a], s->index,
                                 d.bias ? "a bias" : "a tensor of scores");
        s->plan = g->distinct++;
        s->flops = nbhd_desc_flops(&d);
        for (int a = 0; a < 3; a++) {
            s->part.length[a] = problem.axis[a].length;
            s->part.keys[a] = problem.axis[a].keys;
            s->part.window[a] = problem.axis[a].window;
        }
    }
    return NBHD_OK;
}

/* Where each lies, in the order of the parts; before: in a workspace of all. */
static void number_parts(struct nbhd_ragged_plan *g)
{
    long long before = 0;
    for (int i = 0; i < g->count; i++) {
        struct nbhd_part *part = &g->parts[i].part;
        part->index = g->parts[i].index;
        part->token = (int)g->parts[i].token;
        part->kv_token = (int)g->parts[i].kv_token;
        part->before = (int)before;
        before += (long long)part->length[0] * part->length[1] * part->length[2];
        before = before < INT_MAX ? before : INT_MAX;
    }
}

/* Gradients of a bias are summed over the sequences, one after the other. */
static bool sums_bias(const struct nbhd_request *r)
{
    return r->desc.bias && (r->desc.pass == NBHD_BACKWARD || r->desc.pass == NBHD_QK_BACKWARD);
}

/* A sequence is computed side by side with others if it is so little of the whole that the threads end at about one
 * time. */
static void choose_lanes(const struct nbhd_request *r, struct nbhd_ragged_plan *g)
{
    double all = 0;
    g->wide = g->count;
    g->threads = 1;
    if (r->device != NBHD_DEVICE_CPU || sums_bias(r))
        return;
    const int threads = r->desc.threads > 0 ? r->desc.threads : nbhd_threads_available();
    for (int i = 0; i < g->count; i++)
        all += g->parts[i].flops;
    while (g->wide > 0 && 4 * threads * g->parts[g->wide - 1].flops <= all)
        g->wide--;
    if (g->count - g->wide < 2 || threads < 2)
        g->wide = g->count;
    else
        g->threads = nbhd_threads_prepare(threads);
}

/* ---- one launch for many ---- */

/* Where the sequences take less than this together, each on average, a launch for each on a faster row takes longer:
 * that is 9 us at least, 22 backward, on an H200 (docs/notes/ragged.md). In ms, by the model, which is low for small
 * ones; by pass. */
static const double small_ms[] = {0.006, 0.010};

/* A problem of as much work as all sequences: as many as that takes of the one in the middle of the work. */
static nbhd_status joint_problem(const struct nbhd_request *r, const struct nbhd_ragged_plan *g,
                                 struct nbhd_problem *problem)
{
    double all = 0, sum = 0;
    int middle = 0;
    for (int i = 0; i < g->count; i++)
        all += g->parts[i].flops;
    while ((sum += g->parts[middle].flops) < all / 2)
        middle++;
    nbhd_desc d = desc_of(r, &g->parts[middle]);
    const double batch = all / g->parts[middle].flops;
    d.batch = batch < INT_MAX ? (int)(batch + 0.5) : INT_MAX;
    const nbhd_status status = nbhd_problem_init(problem, &d);
    problem->device = r->device;
    problem->flags = r->flags | NBHD_PROBLEM_MANY;
    return status;
}

/* The row that computes all sequences in few launches, if there is one and it pays: where it is the best row of those
 * that take the problem, or the sequences are small. */
static const struct nbhd_kernel *find_joint(const struct nbhd_request *r, const struct nbhd_ragged_plan *g,
                                            const struct nbhd_problem *problem, struct nbhd_config *config)
{
    char why[NBHD_TEXT];
    const char *only = r->kernel ? r->kernel : nbhd_kernel_forced(problem);
    struct nbhd_problem one = *problem;
    bool best = true;
    one.flags &= ~(unsigned)NBHD_PROBLEM_MANY;
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++) {
        if ((only && strcmp(k->name, only)) || nbhd_kernel_refuses(k, &one, why))
            continue;
        *config = (struct nbhd_config){.many = false};
        k->ops->configs(problem, config, 1);
        if (config->many)
            return best || config->predicted_ms < small_ms[problem->desc.pass] * g->count ? k : NULL;
        best = false;
    }
    return NULL;
}

/* Whether a row that is to compute all refuses one of them. */
static bool refused(const struct nbhd_request *r, const struct nbhd_ragged_plan *g, const struct nbhd_kernel *kernel)
{
    char why[NBHD_TEXT];
    struct nbhd_problem problem;
    for (int i = 0; i < g->count; i++) {
        const nbhd_desc d = desc_of(r, &g->parts[i]);
        if (i && g->parts[i].plan == g->parts[i - 1].plan)
            continue;
        nbhd_problem_init(&problem, &d);
        problem.device = r->device;
        problem.flags = r->flags | NBHD_PROBLEM_MANY;
        if (nbhd_kernel_refuses(kernel, &problem, why))
            return true;
    }
    return false;
}

/* A picky row gets the next one that is not beside it, for tensors that it cannot read. */
static void add_reference(nbhd_plan *joint)
{
    char why[NBHD_TEXT];
    const struct nbhd_problem *problem = &joint->problem;
    for (const struct nbhd_kernel *k = joint->kernel + 1; k->name && joint->picky && !joint->reference; k++) {
        struct nbhd_config config = {.many = false};
        if (nbhd_kernel_refuses(k, problem, why))
            continue;
        k->ops->configs(problem, &config, 1);
        if (config.many && nbhd_plan_build(&joint->reference, problem, k, &config))
            nbhd_log(1, "%s is not there for unaligned tensors: %s", k->name, nbhd_last_error());
    }
    if (joint->reference && joint->reference->workspace > joint->workspace)
        joint->workspace = joint->reference->workspace;
}

struct joint_order {
    const struct nbhd_problem *problem;
    const struct nbhd_kernel *kernel;
    const struct nbhd_config *config;
    bool alone; /* no other row beside it */
};

static nbhd_status make_joint(nbhd_plan **joint, const void *context)
{
    const struct joint_order *order = context;
    const nbhd_status status = nbhd_plan_build(joint, order->problem, order->kernel, order->config);
    if (!status && !order->alone)
        add_reference(*joint);
    return status;
}

/* Sets g->joint if there is to be one. */
static nbhd_status plan_jointly(const struct nbhd_request *r, struct nbhd_ragged_plan *g, nbhd_plan *plan)
{
    struct nbhd_problem problem;
    struct nbhd_config config = {.variant = 0};
    const struct nbhd_part *last = &g->parts[g->count - 1].part;
    const double tokens = last->before + (double)last->length[0] * last->length[1] * last->length[2];
    if (r->device == NBHD_DEVICE_CPU || r->desc.pass > NBHD_BACKWARD || sums_bias(r) || g->count < 2 ||
        tokens > INT_MAX || joint_problem(r, g, &problem))
        return NBHD_OK;
    const struct nbhd_kernel *kernel = find_joint(r, g, &problem, &config);
    if (!kernel || refused(r, g, kernel))
        return NBHD_OK;
    const struct joint_order order = {&problem, kernel, &config,
                                      r->kernel || nbhd_kernel_forced(&problem) || r->flags & NBHD_PLAN_ALIGNED};
    const nbhd_status status = nbhd_plan_make(&g->joint, r->device, make_joint, &order);
    if (status)
        return status;
    const double planned =
        (double)problem.desc.batch * problem.axis[0].length * problem.axis[1].length * problem.axis[2].length;
    plan->workspace = (size_t)((double)g->joint->workspace / planned * tokens) + 64;
    plan->config.predicted_ms = config.predicted_ms;
    return NBHD_OK;
}

/* ---- or a plan for each grid ---- */

/* Largest first; each distinct grid where it comes first. */
static nbhd_status plan_grids(const struct nbhd_request *r, struct nbhd_ragged_plan *g, nbhd_plan *plan)
{
    bool timed = true;
    for (int i = 0; i < g->count; i++) {
        const struct nbhd_sequence *s = &g->parts[i];
        nbhd_plan **sub = &g->plans[s->plan];
        nbhd_desc d = desc_of(r, s);
        if (i >= g->wide)
            d.threads = 1;
        const nbhd_status status = *sub ? NBHD_OK : nbhd_plan_create_with(sub, &d, r->device, r->flags, r->kernel);
        if (status)
            return about(r, s, status);
        const size_t bytes = ((*sub)->workspace + 63) / 64 * 64;
        if (i < g->wide)
            plan->workspace = bytes > plan->workspace ? bytes : plan->workspace;
        else
            g->lane = bytes > g->lane ? bytes : g->lane;
        timed = timed && (*sub)->config.predicted_ms > 0;
        plan->config.predicted_ms += (*sub)->config.predicted_ms / (i < g->wide ? 1 : g->threads);
    }
    const size_t lanes = g->lane * (size_t)g->threads;
    plan->workspace = lanes > plan->workspace ? lanes : plan->workspace;
    if (!timed)
        plan->config.predicted_ms = 0;
    return NBHD_OK;
}

static void describe(nbhd_plan *plan)
{
    const struct nbhd_ragged_plan *g = plan->ragged;
    const nbhd_plan *largest = g->joint ? g->joint : g->plans[g->parts[0].plan];
    plan->kernel = largest->kernel;
    int used = snprintf(plan->describe, sizeof plan->describe, "%d sequences of %d grids", g->count, g->distinct);
    if (g->wide < g->count)
        used += snprintf(plan->describe + used, sizeof plan->describe - (size_t)used,
                         ", %d of them side by side on %d threads", g->count - g->wide, g->threads);
    snprintf(plan->describe + used, sizeof plan->describe - (size_t)used, "%s: %.80s",
             g->joint ? ", together" : "; the largest", largest->describe);
}

/* The shape of the caller's tensors, as a problem. Packed: of one axis, the tokens. */
static nbhd_status shape_tensors(const struct nbhd_request *r, nbhd_plan *plan)
{
    struct nbhd_problem *p = &plan->problem;
    const nbhd_desc d = desc_of(r, &plan->ragged->parts[0]);
    const nbhd_status status = nbhd_problem_init(p, &d);
    if (status)
        return status;
    p->device = r->device;
    p->flags = r->flags;
    p->desc.batch = plan->ragged->count;
    for (int i = 0; plan->ragged->padded && i < p->desc.rank; i++) {
        struct nbhd_axis *a = &p->axis[p->at[i]];
        a->length = r->desc.length[i];
        a->keys = r->desc.kv_length[i] ? r->desc.kv_length[i] : a->length;
    }
    if (plan->ragged->padded)
        return NBHD_OK;
    const int window = p->axis[0].window * p->axis[1].window * p->axis[2].window;
    p->desc.rank = 1;
    p->at[0] = 2;
    p->axis[0] = p->axis[1] = (struct nbhd_axis){1, 1, 1, 1, 1, NBHD_EDGE_NEAREST};
    p->axis[2] = (struct nbhd_axis){(int)r->tokens, (int)r->kv_tokens, window, 1, 1, NBHD_EDGE_NEAREST};
    return NBHD_OK;
}

static nbhd_status build(struct nbhd_request *r, nbhd_plan *plan)
{
    struct nbhd_ragged_plan *g = plan->ragged;
    nbhd_status status = nbhd_sequences_check(r);
    if (status)
        return status;
    g->padded = r->padded;
    const size_t count = (size_t)r->ragged.sequences;
    g->count = r->ragged.sequences;
    g->parts = calloc(count, sizeof *g->parts);
    if (!g->parts)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a list of %d sequences could not be allocated", g->count);
    if ((status = nbhd_sequences_read(r, g->parts)) || (status = sort_grids(r, g->parts, g)))
        return status;
    g->plans = calloc((size_t)g->distinct, sizeof(nbhd_plan *));
    if (!g->plans)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a list of %d plans could not be allocated", g->distinct);
    qsort(g->parts, count, sizeof *g->parts, by_work);
    number_parts(g);
    choose_lanes(r, g);
    if ((status = plan_jointly(r, g, plan)) || (!g->joint && (status = plan_grids(r, g, plan))) ||
        (status = shape_tensors(r, plan)))
        return status;
    describe(plan);
    nbhd_log(1, "plan: %s %s", plan->kernel->name, plan->describe);
    return NBHD_OK;
}

nbhd_status nbhd_plan_create_ragged(nbhd_plan **out, const nbhd_desc *desc, const nbhd_ragged *ragged,
                                    nbhd_device device, unsigned flags, const char *kernel)
{
    struct nbhd_request r = {.device = device, .flags = flags, .kernel = kernel};
    if (!out)
        return nbhd_fail(NBHD_ERROR_INVALID, "plan is NULL; it must point to where the plan goes");
    *out = NULL;
    if (!desc || !ragged)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is NULL", desc ? "ragged" : "desc");
    nbhd_status status = nbhd_plan_check(device, flags);
    if (!status)
        status = nbhd_copy_sized(&r.desc, sizeof r.desc, desc, "nbhd_desc");
    if (!status)
        status = nbhd_copy_sized(&r.ragged, sizeof r.ragged, ragged, "nbhd_ragged");
    if (status)
        return status;
    r.desc.size = sizeof r.desc;
    nbhd_plan *plan = calloc(1, sizeof *plan);
    if (plan)
        plan->ragged = calloc(1, sizeof *plan->ragged);
    if (!plan || !plan->ragged) {
        free(plan);
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan of %zu bytes could not be allocated", sizeof *plan);
    }
    status = build(&r, plan);
    if (status)
        nbhd_plan_destroy(&plan);
    *out = plan;
    return status;
}

void nbhd_ragged_drop(struct nbhd_ragged_plan *g)
{
    for (int i = 0; i < g->distinct && g->plans; i++)
        nbhd_plan_destroy(&g->plans[i]);
    nbhd_plan_destroy(&g->joint);
    free(g->plans);
    free(g->parts);
    free(g);
}
