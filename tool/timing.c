/* The clock, spreads and the progress bar. */
#include "timing.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { BAR = 40 };
static const double patience_ms = 2000, redraw_ms = 100;

double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct spread spread_of(double *ms, int count)
{
    qsort(ms, (size_t)count, sizeof *ms, ascending);
    return (struct spread){ms[0], 0.5 * (ms[(count - 1) / 2] + ms[count / 2]), ms[(9 * (count - 1) + 9) / 10]};
}

struct progress progress_begin(const char *what)
{
    double now = now_ms();
    return (struct progress){what, now, isatty(2) ? now : -1};
}

void progress_at(struct progress *p, double fraction)
{
    double now = now_ms();
    if (p->drawn < 0 || now - p->begun < patience_ms || now - p->drawn < redraw_ms)
        return;
    p->drawn = now;
    int full = (int)(fraction * BAR);
    double left = fraction > 0 ? (now - p->begun) * (1 - fraction) / fraction * 1e-3 : 0;
    fprintf(stderr, "\r%s [%.*s%*s] %3.0f%%  %.0f s left \033[K", p->what, full,
            "########################################", BAR - full, "", 100 * fraction, left);
}

void progress_end(struct progress *p)
{
    if (p->drawn > p->begun)
        fprintf(stderr, "\r\033[K");
}
