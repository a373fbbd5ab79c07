/* The search's candidates: windows and strides of one axis under one pair of extents, without those that waste much. */
#include <math.h>
#include <stdlib.h>
#include "sim/find.h"

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

static bool append(struct nbhd_sim_list *list, struct nbhd_sim_entry e)
{
    if (list->count == list->room) {
        int room = list->room ? 2 * list->room : 64;
        struct nbhd_sim_entry *grown = realloc(list->entries, (size_t)room * sizeof *grown);
        if (!grown)
            return false;
        list->entries = grown;
        list->room = room;
    }
    list->entries[list->count++] = e;
    return true;
}

/* Of one window, a larger stride is worth having only if fewer tiles are visited. */
static bool append_window(struct nbhd_sim_finder *f, struct nbhd_sim_list *list, struct nbhd_axis a, int window)
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
        struct nbhd_sim_entry e = {
            window, a.stride, work / outer, work, c.pairs / ((double)a.length * a.keys), c.full == c.visited};
        if (e.waste * f->search.efficiency <= 1 + 1e-9 && !append(list, e))
            return false;
    }
    return true;
}

static bool fill_list(struct nbhd_sim_finder *f, int axis, struct nbhd_sim_list *list)
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

const struct nbhd_sim_list *nbhd_sim_list_for(struct nbhd_sim_finder *f, int axis, int q_extent, int kv_extent,
                                              int dynamic)
{
    for (int i = 0; i < f->list_count[axis]; i++) {
        const struct nbhd_sim_list *l = &f->lists[axis][i];
        if (l->q_extent == q_extent && l->kv_extent == kv_extent && l->dynamic == dynamic)
            return l;
    }
    struct nbhd_sim_list *grown = realloc(f->lists[axis], (size_t)(f->list_count[axis] + 1) * sizeof *grown);
    if (!grown)
        return NULL;
    f->lists[axis] = grown;
    struct nbhd_sim_list *l = &grown[f->list_count[axis]++];
    *l = (struct nbhd_sim_list){q_extent, kv_extent, dynamic, 0, 0, NULL};
    return fill_list(f, axis, l) ? l : NULL;
}
