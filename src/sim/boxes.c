/* Which tilings are sensible for a problem, and their order. */
#include <stdlib.h>
#include "sim/sim.h"

static int power_of_two_from(int x)
{
    int p = 1;
    while (p < x && p < 1 << 16)
        p *= 2;
    return p;
}

/* An extent may round its axis up to a power of two, and is then cut to the axis: 64x2 over 56x56 is 56x2. */
static int longest(struct nbhd_axis a) { return power_of_two_from(a.length < a.keys ? a.length : a.keys); }

static int all_boxes(const struct nbhd_axis axis[3], int tokens, struct nbhd_sim_box boxes[NBHD_SIM_BOXES])
{
    int limit[3], count = 0;
    double most = 1;
    for (int i = 0; i < 3; i++)
        most *= limit[i] = longest(axis[i]);
    if (most < tokens)
        tokens = (int)most;
    for (int e0 = 1; e0 <= limit[0] && e0 <= tokens; e0++) {
        if (tokens % e0)
            continue;
        for (int e1 = 1; e1 <= limit[1] && e0 * e1 <= tokens; e1++) {
            int e2 = tokens / e0 / e1;
            if (tokens / e0 % e1 || e2 > limit[2] || count == NBHD_SIM_BOXES)
                continue;
            const int extent[3] = {e0, e1, e2};
            for (int i = 0; i < 3; i++)
                boxes[count].extent[i] = nbhd_min(extent[i], nbhd_min(axis[i].length, axis[i].keys));
            count++;
        }
    }
    return count;
}

static int compare_tiles(const int x[3], const int y[3])
{
    for (int i = 0; i < 3; i++)
        if (x[i] != y[i])
            return x[i] - y[i];
    return 0;
}

/* To the last difference: what qsort() does with equals is the C library's choice. */
static int better(const void *a, const void *b)
{
    const nbhd_sim_setting *x = a, *y = b;
    if (x->ms != y->ms)
        return x->ms < y->ms ? -1 : 1;
    if (x->counts.bound_mean != y->counts.bound_mean)
        return x->counts.bound_mean > y->counts.bound_mean ? -1 : 1;
    if (x->counts.masked_fraction != y->counts.masked_fraction)
        return x->counts.masked_fraction < y->counts.masked_fraction ? -1 : 1;
    if (x->tiles.tiling != y->tiles.tiling)
        return x->tiles.tiling - y->tiles.tiling;
    const int order = compare_tiles(x->tiles.q_tile, y->tiles.q_tile);
    return order ? order : compare_tiles(x->tiles.kv_tile, y->tiles.kv_tile);
}

/* The boxes to try: the given one, else all of `tokens` tokens. */
static int choose_boxes(const struct nbhd_problem *problem, const int given[3], int tokens,
                        struct nbhd_sim_box boxes[NBHD_SIM_BOXES])
{
    if (!given[0] && !given[1] && !given[2])
        return all_boxes(problem->axis, tokens ? tokens : 128, boxes);
    const int rank = problem->desc.rank;
    for (int i = 0; i < 3; i++)
        boxes[0].extent[i] = i < 3 - rank ? 1 : given[i - (3 - rank)];
    return 1;
}

void nbhd_sim_box_to(const struct nbhd_problem *problem, const struct nbhd_sim_box *box, int extent[3])
{
    const int skip = 3 - problem->desc.rank;
    for (int i = 0; i < 3; i++)
        extent[i] = i + skip < 3 ? box->extent[i + skip] : 0;
}

nbhd_status nbhd_sim_request_init(struct nbhd_sim_request *r, const nbhd_desc *desc, const nbhd_sim_tiles *tiles,
                                  int q_tokens, int kv_tokens)
{
    nbhd_status status = nbhd_problem_init(&r->problem, desc);
    if (status || (status = nbhd_copy_sized(&r->tiles, sizeof r->tiles, tiles, "nbhd_sim_tiles")))
        return status;
    r->tiles.size = sizeof r->tiles;
    if (q_tokens < 0 || q_tokens > 65536 || kv_tokens < 0 || kv_tokens > 65536)
        return nbhd_fail(NBHD_ERROR_INVALID, "q_tokens, kv_tokens are %d, %d; they must be 0 (for 128) to 65536",
                         q_tokens, kv_tokens);
    r->q_tokens = q_tokens ? q_tokens : 128;
    r->kv_tokens = kv_tokens ? kv_tokens : 128;
    r->q_boxes = choose_boxes(&r->problem, r->tiles.q_tile, r->q_tokens, r->q_box);
    r->kv_boxes = choose_boxes(&r->problem, r->tiles.kv_tile, r->kv_tokens, r->kv_box);
    if (!r->q_boxes || !r->kv_boxes)
        return nbhd_fail(NBHD_ERROR_INVALID, "no box of %d tokens fits the axes",
                         r->q_boxes ? r->kv_tokens : r->q_tokens);
    /* What is wrong with a given tile is wrong with each combination: say it once, here. */
    nbhd_sim_tiles first = r->tiles;
    if (!first.q_tile[0] && !first.q_tile[1] && !first.q_tile[2])
        nbhd_sim_box_to(&r->problem, &r->q_box[0], first.q_tile);
    if (!first.kv_tile[0] && !first.kv_tile[1] && !first.kv_tile[2])
        nbhd_sim_box_to(&r->problem, &r->kv_box[0], first.kv_tile);
    first.warpgroups = 1;
    first.tiling = NBHD_SIM_STATIC;
    struct nbhd_sim_case c;
    return nbhd_sim_case_init(&c, &r->problem.desc, &first);
}

/* One combination, appended if it can be counted. A box that cannot be divided among the warpgroups, say, is left out:
 * *refused then has its status, which counts only if nothing is found. */
static nbhd_status try_tiles(const struct nbhd_sim_request *r, const nbhd_sim_tiles *tiles,
                             const nbhd_sim_device *device, nbhd_sim_setting *s, int *found, nbhd_status *refused)
{
    struct nbhd_sim_case c;
    nbhd_status status = nbhd_sim_case_init(&c, &r->problem.desc, tiles);
    if (status) {
        *refused = status;
        return NBHD_OK;
    }
    *s = (nbhd_sim_setting){.desc = r->problem.desc, .tiles = *tiles};
    status = nbhd_sim_case_count(&c, &s->counts);
    if (status)
        return status;
    s->ms = device ? nbhd_sim_model_ms(device, &c, &s->counts) : 0;
    ++*found;
    return NBHD_OK;
}

static nbhd_status try_all(const struct nbhd_sim_request *r, unsigned tilings, const nbhd_sim_device *device,
                           nbhd_sim_setting *all, int *found)
{
    nbhd_status status = NBHD_OK, refused = NBHD_OK;
    for (int tiling = 0; tiling < NBHD_SIM_FLAT; tiling++)
        for (int i = 0; i < r->q_boxes && tilings & 1u << tiling; i++)
            for (int j = 0; j < r->kv_boxes && !status; j++) {
                nbhd_sim_tiles tiles = r->tiles;
                tiles.tiling = tiling;
                nbhd_sim_box_to(&r->problem, &r->q_box[i], tiles.q_tile);
                nbhd_sim_box_to(&r->problem, &r->kv_box[j], tiles.kv_tile);
                status = try_tiles(r, &tiles, device, &all[*found], found, &refused);
            }
    if (!status && tilings & 1u << NBHD_SIM_FLAT) {
        nbhd_sim_tiles tiles = {.size = sizeof tiles,
                                .tiling = NBHD_SIM_FLAT,
                                .q_tile = {r->q_tokens},
                                .kv_tile = {r->kv_tokens},
                                .warpgroups = 1};
        status = try_tiles(r, &tiles, device, &all[*found], found, &refused);
    }
    return status || *found ? status : refused;
}

nbhd_status nbhd_sim_rank(const nbhd_desc *desc, const nbhd_sim_tiles *tiles, unsigned tilings, int q_tokens,
                          int kv_tokens, const nbhd_sim_device *device, nbhd_sim_setting *settings, int room,
                          int *count)
{
    nbhd_sim_device priced;
    *count = 0;
    if (device) {
        nbhd_status wrong = nbhd_sim_device_check(&priced, device);
        if (wrong)
            return wrong;
    }
    struct nbhd_sim_request *r = malloc(sizeof *r);
    if (!r)
        return nbhd_fail(NBHD_ERROR_MEMORY, "no memory for a list of tiles");
    nbhd_status status = nbhd_sim_request_init(r, desc, tiles, q_tokens, kv_tokens);
    if (!status && device)
        status = nbhd_sim_model_check(&priced, &r->problem.desc);
    nbhd_sim_setting *all = NULL;
    if (!status) {
        all = malloc(((size_t)r->q_boxes * (size_t)r->kv_boxes * 3 + 1) * sizeof *all);
        status = all ? NBHD_OK : nbhd_fail(NBHD_ERROR_MEMORY, "no memory for %d x %d tilings", r->q_boxes, r->kv_boxes);
    }
    int found = 0;
    if (!status && (!tilings || tilings >> NBHD_SIM_TILINGS))
        status =
            nbhd_fail(NBHD_ERROR_INVALID, "tilings is 0x%x; it must be bits 0 to %d", tilings, NBHD_SIM_TILINGS - 1);
    if (!status)
        status = try_all(r, tilings, device ? &priced : NULL, all, &found);
    if (!status) {
        qsort(all, (size_t)found, sizeof *all, better);
        for (; *count < room && *count < found; ++*count)
            settings[*count] = all[*count];
    }
    free(all);
    free(r);
    return status;
}

nbhd_status nbhd_sim_plan_tiles(const nbhd_plan *plan, nbhd_sim_tiles *tiles)
{
    const struct nbhd_config *config = &plan->config;
    const nbhd_desc *d = &plan->problem.desc;
    nbhd_sim_tiles result = {.size = sizeof result, .tiling = NBHD_SIM_DYNAMIC, .warpgroups = 1};
    if (!config->q_tile[2] || !config->k_tile[2])
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "%s, %s: no tiling of the simulator's", plan->kernel->name,
                         plan->describe);
    for (int i = 0; i < d->rank; i++) {
        const int at = plan->problem.at[i];
        result.q_tile[i] = nbhd_min(config->q_tile[at], d->length[i]);
        result.kv_tile[i] = nbhd_min(config->k_tile[at], d->kv_length[i]);
    }
    return nbhd_return_sized(tiles, &result, sizeof result, "nbhd_sim_tiles");
}
