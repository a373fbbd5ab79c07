/* Memory asked for before it is used. What a kernel will read next is listed as rows in the order of memory, and asked
 * for a little at a time while it works: requests in a burst queue up, and a machine fetches neighbours three times
 * faster than lines at random. Into the second-level cache: what a step of work reads would not fit the first. */
#ifndef NBHD_CPU_AHEAD_H
#define NBHD_CPU_AHEAD_H

#include <stdbool.h>
#include <stddef.h>

enum { AHEAD_ROWS = 256, CACHE_LINE = 64 };

/* Lines asked for at once: between pieces of work; or, where work asks in its midst, too, between its pieces and amid
 * them. */
enum { AHEAD_MOST = 28, AHEAD_SOME = 8, AHEAD_FEW = 3 };

struct ahead_row {
    const char *data; /* the first of `count` pieces of so many cache lines, `step` bytes from one to the next */
    long long step;
    const int *token; /* piece i is at token[i] steps; NULL: at i steps */
    int count, lines;
};

struct look_ahead {
    int tile, tiles;        /* of the step during which this is asked for */
    int most, few;          /* lines asked for at once: between pieces of work, amid them */
    int rows, at, piece;    /* at, piece: what is asked for next */
    long long lines, asked; /* of all rows */
    long long due;          /* to be asked for by now; what a step leaves over is not asked for */
    long long begin, pace;  /* of the tile: lines due before it; 65,536 times those due in a beat */
    struct ahead_row row[AHEAD_ROWS];
};

/* amid: work asks in its midst, too. */
static inline void ahead_clear(struct look_ahead *a, int tiles, bool amid)
{
    a->tile = 0;
    a->tiles = tiles;
    a->most = amid ? AHEAD_SOME : AHEAD_MOST;
    a->few = amid ? AHEAD_FEW : 0;
    a->rows = a->at = a->piece = 0;
    a->lines = a->asked = a->due = 0;
}

/* Rows past AHEAD_ROWS are not asked for. Pieces that touch become portions of 4 lines: one by one cost more than they
 * help. */
static inline void ahead_add(struct look_ahead *a, const char *data, long long step, const int *token, int count,
                             int bytes)
{
    if (a->rows == AHEAD_ROWS || count <= 0)
        return;
    struct ahead_row *row = &a->row[a->rows++];
    *row = (struct ahead_row){data, step, token, count, (bytes + CACHE_LINE - 1) / CACHE_LINE};
    if (!token && step == bytes)
        *row = (struct ahead_row){data, 4 * CACHE_LINE, NULL, (int)((step * count - 1) / (4 * CACHE_LINE)) + 1, 4};
    a->lines += (long long)row->count * row->lines;
}

/* Asks until so many lines have been asked for in all. */
static inline void ahead_ask(struct look_ahead *a, long long due)
{
    if (due > a->lines)
        due = a->lines;
    while (a->asked < due) {
        const struct ahead_row *row = &a->row[a->at];
        const char *piece = row->data + (row->token ? row->token[a->piece] : a->piece) * row->step;
        for (int i = 0; i < row->lines; i++)
            __builtin_prefetch(piece + i * CACHE_LINE, 0, 2);
        a->asked += row->lines;
        if (++a->piece == row->count) {
            a->piece = 0;
            a->at++;
        }
    }
}

/* Before a tile of so many beats. */
static inline void ahead_tile(struct look_ahead *a, int beats)
{
    a->begin = a->lines * a->tile / a->tiles;
    a->pace = beats ? a->lines * 65536 / ((long long)a->tiles * beats) : 0;
}

/* So many lines of what is due. */
static inline void ahead_lines(struct look_ahead *a, int lines)
{
    if (a->due > a->asked)
        ahead_ask(a, a->due < a->asked + lines ? a->due : a->asked + lines);
}

/* Some of what is due: a core waits for so few lines at a time that it stands still in longer bursts. */
static inline void ahead_some(struct look_ahead *a)
{
    ahead_lines(a, a->most);
}

/* A piece or two, amid a piece of work. */
static inline void ahead_few(struct look_ahead *a)
{
    ahead_lines(a, a->few);
}

/* Beat number `beat` of the tile's work. */
static inline void ahead_beat(struct look_ahead *a, int beat)
{
    a->due = a->begin + (a->pace * beat >> 16);
    ahead_some(a);
}

#endif
