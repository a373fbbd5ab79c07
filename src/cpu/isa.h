/* What this machine's CPU has. Bits are closed under implication (AVX512 contains AVX2), so one test decides. */
#ifndef NBHD_CPU_ISA_H
#define NBHD_CPU_ISA_H

#include <stdbool.h>
#include <stdint.h>
#include "nbhd.h"

enum {
    NBHD_ISA_SCALAR = 1,
    NBHD_ISA_AVX2 = 2,       /* AVX2, FMA and F16C */
    NBHD_ISA_AVX512 = 4,     /* F, BW, DQ, VL */
    NBHD_ISA_AVX512BF16 = 8, /* dot products of bfloat16 pairs */
    NBHD_ISA_AMX = 16,       /* tiles of bfloat16 */
    NBHD_ISA_NEON = 32
};

/* The words that detection reads, so that it can be tested from recorded ones. */
struct nbhd_cpuid {
    uint32_t leaf1_ecx, leaf7_ebx, leaf7_edx, leaf7_1_eax;
    uint64_t xcr0; /* register state that the operating system saves */
};
unsigned nbhd_isa_from_cpuid(const struct nbhd_cpuid *words);

/* What may be used: the machine's, less what NBHD_ISA (scalar, avx2, avx512, avx512bf16, amx, neon) or
 * nbhd_isa_limit leaves out. */
unsigned nbhd_isa_available(void);
/* Caps nbhd_isa_available from now on, for tests; ~0u lifts the cap. */
void nbhd_isa_limit(unsigned mask);
/* Adds bits that the machine lacks, for tests of a row whose instructions are emulated. */
void nbhd_isa_assume(unsigned bits);
const char *nbhd_isa_name(unsigned bit);
/* Of a core's second-level cache; 1 MiB where the system does not tell. No instruction that a virtual machine traps. */
size_t nbhd_l2_bytes(void);
/* Of its first-level data cache; 32 KiB likewise. */
size_t nbhd_l1_bytes(void);
/* True, with a sentence, if the machine lacks the bit `needs`. */
bool nbhd_isa_refuses(unsigned needs, char why[NBHD_TEXT]);

#endif
