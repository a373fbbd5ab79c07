/* The vocabulary of cpu/amx.h in plain C, for machines without tiles: the same names, the same order of sums. */
#ifndef NBHD_TESTS_AMX_EMULATED_H
#define NBHD_TESTS_AMX_EMULATED_H

#include <string.h>
#include "cpu/cpu.h"

struct emulated_tile {
    unsigned char row[16][64];
};
static _Thread_local struct emulated_tile emulated[8];
static _Thread_local bool tiles_configured;

static inline void tile_begin(void)
{
    memset(emulated, 0, sizeof emulated);
    tiles_configured = true;
}
static inline void tile_end(void)
{
    memset(emulated, 0xff, sizeof emulated); /* NaN */
    tiles_configured = false;
}

static inline void emulated_load(int t, const void *p, long long step)
{
    for (int i = 0; i < 16; i++)
        memcpy(emulated[t].row[i], (const char *)p + i * step, 64);
}

static inline void emulated_store(int t, void *p, long long step)
{
    for (int i = 0; i < 16; i++)
        memcpy((char *)p + i * step, emulated[t].row[i], 64);
}

/* Pairs in the order of k, the second of a pair first; subnormals, which the instruction takes for 0, are not looked
 * at. */
static inline void emulated_dot(int sum, int a, int b)
{
    for (int i = 0; i < 16 && tiles_configured; i++) {
        float c[16];
        uint16_t x[32];
        memcpy(c, emulated[sum].row[i], 64);
        memcpy(x, emulated[a].row[i], 64);
        for (int k = 0; k < 16; k++) {
            uint16_t y[32];
            memcpy(y, emulated[b].row[k], 64);
            for (int j = 0; j < 16; j++) {
                c[j] += nbhd_from_bf16(x[2 * k]) * nbhd_from_bf16(y[2 * j]);
                c[j] += nbhd_from_bf16(x[2 * k + 1]) * nbhd_from_bf16(y[2 * j + 1]);
            }
        }
        memcpy(emulated[sum].row[i], c, 64);
    }
}

#define TILE_FENCE()           ((void)0)
#define TILE_ZERO(t)           memset(&emulated[t], 0, sizeof emulated[t])
#define TILE_LOAD(t, p, step)  emulated_load(t, p, step)
#define TILE_STORE(t, p, step) emulated_store(t, p, step)
#define TILE_DOT(sum, a, b)    emulated_dot(sum, a, b)

#endif
