/* The speed of light of this machine's vector units: what a loop of multiply-adds reaches that touches no memory. */
#ifndef NBHD_CPU_PEAK_H
#define NBHD_CPU_PEAK_H

/* GFLOP/s in float32 of the best instruction set among the bits of isa (isa.h) on so many threads. Takes about 0.1 s.
 * 0 if isa holds none that this machine has. */
double nbhd_cpu_peak_gflops(unsigned isa, int threads);

/* One a set: runs `rounds` rounds of independent chains; returns the floating-point operations done. */
double nbhd_peak_loop_scalar(long rounds);
double nbhd_peak_loop_avx2(long rounds);
double nbhd_peak_loop_avx512(long rounds);
double nbhd_peak_loop_neon(long rounds);

#endif
