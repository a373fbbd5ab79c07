/* Compiles what a plan needs side by side. While a thread gathers, nbhd_cuda_acquire hands out an empty module for a
 * kernel that is in no cache, and another thread begins to compile it; a plan built so is good for nothing, and is
 * built again when all kernels are there (nbhd_plan_make). So no kernel's host half has to know of it. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/driver.h"
#include "cuda/jit.h"

enum { MOST = 16, STACK = 16 << 20 }; /* threads at once; bytes: a caller's default may be little */

struct job {
    pthread_t thread;
    char *source, *options, *arch;
    struct job *next;
};

static _Thread_local struct {
    bool on;
    int count;
    struct job *jobs;
} gathering;

static void drop(struct job *job)
{
    free(job->source);
    free(job->options);
    free(job->arch);
    free(job);
}

/* Its failure is told when the plan is built again: compiling then fails in that thread. */
static void *compile(void *context)
{
    const struct job *job = context;
    const struct nbhd_jit *code;
    nbhd_jit_compile(&code, job->source, job->options, job->arch, 0);
    return NULL;
}

/* The thread takes no signal that is meant for the program, but its own faults: NVRTC catches those. */
static bool start(struct job *job)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
    sigset_t others, before;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes))
        return false;
    sigfillset(&others);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&others, faults[i]);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    const bool started = pthread_create(&job->thread, &attributes, compile, job) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return started;
}

static bool is_begun(const char *source, const char *options, const char *arch)
{
    for (const struct job *job = gathering.jobs; job; job = job->next)
        if (!strcmp(job->source, source) && !strcmp(job->options, options) && !strcmp(job->arch, arch))
            return true;
    return false;
}

void nbhd_ahead_begin(void) { gathering.on = true; }

bool nbhd_ahead(const char *source, const char *options, const char *arch, unsigned flags)
{
    char why[NBHD_TEXT];
    if (!gathering.on || flags & NBHD_PLAN_NO_JIT)
        return false;
    if (is_begun(source, options, arch))
        return true;
    if (gathering.count == MOST || !nbhd_nvrtc(why) || nbhd_jit_is_there(source, options, arch))
        return false;
    struct job *job = calloc(1, sizeof *job);
    if (!job)
        return false;
    job->source = strdup(source);
    job->options = strdup(options);
    job->arch = strdup(arch);
    if (!job->source || !job->options || !job->arch || !start(job)) {
        drop(job);
        return false;
    }
    job->next = gathering.jobs;
    gathering.jobs = job;
    gathering.count++;
    return true;
}

bool nbhd_ahead_end(void)
{
    const bool any = gathering.count > 0;
    for (struct job *job = gathering.jobs, *next; job; job = next) {
        next = job->next;
        pthread_join(job->thread, NULL);
        drop(job);
    }
    gathering.on = false;
    gathering.count = 0;
    gathering.jobs = NULL;
    return any;
}
