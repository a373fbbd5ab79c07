/* What the kernels for large windows will read, asked for while they work. Included by broadcast.inc.h. */

/* Rows that are wanted soon, of a block of keys or of a tile, asked for a little with each call of a microkernel: they
 * come from far away, and a core can wait for a few cache lines only. */
struct rows_ahead {
    const float *const *row[4]; /* `count` rows of each kind, one of each by turns; 16-bit ones, too */
    int kinds, count, bytes[4];
    int at, kind, byte; /* what is asked for next */
    int step;           /* portions to a call */
};

enum { AHEAD_PORTION = 256 }; /* bytes */

V_FN void ask_rows(struct rows_ahead *a)
{
    for (int n = 0; n < a->step && a->at < a->count; n++) {
        const char *row = (const char *)a->row[a->kind][a->at] + a->byte;
        const int bytes = nbhd_min(AHEAD_PORTION, a->bytes[a->kind] - a->byte);
        for (int i = 0; i < bytes; i += 64)
            __builtin_prefetch(row + i, 0, 2);
        a->byte += AHEAD_PORTION;
        if (a->byte < a->bytes[a->kind])
            continue;
        a->byte = 0;
        if (++a->kind == a->kinds) {
            a->kind = 0;
            a->at++;
        }
    }
}

/* As many portions to a call as `beats` calls need for all rows. */
static inline void pace_rows(struct rows_ahead *a, int beats)
{
    int portions = 0;
    for (int i = 0; i < a->kinds; i++)
        portions += a->count * ((a->bytes[i] - 1) / AHEAD_PORTION + 1);
    a->step = (portions + beats - 1) / nbhd_max(1, beats);
}

/* Calls of microkernels that ask, for a strip's products of so many keys. */
static inline int ask_beats(int keys, int columns) { return keys / V_ROWS + columns / V_ROWS; }
