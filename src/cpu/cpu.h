/* Small things that every CPU kernel needs: addresses in a view, elements of every dtype, the number of threads. */
#ifndef NBHD_CPU_CPU_H
#define NBHD_CPU_CPU_H

#include <stdint.h>
#include <string.h>
#include "core/kernel.h"

static inline char *nbhd_view_at(const struct nbhd_view *v, int batch, const int x[3], int head)
{
    return v->data + batch * v->batch + x[0] * v->axis[0] + x[1] * v->axis[1] + x[2] * v->axis[2] + head * v->head;
}

static inline float nbhd_float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t nbhd_bits_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float nbhd_from_bf16(uint16_t half) { return nbhd_float_from_bits((uint32_t)half << 16); }

/* Rounds to nearest, ties to even; a NaN stays one. */
static inline uint16_t nbhd_to_bf16(float value)
{
    uint32_t bits = nbhd_bits_from_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float nbhd_from_f16(uint16_t half);
uint16_t nbhd_to_f16(float value);

/* Element i of an array of the dtype. */
double nbhd_load(const char *array, int dtype, long long i);
void nbhd_store(char *array, int dtype, long long i, double value);

/* Rows along axis 2 are done in segments, so that threads share them where there are few: a sequence is one row. */
enum { NBHD_SEGMENT = 64 };

static inline long long nbhd_segments(int extent) { return (extent + NBHD_SEGMENT - 1) / NBHD_SEGMENT; }

/* The segment that is the last digit of a task's number; *task becomes the digits before it. */
static inline struct nbhd_range nbhd_segment(long long *task, int extent)
{
    const int begin = (int)(*task % nbhd_segments(extent)) * NBHD_SEGMENT;
    *task /= nbhd_segments(extent);
    return nbhd_range_of(begin, nbhd_min(begin + NBHD_SEGMENT, extent));
}

/* How many threads a plan should use for so many tasks: desc.threads or all, no more than tasks; starts them. */
int nbhd_plan_threads(const struct nbhd_problem *problem, long long tasks);

#endif
