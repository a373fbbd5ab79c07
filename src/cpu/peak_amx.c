/* The loop of peak.h in products of bfloat16 tiles: as many chains as the products of fwd_amx have sums. */
#include "cpu/amx.h"
#include "cpu/peak.h"

double nbhd_peak_loop_amx(long rounds)
{
    tile_begin();
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    TILE_ZERO(4);
    TILE_ZERO(5);
    TILE_ZERO(6);
    TILE_ZERO(7);
    for (long r = 0; r < rounds; r++) {
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
    }
    tile_end();
    return 4.0 * 2.0 * 16 * 16 * 32 * (double)rounds;
}
