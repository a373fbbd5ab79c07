/* The search for windows, strides and tiles that waste little. Axes are searched one by one, wasteful choices are
 * dropped there, and only what is left is combined: that is why thousands of settings take milliseconds. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "sim/find.h"

/* ---- combinations ---- */

static size_t slot_of(const struct nbhd_sim_found *table, size_t slots, const struct nbhd_sim_found *x)
{
    unsigned long long h = 1469598103934665603ULL;
    for (int i = 0; i < 3; i++) {
        h = (h ^ (unsigned)x->window[i]) * 1099511628211ULL;
        h = (h ^ (unsigned)x->stride[i]) * 1099511628211ULL;
    }
    size_t at = (size_t)(h ^ h >> 29) & (slots - 1);
    while (table[at].bound != 0 && (memcmp(table[at].window, x->window, sizeof x->window) ||
                                    memcmp(table[at].stride, x->stride, sizeof x->stride)))
        at = (at + 1) & (slots - 1);
    return at;
}

static bool grow(struct nbhd_sim_finder *f)
{
    const size_t slots = f->slots ? 2 * f->slots : 1 << 14;
    struct nbhd_sim_found *table = calloc(slots, sizeof *table);
    if (!table)
        return false;
    for (size_t i = 0; i < f->slots; i++)
        if (f->table[i].bound != 0)
            table[slot_of(table, slots, &f->table[i])] = f->table[i];
    free(f->table);
    f->table = table;
    f->slots = slots;
    return true;
}

static int descending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

/* Before the table grows is the time to see what need not enter it. */
static void raise_floor(struct nbhd_sim_finder *f)
{
    double *bounds = malloc((f->used + 1) * sizeof *bounds);
    size_t count = 0;
    for (size_t i = 0; i < f->slots && bounds; i++)
        if (f->table[i].bound != 0)
            bounds[count++] = f->table[i].bound;
    if (count > f->room) {
        qsort(bounds, count, sizeof *bounds, descending);
        f->floor = fmax(f->floor, bounds[f->room]);
    }
    free(bounds);
}

static bool keep(struct nbhd_sim_finder *f, const struct nbhd_sim_found *x)
{
    if (2 * (f->used + 1) > f->slots) {
        raise_floor(f);
        if (!grow(f))
            return false;
    }
    struct nbhd_sim_found *at = &f->table[slot_of(f->table, f->slots, x)];
    f->used += at->bound == 0;
    if (at->bound == 0 || x->bound > at->bound * (1 + 1e-12) ||
        (x->bound >= at->bound * (1 - 1e-12) && x->rimless > at->rimless))
        *at = *x;
    return true;
}

static bool combine(struct nbhd_sim_finder *f, const struct nbhd_sim_list *const list[3], struct nbhd_sim_found x)
{
    const nbhd_sim_search *s = &f->search;
    const double most = (1 + 1e-9) / s->efficiency;
    for (int i = 0; i < list[0]->count; i++)
        for (int j = 0; j < list[1]->count; j++) {
            const struct nbhd_sim_entry *a = &list[0]->entries[i], *b = &list[1]->entries[j];
            if (a->waste * b->waste > most ||
                (s->sparsity > 0 && 1 - a->share * b->share > s->sparsity + s->tolerance + 1e-12))
                continue;
            for (int k = 0; k < list[2]->count; k++) {
                const struct nbhd_sim_entry *c = &list[2]->entries[k];
                f->considered += 1;
                const double share = a->share * b->share * c->share;
                if (a->waste * b->waste * c->waste > most ||
                    (s->sparsity > 0 && fabs(1 - share - s->sparsity) > s->tolerance + 1e-12))
                    continue;
                x.window[0] = a->window, x.window[1] = b->window, x.window[2] = c->window;
                x.stride[0] = a->stride, x.stride[1] = b->stride, x.stride[2] = c->stride;
                x.rimless = a->rimless && b->rimless && c->rimless && f->extra_rimless;
                x.bound = (1 + f->extra_share) / (share * a->work * b->work * c->work + f->extra_work);
                if (x.bound < f->floor || (s->efficiency >= 1 && !x.rimless))
                    continue;
                if (!keep(f, &x))
                    return false;
            }
        }
    return true;
}

/* Extra keys under a pair of boxes: every query tile visits all of their tiles, and the bound pays for that. */
static void weigh_extra(struct nbhd_sim_finder *f, const struct nbhd_sim_box *q, const struct nbhd_sim_box *kv)
{
    const struct nbhd_problem *p = &f->request->problem;
    const double extra = p->desc.extra, volume = nbhd_sim_volume(kv->extent);
    double queries = 1, padded = nbhd_sim_volume(q->extent), keys = 1;
    for (int i = 0; i < 3; i++) {
        queries *= p->axis[i].length;
        keys *= p->axis[i].keys;
        padded *= nbhd_axis_tiles(p->axis[i], q->extent[i]);
    }
    f->extra_share = extra / keys;
    f->extra_work = padded / queries * (ceil(extra / volume) * volume / keys);
    f->extra_rimless = fmod(extra, volume) == 0;
}

static bool search_boxes(struct nbhd_sim_finder *f, int tiling)
{
    const struct nbhd_sim_request *r = f->request;
    for (int i = 0; i < r->q_boxes; i++)
        for (int j = 0; j < r->kv_boxes; j++) {
            weigh_extra(f, &r->q_box[i], &r->kv_box[j]);
            struct nbhd_sim_found x = {.tiling = tiling, .q_box = i, .kv_box = j};
            struct nbhd_sim_list list[3]; /* copies: making the next list may move the last */
            const struct nbhd_sim_list *lists[3];
            for (int axis = 0; axis < 3; axis++) {
                const struct nbhd_sim_list *l = nbhd_sim_list_for(f, axis, r->q_box[i].extent[axis],
                                                                  r->kv_box[j].extent[axis],
                                                                  tiling == NBHD_SIM_DYNAMIC);
                if (!l)
                    return false;
                list[axis] = *l;
                lists[axis] = &list[axis];
            }
            if (!combine(f, lists, x))
                return false;
        }
    return true;
}

/* ---- results ---- */

static double stride_product(const struct nbhd_sim_found *x)
{
    return (double)x->stride[0] * x->stride[1] * x->stride[2];
}

static int better(const void *a, const void *b)
{
    const struct nbhd_sim_found *x = a, *y = b;
    if (fabs(x->bound - y->bound) > 1e-9 * x->bound)
        return x->bound > y->bound ? -1 : 1;
    if (x->rimless != y->rimless)
        return y->rimless - x->rimless;
    const double p = stride_product(x), q = stride_product(y);
    if (p != q)
        return p < q ? -1 : 1;
    int order = memcmp(x->window, y->window, sizeof x->window);
    return order ? order : memcmp(x->stride, y->stride, sizeof x->stride);
}

static nbhd_status describe(const struct nbhd_sim_finder *f, const struct nbhd_sim_found *x, nbhd_sim_setting *s)
{
    const struct nbhd_sim_request *r = f->request;
    const int rank = r->problem.desc.rank;
    *s = (nbhd_sim_setting){.desc = r->problem.desc, .tiles = r->tiles};
    for (int i = 0; i < rank; i++) {
        s->desc.window[i] = x->window[i + 3 - rank];
        s->desc.stride[i] = x->stride[i + 3 - rank];
    }
    s->tiles.tiling = x->tiling;
    s->tiles.warpgroups = 1;
    nbhd_sim_box_to(&r->problem, &r->q_box[x->q_box], s->tiles.q_tile);
    nbhd_sim_box_to(&r->problem, &r->kv_box[x->kv_box], s->tiles.kv_tile);
    struct nbhd_sim_case c;
    nbhd_status status = nbhd_sim_case_init(&c, &s->desc, &s->tiles);
    return status ? status : nbhd_sim_case_count(&c, &s->counts);
}

static nbhd_status report(struct nbhd_sim_finder *f, nbhd_sim_setting *settings, int room, int *count)
{
    size_t kept = 0;
    for (size_t i = 0; i < f->slots; i++)
        if (f->table[i].bound != 0)
            f->table[kept++] = f->table[i];
    if (kept > 1)
        qsort(f->table, kept, sizeof *f->table, better);
    nbhd_status status = NBHD_OK;
    for (*count = 0; *count < room && (size_t)*count < kept && !status; ++*count)
        status = describe(f, &f->table[*count], &settings[*count]);
    return status;
}

/* ---- the request ---- */

static nbhd_status check_window(struct nbhd_sim_finder *f, int i)
{
    const nbhd_desc *d = &f->request->problem.desc;
    const int at = i + 3 - d->rank, longest = d->kv_length[i] / d->dilation[i];
    int low = f->search.window_min[i], high = f->search.window_max[i];
    if (low < 0 || high < 0 || low > longest || high > longest || (low && high && low > high))
        return nbhd_fail(NBHD_ERROR_INVALID,
                         "window_min[%d], window_max[%d] are %d, %d; they must be in order and 1 to %d (0 for the "
                         "default)",
                         i, i, low, high, longest);
    if (d->kv_length[i] != d->length[i])
        low = high = longest;
    f->window_max[at] = high ? high : longest;
    f->window_min[at] = low ? low : nbhd_min(f->window_max[at], nbhd_max(2, longest / 16));
    return NBHD_OK;
}

static nbhd_status check_search(struct nbhd_sim_finder *f)
{
    nbhd_sim_search *s = &f->search;
    nbhd_status status;
    if (!(s->sparsity >= 0 && s->sparsity < 1))
        return nbhd_fail(NBHD_ERROR_INVALID, "sparsity is %g; it must be 0 (for any) to less than 1", s->sparsity);
    if (!(s->tolerance >= 0 && s->tolerance <= 1))
        return nbhd_fail(NBHD_ERROR_INVALID, "tolerance is %g; it must be 0 (for 0.02) to 1", s->tolerance);
    if (!(s->efficiency >= 0 && s->efficiency <= 1))
        return nbhd_fail(NBHD_ERROR_INVALID, "efficiency is %g; it must be 0 (for 0.9) to 1", s->efficiency);
    s->tolerance = s->tolerance > 0 ? s->tolerance : 0.02;
    s->efficiency = s->efficiency > 0 ? s->efficiency : 0.9;
    for (int i = 0; i < 3; i++)
        f->window_min[i] = f->window_max[i] = 1;
    for (int i = 0; i < f->request->problem.desc.rank; i++)
        if ((status = check_window(f, i)))
            return status;
    return NBHD_OK;
}

static void drop(struct nbhd_sim_finder *f)
{
    for (int axis = 0; axis < 3; axis++) {
        for (int i = 0; i < f->list_count[axis]; i++)
            free(f->lists[axis][i].entries);
        free(f->lists[axis]);
    }
    free(f->table);
}

nbhd_status nbhd_sim_find(const nbhd_desc *desc, const nbhd_sim_tiles *tiles, unsigned tilings,
                          const nbhd_sim_search *search, nbhd_sim_setting *settings, int room, int *count,
                          double *considered)
{
    *count = 0;
    struct nbhd_sim_request *r = malloc(sizeof *r);
    if (!r)
        return nbhd_fail(NBHD_ERROR_MEMORY, "no memory for a list of tiles");
    struct nbhd_sim_finder f = {.request = r, .room = (size_t)nbhd_max(room, 1)};
    nbhd_status status = nbhd_copy_sized(&f.search, sizeof f.search, search, "nbhd_sim_search");
    if (!status)
        status = nbhd_sim_request_init(r, desc, tiles, f.search.q_tokens, f.search.kv_tokens);
    if (!status)
        status = check_search(&f);
    if (!status && r->tiles.warpgroups > 1)
        status = nbhd_fail(NBHD_ERROR_INVALID, "warpgroups is %d; a search counts whole query tiles: 0 or 1",
                           r->tiles.warpgroups);
    if (!status && (!tilings || tilings >> NBHD_SIM_FLAT))
        status = nbhd_fail(NBHD_ERROR_INVALID, "tilings is 0x%x; a search knows box tilings only: bits 0 to %d",
                           tilings, NBHD_SIM_FLAT - 1);
    for (int tiling = 0; tiling < NBHD_SIM_FLAT && !status; tiling++)
        if (tilings & 1u << tiling && !search_boxes(&f, tiling))
            status = nbhd_fail(NBHD_ERROR_MEMORY, "no memory for %zu settings", f.used);
    if (!status)
        status = report(&f, settings, room, count);
    if (considered)
        *considered = f.considered;
    drop(&f);
    free(r);
    return status;
}
