/* The worker pool: every task once, thread numbers in range, callers side by side, calls inside a forked child;
 * signals are not the workers'; quotas of control groups. */
#define _DEFAULT_SOURCE /* usleep */
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>
#include "cpu/threads.h"
#include "folder.h"
#include "test.h"

enum { TASKS = 5000, MOST_THREADS = 8 };

struct record {
    int threads;
    atomic_int done[TASKS], out_of_range, shared;
    atomic_flag at_work[MOST_THREADS];
};

static int pause_us; /* of each task, so that all workers come who may */

static void mark(void *context, long long task, int thread)
{
    struct record *r = context;
    if (thread < 0 || thread >= r->threads) {
        atomic_fetch_add(&r->out_of_range, 1);
        return;
    }
    if (atomic_flag_test_and_set(&r->at_work[thread])) /* by its number a thread finds its scratch */
        atomic_fetch_add(&r->shared, 1);
    if (pause_us)
        usleep((useconds_t)pause_us);
    atomic_fetch_add(&r->done[task], 1);
    atomic_flag_clear(&r->at_work[thread]);
}

static bool run_once(struct record *r, int threads, int tasks)
{
    memset(r, 0, sizeof *r);
    r->threads = threads;
    nbhd_parallel(threads, tasks, mark, r);
    bool ok = !atomic_load(&r->out_of_range) && !atomic_load(&r->shared);
    for (int i = 0; i < TASKS; i++)
        ok &= atomic_load(&r->done[i]) == (i < tasks);
    return ok;
}

/* Tasks that each need the one three before. */
struct chain {
    atomic_uchar done[TASKS];
    int length[TASKS];
};

static void link_task(void *context, long long task, int thread)
{
    struct chain *c = context;
    (void)thread;
    if (task >= 3)
        nbhd_wait_for(&c->done[task - 3]);
    c->length[task] = task >= 3 ? c->length[task - 3] + 1 : 1;
    atomic_store_explicit(&c->done[task], 1, memory_order_release);
}

static void check_waiting(void)
{
    static struct chain c;
    nbhd_parallel(5, TASKS, link_task, &c);
    CHECK(c.length[TASKS - 1] == (TASKS + 2) / 3, "a task began before the one that it waits for had ended");
}

static void *call_many_times(void *context)
{
    bool *ok = context;
    struct record *r = malloc(sizeof *r);
    *ok = r != NULL;
    for (int i = 0; *ok && i < 200; i++)
        *ok = run_once(r, 1 + i % 5, i * 25 % TASKS);
    free(r);
    return NULL;
}

static void check_callers(void)
{
    enum { CALLERS = 4 };
    pthread_t threads[CALLERS];
    bool ok[CALLERS];
    for (int i = 0; i < CALLERS; i++)
        pthread_create(&threads[i], NULL, call_many_times, &ok[i]);
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
        CHECK(ok[i], "caller %d lost or repeated a task", i);
    }
}

static void check_fork(void)
{
#ifdef __SANITIZE_THREAD__
    test_skip("thread sanitizer allows no new threads after a fork");
    return;
#endif
    static struct record r;
    const pid_t child = fork();
    if (child == 0) {
        alarm(60); /* a call that waits for workers of the parent would hang */
        const bool ok = run_once(&r, 4, 100) && nbhd_threads_prepare(4) == 4 && run_once(&r, 4, TASKS);
        _exit(ok ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with status %x", (unsigned)status);
}

/* A program that blocks a signal to wait for it gets it, though there are workers from before. */
static void check_signals(void)
{
    sigset_t set, before;
    int got = 0;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, &before);
    kill(getpid(), SIGUSR1); /* in a thread that did not block it, it would end the process */
    usleep(1000);
    CHECK(!sigwait(&set, &got) && got == SIGUSR1, "signal %d", got);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    CHECK(!sigismember(&before, SIGUSR1) && !sigismember(&before, SIGINT), "the caller's signals were left blocked");
}

static void check_quota(void)
{
    static const struct {
        const char *groups, *outer, *inner;
        int want;
    } cases[] = {
        {"0::/a/b\n", "max 100000\n", "max 100000\n", INT_MAX}, {"0::/a/b\n", "400000 100000\n", "max 100000\n", 4},
        {"0::/a/b\n", "400000 100000\n", "150000 100000\n", 2}, {"0::/a\n", "50000 100000\n", "max 100000\n", 1},
        {"4:cpu:/a\n0::/a/b\n", "max 100000\n", "300000 100000\n", 3},
        {"4:cpu:/a\n", "100000 100000\n", "100000 100000\n", INT_MAX}, {"0::/\n", "100000 100000\n", "?", INT_MAX},
        {"0::/a/c\n", "max\n", "1 1\n", INT_MAX}, {"", "1 1\n", "1 1\n", INT_MAX},
        {"0::/a/b\n", "-1 100000\n", "0 0\n", INT_MAX}, {"0::/a/b\n", "1e300 1e-300\n", "nan nan\n", INT_MAX},
    };
    if (!folder_begin())
        return;
    mkdir(in_root("a"), 0700);
    mkdir(in_root("a/b"), 0700);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_text(in_root("groups"), cases[i].groups);
        write_text(in_root("a/cpu.max"), cases[i].outer);
        write_text(in_root("a/b/cpu.max"), cases[i].inner);
        const int quota = nbhd_threads_quota(in_root("groups"), root);
        CHECK(quota == cases[i].want, "case %zu: %d", i, quota);
    }
    CHECK(nbhd_threads_quota("/nowhere", root) == INT_MAX, "without groups");
}

int main(void)
{
    static struct record r;
    CHECK(nbhd_threads_available() >= 1, "%d", nbhd_threads_available());
    CHECK(run_once(&r, 3, 100), "without workers, some task was lost or repeated");
    CHECK(nbhd_threads_prepare(5) == 5, "five threads could not be had");
    for (int tasks = 0; tasks < 40; tasks++)
        CHECK(run_once(&r, 5, tasks), "%d tasks", tasks);
    pause_us = 1000;
    CHECK(run_once(&r, 2, 40), "of four workers more than one took part in a call of two threads");
    pause_us = 0;
    check_waiting();
    check_callers();
    check_fork();
    check_signals();
    check_quota();
    return folder_end();
}
