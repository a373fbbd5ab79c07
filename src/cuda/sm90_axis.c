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
    t->keys = t->inner = t->tiles = t->classes = t->longest = 0;
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
        t->inner += (double)count * (all.end - all.begin);
        t->tiles += count;
    }
    return 1;
}

struct axis_tiles *nbhd_sm90_tiles(struct axis_memo *memo, int extent)
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

struct axis_visits nbhd_sm90_count_visits(struct axis_tiles *t, int k)
{
    struct axis_visits sum = {.longest = ceil_div(t->longest, k), .masked = t->step > 1};
    for (int i = 0; i < t->classes; i++) {
        const int boxes = visited(&t->class[i], k), unmasked = full(&t->class[i], k);
        sum.boxes += t->class[i].count * boxes;
        sum.full += t->class[i].count * unmasked;
        sum.masked |= boxes != unmasked;
    }
    if (!t->visits)
        t->visits = calloc(NBHD_SM90_KEYS + 1, sizeof *t->visits);
    if (t->visits)
        t->visits[k] = sum;
    return sum;
}

void nbhd_sm90_drop_tiles(struct axis_memo *memo)
{
    for (int e = 0; e <= NBHD_SM90_EXTENT; e++) {
        if (memo->tiles[e])
            free(memo->tiles[e]->visits);
        free(memo->tiles[e]);
    }
}
