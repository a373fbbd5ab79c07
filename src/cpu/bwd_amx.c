/* Bfloat16 backward with AMX: the algorithm of bwd_pairs.inc.h over tiles. */
#include "cpu/simd_avx512bf16.h"
#include "cpu/amx.h"
#include "cpu/bwd_amx.inc.h"
