/* Bfloat16 forward with AMX: the algorithm of fwd_pairs.inc.h over tiles. */
#include "cpu/simd_avx512bf16.h"
#include "cpu/amx.h"
#include "cpu/fwd_amx.inc.h"
