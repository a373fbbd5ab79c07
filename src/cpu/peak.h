/* The speed of light of this machine's arithmetic: what a loop reaches that touches no memory. In float32 it is of
 * multiply-adds; for avx512bf16 of dot products of bfloat16 pairs, for amx of products of bfloat16 tiles. */
#ifndef NBHD_CPU_PEAK_H
#define NBHD_CPU_PEAK_H

/* The loop of the best instruction set among the bits of isa (isa.h), on so many threads. */
struct nbhd_peak {
    double (*loop)(long rounds); /* NULL: isa holds none that this machine has */
    double speed, work;          /* rounds a second on one thread, roughly; operations a round */
    int threads;
};
struct nbhd_peak nbhd_peak_open(unsigned isa, int threads);

/* Runs the loop for about so many seconds; returns the floating-point operations done, which the caller times. */
double nbhd_peak_burst(const struct nbhd_peak *peak, double seconds);

/* GFLOP/s of the best of eight bursts; 0 without a loop. Takes about 0.1 s. */
double nbhd_cpu_peak_gflops(unsigned isa, int threads);

/* One a set: runs `rounds` rounds of independent chains; returns the floating-point operations done. */
double nbhd_peak_loop_scalar(long rounds);
double nbhd_peak_loop_avx2(long rounds);
double nbhd_peak_loop_avx512(long rounds);
double nbhd_peak_loop_avx512bf16(long rounds);
double nbhd_peak_loop_amx(long rounds);
double nbhd_peak_loop_neon(long rounds);

/* How many times as fast dot products of bfloat16 pairs are as float32 multiply-adds, with AVX-512: about 2 on Zen 4,
 * 1/2 on Sapphire Rapids. Measured once, in less than a millisecond; 0 where there are none. */
double nbhd_cpu_dots_speed(void);

#endif
