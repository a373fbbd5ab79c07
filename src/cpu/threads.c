/* The worker pool. Workers only ever help: the caller takes tasks too and waits just for workers that have joined its
 * job, so a call completes even if no worker wakes (after a fork, say). */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>
#include "core/kernel.h"
#include "cpu/threads.h"

enum { MAX_WORKERS = 1023, SPINS = 4000 };

struct job {
    void (*work)(void *, long long, int);
    void *context;
    long long tasks;
    int threads;
};

/* lock guards job, open, joined, active and workers; the atomics let waiting threads spin a while before they sleep. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    struct job job;
    bool open;
    int joined; /* workers that entered this job; also the last one's thread number */
    int workers;
    atomic_int active;
    atomic_uint generation;
    atomic_llong next; /* the next task */
    atomic_flag busy;  /* some caller has the pool */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER,
          .busy = ATOMIC_FLAG_INIT};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_tasks(const struct job *job, int thread)
{
    for (;;) {
        long long task = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
        if (task >= job->tasks)
            return;
        job->work(job->context, task, thread);
    }
}

static void *worker(void *unused)
{
    (void)unused;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&pool.generation) == seen; i++)
            relax();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.generation) == seen)
            pthread_cond_wait(&pool.wake, &pool.lock);
        seen = atomic_load(&pool.generation);
        const bool join = pool.open && pool.joined + 1 < pool.job.threads;
        const struct job job = pool.job;
        const int thread = join ? ++pool.joined : 0;
        if (join)
            atomic_fetch_add(&pool.active, 1);
        pthread_mutex_unlock(&pool.lock);
        if (!join)
            continue;
        take_tasks(&job, thread);
        pthread_mutex_lock(&pool.lock);
        if (atomic_fetch_sub(&pool.active, 1) == 1)
            pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* In a child process the workers are gone; its calls start anew. */
static void forget_workers(void)
{
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.workers = 0;
    pool.open = false;
    atomic_store(&pool.active, 0);
    atomic_flag_clear(&pool.busy);
}

static void once(void) { pthread_atfork(NULL, NULL, forget_workers); }

/* Signals to the process are for the program's own threads, one of which may wait for them. Faults are the worker's,
 * and profilers ask each thread. */
static void signals_of_workers(sigset_t *blocked)
{
    static const int let_in[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS, SIGPROF};
    sigfillset(blocked);
    for (size_t i = 0; i < sizeof let_in / sizeof *let_in; i++)
        sigdelset(blocked, let_in[i]);
}

int nbhd_threads_prepare(int threads)
{
    static pthread_once_t control = PTHREAD_ONCE_INIT;
    if (threads <= 1)
        return threads;
    sigset_t callers, ours;
    signals_of_workers(&ours);
    pthread_once(&control, once);
    pthread_mutex_lock(&pool.lock);
    pthread_sigmask(SIG_SETMASK, &ours, &callers); /* workers inherit it */
    while (pool.workers < threads - 1 && pool.workers < MAX_WORKERS) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, NULL))
            break;
        pthread_detach(thread);
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &callers, NULL);
    const int ready = pool.workers + 1;
    pthread_mutex_unlock(&pool.lock);
    return ready < threads ? ready : threads;
}

/* What NBHD_THREADS asks for; 0: nothing, or no number, which is said once. */
static int threads_asked_for(void)
{
    static atomic_bool told;
    const char *text = nbhd_env("NBHD_THREADS");
    char *end = NULL;
    const long count = text ? strtol(text, &end, 10) : 0;
    if (!text || (count > 0 && !*end))
        return count > MAX_WORKERS ? MAX_WORKERS : (int)count;
    if (!atomic_exchange(&told, true))
        nbhd_log(0, "NBHD_THREADS is '%s'; it must be a whole number of at least 1. It is ignored", text);
    return 0;
}

/* The quota is read once: planning a small problem is quicker than reading it. */
static int within_quota(int count)
{
    static atomic_int known; /* 0: not yet */
    int quota = atomic_load_explicit(&known, memory_order_relaxed);
    if (!quota) {
        quota = nbhd_threads_quota("/proc/self/cgroup", "/sys/fs/cgroup");
        atomic_store_explicit(&known, quota, memory_order_relaxed);
    }
    return count < quota ? count : quota;
}

int nbhd_threads_available(void)
{
    int count = 0;
#if defined(__linux__)
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set))
        count = CPU_COUNT(&set);
#endif
    if (count < 1)
        count = (int)sysconf(_SC_NPROCESSORS_ONLN);
    const int wanted = threads_asked_for();
    if (wanted > 0)
        count = wanted;
    else if (count > 1)
        count = within_quota(count);
    return count < 1 ? 1 : count > MAX_WORKERS ? MAX_WORKERS : count;
}

static void run_shared(const struct job *job)
{
    pthread_mutex_lock(&pool.lock);
    pool.job = *job;
    pool.joined = 0;
    pool.open = true;
    atomic_store(&pool.next, 0);
    atomic_fetch_add(&pool.generation, 1);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_tasks(job, 0);
    pthread_mutex_lock(&pool.lock);
    pool.open = false;
    pthread_mutex_unlock(&pool.lock);
    for (int i = 0; i < SPINS && atomic_load(&pool.active); i++)
        relax();
    pthread_mutex_lock(&pool.lock);
    while (atomic_load(&pool.active))
        pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

void nbhd_parallel(int threads, long long tasks, void (*work)(void *context, long long task, int thread),
                   void *context)
{
    const struct job job = {work, context, tasks, threads};
    if (threads > 1 && tasks > 1 && !atomic_flag_test_and_set(&pool.busy)) {
        run_shared(&job);
        atomic_flag_clear(&pool.busy);
        return;
    }
    for (long long task = 0; task < tasks; task++)
        work(context, task, 0);
}
