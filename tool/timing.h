/* The clock, what a series of times comes to, and a bar for whoever waits. */
#ifndef NBHD_TOOL_TIMING_H
#define NBHD_TOOL_TIMING_H

double now_ms(void);

struct spread {
    double min, median, p90;
};
/* Sorts ms[0..count); count >= 1. */
struct spread spread_of(double *ms, int count);

/* A bar on stderr, drawn only on a terminal and only for what lasts longer than two seconds. */
struct progress {
    const char *what;
    double begun, drawn;
};
struct progress progress_begin(const char *what);
void progress_at(struct progress *p, double fraction);
void progress_end(struct progress *p); /* wipes the bar */

#endif
