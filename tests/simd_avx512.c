/* The checks of simd.inc.h for simd_avx512.h, compiled with its flags. */
#include "cpu/simd_avx512.h"
#include "simd.inc.h"

void test_simd_avx512(const struct simd_test *test) { check_vocabulary(test); }
