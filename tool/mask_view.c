/* Flags per axis and token: see mask_view.h. A key has a property if its coordinate has it on every axis. */
#include "mask_view.h"

#include <stdlib.h>
#include <string.h>

#include "tool.h"

enum { SEEN = 1, UNION = 2, LOADED = 4, SELF = 8 };

static unsigned char flags_of(const nbhd_sim_tile *t, int token, int first, int count, int query, bool cross)
{
    const int step = cross ? 1 : t->dilation, group = cross ? 0 : t->group;
    if (token % step != group)
        return 0;
    const int e = token / step, e0 = first / step;
    unsigned flags = 0;
    if (e >= e0 && e < e0 + count)
        flags |= SEEN;
    if (e >= t->any_begin && e < t->any_end)
        flags |= UNION;
    if (e >= t->grid_begin && e < t->grid_begin + t->visited * t->kv_tile)
        flags |= LOADED;
    if (token == query && !cross)
        flags |= SELF;
    return (unsigned char)flags;
}

static int begin_axis(struct view *v, int at, int axis, int query)
{
    struct view_axis *a = &v->axis[at];
    const int length = v->desc.length[axis], keys = v->desc.kv_length[axis] ? v->desc.kv_length[axis] : length;
    int first, count;
    a->tile = (nbhd_sim_tile)NBHD_SIM_TILE_INIT;
    nbhd_status status = nbhd_sim_tile_of(&v->desc, &v->tiles, axis, query, &a->tile);
    if (!status)
        status = nbhd_desc_keys(&v->desc, axis, query, &first, &count);
    if (status)
        return tool_fail_library(status);
    a->keys = keys;
    a->query = query;
    a->flags = malloc((size_t)keys);
    if (!a->flags)
        return tool_fail(TOOL_FAILED, "no memory for an axis of %d keys", keys);
    for (int i = 0; i < keys; i++)
        a->flags[i] = flags_of(&a->tile, i, first, count, query, keys != length);
    int inside = 0;
    for (int i = 0; i < a->tile.visited; i++)
        inside += view_tile_inside(v, at, i);
    v->seen *= count;
    v->visited *= a->tile.visited;
    v->full *= inside;
    v->queries *= a->tile.q_end - a->tile.q_begin;
    v->united *= a->tile.any_end - a->tile.any_begin;
    return TOOL_DONE;
}

int view_begin(struct view *v, const nbhd_desc *desc, const nbhd_sim_tiles *tiles, const int *query)
{
    *v = (struct view){.desc = *desc, .tiles = *tiles, .rank = desc->rank};
    v->seen = v->visited = v->full = v->queries = v->united = 1;
    int status = TOOL_DONE;
    for (int i = 0; i < 3 && !status; i++) {
        const int axis = i - (3 - desc->rank);
        if (axis >= 0) {
            status = begin_axis(v, i, axis, query[axis]);
            continue;
        }
        v->axis[i] = (struct view_axis){.keys = 1, .flags = malloc(1)};
        v->axis[i].tile = (nbhd_sim_tile){sizeof(nbhd_sim_tile), 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1};
        if (v->axis[i].flags)
            v->axis[i].flags[0] = SEEN | UNION | LOADED | SELF;
        else
            status = tool_fail(TOOL_FAILED, "out of memory");
    }
    if (status)
        view_end(v);
    return status;
}

void view_end(struct view *v)
{
    for (int i = 0; i < 3; i++)
        free(v->axis[i].flags);
    memset(v, 0, sizeof *v);
}

enum view_class view_class(const struct view *v, const int key[3])
{
    const int flags = v->axis[0].flags[key[0]] & v->axis[1].flags[key[1]] & v->axis[2].flags[key[2]];
    return flags & SELF && flags & SEEN ? VIEW_QUERY
           : flags & SEEN               ? VIEW_SEEN
           : flags & UNION              ? VIEW_UNION
           : flags & LOADED             ? VIEW_LOADED
                                        : VIEW_SKIPPED;
}

void view_tile_span(const struct view *v, int axis, int i, int *begin, int *end)
{
    const nbhd_sim_tile *t = &v->axis[axis].tile;
    *begin = t->grid_begin + i * t->kv_tile;
    *end = *begin + t->kv_tile < v->axis[axis].keys ? *begin + t->kv_tile : v->axis[axis].keys;
}

bool view_tile_inside(const struct view *v, int axis, int i)
{
    const nbhd_sim_tile *t = &v->axis[axis].tile;
    const int begin = t->grid_begin + i * t->kv_tile;
    return begin >= t->all_begin && begin + t->kv_tile <= t->all_end;
}
