/* The vocabulary of tiles: eight registers 0 .. 7 of 16 rows of 64 bytes, each 16 x 16 floats or 16 x 32 bfloat16.
 * Registers are literal numbers, so these are macros. tests/amx_emulated.h has the same names in plain C. The
 * compiler does not order tile instructions with ordinary accesses: TILE_FENCE where one reads what the other wrote. */
#ifndef NBHD_CPU_AMX_H
#define NBHD_CPU_AMX_H

#include <immintrin.h>

struct tile_config {
    unsigned char palette, start_row, reserved[14];
    unsigned short bytes[16]; /* of a row; of registers 0 .. 7, the rest 0 */
    unsigned char rows[16];
};

/* A thread's tiles, from here to tile_end. */
static inline void tile_begin(void)
{
    struct tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    __asm__ volatile("" : : "r"(&config) : "memory"); /* the compiler does not see how much ldtilecfg reads */
    _tile_loadconfig(&config);
}
static inline void tile_end(void) { _tile_release(); }

#define TILE_FENCE()                  __asm__ volatile("" : : : "memory")
#define TILE_ZERO(t)                  _tile_zero(t)
#define TILE_LOAD(t, p, step)         _tile_loadd(t, p, step) /* 16 rows of 64 bytes, `step` bytes apart */
#define TILE_STORE(t, p, step)        _tile_stored(t, p, step)
/* sum[i][j] += over pairs k of 32 of a[i][2 k] b[k][2 j] + a[i][2 k + 1] b[k][2 j + 1]: b lies in pairs. */
#define TILE_DOT(sum, a, b)           _tile_dpbf16ps(sum, a, b)

#endif
