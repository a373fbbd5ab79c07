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

/* `state` says it all to a thread that spins: which call it is (its high half), how many more workers may join it, and
 * how many are in it. Joining, leaving and the end of a call are one atomic operation each, so a call of a few
 * microseconds is shared without a lock, for which sixteen threads would queue. The lock and the conditions are for
 * those that have spun in vain and sleep. Each line of its own: one is written for every task. */
#define CALL  (1ull << 32)
#define PLACE (1ull << 16)

static struct {
    _Alignas(64) atomic_ullong state;
    _Alignas(64) atomic_llong next; /* the next task */
    _Alignas(64) struct job job;    /* of the call that `state` counts; stands while somebody is in it */
    atomic_flag busy;               /* some caller has the pool */
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    atomic_int asleep;     /* workers that wait for `wake`, or are about to */
    atomic_bool waited_for; /* the caller waits for `done`, or is about to */
    int workers;           /* guarded by lock */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER,
          .busy = ATOMIC_FLAG_INIT};

static unsigned call_of(unsigned long long state) { return (unsigned)(state / CALL); }
static int places_of(unsigned long long state) { return (int)(state % CALL / PLACE); }
static int active_of(unsigned long long state) { return (int)(state % PLACE); }

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

void nbhd_wait_for(atomic_uchar *flag)
{
    for (int i = 0; !atomic_load_explicit(flag, memory_order_acquire); i++)
        if (i < SPINS)
            relax();
        else
            sched_yield(); /* its thread may want this processor */
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

/* Returns the first call after `seen`. Who sleeps has said so before it looks a last time, and who begins a call looks
 * for sleepers after that: one of them sees the other. */
static unsigned next_call(unsigned seen)
{
    for (int i = 0; i < SPINS && call_of(atomic_load(&pool.state)) == seen; i++)
        relax();
    if (call_of(atomic_load(&pool.state)) == seen) {
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.asleep, 1);
        while (call_of(atomic_load(&pool.state)) == seen)
            pthread_cond_wait(&pool.wake, &pool.lock);
        atomic_fetch_sub(&pool.asleep, 1);
        pthread_mutex_unlock(&pool.lock);
    }
    return call_of(atomic_load(&pool.state));
}

/* Returns the number of the place taken in this call, or 0: it has none left, or is over. */
static int join_call(unsigned call)
{
    unsigned long long state = atomic_load(&pool.state);
    while (call_of(state) == call && places_of(state) > 0)
        if (atomic_compare_exchange_weak(&pool.state, &state, state - PLACE + 1))
            return places_of(state);
    return 0;
}

static void leave_call(void)
{
    const bool last = active_of(atomic_fetch_sub(&pool.state, 1)) == 1;
    if (!last || !atomic_load(&pool.waited_for))
        return;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_signal(&pool.done);
    pthread_mutex_unlock(&pool.lock);
}

static void *worker(void *unused)
{
    (void)unused;
    unsigned call = 0;
    for (;;) {
        call = next_call(call);
        const int thread = join_call(call);
        if (!thread)
            continue;
        take_tasks(&pool.job, thread);
        leave_call();
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
    atomic_store(&pool.asleep, 0);
    atomic_store(&pool.waited_for, false);
    atomic_store(&pool.state, call_of(atomic_load(&pool.state)) * CALL);
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

static void begin_call(const struct job *job)
{
    const unsigned call = call_of(atomic_load(&pool.state)) + 1;
    pool.job = *job;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.state, call * CALL + (unsigned)(job->threads - 1) * PLACE);
    if (!atomic_load(&pool.asleep))
        return;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

static bool workers_left(void) { return active_of(atomic_load(&pool.state)) == 0; }

/* Nobody joins any more; returns when those that had have left. */
static void end_call(void)
{
    atomic_fetch_and(&pool.state, ~(CALL - PLACE));
    for (int i = 0; i < SPINS && !workers_left(); i++)
        relax();
    if (workers_left())
        return;
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.waited_for, true);
    while (!workers_left())
        pthread_cond_wait(&pool.done, &pool.lock);
    atomic_store(&pool.waited_for, false);
    pthread_mutex_unlock(&pool.lock);
}

static void run_shared(const struct job *job)
{
    begin_call(job);
    take_tasks(job, 0);
    end_call();
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
