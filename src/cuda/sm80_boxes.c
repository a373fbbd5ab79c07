/* Boxes for the sm80 kernels, by counting: the cost of a choice is a product over axes, so every choice can be
 * tried. */
#include "cuda/sm80.h"
#include <stdlib.h>
#include "core/tiles.h"

#define EXTENTS   38 /* candidates: 1 to 32, then steps */
#define MOST_PACK 16

static int extent_at(int i)
{
    static const int long_ones[] = {40, 48, 64, 80, 96, 128};
    return i < 32 ? i + 1 : long_ones[i - 32];
}

/* Sums over the row boxes of an axis, over its dilation groups. */
struct count {
    double tiles;   /* row boxes */
    double steps;   /* column boxes that they walk */
    double visited; /* the same, of each warp's part of the box */
    double full;    /* of these, need no mask */
};

static struct nbhd_range any_of(struct nbhd_axis a, bool inverse, int n, int begin, int end)
{
    const struct nbhd_range r = {begin, end};
    return inverse ? nbhd_tile_any_queries(a, n, r) : nbhd_tile_any(a, n, r);
}

static struct nbhd_range all_of(struct nbhd_axis a, bool inverse, int n, int begin, int end)
{
    const struct nbhd_range r = {begin, end};
    return inverse ? nbhd_tile_all_queries(a, n, r) : nbhd_tile_all(a, n, r);
}

/* What a warp's part of a row box sees of columns, from where the box's own begin: what some of its rows see, and what
 * all do. length: of the box's, of a box's first part; -1 of others. */
struct sight {
    int length, begin, end, all_begin, all_end;
    double count; /* of parts that are alike */
};

/* Of the row boxes of an axis, as they come; neighbours are mostly alike. */
struct sights {
    struct sight *list; /* NULL: not yet, or no memory */
    int count;
};

static void add_sight(struct sights *all, const struct sight *part)
{
    for (int i = all->count; i-- > nbhd_max(0, all->count - 16);) {
        struct sight *s = &all->list[i];
        if (s->length == part->length && s->begin == part->begin && s->end == part->end &&
            s->all_begin == part->all_begin && s->all_end == part->all_end) {
            s->count += part->count;
            return;
        }
    }
    all->list[all->count++] = *part;
}

/* Row boxes of `rows` elements, of which a warp has `part`; so many groups of n elements. */
static void look(struct sights *sights, struct nbhd_axis a, bool inverse, int n, int rows, int part, int groups)
{
    const int size = inverse && a.keys != a.length ? a.keys : n;
    for (int x = 0; x < size && groups; x += rows) {
        const int end = nbhd_min(x + rows, size);
        const struct nbhd_range any = any_of(a, inverse, n, x, end);
        for (int y = x; y < end; y += part) {
            const int stop = nbhd_min(y + part, end), from = any.begin;
            const struct nbhd_range some = any_of(a, inverse, n, y, stop), all = all_of(a, inverse, n, y, stop);
            add_sight(sights, &(struct sight){y == x ? nbhd_max(any.end - from, 0) : -1, some.begin - from,
                                              some.end - from, all.begin - from, all.end - from, groups});
        }
    }
}

static void look_at_axis(struct sights *sights, struct nbhd_axis a, bool inverse, int rows, int part)
{
    const int large = nbhd_group_size(a, 0),
              small = nbhd_group_size(a, a.dilation - 1); /* groups differ by one at most */
    const int larger = large == small ? a.dilation : a.length % a.dilation;
    const int size = nbhd_max(large, a.keys), most = 2 * (size / part + size / rows + 2); /* boxes are cut short */
    sights->list = malloc((size_t)most * sizeof *sights->list);
    if (!sights->list)
        return;
    look(sights, a, inverse, large, rows, part, larger);
    look(sights, a, inverse, small, rows, part, a.dilation - larger);
}

/* Against column boxes of `columns`. */
static struct count count_columns(const struct sights *sights, int columns)
{
    struct count c = {0, 0, 0, 0};
    for (int i = 0; i < sights->count; i++) {
        const struct sight *s = &sights->list[i];
        if (s->length >= 0) {
            c.tiles += s->count;
            c.steps += s->count * ((s->length + columns - 1) / columns);
        }
        if (s->end > s->begin)
            c.visited += s->count * ((s->end - 1) / columns - s->begin / columns + 1);
        c.full += s->count * nbhd_max(0, s->all_end / columns - (s->all_begin + columns - 1) / columns);
    }
    return c;
}

/* The search of one problem. Sights are remembered per axis, row extent and part, counts also per column extent. */
struct search {
    const struct nbhd_problem *problem;
    const struct nbhd_sm80_shape *shape;
    int size[3];            /* row tokens of the largest group */
    int reach[3];           /* column tokens of it */
    struct sights (*sights)[EXTENTS][8]; /* [3 axes][rows][log2 of parts] */
    struct count *known[3]; /* [EXTENTS rows][8 log2 of parts][EXTENTS columns], tiles 0: not yet */
};

static int log2_of(int x)
{
    int n = 0;
    while (x >>= 1)
        n++;
    return n;
}

/* part is rounded to a power of 2 of row boxes that are none: an estimate there. */
static const struct count *count_of(struct search *s, int axis, int row, int part, int column)
{
    const int log = log2_of(part);
    struct count *c = &s->known[axis][(row * 8 + log) * EXTENTS + column];
    struct sights *sights = &s->sights[axis][row][log];
    if (!sights->list)
        look_at_axis(sights, s->problem->axis[axis], s->shape->inverse, extent_at(row),
                     nbhd_min(1 << log, extent_at(row)));
    if (c->tiles == 0)
        *c = count_columns(sights, extent_at(column));
    return c;
}

/* How much of each axis a warp's rows span: they are consecutive. */
static void warp_part(const int box[3], int tokens, int part[3])
{
    for (int a = 2; a >= 0; a--) {
        part[a] = nbhd_max(1, nbhd_min(box[a], tokens));
        tokens = (tokens + box[a] - 1) / box[a];
    }
}

/* A step that only some warps of a CTA take still costs the others: they wait, unless another CTA of the multiprocessor
 * has work; loading and the barrier cost all. Factors as on an H200: docs/notes/sm80.md. units: batch x heads, each of
 * which does the same. */
static struct nbhd_sm80_work work_of(const struct count *const c[3], const struct nbhd_sm80_shape *shape,
                                     double extra_steps, bool exact, double units)
{
    struct nbhd_sm80_work w = {.ctas = units * c[0]->tiles * c[1]->tiles * c[2]->tiles,
                               .steps = units * c[0]->steps * c[1]->steps * c[2]->steps,
                               .visited = units * c[0]->visited * c[1]->visited * c[2]->visited};
    if (exact) /* else columns past the box are masked */
        w.full = units * c[0]->full * c[1]->full * c[2]->full;
    const double steps = w.steps * shape->warps;
    w.cost = w.visited + 0.1 * (w.visited - w.full) + 0.25 * (steps - w.visited) + 0.1 * steps +
             (extra_steps + shape->setup) * w.ctas * shape->warps;
    return w;
}

struct best {
    struct nbhd_sm80_work work;
    int row[3], column[3], pack;
};

static void try_columns(struct search *s, const int row[3], int pack, struct best *best)
{
    const int n = s->shape->n;
    int box[3], part[3], column[3];
    for (int a = 0; a < 3; a++)
        box[a] = extent_at(row[a]);
    warp_part(box, nbhd_max(1, s->shape->rows / s->shape->warps / pack), part);
    const double extra = s->shape->inverse ? 0 : (s->problem->desc.extra + n - 1) / n;
    const double units = (double)s->problem->desc.batch *
                         (s->shape->inverse ? s->problem->desc.kv_heads : s->problem->desc.heads / pack);
    for (column[0] = 0; column[0] < EXTENTS && extent_at(column[0]) <= n; column[0]++) {
        if (column[0] && extent_at(column[0]) > s->reach[0])
            break;
        for (column[1] = 0; column[1] < EXTENTS && extent_at(column[0]) * extent_at(column[1]) <= n; column[1]++) {
            if (column[1] && extent_at(column[1]) > s->reach[1])
                break;
            const int room = n / (extent_at(column[0]) * extent_at(column[1]));
            column[2] = 0;
            while (column[2] + 1 < EXTENTS && extent_at(column[2] + 1) <= room)
                column[2]++; /* the longest that fits */
            const struct count *c[3];
            for (int a = 0; a < 3; a++)
                c[a] = count_of(s, a, row[a], part[a], column[a]);
            const bool exact = extent_at(column[0]) * extent_at(column[1]) * extent_at(column[2]) == n;
            const struct nbhd_sm80_work work = work_of(c, s->shape, extra, exact, units);
            if (work.cost < best->work.cost * (1 - 1e-9))
                *best = (struct best){work, {row[0], row[1], row[2]}, {column[0], column[1], column[2]}, pack};
        }
    }
}

/* Row boxes that fill the tile or cover the axes. */
static void try_rows(struct search *s, int pack, struct best *best)
{
    const int tokens = s->shape->rows / pack;
    int row[3];
    for (row[0] = 0; row[0] < EXTENTS; row[0]++) {
        const int room0 = tokens / extent_at(row[0]);
        if (room0 < 1 || (row[0] && extent_at(row[0] - 1) >= s->size[0]))
            break;
        for (row[1] = 0; row[1] < EXTENTS; row[1]++) {
            const int room1 = room0 / extent_at(row[1]);
            if (room1 < 1 || (row[1] && extent_at(row[1] - 1) >= s->size[1]))
                break;
            row[2] = 0;
            while (row[2] + 1 < EXTENTS && extent_at(row[2] + 1) <= room1 && extent_at(row[2]) < s->size[2])
                row[2]++;
            /* Not a long slow axis with a short remainder: as good as others, and many. */
            const int used = extent_at(row[0]) * extent_at(row[1]) * extent_at(row[2]);
            const bool whole =
                extent_at(row[2]) >= s->size[2] && extent_at(row[1]) >= s->size[1] && extent_at(row[0]) >= s->size[0];
            if (4 * used < 3 * tokens && !whole && extent_at(row[2]) < s->size[2])
                continue;
            try_columns(s, row, pack, best);
        }
    }
}

struct nbhd_sm80_work nbhd_sm80_boxes(const struct nbhd_problem *problem, const struct nbhd_sm80_shape *shape,
                                      struct nbhd_boxes_sm80 *boxes)
{
    struct search s = {.problem = problem, .shape = shape, .sights = calloc(3, sizeof *s.sights)};
    struct best best = {.work = {.cost = 1e300}};
    for (int a = 0; a < 3; a++) {
        const struct nbhd_axis *axis = &problem->axis[a];
        const int group = nbhd_group_size(*axis, 0);
        s.size[a] = shape->inverse && axis->keys != axis->length ? axis->keys : group;
        s.reach[a] = !shape->inverse && axis->keys != axis->length ? axis->keys : group;
        s.known[a] = calloc((size_t)EXTENTS * 8 * EXTENTS, sizeof *s.known[a]);
        if (!s.known[a] || !s.sights)
            goto done;
    }
    const int group = problem->desc.heads / problem->desc.kv_heads;
    for (int pack = 1; pack <= (shape->packs ? group : 1) && pack <= MOST_PACK; pack++)
        if (group % pack == 0)
            try_rows(&s, pack, &best);
    for (int a = 0; a < 3; a++) {
        boxes->row_box[a] = extent_at(best.row[a]);
        boxes->column_box[a] = extent_at(best.column[a]);
        boxes->tiles[a] = (s.size[a] + boxes->row_box[a] - 1) / boxes->row_box[a];
    }
    boxes->pack = best.pack;
    boxes->group = group;
done:
    for (int a = 0; a < 3; a++) {
        free(s.known[a]);
        for (int i = 0; i < EXTENTS * 8 && s.sights; i++)
            free(s.sights[a][i / 8][i % 8].list);
    }
    free(s.sights);
    return best.work;
}
