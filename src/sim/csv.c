/* Measurements from a table of comma-separated values, as `nbhd bench --csv` writes it: columns by the names in the
 * first row, in any order, others ignored; empty lines and lines that begin with # are skipped. */
#include <stdlib.h>
#include <string.h>
#include "sim/sim.h"

enum column {
    LINE, MS, MS_MEDIAN, MS_MIN, TILING, Q_TILE, KV_TILE, WARPGROUPS, Q_ROWS, KV_ROWS, RESIDENT, MASK_STEPS, COLUMNS
};
static const char *const column_names[COLUMNS] = {
    "line",    "ms",         "ms_median", "ms_min",  "tiling",   "q_tile",
    "kv_tile", "warpgroups", "q_rows",    "kv_rows", "resident", "mask_steps",
};

struct span {
    const char *at;
    size_t length;
};

/* The next cell of [*at, end): quotes around it are dropped; *at moves behind its comma, or to NULL after the last. */
static struct span next_cell(const char **at, const char *end)
{
    const char *p = *at;
    bool quoted = p < end && *p == '"';
    p += quoted;
    const char *stop = memchr(p, quoted ? '"' : ',', (size_t)(end - p));
    struct span cell = {p, (size_t)((stop ? stop : end) - p)};
    const char *comma = quoted && stop ? memchr(stop, ',', (size_t)(end - stop)) : stop;
    *at = comma && *comma == ',' ? comma + 1 : NULL;
    while (cell.length && (*cell.at == ' ' || *cell.at == '\t'))
        cell.at++, cell.length--;
    while (cell.length && strchr(" \t\r", cell.at[cell.length - 1]))
        cell.length--;
    return cell;
}

static void copy_cell(struct span cell, char *text, size_t room)
{
    size_t length = cell.length < room - 1 ? cell.length : room - 1;
    if (length) /* a cell that is not there has no address */
        memcpy(text, cell.at, length);
    text[length] = '\0';
}

/* "2x8x8"; false if it is no such thing. */
static bool read_extents(struct span cell, int extent[3])
{
    char text[64], *p = text;
    copy_cell(cell, text, sizeof text);
    for (int i = 0; i < 3; i++, p++) {
        char *end;
        long value = strtol(p, &end, 10);
        if (end == p || value < 1 || value > 1 << 20)
            return false;
        extent[i] = (int)value;
        p = end;
        if (*p != 'x')
            return *p == '\0';
    }
    return false;
}

static bool read_tiling(struct span cell, int *tiling)
{
    char text[32];
    copy_cell(cell, text, sizeof text);
    for (*tiling = 0; *tiling < NBHD_SIM_TILINGS; ++*tiling)
        if (!strcmp(nbhd_sim_tiling_name(*tiling), text))
            return true;
    return false;
}

/* Which column of the table is which: map[i] is the enum column of the i-th cell, or COLUMNS. */
enum { MOST_CELLS = 64 };

static int read_header(const char *at, const char *end, enum column map[MOST_CELLS])
{
    int cells = 0;
    while (at && cells < MOST_CELLS) {
        char name[32];
        copy_cell(next_cell(&at, end), name, sizeof name);
        map[cells] = COLUMNS;
        for (int i = 0; i < COLUMNS; i++)
            if (!strcmp(name, column_names[i]))
                map[cells] = (enum column)i;
        cells++;
    }
    return cells;
}

static bool has(const enum column *map, int cells, enum column wanted)
{
    for (int i = 0; i < cells; i++)
        if (map[i] == wanted)
            return true;
    return false;
}

static nbhd_status read_row(const char *at, const char *end, const enum column *map, int cells, int row,
                            nbhd_sim_sample *sample)
{
    struct span value[COLUMNS] = {{0}};
    for (int i = 0; at && i < cells; i++) {
        struct span cell = next_cell(&at, end);
        if (map[i] != COLUMNS)
            value[map[i]] = cell;
    }
    char text[NBHD_TEXT];
    copy_cell(value[LINE], text, sizeof text);
    *sample = (nbhd_sim_sample){.tiles = {.size = sizeof(nbhd_sim_tiles), .tiling = NBHD_SIM_DYNAMIC}};
    nbhd_status status = nbhd_desc_parse(&sample->desc, text);
    if (status)
        return nbhd_fail(status, "row %d: %s", row, nbhd_last_error());
    const struct span ms = value[MS].length ? value[MS] : value[MS_MEDIAN].length ? value[MS_MEDIAN] : value[MS_MIN];
    copy_cell(ms, text, sizeof text);
    const char *stop;
    sample->ms = nbhd_read_number(text, &stop);
    if (stop == text || *stop || !(sample->ms > 0))
        return nbhd_fail(NBHD_ERROR_INVALID, "row %d: '%s' is no time in milliseconds", row, text);
    if (value[TILING].length && !read_tiling(value[TILING], &sample->tiles.tiling))
        return nbhd_fail(NBHD_ERROR_INVALID, "row %d: the tiling is not static, dynamic, permuted or flat", row);
    if ((value[Q_TILE].length && !read_extents(value[Q_TILE], sample->tiles.q_tile)) ||
        (value[KV_TILE].length && !read_extents(value[KV_TILE], sample->tiles.kv_tile)))
        return nbhd_fail(NBHD_ERROR_INVALID, "row %d: q_tile and kv_tile are extents such as 2x8x8", row);
    nbhd_sim_tiles *t = &sample->tiles;
    int *const numbers[] = {&t->warpgroups, &t->q_rows, &t->kv_rows, &t->resident, &t->mask_steps};
    for (int i = 0; i < 5; i++) {
        copy_cell(value[WARPGROUPS + i], text, sizeof text);
        *numbers[i] = *text ? atoi(text) : i == 0;
    }
    return NBHD_OK;
}

nbhd_status nbhd_sim_samples_parse(const char *text, nbhd_sim_sample *samples, int room, int *count)
{
    enum column map[MOST_CELLS];
    int cells = 0, row = 0;
    *count = 0;
    while (*text) {
        const char *stop = strchr(text, '\n'), *end = stop ? stop : text + strlen(text), *at = text;
        text = stop ? stop + 1 : end;
        row++;
        while (at < end && strchr(" \t\r", *at))
            at++;
        if (at == end || *at == '#')
            continue;
        if (!cells) {
            cells = read_header(at, end, map);
            if (!has(map, cells, LINE) ||
                (!has(map, cells, MS) && !has(map, cells, MS_MEDIAN) && !has(map, cells, MS_MIN)))
                return nbhd_fail(NBHD_ERROR_INVALID, "row %d: the column names lack line, or ms, ms_median or ms_min",
                                 row);
            continue;
        }
        if (*count == room)
            return nbhd_fail(NBHD_ERROR_INVALID, "row %d: more than %d measurements", row, room);
        nbhd_status status = read_row(at, end, map, cells, row, &samples[*count]);
        if (status)
            return status;
        ++*count;
    }
    if (!*count)
        return nbhd_fail(NBHD_ERROR_INVALID, "the table has no row of measurements below a row of column names");
    return NBHD_OK;
}
