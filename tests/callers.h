/* Several threads execute one plan at a time, each with its own workspace; every result is that of one alone. */
#ifndef NBHD_TESTS_CALLERS_H
#define NBHD_TESTS_CALLERS_H

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "nbhd.h"
#include "test.h"

struct caller {
    const nbhd_plan *plan;
    const float *q;
    float *o;
    int rounds, failures;
};

static void *call_often(void *context)
{
    struct caller *c = context;
    void *workspace = aligned_alloc(64, (nbhd_plan_workspace(c->plan) + 127) / 64 * 64);
    nbhd_args args = NBHD_ARGS_INIT;
    args.q.data = args.k.data = args.v.data = (void *)(uintptr_t)c->q;
    args.o.data = c->o;
    for (int i = 0; i < c->rounds; i++)
        c->failures += nbhd_execute(c->plan, &args, workspace, NULL) != NBHD_OK;
    free(workspace);
    return NULL;
}

/* Of a forward plan of float32, contiguous, whose q, k, v and o have so many elements each. */
static void check_callers(const nbhd_plan *plan, size_t elements, int rounds)
{
    enum { CALLERS = 4 };
    struct caller alone, callers[CALLERS];
    pthread_t threads[CALLERS];
    float *memory = calloc((CALLERS + 2) * elements, sizeof *memory), *q = memory, *o = memory + elements;
    if (!CHECK(memory != NULL, "no memory for %zu elements", elements))
        return;
    for (size_t i = 0; i < elements; i++)
        q[i] = (float)(i * 7919 % 1000) / 500.0f - 1.0f;
    alone = (struct caller){.plan = plan, .q = q, .o = o, .rounds = rounds};
    call_often(&alone);
    CHECK(!alone.failures, "%d executions failed alone", alone.failures);
    for (int i = 0; i < CALLERS; i++) {
        callers[i] = (struct caller){.plan = plan, .q = q, .o = o + (size_t)(i + 1) * elements, .rounds = rounds};
        pthread_create(&threads[i], NULL, call_often, &callers[i]);
    }
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
        CHECK(!callers[i].failures, "%d executions failed", callers[i].failures);
        CHECK(!memcmp(callers[i].o, o, elements * sizeof *o), "caller %d has other bits", i);
    }
    free(memory);
}

#endif
