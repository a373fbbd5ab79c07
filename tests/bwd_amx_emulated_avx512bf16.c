/* The row bwd_amx over emulated tiles, in place of the library's: for test_bwd_amx_emulated. */
#include "cpu/simd_avx512bf16.h"
#include "amx_emulated.h"
#include "cpu/bwd_amx.inc.h"
