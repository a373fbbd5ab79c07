/* What the forward and the backward for small windows share. Lanes are VF queries along axis 2 whose windows begin at
 * different keys; a permute gives each lane its own.
 *
 * Rows of keys are transposed into lines, line[d][position]. Positions count the tokens of axis 2 with the dilation
 * groups one after another, for queries as for keys; so a group's keys are adjacent whatever the dilation, and VF
 * queries may straddle groups. Per key row, d and column j of the window:
 *
 *     table   = line[d][base + j .. base + j + 2 VF)     base: where the first lane's window begins
 *     S[j][r] += X[d][r] * table[start[lane]]            for the rows r that see the key row, 1 to FWD_ROWS of them
 *
 * Borders, stride and dilation are in start[] and cost nothing. */

enum { ROW_WIDTH = FWD_ROWS * VF };

/* ---- positions: the elements of axis 2, all dilation groups laid end to end ---- */

struct position {
    int group, element, size;
};

static struct position position_of(struct nbhd_axis a, int i)
{
    const int size = nbhd_group_size(a, 0), longs = a.length - (size - 1) * a.dilation;
    if (i < longs * size)
        return (struct position){i / size, i % size, size};
    i -= longs * size;
    return (struct position){longs + i / (size - 1), i % (size - 1), size - 1};
}

static void position_next(struct nbhd_axis a, struct position *x)
{
    if (++x->element == x->size) {
        x->element = 0;
        x->size = nbhd_group_size(a, ++x->group);
    }
}

/* Elements before and after a group's that have key positions too: those that windows wrap around to. */
static struct nbhd_range beyond(struct nbhd_axis a)
{
    if (a.edge != NBHD_EDGE_PERIODIC)
        return nbhd_range_of(0, 0);
    return nbhd_range_of(-(a.window / 2), a.window - 1 - a.window / 2);
}

/* The key position of an element of the group of x, which is query position i. */
static int key_position(struct nbhd_axis a, struct position x, int i, int element)
{
    const struct nbhd_range more = beyond(a);
    return i - x.element + x.group * (more.end - more.begin) - more.begin + element;
}

/* Key positions that the queries see; their tokens go to token[]. */
static struct nbhd_range find_keys(struct nbhd_axis a, struct nbhd_range queries, int *token)
{
    const struct position first = position_of(a, queries.begin), last = position_of(a, queries.end - 1);
    const struct nbhd_range keys = nbhd_keys(a, first.size, first.element), more = beyond(a);
    const int begin = key_position(a, first, queries.begin, keys.begin);
    const int end = key_position(a, last, queries.end - 1, nbhd_keys(a, last.size, last.element).end);
    struct position x = {first.group, keys.begin, first.size};
    for (int i = 0; i < end - begin; i++) {
        token[i] = x.group + nbhd_wrap(a, x.size, x.element) * a.dilation;
        if (++x.element == x.size + more.end && i + 1 < end - begin)
            x = (struct position){x.group + 1, more.begin, nbhd_group_size(a, x.group + 1)};
    }
    return nbhd_range_of(begin, end);
}

/* Tokens of an axis without dilation that the queries see, but those that they wrap around to. */
static struct nbhd_range near_keys(struct nbhd_axis a, struct nbhd_range queries)
{
    const struct nbhd_range any = nbhd_tile_any(a, a.length, queries);
    return nbhd_range_of(nbhd_max(any.begin, 0), nbhd_min(any.end, a.length));
}

/* ---- blocks of lanes ---- */

/* How V_OUT_LANES lanes see keys: all the same; each from the key on after the one where the lane before begins, values
 * one column apart; or otherwise, or some fewer than others. */
enum { V_OUT_LANES = 4, LANES_MIXED = 0, LANES_ALIKE, LANES_STRAIGHT };

/* VF queries along axis 2. Lanes past `lanes` repeat another, and nothing that differs is stored of them. Where lanes
 * fill half a vector at most, two rows of queries can share one: the upper half repeats the lower. Positions of keys
 * are less the first that the task at hand sees. */
struct lane_block {
    int lanes;
    int shared;     /* 1: a vector is of two rows of queries, else 0 */
    int base;       /* position of lane 0's first key */
    bool ragged;    /* some windows have fewer keys than others */
    bool straight;  /* each window begins one position after the previous lane's */
    bool near;      /* all windows begin at most VF - 1 positions after the first */
    bool even_bias; /* all lanes have the same relative positions */
    int start[VF];  /* position of the first key, less base */
    int count[VF];  /* keys */
    int query[VF];  /* token of the query */
    int key[VF];    /* position of the first key */
    int token[VF];  /* its token */
    int seam[VF];   /* keys from there on that lie one after the other; */
    int circle[VF]; /* those past them, so many tokens before where they would follow */
    int bias[VF];   /* column of the bias table for j = 0 */
    char group[VF / V_OUT_LANES]; /* LANES_ of each so many lanes; MIXED where not all are lanes */
};

/* The lane at x, query position i. */
static void set_lane(struct nbhd_axis a, struct lane_block *b, int l, struct position x, int i, int first_key)
{
    const struct nbhd_range keys = nbhd_keys(a, x.size, x.element);
    b->key[l] = key_position(a, x, i, keys.begin) - first_key;
    b->start[l] = b->key[l] - b->key[0];
    b->count[l] = keys.end - keys.begin;
    b->query[l] = x.group + x.element * a.dilation;
    b->token[l] = x.group + nbhd_wrap(a, x.size, keys.begin) * a.dilation;
    b->seam[l] = nbhd_together(a, x.size, keys.begin, keys.end);
    b->circle[l] = x.size * a.dilation;
    b->bias[l] = keys.begin - x.element + a.window - 1;
    b->ragged |= b->count[l] != a.window;
    b->straight &= b->start[l] == l;
    b->near &= b->start[l] < VF;
    b->even_bias &= b->bias[l] == b->bias[0];
}

static void repeat_lane(struct lane_block *b, int from, int to)
{
    b->key[to] = b->key[from], b->start[to] = b->start[from], b->count[to] = b->count[from];
    b->query[to] = b->query[from], b->token[to] = b->token[from], b->bias[to] = b->bias[from];
    b->seam[to] = b->seam[from], b->circle[to] = b->circle[from];
}

/* The second row's lanes; its relative positions on axis 1 are less by one. */
static void share_lanes(struct nbhd_axis a, struct lane_block *b)
{
    for (int l = 0; l < VF / 2; l++) {
        repeat_lane(b, l, l + VF / 2);
        b->bias[l + VF / 2] -= 2 * a.window - 1;
    }
    b->shared = 1;
    b->straight = b->even_bias = false;
}

static void group_lanes(struct nbhd_axis a, struct lane_block *b)
{
    const int rim = V_OUT_LANES - 1;
    for (int first = 0; first + rim < b->lanes; first += V_OUT_LANES) {
        bool alike = true, straight = a.window >= rim;
        for (int l = first; l <= first + rim; l++) {
            const int after = l - first;
            alike &= b->count[l] == a.window && b->key[l] == b->key[first] && b->token[l] == b->token[first];
            straight &= b->count[l] == a.window && b->key[l] == b->key[first] + after &&
                        b->token[l] == b->token[first] + after * a.dilation;
        }
        b->group[first / V_OUT_LANES] = alike ? LANES_ALIKE : straight ? LANES_STRAIGHT : LANES_MIXED;
    }
}

/* Blocks for the queries; returns how many. share: rows share vectors where they can. */
static int make_blocks(struct nbhd_axis a, struct nbhd_range queries, int first_key, bool share,
                       struct lane_block *block)
{
    struct position x = position_of(a, queries.begin);
    struct lane_block *b = block;
    for (int i = queries.begin; i < queries.end; b++) {
        *b = (struct lane_block){.lanes = nbhd_min(queries.end - i, VF)};
        b->straight = b->near = b->even_bias = true;
        for (int l = 0; l < b->lanes; l++, i++) {
            set_lane(a, b, l, x, i, first_key);
            if (i + 1 < queries.end)
                position_next(a, &x);
        }
        for (int l = b->lanes; l < VF; l++)
            repeat_lane(b, b->lanes - 1, l);
        b->base = b->key[0];
        group_lanes(a, b);
        if (share && b->lanes <= VF / 2)
            share_lanes(a, b);
    }
    return (int)(b - block);
}

/* ---- lines ---- */

/* Lines stay in a ring of slots for each kv head of a group; which row of keys a slot holds is its tag: elements of
 * axis 0 and 1, unwrapped, for a ring holds any that follow each other. */
#define NO_LINE LLONG_MIN

static long long tag_of(const int e[2]) { return e[0] * (1ll << 32) + e[1]; }

static long long ring_slot(const int ring[2], int member, const int e[2])
{
    const int slot[2] = {e[0] - nbhd_image(ring[0], e[0]), e[1] - nbhd_image(ring[1], e[1])};
    return ((long long)member * ring[0] + slot[0]) * ring[1] + slot[1];
}

/* line[i][key] = element i < d of the key's row; token 0's at `row`. Keys past the last repeat it, never looked up. */
static void pack_line(const char *row, long long step, const int *token, int keys, int dtype, int d, float *line,
                      int line_step)
{
    for (int i = 0; i < keys; i += VF) {
        const char *rows[VF];
        for (int l = 0; l < VF; l++)
            rows[l] = row + token[nbhd_min(i + l, keys - 1)] * step;
        pack_vector(line + i, line_step, rows, dtype, VF, d, false);
    }
}

/* How lanes get their keys of a column: straight, each its neighbour's next one, by a load; near, all among the next VF
 * positions, by a load and a permute; far, by a permute of two loads, which all columns share. */
enum look_up { LOOK_STRAIGHT, LOOK_NEAR, LOOK_FAR };

/* p, as an address of which the compiler knows nothing: what is loaded there takes no register from one use to the
 * next. */
V_FN const int *not_kept(const int *p)
{
    __asm__("" : "+r"(p));
    return p;
}

/* s[columns][rows] = sum over i < d of xt[i][rows] * line[i][start[lane] + column] */
V_FN void look_up_micro(const float *xt, const float *line, int line_step, const int *start, int d, float *s,
                        const int rows, const int columns, const enum look_up how)
{
    const bool keep_rows = V_FAST_LOOKUP || rows <= columns; /* in registers; else keys, and each row in turn */
    vf acc[V_COLUMNS][FWD_ROWS];
    vi index[V_COLUMNS];
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++) {
        index[j] = v_imin(v_iadd(v_iload(start), v_iset1(j)), v_iset1(2 * VF - 1));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            acc[j][r] = v_zero();
    }
    for (int i = 0; i < d; i++, xt += ROW_WIDTH, line += line_step) {
        vf low = v_zero(), high = v_zero(), x[FWD_ROWS], key[V_COLUMNS];
        if (how == LOOK_FAR) {
            low = v_keep(v_load(line));
            high = v_keep(v_load(line + VF));
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows && keep_rows; r++)
            x[r] = v_keep(v_load(xt + r * VF));
#pragma GCC unroll 8
        for (int j = 0; j < columns; j++) {
            key[j] = how == LOOK_FAR ? v_lookup(low, high, index[j]) : v_keep(v_load(line + j));
            if (how == LOOK_NEAR)
                key[j] = v_permute(key[j], v_iload(not_kept(start)));
#pragma GCC unroll 4
            for (int r = 0; r < rows && keep_rows; r++)
                acc[j][r] = v_fma(x[r], key[j], acc[j][r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows && !keep_rows; r++) {
            const vf one = v_keep(v_load(xt + r * VF));
#pragma GCC unroll 8
            for (int j = 0; j < columns; j++)
                acc[j][r] = v_fma(one, key[j], acc[j][r]);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            v_store(s + j * ROW_WIDTH + r * VF, acc[j][r]);
}

/* Columns that a product of so many rows takes at once: of what accumulators there are, some make room for a slow
 * table. */
V_FN int look_up_most(int rows, enum look_up how)
{
    const int room = V_ROWS * V_STRIP;
    return nbhd_min(V_COLUMNS, (how == LOOK_FAR && !V_FAST_LOOKUP ? room * 2 / 3 : room) / rows);
}

V_FN void look_up_columns(const float *xt, const float *line, int line_step, const int *start, int d, float *s,
                          const int rows, int columns, const enum look_up how)
{
    const int most = look_up_most(rows, how); /* the compiler leaves out cases that it does not allow */
    switch (columns <= most ? columns : 0) {
    case 1: look_up_micro(xt, line, line_step, start, d, s, rows, 1, how); return;
    case 2: look_up_micro(xt, line, line_step, start, d, s, rows, 2, how); return;
#if V_COLUMNS > 2
    case 3: look_up_micro(xt, line, line_step, start, d, s, rows, 3, how); return;
    case 4: look_up_micro(xt, line, line_step, start, d, s, rows, 4, how); return;
    case 5: look_up_micro(xt, line, line_step, start, d, s, rows, 5, how); return;
    case 6: look_up_micro(xt, line, line_step, start, d, s, rows, 6, how); return;
#endif
#if V_COLUMNS > 6
    case 7: look_up_micro(xt, line, line_step, start, d, s, rows, 7, how); return;
    case 8: look_up_micro(xt, line, line_step, start, d, s, rows, 8, how); return;
#endif
    default: return;
    }
}

V_FN void look_up_rows(const float *xt, const float *line, int line_step, const int *start, int d, float *s, int rows,
                       int columns, const enum look_up how)
{
    switch (rows) {
    case 1: look_up_columns(xt, line, line_step, start, d, s, 1, columns, how); return;
    case 2: look_up_columns(xt, line, line_step, start, d, s, 2, columns, how); return;
    case 3: look_up_columns(xt, line, line_step, start, d, s, 3, columns, how); return;
    default: look_up_columns(xt, line, line_step, start, d, s, 4, columns, how); return;
    }
}

/* s[columns][rows] for all columns of a window; a table of two vectors serves `most` of them at a time. line: of the
 * task's first key. */
static void look_up_product(const struct lane_block *b, const float *xt, const float *line, int line_step, int d,
                            float *s, int rows, int columns, int most)
{
    const enum look_up how = V_FAST_LOOKUP ? LOOK_FAR : b->straight ? LOOK_STRAIGHT : b->near ? LOOK_NEAR : LOOK_FAR;
    const int room = nbhd_min(how == LOOK_FAR ? most : columns, look_up_most(rows, how));
    const int parts = (columns + room - 1) / room;
    line += b->base;
    for (int part = 0; part < parts; part++) {
        const int j = columns * part / parts, n = columns * (part + 1) / parts - j;
        float *to = s + j * ROW_WIDTH;
        if (how == LOOK_FAR)
            look_up_rows(xt, line + j, line_step, b->start, d, to, rows, n, LOOK_FAR);
        else if (how == LOOK_STRAIGHT)
            look_up_rows(xt, line + j, line_step, b->start, d, to, rows, n, LOOK_STRAIGHT);
        else
            look_up_rows(xt, line + j, line_step, b->start, d, to, rows, n, LOOK_NEAR);
    }
}
