/* See peak.h. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>
#include "cpu/isa.h"
#include "cpu/peak.h"
#include "cpu/simd_scalar.h"
#include "cpu/peak.inc.h"
#include "cpu/threads.h"

double nbhd_peak_loop_scalar(long rounds) { return peak_loop(rounds, v_set1(0.999f), v_set1(0.001f)); }

static const struct {
    unsigned isa;
    double (*loop)(long rounds);
} loops[] = {
#if defined(__x86_64__)
#if !defined(NBHD_NO_AMX)
    {NBHD_ISA_AMX, nbhd_peak_loop_amx},
#endif
    {NBHD_ISA_AVX512BF16, nbhd_peak_loop_avx512bf16},
    {NBHD_ISA_AVX512, nbhd_peak_loop_avx512},
    {NBHD_ISA_AVX2, nbhd_peak_loop_avx2},
#elif defined(__aarch64__)
    {NBHD_ISA_NEON, nbhd_peak_loop_neon},
#endif
    {NBHD_ISA_SCALAR, nbhd_peak_loop_scalar},
};

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct nbhd_peak nbhd_peak_open(unsigned isa, int threads)
{
    enum { TRIES = 4, ROUNDS = 2000 };
    struct nbhd_peak peak = {.threads = nbhd_threads_prepare(threads)};
    isa &= nbhd_isa_available();
    for (size_t i = 0; !peak.loop && i < sizeof loops / sizeof *loops; i++)
        if (loops[i].isa & isa)
            peak.loop = loops[i].loop;
    for (int n = 0; peak.loop && n < TRIES; n++) {
        const double start = seconds();
        peak.work = peak.loop(ROUNDS) / ROUNDS;
        peak.speed = fmax(peak.speed, ROUNDS / (seconds() - start));
    }
    return peak;
}

struct burst {
    double (*loop)(long rounds);
    long rounds;
};

static void burst_task(void *context, long long task, int thread)
{
    const struct burst *burst = context;
    (void)task;
    (void)thread;
    burst->loop(burst->rounds);
}

/* Many short tasks, so that an interruption of one thread costs little. */
double nbhd_peak_burst(const struct nbhd_peak *peak, double length)
{
    enum { TASKS = 16 };
    struct burst burst = {peak->loop, 1 + (long)(peak->speed * length / TASKS)};
    nbhd_parallel(peak->threads, (long long)TASKS * peak->threads, burst_task, &burst);
    return peak->work * (double)burst.rounds * TASKS * peak->threads;
}

double nbhd_cpu_peak_gflops(unsigned isa, int threads)
{
    enum { BURSTS = 8 };
    const struct nbhd_peak peak = nbhd_peak_open(isa, threads);
    double best = 0;
    for (int i = 0; peak.loop && i < BURSTS; i++) {
        const double start = seconds(), work = nbhd_peak_burst(&peak, 0.01);
        best = fmax(best, work / (seconds() - start) * 1e-9);
    }
    return best;
}

#if defined(__x86_64__)
static double short_rate(double (*loop)(long))
{
    const double start = seconds(), work = loop(100);
    return work / (seconds() - start);
}

/* A middle one of the ratios of neighbouring runs: one or two may be disturbed, or the clock may change meanwhile. */
static double dots_speed(void)
{
    enum { RUNS = 5 };
    double speed[RUNS];
    for (int i = 0; i < RUNS; i++) {
        const double plain = short_rate(nbhd_peak_loop_avx512), x = short_rate(nbhd_peak_loop_avx512bf16) / plain;
        int at = i;
        for (; at > 0 && speed[at - 1] > x; at--)
            speed[at] = speed[at - 1];
        speed[at] = x;
    }
    return speed[RUNS / 2];
}

double nbhd_cpu_dots_speed(void)
{
    static _Atomic double known; /* 0: not yet; a race only repeats the measurement */
    double speed = atomic_load_explicit(&known, memory_order_relaxed);
    if (speed == 0 && nbhd_isa_available() & NBHD_ISA_AVX512BF16) {
        speed = dots_speed();
        atomic_store_explicit(&known, speed, memory_order_relaxed);
    }
    return speed;
}
#else
double nbhd_cpu_dots_speed(void) { return 0; }
#endif
