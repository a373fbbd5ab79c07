/* Units of keys, which a kernel of pairs copies once for many tiles: where they will do, their shape, how many a thread
 * keeps. */
#include <string.h>
#include "cpu/fwd_choice.h"
#include "cpu/isa.h"
#include "cpu/place.h"

enum {
    UNIT = 32,            /* keys */
    KEPT_BYTES = 4 << 20, /* twice a second-level cache: copies are quicker to come back than rows of many heads */
    MOST_KEYS = 108       /* in units, percent of those that tiles see */
};

/* Units of so many keys along an axis that its tiles visit, in sum; 0 if queries of a tile see different keys there, or
 * not whole units. */
static double units_along(struct nbhd_axis a, const struct nbhd_grid *grid, int unit)
{
    double visited = 0;
    for (int i = 0; i < grid->count; i++) {
        const struct nbhd_cell cell = nbhd_grid_cell(grid, i);
        const struct nbhd_range any = nbhd_tile_any(a, cell.size, cell.q), all = nbhd_tile_all(a, cell.size, cell.q);
        const bool whole = any.end % unit == 0 || any.end == nbhd_keys_of_group(a, cell.size);
        if (any.begin != all.begin || any.end != all.end || any.begin % unit || !whole)
            return 0;
        visited += nbhd_whole(any.end - any.begin, unit) / unit;
    }
    return visited;
}

/* The shape that makes the fewest units; returns how many a tile visits on average, 0 if there is none that will do. */
static double choose_shape(const struct nbhd_problem *problem, const struct nbhd_grid grid[3], int best[3])
{
    const struct nbhd_axis *a = problem->axis;
    double visited[3][UNIT + 1], tiles = 1, keys = 1;
    for (int i = 0; i < 3; i++) {
        for (int unit = 1; unit <= UNIT; unit *= 2)
            visited[i][unit] = units_along(a[i], &grid[i], unit);
        tiles *= grid[i].count;
        keys *= visited[i][1];
    }
    double least = keys / UNIT * MOST_KEYS / 100;
    bool found = false;
    for (int x = 1; x <= UNIT; x *= 2)
        for (int y = 1; x * y <= UNIT; y *= 2) {
            const double units = visited[0][x] * visited[1][y] * visited[2][UNIT / x / y];
            if (units == 0 || units > least)
                continue;
            least = units;
            found = true;
            memcpy(best, (const int[3]){x, y, UNIT / x / y}, 3 * sizeof *best);
        }
    return found ? least / tiles : 0;
}

/* A sequence's units are kept whole or, where windows are small enough that the next tiles find most of theirs, as many
 * as have room. */
void nbhd_fwd_choose_units(const struct nbhd_problem *problem, struct nbhd_fwd *f, const struct nbhd_fwd_machine *m)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_axis *a = problem->axis;
    struct nbhd_fwd_units *u = &f->units;
    const bool periodic = a[0].edge == NBHD_EDGE_PERIODIC || a[1].edge == NBHD_EDGE_PERIODIC ||
                          a[2].edge == NBHD_EDGE_PERIODIC;
    if (!m->unit_state || d->bias || d->extra || periodic)
        return;
    const double visited = choose_shape(problem, f->grid, u->shape);
    if (visited == 0)
        return;
    double units = 1;
    for (int i = 0; i < 3; i++)
        units *= nbhd_whole(nbhd_keys_of_group(a[i], f->grid[i].size), u->shape[i]) / u->shape[i];
    u->size = UNIT * (nbhd_whole(d->head_dim, 2 * m->vf) + nbhd_whole(d->head_dim_v, 2 * m->vf));
    const int room = nbhd_min(FWD_MOST_KEPT, KEPT_BYTES / 2 / u->size);
    if (units > FWD_MOST_UNITS || room < FWD_GROUPS || (units > room && visited > 0.75 * room))
        return;
    u->slots = nbhd_min((int)units, room);
    f->at_units = nbhd_place(&f->scratch, (size_t)u->slots * (size_t)u->size * sizeof(uint16_t));
    f->at_unit_state = nbhd_place(&f->scratch, m->unit_state);
}
