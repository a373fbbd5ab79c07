/* Where the parts of a thread's scratch lie, for the planners of the vector rows. */
#ifndef NBHD_CPU_PLACE_H
#define NBHD_CPU_PLACE_H

#include <stdbool.h>
#include <stddef.h>
#include "nbhd_geom.h"

/* The least multiple of part that holds n. */
static inline int nbhd_whole(int n, int part) { return (n + part - 1) / part * part; }

/* Places the next part at *end, on a cache line of its own; returns where it begins. */
static inline size_t nbhd_place(size_t *end, size_t bytes)
{
    const size_t at = *end;
    *end += (bytes + 63) / 64 * 64;
    return at;
}

/* ---- lines of permuted keys ---- */

/* Floats from one dimension of a line to the next: lines that are a multiple of `far` floats apart fall into few cache
 * sets. */
static inline int nbhd_line_step(int positions, int vf, int far)
{
    const int step = nbhd_whole(positions, vf);
    return step % far ? step : step + vf;
}

/* Rows of keys whose distance is a multiple of a power of two, because of the heads between them, share a few of the
 * caches' sets. Rows eight times their size apart are worth a copy for windows of so many keys. */
static inline bool nbhd_rows_crowd(const struct nbhd_axis a[3], int heads, int width)
{
    const long long token = (long long)heads * width, power = token & -token;
    return power >= 8 * (long long)width && (double)a[0].window * a[1].window * a[2].window >= 32;
}

/* Key elements that t neighbouring queries of one group see at most, unwrapped. */
static inline int nbhd_most_keys(struct nbhd_axis a, int t)
{
    const int most = t + a.window + a.stride - 2;
    return a.edge == NBHD_EDGE_PERIODIC ? most : nbhd_min(nbhd_group_size(a, 0), most);
}

/* Most dilation groups that n neighbouring positions of queries come to the end of. */
static inline int nbhd_most_ends(struct nbhd_axis a, int n)
{
    return a.dilation > 1 ? nbhd_min(a.dilation - 1, (n - 2) / nbhd_group_size(a, a.dilation - 1) + 1) : 0;
}

/* Key positions of axis 2 that t positions of queries need at most. A periodic axis has positions of its own for what a
 * group's windows wrap around to. */
static inline int nbhd_most_positions(struct nbhd_axis a, int t)
{
    const int most = t + 2 * (a.window + a.stride);
    return a.edge == NBHD_EDGE_PERIODIC ? most + nbhd_most_ends(a, t) * (a.window - 1) : nbhd_min(a.length, most);
}

/* Columns that a table of two vectors can serve, `most` at most: the lanes' first keys are up to `spread` apart. */
static inline int nbhd_permute_columns(struct nbhd_axis a, int vf, int most)
{
    const int ends = a.edge == NBHD_EDGE_PERIODIC ? nbhd_most_ends(a, vf) : a.dilation > 1;
    const int spread = vf - 1 + a.stride - 1 + ends * (a.window - 1);
    return nbhd_min(most, 2 * vf - spread);
}

#endif
