/* Rows shared out among threads. */
#include "parallel.h"

#include "cpu/threads.h"

struct shares {
    void (*work)(void *context, int begin, int end);
    void *context;
    int rows, count;
};

int threads_of(int threads) { return threads ? threads : nbhd_threads_available(); }

static void do_share(void *context, long long share, int thread)
{
    const struct shares *s = context;
    (void)thread;
    s->work(s->context, (int)(s->rows * share / s->count), (int)(s->rows * (share + 1) / s->count));
}

void parallel_rows(int threads, int rows, void (*work)(void *context, int begin, int end), void *context)
{
    const int ready = nbhd_threads_prepare(threads_of(threads));
    struct shares s = {work, context, rows, ready < rows ? ready : rows};
    nbhd_parallel(ready, s.count, do_share, &s);
}
