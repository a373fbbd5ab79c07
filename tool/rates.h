/* What share of the machine's speed of light a kernel reaches, measured beside it: between its runs come bursts of a
 * loop on registers, with the instructions that the kernel is named after, on the same threads. A run and the bursts
 * next to it suffer the same neighbours and the same clock, so of many such pairs the median ratio stays where absolute
 * times swing. */
#ifndef NBHD_TOOL_RATES_H
#define NBHD_TOOL_RATES_H

#include "cpu/peak.h"
#include "nbhd.h"

enum { SHARE_PAIRS = 1000 };

struct share {
    struct nbhd_peak peak;  /* no loop: nothing is measured */
    double flops;           /* of a run, as the loop counts them */
    double begun, runs, ms; /* since the last burst */
    double before;          /* operations a second of the last burst */
    double ratios[SHARE_PAIRS];
    int pairs;
};

/* The kernel's runs on so many threads do `flops` each. */
void share_begin(struct share *s, nbhd_device device, const char *kernel, int threads, double flops);
/* To be called after each run, of ms milliseconds. Every 10 ms a burst, a fourth as long as the runs before it. */
void share_run(struct share *s, double ms);
/* The median of all pairs: operations a second in runs, over those in the bursts before and after them. 0: not known,
 * as on a GPU. */
double share_end(struct share *s);

#endif
