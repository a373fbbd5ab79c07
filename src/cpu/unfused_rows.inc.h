/* Rows of a tensor of any dtype as vectors of float, over the SIMD vocabulary. */
#include "core/kernel.h"
#include "cpu/cpu.h"

typedef float real;

/* Elements i .. i + n - 1 of a row, n <= VF; lanes past n are 0. */
V_FN vf row_load(const char *row, int dtype, int i, int n)
{
    if (dtype == NBHD_BF16)
        return v_load_bf16((const uint16_t *)(const void *)row + i, n);
    if (dtype == NBHD_F16)
        return v_load_f16((const uint16_t *)(const void *)row + i, n);
    const float *at = (const float *)(const void *)row + i;
    return n == VF ? v_load(at) : v_load_part(at, n);
}

V_FN void row_store(char *row, int dtype, int i, vf x, int n)
{
    if (dtype == NBHD_BF16)
        v_store_bf16((uint16_t *)(void *)row + i, x, n);
    else if (dtype == NBHD_F16)
        v_store_f16((uint16_t *)(void *)row + i, x, n);
    else if (n == VF)
        v_store((float *)(void *)row + i, x);
    else
        v_store_part((float *)(void *)row + i, x, n);
}

V_FN real row_element(const char *row, int dtype, int i)
{
    if (dtype == NBHD_BF16)
        return nbhd_from_bf16(((const uint16_t *)(const void *)row)[i]);
    if (dtype == NBHD_F16)
        return nbhd_from_f16(((const uint16_t *)(const void *)row)[i]);
    return ((const float *)(const void *)row)[i];
}
