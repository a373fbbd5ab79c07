/* See cpu.h. */
#include <math.h>
#include "cpu/cpu.h"
#include "cpu/threads.h"

float nbhd_from_f16(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
    if (exponent == 31)
        return nbhd_float_from_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) {
        const float tiny = (float)fraction * 0x1p-24f; /* subnormal, or zero */
        return sign ? -tiny : tiny;
    }
    return nbhd_float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

uint16_t nbhd_to_f16(float value)
{
    const uint32_t bits = nbhd_bits_from_float(value), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000u)
        return sign | 0x7e00;
    if (magnitude >= 0x477ff000u) /* rounds to more than 65504 */
        return sign | 0x7c00;
    if (magnitude < 0x38800000u) /* subnormal: the unit is 2^-24, and nearbyintf rounds ties to even */
        return (uint16_t)(sign | (uint16_t)nearbyintf(nbhd_float_from_bits(magnitude) * 0x1p24f));
    return (uint16_t)(sign | (uint16_t)((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

double nbhd_load(const char *array, int dtype, long long i)
{
    switch (dtype) {
    case NBHD_F64: return ((const double *)(const void *)array)[i];
    case NBHD_F16: return (double)nbhd_from_f16(((const uint16_t *)(const void *)array)[i]);
    case NBHD_BF16: return (double)nbhd_from_bf16(((const uint16_t *)(const void *)array)[i]);
    default: return (double)((const float *)(const void *)array)[i];
    }
}

void nbhd_store(char *array, int dtype, long long i, double value)
{
    switch (dtype) {
    case NBHD_F64: ((double *)(void *)array)[i] = value; return;
    case NBHD_F16: ((uint16_t *)(void *)array)[i] = nbhd_to_f16((float)value); return;
    case NBHD_BF16: ((uint16_t *)(void *)array)[i] = nbhd_to_bf16((float)value); return;
    default: ((float *)(void *)array)[i] = (float)value; return;
    }
}

int nbhd_plan_threads(const struct nbhd_problem *problem, long long tasks)
{
    int threads = problem->desc.threads ? problem->desc.threads : nbhd_threads_available();
    if (tasks < threads)
        threads = (int)tasks;
    return nbhd_threads_prepare(threads < 1 ? 1 : threads);
}
