/* The worker pool: every task once, thread numbers in range, callers side by side, calls inside a forked child. */
#define _DEFAULT_SOURCE /* usleep */
#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>
#include "cpu/threads.h"
#include "test.h"

enum { TASKS = 5000 };

struct record {
    int threads;
    atomic_int done[TASKS], out_of_range;
};

static int pause_us; /* of each task, so that all workers come who may */

static void mark(void *context, long long task, int thread)
{
    struct record *r = context;
    if (pause_us)
        usleep((useconds_t)pause_us);
    atomic_fetch_add(&r->done[task], 1);
    if (thread < 0 || thread >= r->threads)
        atomic_fetch_add(&r->out_of_range, 1);
}

static bool run_once(struct record *r, int threads, int tasks)
{
    memset(r, 0, sizeof *r);
    r->threads = threads;
    nbhd_parallel(threads, tasks, mark, r);
    bool ok = !atomic_load(&r->out_of_range);
    for (int i = 0; i < TASKS; i++)
        ok &= atomic_load(&r->done[i]) == (i < tasks);
    return ok;
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
    check_callers();
    check_fork();
    return test_done();
}
