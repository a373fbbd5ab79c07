/* Query tiles of one axis, by what they need of key boxes: see sm90_axis.h. Counts are exact. */
#include "cuda/sm90_axis.h"
#include <stdlib.h>

/* Adds tiles to their class; 0 if there are too many classes. */
static int add_tiles(struct axis_tiles *t, struct tile_class c)
{
    for (int i = 0; i < t->classes; i++)
        if (t->class[i].length == c.length && t->class[i].inner_begin == c.inner_begin &&
            t->class[i].inner_end == c.inner_end) {
            t->class[i].count += c.count;
            return 1;
        }
    if (t->classes == NBHD_SM90_CLASSES)
        return 0;
    t->class[t->classes++] = c;
    return 1;
}

/* Classes of every step-th tile, each counted step times; 0 if they are too many. */
static int classify(struct axis_tiles *t, const struct axis_memo *memo, int step)
{
    t->keys = t->tiles = t->classes = t->longest = 0;
    t->step = step;
    const int tiles = ceil_div(memo->n, t->extent);
    for (int i = 0; i < tiles; i += step) {
        const int q = nbhd_min(i + step / 2, tiles - 1) * t->extent, count = nbhd_min(step, tiles - i);
        const struct nbhd_range tile = nbhd_range_of(q, nbhd_min(q + t->extent, memo->n));
        const struct nbhd_range any = nbhd_tile_any(memo->axis, memo->n, tile);
        const struct nbhd_range all = nbhd_tile_all(memo->axis, memo->n, tile);
        const int length = any.end - any.begin;
        if (!add_tiles(t, (struct tile_class){length, all.begin - any.begin, all.end - any.begin, count}))
            return 0;
        t->longest = nbhd_max(t->longest, length);
        t->keys += (double)count * length;
        t->tiles += count;
    }
    return 1;
}

const struct axis_tiles *nbhd_sm90_tiles(struct axis_memo *memo, int extent)
{
    if (memo->tiles[extent])
        return memo->tiles[extent];
    struct axis_tiles *t = memo->tiles[extent] = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->extent = extent;
    for (int step = 1; !classify(t, memo, step);) /* causal windows, a long axis: nearly every tile is its own class */
        step *= 2;
    return t;
}

struct axis_visits nbhd_sm90_visits(const struct axis_tiles *t, int k)
{
    struct axis_visits sum = {0, 0, ceil_div(t->longest, k)};
    for (int i = 0; i < t->classes; i++) {
        sum.boxes += t->class[i].count * visited(&t->class[i], k);
        sum.full += t->class[i].count * full(&t->class[i], k);
    }
    return sum;
}

int nbhd_sm90_is_masked(const struct axis_tiles *t, int k)
{
    for (int i = 0; i < t->classes; i++)
        if (t->step > 1 || visited(&t->class[i], k) != full(&t->class[i], k))
            return 1;
    return 0;
}

void nbhd_sm90_drop_tiles(struct axis_memo *memo)
{
    for (int e = 0; e <= NBHD_SM90_EXTENT; e++)
        free(memo->tiles[e]);
}
