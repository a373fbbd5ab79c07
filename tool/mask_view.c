/* Flags per axis and token: see mask_view.h. A key has a property if its coordinate has it on every axis. */
#include "mask_view.h"

#include <stdlib.h>
#include <string.h>

#include "tool.h"

enum { SEEN = 1, UNION = 2, LOADED = 4, SELF = 8 };

/* period: of a periodic axis, else 0. */
static bool holds(int begin, int end, int e, int period)
{
    bool inside = e >= begin && e < end;
    for (int image = -period; period && image <= period; image += 2 * period)
        inside = inside || (e + image >= begin && e + image < end);
    return inside;
}

static unsigned char flags_of(const nbhd_sim_tile *t, const nbhd_sim_tile *own, int token, int query, bool cross,
                              int period)
{
    const int step = cross ? 1 : t->dilation, group = cross ? 0 : t->group;
    if (token % step != group)
        return 0;
    const int e = token / step;
    unsigned flags = 0;
    if (holds(own->any_begin, own->any_end, e, period))
        flags |= SEEN;
    if (holds(t->any_begin, t->any_end, e, period))
        flags |= UNION;
    if (holds(t->grid_begin, t->grid_begin + t->visited * t->kv_tile, e, period))
        flags |= LOADED;
    if (token == query && !cross)
        flags |= SELF;
    return (unsigned char)flags;
}

static int begin_axis(struct view *v, int at, int axis, int query)
{
    struct view_axis *a = &v->axis[at];
    const int length = v->desc.length[axis], kv = v->desc.kv_length[axis] ? v->desc.kv_length[axis] : length;
    const int keys = v->inverse ? length : kv;
    /* The union of one query is its window. */
    nbhd_sim_tiles one = {sizeof one, NBHD_SIM_DYNAMIC, {1, 1, 1}, {1, 1, 1}, 1, 0, 0, 0, 0};
    nbhd_sim_tile own = NBHD_SIM_TILE_INIT;
    for (int i = v->rank; i < 3; i++)
        one.q_tile[i] = one.kv_tile[i] = 0;
    a->tile = (nbhd_sim_tile)NBHD_SIM_TILE_INIT;
    nbhd_status status = nbhd_sim_tile_of(&v->desc, &v->tiles, axis, query, &a->tile);
    if (!status)
        status = nbhd_sim_tile_of(&v->desc, &one, axis, query, &own);
    if (status)
        return tool_fail_library(status);
    a->keys = keys;
    a->query = query;
    a->flags = malloc((size_t)keys);
    if (!a->flags)
        return tool_fail(TOOL_FAILED, "no memory for an axis of %d keys", keys);
    a->period = v->desc.edge[axis] == NBHD_PERIODIC ? a->tile.elements : 0;
    for (int i = 0; i < keys; i++)
        a->flags[i] = flags_of(&a->tile, &own, i, query, kv != length, a->period);
    int inside = 0;
    for (int i = 0; i < a->tile.visited; i++)
        inside += view_tile_inside(v, at, i);
    v->seen *= own.any_end - own.any_begin;
    v->visited *= a->tile.visited;
    v->full *= inside;
    v->queries *= a->tile.q_end - a->tile.q_begin;
    v->united *= a->tile.any_end - a->tile.any_begin;
    return TOOL_DONE;
}

int view_begin(struct view *v, const nbhd_desc *desc, const nbhd_sim_tiles *tiles, const int *query)
{
    *v = (struct view){.desc = *desc, .tiles = *tiles, .rank = desc->rank};
    v->inverse = desc->pass == NBHD_BACKWARD;
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
    if (v->axis[axis].period)
        *begin = (*begin + v->axis[axis].period) % v->axis[axis].period;
    *end = *begin + t->kv_tile < v->axis[axis].keys ? *begin + t->kv_tile : v->axis[axis].keys;
}

bool view_tile_inside(const struct view *v, int axis, int i)
{
    const nbhd_sim_tile *t = &v->axis[axis].tile;
    const int begin = t->grid_begin + i * t->kv_tile;
    return begin >= t->all_begin && begin + t->kv_tile <= t->all_end;
}
