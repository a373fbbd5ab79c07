/* The loop on registers beside a kernel's runs: see rates.h. */
#include "rates.h"

#include <math.h>
#include <string.h>
#include <time.h>

#include "cpu/isa.h"
#include "timing.h"

/* The instruction set that ends a kernel's name, and those that it contains; all that this machine has if none does. */
static unsigned isa_of(const char *kernel)
{
    const char *suffix = strrchr(kernel, '_');
    for (unsigned bit = NBHD_ISA_NEON; suffix && bit; bit >>= 1)
        if (!strcmp(suffix + 1, nbhd_isa_name(bit)))
            return bit == NBHD_ISA_NEON ? bit : bit | (bit - 1);
    return nbhd_isa_available();
}

/* One thread alone counts the seconds that it ran, so that waiting for a core counts on neither side. */
static double seconds(const struct share *s)
{
    struct timespec t;
    clock_gettime(s->peak.threads > 1 ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Operations a second; the runs that follow begin where it ends. */
static double burst(struct share *s, double length)
{
    const double start = seconds(s), work = nbhd_peak_burst(&s->peak, length);
    s->begun = seconds(s);
    s->runs = s->ms = 0;
    return work / (s->begun - start);
}

void share_begin(struct share *s, nbhd_device device, const char *kernel, int threads, double flops)
{
    *s = (struct share){.flops = flops};
    if (device != NBHD_DEVICE_CPU)
        return;
    s->peak = nbhd_peak_open(isa_of(kernel), threads);
    if (s->peak.loop)
        s->before = burst(s, 0.0025);
}

/* Of the runs since the last burst and a new one. */
static void add_pair(struct share *s)
{
    const double passed = seconds(s) - s->begun, speed = s->flops * s->runs / passed;
    const double before = s->before, after = s->before = burst(s, fmin(passed / 4, 0.025));
    s->ratios[s->pairs++] = 2 * speed / (before + after);
}

void share_run(struct share *s, double ms)
{
    s->runs++;
    s->ms += ms;
    if (s->peak.loop && s->ms > 10 && s->pairs < SHARE_PAIRS)
        add_pair(s);
}

double share_end(struct share *s)
{
    if (s->peak.loop && s->runs > 0 && !s->pairs)
        add_pair(s);
    return s->pairs ? spread_of(s->ratios, s->pairs).median : 0;
}
