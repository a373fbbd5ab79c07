/* The search for windows, strides and tiles that waste little. Axes are searched one by one, wasteful choices are
 * dropped there, and only what is left is combined: that is why thousands of settings take milliseconds. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "sim/sim.h"

/* One window and stride of one axis under one pair of extents. */
struct entry {
    int window, stride;
    double waste; /* keys in visited tiles over keys seen, per query tile: 1 is perfect */
    double work;  /* the same with the queries past the axis' end: what the bound pays */
    double share; /* pairs seen of all pairs */
    int rimless;  /* no tile needs a mask */
};

struct list {
    int q_extent, kv_extent, dynamic, count, room;
    struct entry *entries;
};

/* A window and stride of all axes, with the best tiling seen for it. */
struct found {
    int window[3], stride[3], tiling, q_box, kv_box, rimless;
    double bound;
};

struct finder {
    const struct nbhd_sim_request *request;
    nbhd_sim_search search;
    int window_min[3], window_max[3]; /* by the problem's three axes */
    struct list *lists[3];
    int list_count[3];
    struct found *table; /* open addressing by window and stride; bound 0: free */
    size_t slots, used, room;
    double floor; /* `room` settings have at least this bound: lesser ones cannot be among the results */
    double considered;
};

/* ---- candidates of one axis ---- */

enum { STRIDES = 64 };

static int add_once(int *values, int count, int value)
{
    for (int i = 0; i < count; i++)
        if (values[i] == value)
            return count;
    if (count < STRIDES)
        values[count++] = value;
    return count;
}

static int ascending(const void *a, const void *b)
{
    const int x = *(const int *)a, y = *(const int *)b;
    return (x > y) - (x < y);
}

/* 1, the powers of two, multiples of the query tile's extent by powers of two, and the window: sorted. */
static int strides_of(int window, int extent, int strides[STRIDES])
{
    int count = 0;
    for (long long s = 1; s <= window; s *= 2)
        count = add_once(strides, count, (int)s);
    for (long long s = extent; s <= window; s *= 2)
        count = add_once(strides, count, (int)s);
    count = add_once(strides, count, window);
    qsort(strides, (size_t)count, sizeof *strides, ascending);
    return count;
}

/* Between two windows to try: a power of two that leaves about 16 per axis in 3-D, 32 in 2-D, 64 in 1-D. */
static int window_step(int low, int high, int rank)
{
    const int wanted = rank == 1 ? 64 : rank == 2 ? 32 : 16;
    int step = 1;
    while ((high - low) / step >= wanted)
        step *= 2;
    return step;
}

static bool append(struct list *list, struct entry e)
{
    if (list->count == list->room) {
        int room = list->room ? 2 * list->room : 64;
        struct entry *grown = realloc(list->entries, (size_t)room * sizeof *grown);
        if (!grown)
            return false;
        list->entries = grown;
        list->room = room;
    }
    list->entries[list->count++] = e;
    return true;
}

/* Of one window, a larger stride is worth having only if fewer tiles are visited. */
static bool append_window(struct finder *f, struct list *list, struct nbhd_axis a, int window)
{
    int strides[STRIDES];
    a.window = window;
    const int inverse = f->request->problem.desc.pass == NBHD_BACKWARD;
    const int count = a.keys != a.length ? 1 : strides_of(window, list->q_extent, strides);
    double least = INFINITY;
    for (int i = 0; i < count; i++) {
        a.stride = a.keys != a.length ? 1 : strides[i];
        struct nbhd_sim_axis c =
            nbhd_sim_axis_count(a, list->q_extent, list->kv_extent, list->dynamic, inverse, 1);
        const double work = c.visited * list->q_extent * list->kv_extent / c.pairs;
        const double outer = inverse ? c.outer * list->kv_extent / a.keys : c.outer * list->q_extent / a.length;
        f->considered += 1;
        if (c.visited >= least)
            continue;
        least = c.visited;
        struct entry e = {
            window, a.stride, work / outer, work, c.pairs / ((double)a.length * a.keys), c.full == c.visited};
        if (e.waste * f->search.efficiency <= 1 + 1e-9 && !append(list, e))
            return false;
    }
    return true;
}

static bool fill_list(struct finder *f, int axis, struct list *list)
{
    const struct nbhd_axis a = f->request->problem.axis[axis];
    const int low = f->window_min[axis], high = f->window_max[axis], extent = list->kv_extent;
    const int step = window_step(low, high, f->request->problem.desc.rank);
    for (int w = low; w <= high; w++) {
        const bool wanted = w == low || w == high || w % step == 0 || (extent >= step && w % extent == 0);
        if (wanted && !append_window(f, list, a, w))
            return false;
        if (!wanted && step > 1 && extent % step == 0)
            w = nbhd_min(w + step - w % step, high) - 1; /* nothing in between */
    }
    return true;
}

/* The list of an axis under these extents: made once. */
static const struct list *list_for(struct finder *f, int axis, int q_extent, int kv_extent, int dynamic)
{
    for (int i = 0; i < f->list_count[axis]; i++) {
        const struct list *l = &f->lists[axis][i];
        if (l->q_extent == q_extent && l->kv_extent == kv_extent && l->dynamic == dynamic)
            return l;
    }
    struct list *grown = realloc(f->lists[axis], (size_t)(f->list_count[axis] + 1) * sizeof *grown);
    if (!grown)
        return NULL;
    f->lists[axis] = grown;
    struct list *l = &grown[f->list_count[axis]++];
    *l = (struct list){q_extent, kv_extent, dynamic, 0, 0, NULL};
    return fill_list(f, axis, l) ? l : NULL;
}

/* ---- combinations ---- */

static size_t slot_of(const struct found *table, size_t slots, const struct found *x)
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

static bool grow(struct finder *f)
{
    const size_t slots = f->slots ? 2 * f->slots : 1 << 14;
    struct found *table = calloc(slots, sizeof *table);
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
static void raise_floor(struct finder *f)
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

static bool keep(struct finder *f, const struct found *x)
{
    if (2 * (f->used + 1) > f->slots) {
        raise_floor(f);
        if (!grow(f))
            return false;
    }
    struct found *at = &f->table[slot_of(f->table, f->slots, x)];
    f->used += at->bound == 0;
    if (at->bound == 0 || x->bound > at->bound * (1 + 1e-12) ||
        (x->bound >= at->bound * (1 - 1e-12) && x->rimless > at->rimless))
        *at = *x;
    return true;
}

static bool combine(struct finder *f, const struct list *const list[3], struct found x)
{
    const nbhd_sim_search *s = &f->search;
    const double most = (1 + 1e-9) / s->efficiency;
    for (int i = 0; i < list[0]->count; i++)
        for (int j = 0; j < list[1]->count; j++) {
            const struct entry *a = &list[0]->entries[i], *b = &list[1]->entries[j];
            if (a->waste * b->waste > most ||
                (s->sparsity > 0 && 1 - a->share * b->share > s->sparsity + s->tolerance + 1e-12))
                continue;
            for (int k = 0; k < list[2]->count; k++) {
                const struct entry *c = &list[2]->entries[k];
                f->considered += 1;
                const double share = a->share * b->share * c->share;
                if (a->waste * b->waste * c->waste > most ||
                    (s->sparsity > 0 && fabs(1 - share - s->sparsity) > s->tolerance + 1e-12))
                    continue;
                x.window[0] = a->window, x.window[1] = b->window, x.window[2] = c->window;
                x.stride[0] = a->stride, x.stride[1] = b->stride, x.stride[2] = c->stride;
                x.rimless = a->rimless && b->rimless && c->rimless;
                x.bound = 1 / (share * a->work * b->work * c->work);
                if (x.bound < f->floor || (s->efficiency >= 1 && !x.rimless))
                    continue;
                if (!keep(f, &x))
                    return false;
            }
        }
    return true;
}

static bool search_boxes(struct finder *f, int tiling)
{
    const struct nbhd_sim_request *r = f->request;
    for (int i = 0; i < r->q_boxes; i++)
        for (int j = 0; j < r->kv_boxes; j++) {
            struct found x = {.tiling = tiling, .q_box = i, .kv_box = j};
            struct list list[3]; /* copies: making the next list may move the last */
            const struct list *lists[3];
            for (int axis = 0; axis < 3; axis++) {
                const struct list *l = list_for(f, axis, r->q_box[i].extent[axis], r->kv_box[j].extent[axis],
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

static double stride_product(const struct found *x)
{
    return (double)x->stride[0] * x->stride[1] * x->stride[2];
}

static int better(const void *a, const void *b)
{
    const struct found *x = a, *y = b;
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

static nbhd_status describe(const struct finder *f, const struct found *x, nbhd_sim_setting *s)
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

static nbhd_status report(struct finder *f, nbhd_sim_setting *settings, int room, int *count)
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

static nbhd_status check_window(struct finder *f, int i)
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

static nbhd_status check_search(struct finder *f)
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

static void drop(struct finder *f)
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
    struct finder f = {.request = r, .room = (size_t)nbhd_max(room, 1)};
    nbhd_status status = nbhd_copy_sized(&f.search, sizeof f.search, search, "nbhd_sim_search");
    if (!status)
        status = nbhd_sim_request_init(r, desc, tiles, f.search.q_tokens, f.search.kv_tokens);
    if (!status)
        status = check_search(&f);
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
