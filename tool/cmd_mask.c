/* nbhd mask: what a query sees, its tile's union, and the key tiles visited, masked and skipped; drawn or in
 * letters. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "args.h"
#include "lines.h"
#include "mask_draw.h"
#include "sim_args.h"
#include "tool.h"

struct options {
    const char *query, *output;
    struct sim_args tiles;
    int drawn; /* pictures so far */
};

/* "3,5" or "3x5"; the middle of the axes if there is none. */
static int read_query(const char *text, const nbhd_desc *desc, int query[3])
{
    if (!text) {
        for (int i = 0; i < desc->rank; i++)
            query[i] = desc->length[i] / 2;
        return TOOL_DONE;
    }
    int count = 0;
    for (const char *p = text; count < 4; p++) {
        char *end;
        long value = strtol(p, &end, 10);
        if (end == p || value < -1000000000 || value > 1000000000 || count == 3)
            return tool_fail(TOOL_USAGE, "--query is '%s'; it must be one coordinate per axis, such as 3,5", text);
        query[count++] = (int)value;
        p = end;
        if (!*p)
            break;
        if (*p != ',' && *p != 'x')
            return tool_fail(TOOL_USAGE, "--query is '%s'; it must be one coordinate per axis, such as 3,5", text);
    }
    if (count != desc->rank)
        return tool_fail(TOOL_USAGE, "--query has %d coordinate%s for %d ax%s", count, count > 1 ? "s" : "", desc->rank,
                         desc->rank > 1 ? "es" : "is");
    return TOOL_DONE;
}

/* Small tiles, so that a drawing shows several. */
static void default_tile(const nbhd_desc *desc, const int *length, int tile[3])
{
    static const int extents[3][3] = {{8, 0, 0}, {4, 4, 0}, {2, 4, 4}};
    if (tile[0] || tile[1] || tile[2])
        return;
    for (int i = 0; i < desc->rank; i++)
        tile[i] = length[i] && length[i] < extents[desc->rank - 1][i] ? length[i] : extents[desc->rank - 1][i];
}

static int mask_one(const nbhd_desc *desc, const char *line, void *context)
{
    struct options *o = context;
    int query[3] = {0, 0, 0};
    (void)line;
    if (o->output && o->drawn++)
        return tool_fail(TOOL_USAGE, "-o %s: one picture holds one problem, here are more", o->output);
    nbhd_sim_tiles tiles;
    int status = sim_args_one_tiling(&o->tiles);
    if (status || (status = sim_args_tiles(&o->tiles, desc, &tiles)) || (status = read_query(o->query, desc, query)))
        return status;
    if (tiles.tiling == NBHD_SIM_FLAT)
        return tool_fail(TOOL_USAGE, "--flat: such tiles are no boxes, so there is nothing to draw");
    default_tile(desc, desc->length, tiles.q_tile);
    default_tile(desc, desc->kv_length[0] ? desc->kv_length : desc->length, tiles.kv_tile);
    struct view v;
    if ((status = view_begin(&v, desc, &tiles, query)))
        return status;
    if (o->output)
        status = mask_draw(&v, o->output);
    else
        mask_print(&v);
    view_end(&v);
    return status;
}

static int run(int argc, char **argv)
{
    struct options o = {0};
    const struct option table[] = {
        opt_text("query", 'q', &o.query, "I,J,K", "the query's coordinates (the middle)"),
        opt_text("output", 'o', &o.output, "FILE", "a picture, .svg or .png (letters on the terminal)"),
        SIM_TILE_OPTIONS(&o.tiles),
        opt_end(),
    };
    const struct usage usage = {
        .synopsis = "nbhd mask LINE [--query I,J,K] [-o FILE] [OPTIONS]",
        .about = "Draws what one query sees, what its tile of queries sees together, and which key tiles a kernel\n"
                 "visits for it, with and without a mask. One axis: the matrix of queries and keys. Three axes: slice\n"
                 "by slice.\n"
                 "On a bwd line --query is a key, and the picture shows the queries that see it.\n"
                 "Tiles of 8, 4x4 or 2x4x4 tokens unless told otherwise.",
        .options = table,
        .operands_min = 1,
        .operands_max = 1 << 20,
        .operands_name = "a problem line",
    };
    int count;
    int status = args_parse(&usage, argc, argv, &count);
    return status == ARGS_GO_ON ? lines_each(argv, count, mask_one, &o) : status;
}

const struct command cmd_mask = {"mask", "draw what a query sees, and the tiles that a kernel visits", run};
