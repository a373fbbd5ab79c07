/* A tiling from options: see sim_args.h. */
#include "sim_args.h"

#include <stdio.h>
#include <string.h>

#include "tool.h"

int sim_args_extents(const char *name, const struct extents *from, int rank, int to[3])
{
    if (from->count && from->count != rank)
        return tool_fail(TOOL_USAGE, "--%s has %d number%s for %d ax%s", name, from->count,
                         from->count > 1 ? "s" : "", rank, rank > 1 ? "es" : "is");
    for (int i = 0; i < from->count; i++)
        to[i] = from->at[i];
    return TOOL_DONE;
}

unsigned sim_args_tilings(const struct sim_args *a, unsigned otherwise)
{
    unsigned bits = 0;
    for (int i = 0; i < NBHD_SIM_TILINGS; i++)
        bits |= a->tilings[i] ? 1u << i : 0;
    return bits ? bits : otherwise;
}

int sim_args_one_tiling(const struct sim_args *a)
{
    const char *first = NULL;
    for (int i = 0; i < NBHD_SIM_TILINGS; i++) {
        if (a->tilings[i] && first)
            return tool_fail(TOOL_USAGE, "--%s and --%s: a picture shows one tiling", first, nbhd_sim_tiling_name(i));
        if (a->tilings[i])
            first = nbhd_sim_tiling_name(i);
    }
    return TOOL_DONE;
}

int sim_args_tiles(const struct sim_args *a, const nbhd_desc *desc, nbhd_sim_tiles *tiles)
{
    *tiles = (nbhd_sim_tiles)NBHD_SIM_TILES_INIT;
    const unsigned bits = sim_args_tilings(a, 1u << NBHD_SIM_STATIC);
    while (!(bits & 1u << tiles->tiling))
        tiles->tiling++;
    tiles->warpgroups = a->warpgroups;
    const int rank = bits == 1u << NBHD_SIM_FLAT ? 1 : desc->rank;
    int status = sim_args_extents("q-tile", &a->q_tile, rank, tiles->q_tile);
    return status ? status : sim_args_extents("kv-tile", &a->kv_tile, rank, tiles->kv_tile);
}

void sim_format_extents(const int extent[3], char text[48])
{
    int length = 0;
    *text = '\0';
    for (int i = 0; i < 3 && extent[i]; i++)
        length += snprintf(text + length, 48 - (size_t)length, "%s%d", i ? "x" : "", extent[i]);
}
