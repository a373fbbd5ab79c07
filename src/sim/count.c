/* Counts of a tiling: checked input, one count per axis, and their product (docs/simulator.md derives why a
 * product). */
#include <math.h>
#include <string.h>
#include "sim/sim.h"

static const char *const tiling_names[NBHD_SIM_TILINGS] = {"static", "dynamic", "permuted", "flat"};

const char *nbhd_sim_tiling_name(int tiling)
{
    return tiling >= 0 && tiling < NBHD_SIM_TILINGS ? tiling_names[tiling] : NULL;
}

#define MAX_TILE 65536 /* tokens; far more than any processor holds, and products of two fit an int */

static nbhd_status check_box(const struct nbhd_sim_case *c, const char *field, const int given[3], int extent[3])
{
    const int rank = c->tiling == NBHD_SIM_FLAT ? 1 : c->problem.desc.rank;
    double volume = 1;
    for (int i = 0; i < 3; i++)
        extent[i] = 1;
    for (int i = 0; i < rank; i++) {
        const nbhd_desc *d = &c->problem.desc;
        int length = field[0] == 'q' ? d->length[i] : d->kv_length[i];
        if (given[i] < 1)
            return nbhd_fail(NBHD_ERROR_INVALID, "%s[%d] is %d; it must be at least 1", field, i, given[i]);
        if (c->tiling != NBHD_SIM_FLAT && given[i] > length)
            return nbhd_fail(NBHD_ERROR_INVALID, "%s[%d] is %d; the axis has only %d tokens", field, i, given[i],
                             length);
        extent[i + 3 - rank] = given[i];
        volume *= given[i];
    }
    for (int i = rank; i < 3; i++)
        if (given[i] > 1)
            return nbhd_fail(NBHD_ERROR_INVALID, "%s[%d] is %d; %s has %d ax%s", field, i, given[i],
                             c->tiling == NBHD_SIM_FLAT ? "a flat tiling" : "the problem", rank,
                             rank > 1 ? "es" : "is");
    if (volume > MAX_TILE)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s has %.0f tokens; at most %d", field, volume, MAX_TILE);
    return NBHD_OK;
}

static nbhd_status check_warpgroups(struct nbhd_sim_case *c, int warpgroups)
{
    c->warpgroups = warpgroups ? warpgroups : 1;
    c->split_axis = 2;
    if (c->warpgroups < 1 || c->warpgroups > 64)
        return nbhd_fail(NBHD_ERROR_INVALID, "warpgroups is %d; it must be 1 to 64", warpgroups);
    if (c->warpgroups == 1)
        return NBHD_OK;
    if (c->tiling == NBHD_SIM_FLAT)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "warpgroups is %d; skipping is counted for boxes, not for flat tiles",
                         warpgroups);
    const int *stays = c->problem.desc.pass == NBHD_BACKWARD ? c->kv_tile : c->q_tile;
    for (c->split_axis = 0; c->split_axis < 3; c->split_axis++)
        if (stays[c->split_axis] % c->warpgroups == 0)
            return NBHD_OK;
    return nbhd_fail(NBHD_ERROR_INVALID, "warpgroups is %d; it divides no extent of the %s tile", warpgroups,
                     stays == c->q_tile ? "query" : "key");
}

/* What the model of time is told of the kernel. */
static nbhd_status check_kernel(struct nbhd_sim_case *c, const nbhd_sim_tiles *tiles)
{
    const double q = nbhd_sim_volume(c->q_tile), kv = nbhd_sim_volume(c->kv_tile);
    if (tiles->q_rows && (tiles->q_rows < q || tiles->q_rows > MAX_TILE))
        return nbhd_fail(NBHD_ERROR_INVALID, "q_rows is %d; it must be the q_tile's %.0f to %d", tiles->q_rows, q,
                         MAX_TILE);
    if (tiles->kv_rows && (tiles->kv_rows < kv || tiles->kv_rows > MAX_TILE))
        return nbhd_fail(NBHD_ERROR_INVALID, "kv_rows is %d; it must be the kv_tile's %.0f to %d", tiles->kv_rows, kv,
                         MAX_TILE);
    if (tiles->resident < 0 || tiles->resident > 64)
        return nbhd_fail(NBHD_ERROR_INVALID, "resident is %d; it must be 0 to 64", tiles->resident);
    if (tiles->mask_steps < 0 || tiles->mask_steps > 64)
        return nbhd_fail(NBHD_ERROR_INVALID, "mask_steps is %d; it must be 0 to 64", tiles->mask_steps);
    c->q_rows = tiles->q_rows;
    c->kv_rows = tiles->kv_rows;
    c->resident = tiles->resident;
    c->mask_steps = tiles->mask_steps;
    return NBHD_OK;
}

nbhd_status nbhd_sim_case_init(struct nbhd_sim_case *c, const nbhd_desc *desc, const nbhd_sim_tiles *given)
{
    nbhd_sim_tiles tiles;
    nbhd_status status = nbhd_problem_init(&c->problem, desc);
    if (status || (status = nbhd_copy_sized(&tiles, sizeof tiles, given, "nbhd_sim_tiles")))
        return status;
    if (!nbhd_sim_tiling_name(tiles.tiling))
        return nbhd_fail(NBHD_ERROR_INVALID, "tiling is %d; it must be 0 to %d (nbhd_sim_tiling)", tiles.tiling,
                         NBHD_SIM_TILINGS - 1);
    c->tiling = tiles.tiling;
    if (c->tiling == NBHD_SIM_FLAT && c->problem.desc.pass == NBHD_BACKWARD)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "tiling is flat; a backward pass is counted in boxes only");
    for (int i = 0; i < c->problem.desc.rank && c->tiling == NBHD_SIM_FLAT; i++)
        if (c->problem.desc.edge[i] == NBHD_PERIODIC)
            return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "tiling is flat and edge[%d] periodic; that is counted in boxes "
                             "only", i);
    if ((status = check_box(c, "q_tile", tiles.q_tile, c->q_tile)) ||
        (status = check_box(c, "kv_tile", tiles.kv_tile, c->kv_tile)))
        return status;
    if ((status = check_kernel(c, &tiles)))
        return status;
    return check_warpgroups(c, tiles.warpgroups);
}

struct nbhd_sim_axis nbhd_sim_axis_count(struct nbhd_axis a, int q_tile, int kv_tile, bool dynamic, bool inverse,
                                         int parts)
{
    enum nbhd_tiling tiling = dynamic ? NBHD_TILING_DYNAMIC : NBHD_TILING_STATIC;
    struct nbhd_tile_count t = inverse ? nbhd_tiles_count_inverse(a, kv_tile, q_tile, tiling)
                                       : nbhd_tiles_count(a, q_tile, kv_tile, tiling);
    struct nbhd_sim_axis s = {t.q_tiles, t.visited, t.full, t.visited_max, t.visited, t.pairs, 0};
    if (parts > 1)
        s.split = inverse ? nbhd_tiles_split_inverse(a, kv_tile, q_tile, tiling, parts)
                          : nbhd_tiles_split(a, q_tile, kv_tile, tiling, parts);
    const int inner = inverse ? q_tile : kv_tile, all = inverse ? a.length : a.keys;
    s.total = ceil((double)all / inner);
    return s;
}

/* Extra keys have no position: forward, every query tile visits all their tiles, the last of which needs a mask unless
 * it is full. Backward, each of their tiles visits every query tile. */
static void add_extra(const struct nbhd_sim_case *c, nbhd_sim_counts *counts, double *visited, double *full)
{
    const double kv = nbhd_sim_volume(c->kv_tile), extra = c->problem.desc.extra;
    const double tiles = ceil(extra / kv), whole = floor(extra / kv);
    if (c->problem.desc.pass != NBHD_BACKWARD) {
        *visited += counts->tiles_outer * tiles;
        *full += counts->tiles_outer * whole;
        counts->visited_max += tiles;
        counts->tiles_total += tiles;
        return;
    }
    double q_tiles = 1;
    for (int i = 0; i < 3; i++)
        q_tiles *= nbhd_axis_tiles(c->problem.axis[i], c->q_tile[i]);
    *visited += tiles * q_tiles;
    *full += whole * q_tiles;
    counts->tiles_outer += tiles;
    counts->visited_max = fmax(counts->visited_max, tiles > 0 ? q_tiles : 0);
}

/* From totals to means, shares and bounds. visited, full, computed: sums over outer tiles. */
static void finish(const struct nbhd_sim_case *c, double visited, double full, double computed, nbhd_sim_counts *counts)
{
    const double area = nbhd_sim_volume(c->q_tile) * nbhd_sim_volume(c->kv_tile);
    double queries = 1, keys = 1;
    for (int i = 0; i < 3; i++) {
        queries *= c->problem.axis[i].length;
        keys *= c->problem.axis[i].keys;
    }
    counts->visited_mean = visited / counts->tiles_outer;
    counts->computed_mean = computed / counts->tiles_outer;
    counts->masked_fraction = 1 - full / visited;
    counts->block_sparse = full == visited;
    counts->work_ratio = visited * area / counts->pairs;
    counts->computed_ratio = computed * area / counts->pairs;
    counts->bound_flop = queries * (keys + c->problem.desc.extra) / counts->pairs;
    counts->bound_tile = counts->tiles_total / counts->visited_max;
    counts->bound_mean = counts->bound_flop / counts->computed_ratio;
}

static void combine(const struct nbhd_sim_case *c, const struct nbhd_sim_axis axis[3], nbhd_sim_counts *counts)
{
    double visited = 1, full = 1, split = 1, tokens = 1;
    *counts =
        (nbhd_sim_counts){.size = sizeof *counts, .tiles_outer = 1, .visited_max = 1, .tiles_total = 1, .pairs = 1};
    for (int i = 0; i < 3; i++) {
        counts->tiles_outer *= axis[i].outer;
        counts->visited_max *= axis[i].visited_max;
        counts->tiles_total *= axis[i].total;
        counts->pairs *= axis[i].pairs;
        visited *= axis[i].visited;
        full *= axis[i].full;
        split *= i == c->split_axis ? axis[i].split / c->warpgroups : axis[i].visited;
        tokens *= c->problem.axis[i].length;
    }
    const double skipped = visited - split;
    counts->pairs += tokens * c->problem.desc.extra;
    if (c->problem.desc.extra)
        add_extra(c, counts, &visited, &full);
    finish(c, visited, full, visited - skipped, counts);
}

void nbhd_sim_finish_flat(const struct nbhd_sim_case *c, double visited, double full, nbhd_sim_counts *counts)
{
    if (c->problem.desc.extra)
        add_extra(c, counts, &visited, &full);
    finish(c, visited, full, visited, counts);
}

nbhd_status nbhd_sim_case_count(const struct nbhd_sim_case *c, nbhd_sim_counts *counts)
{
    if (c->tiling == NBHD_SIM_FLAT)
        return nbhd_sim_flat_count(c, counts);
    struct nbhd_sim_axis axis[3];
    for (int i = 0; i < 3; i++)
        axis[i] = nbhd_sim_axis_count(c->problem.axis[i], c->q_tile[i], c->kv_tile[i], c->tiling == NBHD_SIM_DYNAMIC,
                                      c->problem.desc.pass == NBHD_BACKWARD, i == c->split_axis ? c->warpgroups : 1);
    combine(c, axis, counts);
    return NBHD_OK;
}

nbhd_status nbhd_sim_count(const nbhd_desc *desc, const nbhd_sim_tiles *tiles, nbhd_sim_counts *counts)
{
    struct nbhd_sim_case c;
    nbhd_sim_counts result;
    nbhd_status status = nbhd_sim_case_init(&c, desc, tiles);
    if (status || (status = nbhd_sim_case_count(&c, &result)))
        return status;
    return nbhd_return_sized(counts, &result, sizeof result, "nbhd_sim_counts");
}

nbhd_status nbhd_sim_tile_of(const nbhd_desc *desc, const nbhd_sim_tiles *tiles, int axis, int query,
                             nbhd_sim_tile *tile)
{
    struct nbhd_sim_case c;
    nbhd_status status = nbhd_sim_case_init(&c, desc, tiles);
    if (status)
        return status;
    const nbhd_desc *d = &c.problem.desc;
    const bool inverse = d->pass == NBHD_BACKWARD, dynamic = c.tiling == NBHD_SIM_DYNAMIC;
    if (c.tiling == NBHD_SIM_FLAT)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "tiling is flat; its tiles are no boxes, so they have no axis");
    if (axis < 0 || axis >= d->rank)
        return nbhd_fail(NBHD_ERROR_INVALID, "axis is %d; it must be 0 to %d", axis, d->rank - 1);
    const int length = inverse ? d->kv_length[axis] : d->length[axis];
    if (query < 0 || query >= length)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s[%d] is %d; it must be 0 to %d", inverse ? "key" : "query", axis, query,
                         length - 1);
    const int at = axis + 3 - d->rank;
    const struct nbhd_axis a = c.problem.axis[at];
    const int group = query % a.dilation, n = nbhd_group_size(a, group), keys = a.keys != a.length ? a.keys : n;
    const int stay = inverse ? c.kv_tile[at] : c.q_tile[at], visit = inverse ? c.q_tile[at] : c.kv_tile[at];
    const int begin = query / a.dilation / stay * stay;
    const enum nbhd_tiling tiling = dynamic ? NBHD_TILING_DYNAMIC : NBHD_TILING_STATIC;
    const struct nbhd_tile t = inverse ? nbhd_tile_at_inverse(a, n, begin, stay, visit, tiling)
                                       : nbhd_tile_at(a, n, begin, stay, visit, tiling);
    const int grid = dynamic ? t.any.begin : nbhd_image(visit, t.any.begin);
    const nbhd_sim_tile result = {sizeof result, group,       a.dilation,  inverse ? keys : n, inverse ? n : keys,
                                  t.q.begin,     t.q.end,     t.any.begin, t.any.end,          t.all.begin,
                                  t.all.end,     grid,        visit,       t.visited};
    return nbhd_return_sized(tile, &result, sizeof result, "nbhd_sim_tile");
}

double nbhd_sim_end_to_end(double share, int steps, int dense_steps, double speedup)
{
    if (!(share >= 0 && share <= 1) || steps < 1 || dense_steps < 0 || dense_steps > steps || !(speedup > 0))
        return 0;
    const double faster = share * (steps - dense_steps) / steps;
    return 1 / (1 - faster + faster / speedup);
}
