/* The checks of simd.inc.h for simd_avx2.h, compiled with its flags. */
#include "cpu/simd_avx2.h"
#include "simd.inc.h"

void test_simd_avx2(const struct simd_test *test) { check_vocabulary(test); }
