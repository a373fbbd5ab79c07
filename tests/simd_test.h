/* Between test_simd.c and the vocabularies' own compilations of simd.inc.h. */
#ifndef NBHD_TESTS_SIMD_TEST_H
#define NBHD_TESTS_SIMD_TEST_H

#include <stdbool.h>
#include "cpu/cpu.h"

struct simd_test {
    void (*check)(bool ok, const char *operation, int lane, double in, double out);
    char *page_end; /* the byte behind a writable page; inaccessible */
    bool fused;     /* fma rounds once */
};

void test_simd_avx2(const struct simd_test *test);
void test_simd_avx512(const struct simd_test *test);
void test_simd_avx512bf16(const struct simd_test *test);
void test_simd_neon(const struct simd_test *test);

#endif
