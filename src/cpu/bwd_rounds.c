/* See bwd_rounds.h. */
#include "cpu/bwd_rounds.h"

/* For a dilation group of n: keys are visited in order by queries in order, so regions i and i + c are disjoint if the
 * one ends before the other begins. */
static int count_colours(struct nbhd_axis a, int n, int extent)
{
    const int regions = (n + extent - 1) / extent;
    int colours = 1;
    for (int i = 0, next = 1; i < regions; i++) {
        const int last = nbhd_min((i + 1) * extent, n) - 1, end = nbhd_keys(a, n, last).end;
        while (next < regions && (next <= i || nbhd_keys(a, n, next * extent).begin < end))
            next++;
        colours = nbhd_max(colours, next - i);
    }
    return colours;
}

struct nbhd_rounds nbhd_rounds_make(struct nbhd_axis a, int tile, int regions, bool paired)
{
    const int n = nbhd_group_size(a, 0), tiles = (n + tile - 1) / tile, extent = (tiles + regions - 1) / regions * tile;
    struct nbhd_rounds r = {.regions = nbhd_grid_make(a, extent), .groups = a.dilation, .paired = paired};
    const int each = r.regions.tiles_long;
    /* Groups come in two sizes; last windows of the shorter ones may share keys where those of the longer do not. */
    const int shorter = nbhd_group_size(a, a.dilation - 1);
    r.rounds = paired ? each : nbhd_max(count_colours(a, n, extent), count_colours(a, shorter, extent));
    r.slots = r.groups * (paired ? each : (each + r.rounds - 1) / r.rounds);
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

bool nbhd_rounds_at(const struct nbhd_rounds *r, struct nbhd_axis a, int round, int slot, struct nbhd_region *region)
{
    const int each = r->slots / r->groups, group = slot / each, n = nbhd_group_size(a, group);
    const int regions = group < r->regions.longs ? r->regions.tiles_long : r->regions.tiles_short;
    const int i = r->paired ? slot % each : slot % each * r->rounds + round;
    if (i >= regions || (r->paired && round >= regions))
        return false;
    region->group = group;
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
