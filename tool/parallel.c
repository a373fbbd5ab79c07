/* Rows shared out among threads. */
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>

enum { THREADS_MAX = 256 };

struct share {
    void (*work)(void *context, int begin, int end);
    void *context;
    int begin, end;
    pthread_t thread;
    bool started;
};

int cpu_count(void)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
    return n > 0 ? n : 1;
}

static void *begin_share(void *argument)
{
    struct share *s = argument;
    s->work(s->context, s->begin, s->end);
    return NULL;
}

void parallel_rows(int threads, int rows, void (*work)(void *context, int begin, int end), void *context)
{
    struct share share[THREADS_MAX];
    int n = threads ? threads : cpu_count();
    n = n > rows ? rows : n;
    n = n > THREADS_MAX ? THREADS_MAX : n;
    for (int i = 0; i < n; i++) {
        share[i] = (struct share){.work = work, .context = context};
        share[i].begin = (int)((long long)rows * i / n);
        share[i].end = (int)((long long)rows * (i + 1) / n);
        share[i].started = i + 1 < n && !pthread_create(&share[i].thread, NULL, begin_share, &share[i]);
    }
    for (int i = n - 1; i >= 0; i--) {
        if (share[i].started)
            pthread_join(share[i].thread, NULL);
        else
            begin_share(&share[i]);
    }
}
