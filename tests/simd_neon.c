/* The checks of simd.inc.h for simd_neon.h, compiled with its flags. */
#include "cpu/simd_neon.h"
#include "simd.inc.h"

void test_simd_neon(const struct simd_test *test) { check_vocabulary(test); }
