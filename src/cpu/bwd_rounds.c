/* See bwd_rounds.h. */
#include "cpu/bwd_rounds.h"

/* Where region i of a group of n begins; on a periodic axis regions go on around the circle. */
static int region_begin(int n, int regions, int extent, int i)
{
    return i < regions ? i * extent : n + nbhd_min((i - regions) * extent, n);
}

/* For a dilation group of n: keys are visited in order by queries in order, so regions i and i + c are disjoint if the
 * one ends before the other begins. */
static int count_colours(struct nbhd_axis a, int n, int extent)
{
    const int regions = (n + extent - 1) / extent, all = a.edge == NBHD_EDGE_PERIODIC ? 2 * regions : regions;
    int colours = 1;
    for (int i = 0, next = 1; i < regions; i++) {
        const int last = nbhd_min((i + 1) * extent, n) - 1, end = nbhd_keys(a, n, last).end;
        while (next < all && (next <= i || nbhd_keys(a, n, region_begin(n, regions, extent, next)).begin < end))
            next++;
        colours = nbhd_max(colours, next - i);
    }
    return nbhd_min(colours, regions);
}

/* Of so many regions, those that are coloured; around a circle, those past the last whole turn of colours would meet
 * the first ones, and have rounds of their own. */
static int coloured(const struct nbhd_rounds *r, struct nbhd_axis a, int regions)
{
    const int colours = nbhd_min(r->colours, regions);
    return a.edge == NBHD_EDGE_PERIODIC && regions ? regions / colours * colours : regions;
}

struct nbhd_rounds nbhd_rounds_make(struct nbhd_axis a, int tile, int regions, bool paired)
{
    const int n = nbhd_group_size(a, 0), tiles = (n + tile - 1) / tile, extent = (tiles + regions - 1) / regions * tile;
    struct nbhd_rounds r = {.regions = nbhd_grid_make(a, extent), .groups = a.dilation, .paired = paired};
    const int each = r.regions.tiles_long;
    /* Groups come in two sizes; last windows of the shorter ones may share keys where those of the longer do not. */
    const int shorter = nbhd_group_size(a, a.dilation - 1);
    r.colours = paired ? each : nbhd_max(count_colours(a, n, extent), count_colours(a, shorter, extent));
    const int few = r.groups > r.regions.longs ? r.regions.tiles_short : each;
    r.rounds = r.colours + nbhd_max(each - coloured(&r, a, each), few - coloured(&r, a, few));
    r.slots = r.groups * (paired ? each : (each + r.colours - 1) / r.colours);
    return r;
}

/* Key region j of n holds the keys [keys j / n, keys (j + 1) / n). */
static int key_region_begin(int keys, int j, int n) { return (int)((long long)keys * j / n); }

static int key_region_of(int keys, int key, int n) { return (int)(((long long)(key + 1) * n - 1) / keys); }

double nbhd_rounds_visits(const struct nbhd_rounds *r, struct nbhd_axis a, int tile)
{
    enum { SAMPLES = 9 };
    const int n = nbhd_group_size(a, 0), keys = a.keys != a.length ? a.keys : n, tiles = (n + tile - 1) / tile;
    if (!r->paired)
        return 1;
    int visits = 0;
    for (int i = 0; i < SAMPLES; i++) {
        const int begin = (int)((long long)(tiles - 1) * i / (SAMPLES - 1)) * tile;
        const struct nbhd_range any = nbhd_tile_any(a, n, nbhd_range_of(begin, nbhd_min(begin + tile, n)));
        visits += key_region_of(keys, any.end - 1, r->rounds) - key_region_of(keys, any.begin, r->rounds) + 1;
    }
    return (double)visits / SAMPLES;
}

/* The regions of a dilation group. */
static int count_regions(const struct nbhd_rounds *r, int group)
{
    return group < r->regions.longs ? r->regions.tiles_long : r->regions.tiles_short;
}

/* The region of a turn, and its group; -1: there is none. */
static int region_of(const struct nbhd_rounds *r, struct nbhd_axis a, struct nbhd_turn turn, int *group)
{
    const int each = r->slots / r->groups, place = turn.slot % each;
    *group = turn.slot / each;
    const int regions = count_regions(r, *group), whole = coloured(r, a, regions);
    if (r->paired)
        return place < regions && turn.round < regions ? place : -1;
    const bool past = turn.round >= r->colours; /* those that a circle has left over */
    const int i = past ? whole + turn.round - r->colours : place * r->colours + turn.round;
    return i >= (past ? regions : whole) || (past && place) ? -1 : i;
}

/* The other way round; paired: with key region j. */
static struct nbhd_turn turn_of(const struct nbhd_rounds *r, struct nbhd_axis a, int group, int i, int j)
{
    const int first = group * (r->slots / r->groups), regions = count_regions(r, group);
    const int whole = coloured(r, a, regions);
    if (r->paired)
        return (struct nbhd_turn){(j - i + regions) % regions, first + i};
    if (i < whole)
        return (struct nbhd_turn){i % r->colours, first + i / r->colours};
    return (struct nbhd_turn){r->colours + i - whole, first};
}

bool nbhd_rounds_at(const struct nbhd_rounds *r, struct nbhd_axis a, int round, int slot, struct nbhd_region *region)
{
    const int i = region_of(r, a, (struct nbhd_turn){round, slot}, &region->group);
    if (i < 0)
        return false;
    const int n = nbhd_group_size(a, region->group), regions = count_regions(r, region->group);
    region->size = n;
    region->q = nbhd_range_of(i * r->regions.tile, nbhd_min((i + 1) * r->regions.tile, n));
    region->keys = nbhd_tile_any(a, n, region->q);
    if (r->paired) {
        const int keys = a.keys != a.length ? a.keys : n, j = (i + round) % regions;
        region->keys.begin = nbhd_max(region->keys.begin, key_region_begin(keys, j, regions));
        region->keys.end = nbhd_min(region->keys.end, key_region_begin(keys, j + 1, regions));
    }
    return true;
}

int nbhd_rounds_rivals(const struct nbhd_rounds *r, struct nbhd_axis a, struct nbhd_turn turn, bool queries,
                       struct nbhd_turn rivals[NBHD_MOST_REGIONS])
{
    int group, count = 0;
    const int i = region_of(r, a, turn, &group);
    if (i < 0)
        return 0;
    const int regions = count_regions(r, group), j = (i + turn.round) % regions;
    const int around = a.edge == NBHD_EDGE_PERIODIC ? regions : 2 * regions; /* no way around other axes */
    for (int other = 0; other < regions; other++) {
        const int apart = other < i ? i - other : other - i;
        if (r->paired)
            rivals[count++] = queries ? turn_of(r, a, group, i, other) : turn_of(r, a, group, other, j);
        else if (queries ? apart == 0 : nbhd_min(apart, around - apart) < r->colours)
            rivals[count++] = turn_of(r, a, group, other, 0);
    }
    return count;
}
