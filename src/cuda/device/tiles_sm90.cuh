/* The query tiles of fwd_sm90: which ones a CTA takes, where they lie, and the tables of a tile that all roles read.
 * NBHD_* as in fwd_sm90.cu. */
#ifndef NBHD_DEVICE_TILES_SM90_CUH
#define NBHD_DEVICE_TILES_SM90_CUH

/* Where a tile lies: its origin in elements of its dilation group, the group, and the group's size. slice: of this
 * launch, selects the maps; shift: what selects dilation group and batch in the maps' coordinates. */
struct place {
    int origin[3], group[3], size[3], shift[3];
    int batch, head, kv_head, slice;
};

/* A box of keys: its origin on the last axis (of extra keys: the first), how many, and NBHD_SM90_* flags. */
struct __align__(16) box {
    int begin, keys, flags;
};

/* One column of the masks, see mask_sm90.cuh. */
#define MASK_COLUMNS (16 * NBHD_MASK_STEPS)
struct column {
    short first, axis;
    int shift;
};

/* Of one tile. */
struct tile {
    int2 any[3], all[NBHD_GROUPS][3]; /* keys that some row of the tile, that all rows of a warpgroup see, per axis */
    struct place place;
    int shape; /* of its key boxes */
    int more;  /* 0: the CTA's last tile */
    struct column column[MASK_COLUMNS + !MASK_COLUMNS];
#if NBHD_MANY
    struct nbhd_view o, lse; /* of its sequence */
#endif
};

/* Beside the tiles in shared memory. [2]: of K, of V. Tile n of the CTA has place[n], slot n % NBHD_TILES with
 * its tables and windows, and Q stage n % NBHD_Q_STAGES. */
struct tables {
    unsigned long long q_full[2], q_empty[2], tile_full[NBHD_TILES], tile_empty[NBHD_TILES];
    unsigned long long full[2][NBHD_STAGES], empty[2][NBHD_STAGES]; /* side by side: FULL_V */
    struct box box[NBHD_STAGES];          /* of each K stage */
    unsigned origin[NBHD_STAGES][MASK_COLUMNS + 2 * !MASK_COLUMNS]; /* of its box, on each column's axis */
    int filled[2][NBHD_STAGES];           /* rows of a stage that may hold something else than zeros */
    unsigned row[Q_ROWS];                 /* as in struct nbhd_boxes */
    float2 finished[Q_ROWS];              /* of the tile before: 1 / sum, logsumexp */
    struct tile tile[NBHD_TILES];
    struct place place[NBHD_SM90_MOST];
    int tiles; /* of this CTA */
    unsigned scratch;
};

NBHD_STATIC_ASSERT(sizeof(struct tables) <=
                       NBHD_FWD_SM90_TABLES(NBHD_GROUPS, NBHD_STAGES, NBHD_TILES, 0, NBHD_MASK_STEPS) +
                           NBHD_MANY * NBHD_SM90_TABLES_MANY(NBHD_TILES),
                   "the host counts on it");

/* ---- sequences of a ragged batch ---- */

#if NBHD_MANY
typedef struct nbhd_boxes_many boxes_argument;

NBHD_FN const struct nbhd_parts *parts_of(const struct nbhd_boxes *b)
{
    return &((const struct nbhd_boxes_many *)b)->parts;
}

/* The last sequence whose first block is not after `work`, which then counts from that block on. */
NBHD_FN int take_sequence(const struct nbhd_boxes *b, int *work)
{
    const struct nbhd_parts *list = parts_of(b);
    int low = 0, high = list->count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (list->part[middle].block <= *work)
            low = middle;
        else
            high = middle;
    }
    *work -= list->part[low].block;
    return low;
}

NBHD_FN struct nbhd_axis axis_of(const struct nbhd_params *p, const struct nbhd_boxes *b, int sequence, int a)
{
    const struct nbhd_part *part = &parts_of(b)->part[sequence];
    struct nbhd_axis axis = p->axis[a];
    axis.length = part->length[a];
    axis.keys = part->keys[a];
    axis.window = part->window[a];
    return axis;
}

NBHD_FN int tiles_of(const struct nbhd_params *p, const struct nbhd_boxes *b, int sequence, int a)
{
    return (nbhd_group_size(axis_of(p, b, sequence, a), 0) + b->q_box[a] - 1) / b->q_box[a];
}

/* One of the views of O and logsumexp, which are the 4th and 5th. */
NBHD_FN struct nbhd_view view_of(const struct nbhd_boxes *b, int sequence, const struct nbhd_view *all, int number)
{
    struct nbhd_view view = *all;
    nbhd_part_view(&parts_of(b)->part[sequence], parts_of(b)->padded, number, &view);
    return view;
}
#else /* the problem is the only sequence */
typedef struct nbhd_boxes boxes_argument;

NBHD_FN int take_sequence(const struct nbhd_boxes *b, int *work) { return 0; }

NBHD_FN struct nbhd_axis axis_of(const struct nbhd_params *p, const struct nbhd_boxes *b, int sequence, int a)
{
    return p->axis[a];
}

NBHD_FN int tiles_of(const struct nbhd_params *p, const struct nbhd_boxes *b, int sequence, int a)
{
    return b->tiles[a];
}
#endif

/* ---- which ---- */

/* The i-th tile of this CTA; -1 if it has fewer. */
NBHD_FN int work_of(const struct nbhd_boxes *b, int i)
{
    int block = blockIdx.x, kind = 0, first = 0;
    for (; kind < NBHD_SM90_RUNS - 1 && block >= b->rounds[kind] * b->resident; kind++) {
        block -= b->rounds[kind] * b->resident;
        first += b->rounds[kind] * b->resident * (NBHD_SM90_MOST >> kind);
    }
    int count = kind < NBHD_SM90_RUNS - 1 ? NBHD_SM90_MOST >> kind : 1;
    if (i >= count)
        return -1;
    first += (block / b->resident * count + i) * b->resident;
    return first + (block % b->resident + i * NBHD_SM90_STEP) % b->resident;
}

/* Takes the lowest digit, which counts to `base`, off x, which is not negative. */
NBHD_FN int take_digit(int *x, int base)
{
    int digit = (unsigned)*x % (unsigned)base;
    *x = (unsigned)*x / (unsigned)base;
    return digit;
}

NBHD_FN struct place place_of(const struct nbhd_params *p, const struct nbhd_boxes *b, int work)
{
    struct place t;
    int sequence = take_sequence(b, &work), count[3];
    for (int a = 0; a < 3; a++)
        count[a] = tiles_of(p, b, sequence, a);
    int tiles = count[0] * count[1] * count[2], x = take_digit(&work, tiles);
    if (b->reverse)
        x = tiles - 1 - x;
    t.head = take_digit(&work, b->head_blocks) * b->pack;
    t.kv_head = p->heads == p->kv_heads ? t.head : t.head / (p->heads / p->kv_heads);
    t.slice = work;
    int slice = b->slice_begin + t.slice;
    t.origin[0] = take_digit(&x, count[0]);
    int strip = x, place = take_digit(&strip, count[2] * b->strip), first = strip * b->strip;
    t.origin[1] = first + take_digit(&place, nbhd_min(b->strip, count[1] - first));
    t.origin[2] = place;
    for (int a = 2; a >= 0; a--) {
        struct nbhd_axis axis = axis_of(p, b, sequence, a);
        t.origin[a] *= b->q_box[a];
        t.group[a] = 0;
        t.size[a] = axis.length;
        if (NBHD_DILATED && axis.dilation > 1) {
            t.group[a] = take_digit(&slice, axis.dilation);
            t.size[a] = nbhd_group_size(axis, t.group[a]);
        }
    }
    t.batch = slice; /* of a ragged batch 0 */
    if (NBHD_MANY)
        t.slice = sequence;
    for (int a = 0; a < 3; a++) /* group or batch: with three axes and a batch, maps are of slices */
        t.shift[a] = b->sliced ? 0 : t.group[a] + (a == 0 ? t.batch : 0);
    return t;
}

/* By one warp: where the CTA's tiles lie, without those that have no queries (a dilation group may have fewer elements
 * than the first). A lane works out one tile: the divisions take long. */
NBHD_FN void find_tiles(const struct nbhd_params *p, const struct nbhd_boxes *b, struct tables *tab)
{
    int lane = threadIdx.x & 31, work = work_of(b, lane), has = 0;
    struct place at;
    if (work >= 0) {
        at = place_of(p, b, work);
        has = at.origin[0] < at.size[0] && at.origin[1] < at.size[1] && at.origin[2] < at.size[2];
    }
    unsigned all = __ballot_sync(~0u, has);
    if (has)
        tab->place[__popc(all & ((1u << lane) - 1))] = at;
    if (lane == 0)
        tab->tiles = __popc(all);
    __syncwarp();
}

NBHD_STATIC_ASSERT(NBHD_SM90_MOST <= 32, "a lane for each tile of a CTA");

/* ---- where ---- */

#include "device/query_tiles_sm90.cuh"

/* Keys seen from each coordinate of the query box, axis after axis, and a place more; behind the tables. */
NBHD_FN int2 *windows_of(const struct nbhd_boxes *b, struct tables *tab, int slot)
{
    return (int2 *)(tab + 1) + slot * (b->q_box[0] + b->q_box[1] + b->q_box[2] + 1);
}

/* Which of a tensor's maps a place is in. */
NBHD_FN int map_of(const struct nbhd_boxes *b, const struct place *at)
{
    return b->sliced || NBHD_MANY ? at->slice : 0;
}

#endif
