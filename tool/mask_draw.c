/* Pictures of a view. 1-D: the matrix of all queries and keys. 2-D: the plane of keys. 3-D: one plane per slice. */
#include "mask_draw.h"

#include <stdio.h>
#include <string.h>

#include "canvas.h"
#include "tool.h"

static const int colours[VIEW_CLASSES] = {0xb2182b, 0x2b6ca3, 0xa6cbe3, 0xf6d9b0, 0xf1f1f1};
static const char *const meanings[2][VIEW_CLASSES] = {
    {"the query", "keys that it sees", "keys that others of its tile see", "loaded with a visited tile, seen by none",
     "skipped"},
    {"the key", "queries that see it", "queries that see others of its tile",
     "loaded with a visited tile, see none of it", "skipped"}};
enum {
    INK = 0x333333, FULL_COLOUR = 0x3ecf6e, MASKED_COLOUR = 0xd4760a, TILE_COLOUR = 0xb2182b, GRID_COLOUR = 0xd0d0d0
};

enum { MARGIN = 16, WORDS = 13, MATRIX_MOST = 160, WRAP = 64 };

/* ---- pieces ---- */

/* Tiles of one query and one key are no tiles: then the picture shows the mask alone. */
static bool tiled(const struct view *v)
{
    double tokens = 1;
    for (int i = 0; i < v->rank; i++)
        tokens *= (double)v->tiles.q_tile[i] * v->tiles.kv_tile[i];
    return tokens > 1;
}

static bool dilated(const struct view *v, int axis) { return v->axis[axis].tile.dilation > 1; }

/* Outlines are drawn where tiles are rectangles of neighbouring tokens. */
static bool outlined(const struct view *v) { return tiled(v) && !dilated(v, 1) && !dilated(v, 2); }

static int legend_lines(const struct view *v) { return !tiled(v) ? 3 : !outlined(v) ? 5 : v->rank > 1 ? 8 : 7; }

static void draw_legend(struct canvas *c, const struct view *v, double x, double y)
{
    for (int i = 0; i < VIEW_CLASSES; i++) {
        if ((i == VIEW_UNION || i == VIEW_LOADED) && !tiled(v))
            continue;
        canvas_box(c, x, y, 12, 12, colours[i], GRID_COLOUR, 0.5);
        canvas_words(c, x + 18, y + 11, WORDS, INK, CANVAS_LEFT, "%s",
                     tiled(v) || i < VIEW_SKIPPED ? meanings[v->inverse][i] : "not seen");
        y += 18;
    }
    if (!outlined(v))
        return;
    const char *visited = v->inverse ? "query" : "key", *stays = v->inverse ? "key" : "query";
    static const char *const names[] = {"every pair visible: no mask", "which needs a mask"};
    for (int i = 0; i < 2; i++, y += 18) {
        canvas_box(c, x + 1, y + 1, 10, 10, CANVAS_NONE, i ? MASKED_COLOUR : FULL_COLOUR, 2);
        canvas_words(c, x + 18, y + 11, WORDS, INK, CANVAS_LEFT, "visited %s tile, %s", visited, names[i]);
    }
    if (v->rank > 1) {
        canvas_box(c, x + 1, y + 1, 10, 10, CANVAS_NONE, TILE_COLOUR, 2);
        canvas_words(c, x + 18, y + 11, WORDS, INK, CANVAS_LEFT, "the %s tile", stays);
    }
}

enum { TITLE_HEIGHT = 42 };

static double height_for(const struct view *v, double drawn)
{
    return TITLE_HEIGHT + drawn + 8 + 18 * legend_lines(v) + 2 * MARGIN;
}

static void describe(const struct view *v, char line[NBHD_TEXT], char counts[NBHD_TEXT])
{
    char query[64];
    int length = 0;
    for (int i = 3 - v->rank; i < 3; i++)
        length += snprintf(query + length, sizeof query - (size_t)length, "%s%d", length ? "," : "", v->axis[i].query);
    nbhd_desc_format(&v->desc, line, NBHD_TEXT);
    const char *format = v->inverse
                             ? "key %s is seen by %.0f queries; its tile of %.0f by %.0f: %.0f query tiles (%s), "
                               "%.0f with a mask"
                             : "query %s sees %.0f keys; its tile of %.0f sees %.0f: %.0f key tiles (%s), "
                               "%.0f with a mask";
    snprintf(counts, NBHD_TEXT, format, query, v->seen, v->queries, v->united, v->visited,
             nbhd_sim_tiling_name(v->tiles.tiling), v->visited - v->full);
}

static void draw_title(struct canvas *c, const struct view *v)
{
    char line[NBHD_TEXT], counts[NBHD_TEXT];
    describe(v, line, counts);
    canvas_words(c, MARGIN, MARGIN + 11, WORDS, INK, CANVAS_LEFT, "%.100s", line);
    if (tiled(v))
        canvas_words(c, MARGIN, MARGIN + 29, WORDS, INK, CANVAS_LEFT, "%.150s", counts);
    else
        canvas_words(c, MARGIN, MARGIN + 29, WORDS, INK, CANVAS_LEFT, "%.*s", (int)strcspn(counts, ";"), counts);
}

/* A picture holds at least its words. */
static double width_for(const struct view *v, double drawn)
{
    const double words = tiled(v) ? 680 : 360;
    return (drawn < words ? words : drawn) + 2 * MARGIN;
}

/* ---- planes ---- */

struct plane {
    double x, y, cell;
    int slice; /* on the first axis */
};

static void box_of(struct canvas *c, const struct plane *p, int y0, int y1, int x0, int x1, int colour,
                   double thickness)
{
    canvas_box(c, p->x + x0 * p->cell, p->y + y0 * p->cell, (x1 - x0) * p->cell, (y1 - y0) * p->cell, CANVAS_NONE,
               colour, thickness);
}

static void draw_grid(struct canvas *c, const struct plane *p, int rows, int columns)
{
    for (int y = 0; y <= rows && p->cell >= 6; y++)
        canvas_line(c, p->x, p->y + y * p->cell, p->x + columns * p->cell, p->y + y * p->cell, 0xffffff, 0.5, false);
    for (int x = 0; x <= columns && p->cell >= 6; x++)
        canvas_line(c, p->x + x * p->cell, p->y, p->x + x * p->cell, p->y + rows * p->cell, 0xffffff, 0.5, false);
}

/* Runs of equal cells are one rectangle, so that large planes stay small files. */
static int run_end(const struct view *v, int slice, int y, int x)
{
    const enum view_class class = view_class(v, (int[3]){slice, y, x});
    while (++x < v->axis[2].keys && view_class(v, (int[3]){slice, y, x}) == class)
        ;
    return x;
}

static void draw_cells(struct canvas *c, const struct view *v, const struct plane *p)
{
    const int rows = v->axis[1].keys, columns = v->axis[2].keys;
    for (int y = 0; y < rows; y++)
        for (int x = 0, end; x < columns; x = end) {
            end = run_end(v, p->slice, y, x);
            canvas_box(c, p->x + x * p->cell, p->y + y * p->cell, (end - x) * p->cell, p->cell,
                       colours[view_class(v, (int[3]){p->slice, y, x})], CANVAS_NONE, 0);
        }
    draw_grid(c, p, rows, columns);
}

/* Which visited tile of the first axis holds the slice; -1: none. */
static int slab_of(const struct view *v, int slice)
{
    const nbhd_sim_tile *t = &v->axis[0].tile;
    if (slice % t->dilation != t->group || slice / t->dilation < t->grid_begin)
        return -1;
    const int i = (slice / t->dilation - t->grid_begin) / t->kv_tile;
    return i < t->visited ? i : -1;
}

static void draw_tiles(struct canvas *c, const struct view *v, const struct plane *p)
{
    const int slab = slab_of(v, p->slice);
    const double thickness = p->cell < 5 ? 1 : 2;
    if (slab < 0 || !outlined(v))
        return;
    for (int wanted = 0; wanted < 2; wanted++) /* those without a mask on top of their neighbours' edges */
        for (int i = 0; i < v->axis[1].tile.visited; i++)
            for (int j = 0; j < v->axis[2].tile.visited; j++) {
                int y0, y1, x0, x1;
                const bool full =
                    view_tile_inside(v, 0, slab) && view_tile_inside(v, 1, i) && view_tile_inside(v, 2, j);
                view_tile_span(v, 1, i, &y0, &y1);
                view_tile_span(v, 2, j, &x0, &x1);
                if (full == wanted)
                    box_of(c, p, y0, y1, x0, x1, full ? FULL_COLOUR : MASKED_COLOUR, thickness);
            }
    const nbhd_sim_tile *t0 = &v->axis[0].tile, *t1 = &v->axis[1].tile, *t2 = &v->axis[2].tile;
    const bool cross = v->axis[1].keys != t1->elements || v->axis[2].keys != t2->elements;
    if (!cross && p->slice / t0->dilation >= t0->q_begin && p->slice / t0->dilation < t0->q_end && v->rank > 1)
        canvas_box(c, p->x + t2->q_begin * p->cell + thickness, p->y + t1->q_begin * p->cell + thickness,
                   (t2->q_end - t2->q_begin) * p->cell - 2 * thickness,
                   (t1->q_end - t1->q_begin) * p->cell - 2 * thickness, CANVAS_NONE, TILE_COLOUR,
                   thickness); /* inside the outline of a key tile at the same place */
}

/* Slices worth a plane: all of a short axis, else those of visited tiles. */
static int slices_of(const struct view *v, int *first)
{
    const nbhd_sim_tile *t = &v->axis[0].tile;
    *first = 0;
    if (v->axis[0].keys <= 12 || t->dilation > 1)
        return v->axis[0].keys;
    *first = t->grid_begin;
    const int end = t->grid_begin + t->visited * t->kv_tile;
    return (end < v->axis[0].keys ? end : v->axis[0].keys) - *first;
}

static int draw_planes(const struct view *v, const char *path)
{
    int first, slices = slices_of(v, &first);
    const int rows = v->axis[1].keys, columns = v->axis[2].keys, label = v->rank == 3 ? 18 : 0;
    int across = 1;
    while (across < slices && (across + 1) * columns * 3 <= 1200 && across < 6)
        across++;
    const double room = v->rank == 3 ? 1200.0 / across - 12 : 880;
    double cell = room / (columns > rows ? columns : rows);
    cell = cell > 16 ? 16 : cell < 1 ? 1 : (int)(2 * cell) / 2.0;
    const int down = (slices + across - 1) / across;
    const double step_x = columns * cell + 12, step_y = rows * cell + label + 10;
    if (step_x * across > 20000 || step_y * down > 20000)
        return tool_fail(TOOL_USAGE, "%s: %d slices of %d x %d keys are too many for a picture", path, slices, rows,
                         columns);
    struct canvas c;
    canvas_begin(&c, width_for(v, across * step_x), height_for(v, down * step_y));
    draw_title(&c, v);
    for (int i = 0; i < slices; i++) {
        struct plane p = {MARGIN + i % across * step_x, MARGIN + TITLE_HEIGHT + i / across * step_y + label, cell,
                          first + i};
        if (v->rank == 3)
            canvas_words(&c, p.x, p.y - 4, WORDS, INK, CANVAS_LEFT, "slice %d", first + i);
        draw_cells(&c, v, &p);
        draw_tiles(&c, v, &p);
    }
    draw_legend(&c, v, MARGIN, MARGIN + TITLE_HEIGHT + down * step_y + 8);
    int status = canvas_write(&c, path);
    canvas_end(&c);
    return status;
}

/* ---- the matrix of one axis ---- */

/* The cells of one query's row, or the outlines of its tile's key tiles. */
static int draw_row(struct canvas *c, const struct view *v, int query, double y, double cell, bool outlines)
{
    struct view row;
    int status = view_begin(&row, &v->desc, &v->tiles, &query);
    if (status)
        return status;
    const struct plane p = {MARGIN, y, cell, 0};
    for (int x = 0, end; x < row.axis[2].keys && !outlines; x = end) {
        end = run_end(&row, 0, 0, x);
        canvas_box(c, MARGIN + x * cell, y, (end - x) * cell, cell, colours[view_class(&row, (int[3]){0, 0, x})],
                   CANVAS_NONE, 0);
    }
    const nbhd_sim_tile *t = &row.axis[2].tile;
    for (int i = 0; i < t->visited && outlines; i++) {
        int begin, end;
        view_tile_span(&row, 2, i, &begin, &end);
        box_of(c, &p, 0, t->q_end - t->q_begin, begin, end, view_tile_inside(&row, 2, i) ? FULL_COLOUR : MASKED_COLOUR,
               2);
    }
    view_end(&row);
    return TOOL_DONE;
}

static int draw_matrix(const struct view *v, const char *path)
{
    const int queries = v->inverse && v->desc.kv_length[0] ? v->desc.kv_length[0] : v->desc.length[0];
    const int keys = v->axis[2].keys, step = v->inverse ? v->tiles.kv_tile[0] : v->tiles.q_tile[0];
    double cell = 880.0 / (keys > queries ? keys : queries);
    cell = cell > 14 ? 14 : (int)(2 * cell) / 2.0;
    struct canvas c;
    canvas_begin(&c, width_for(v, keys * cell), height_for(v, queries * cell));
    draw_title(&c, v);
    int status = TOOL_DONE;
    const double top = MARGIN + TITLE_HEIGHT;
    for (int q = 0; q < queries && !status; q++)
        status = draw_row(&c, v, q, top + q * cell, cell, false);
    draw_grid(&c, &(struct plane){MARGIN, top, cell, 0}, queries, keys);
    for (int q = 0; q < queries && !status && outlined(v); q += step)
        status = draw_row(&c, v, q, top + q * cell, cell, true);
    canvas_box(&c, MARGIN, top + v->axis[2].query * cell, keys * cell, cell, CANVAS_NONE, TILE_COLOUR, 2);
    draw_legend(&c, v, MARGIN, top + queries * cell + 8);
    if (!status)
        status = canvas_write(&c, path);
    canvas_end(&c);
    return status;
}

int mask_draw(const struct view *v, const char *path)
{
    if (v->rank > 1)
        return draw_planes(v, path);
    if (v->desc.length[0] > MATRIX_MOST || v->desc.kv_length[0] > MATRIX_MOST)
        return tool_fail(TOOL_USAGE, "%s: a picture of one axis is the matrix of queries and keys, at most %d of each",
                         path, MATRIX_MOST);
    return draw_matrix(v, path);
}

/* ---- letters ---- */

void mask_print(const struct view *v)
{
    static const char letters[VIEW_CLASSES] = {'Q', '#', '+', 'o', '.'};
    char line[NBHD_TEXT], counts[NBHD_TEXT];
    int first, slices = slices_of(v, &first);
    describe(v, line, counts);
    puts(line);
    puts(counts);
    for (int slice = first; slice < first + slices; slice++) {
        if (v->rank == 3)
            printf("slice %d\n", slice);
        for (int y = 0; y < v->axis[1].keys; y++)
            for (int x = 0; x < v->axis[2].keys; x++) {
                putchar(letters[view_class(v, (int[3]){slice, y, x})]);
                if (x + 1 == v->axis[2].keys || (v->rank == 1 && x % WRAP == WRAP - 1))
                    putchar('\n');
            }
    }
    for (int i = 0; i < VIEW_CLASSES; i++)
        printf("%s%c %s", i ? ", " : "", letters[i], meanings[v->inverse][i]);
    putchar('\n');
}
