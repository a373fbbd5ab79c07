/* Forward in bfloat16 with products of pairs, in the tiles of tiles.inc.h: up to 64 queries, one a lane.
 *
 *     S = Q K^T                 sums over pairs of dimensions    float32
 *     P = exp2(f S - reference)                                  rounded to bfloat16
 *     O = O * alpha + P V       sums over pairs of keys          float32
 *
 * A block's keys and values are copied, in the order that the products want. The reference is no exact maximum: it
 * moves only where a score exceeds it by PAIR_SLACK, so that O is rarely rescaled; probabilities of up to 2^PAIR_SLACK
 * lose nothing, as both types have the exponents.
 * A kernel file includes simd_avx512bf16.h, this, and the products: dots.inc.h, or amx_products.inc.h over tiles. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/counters.h"
#include "core/kernel.h"
#include "cpu/cpu.h"
#include "cpu/fwd_plan.h"
#include "cpu/threads.h"

#define LOG2E 1.44269504088896340736f
#define LN2   0.69314718055994530942f
#define V_ALL ((1u << VF) - 1u)

#define PRODUCT_STEP v_pair_step

#include "cpu/rows.inc.h"
#include "cpu/fwd_common.inc.h"
#include "cpu/broadcast.inc.h"

/* The rows of the next block, asked for a few at a time beside the work on this one: they come from far away. */
struct pair_ahead {
    const struct key_block *b; /* count 0: there is none */
    int next, d, columns; /* next key */
    int due, beats; /* times that ask_ahead is called, during which all are asked for */
};

V_FN void ask_ahead(struct pair_ahead *a)
{
    for (a->due += a->b->count; a->due >= a->beats && a->next < a->b->count; a->due -= a->beats, a->next++) {
        for (int c = 0; c < a->d; c += VP)
            __builtin_prefetch((const uint16_t *)(const void *)a->b->k[a->next] + c, 0, 2);
        for (int c = 0; c < a->columns; c += VP)
            __builtin_prefetch((const uint16_t *)(const void *)a->b->v[a->next] + c, 0, 2);
    }
}

/* ---- what a kernel file's products define ---- */

struct pair_slot;
struct pair_scratch;
/* Before and after a thread's tiles. */
static void pair_begin(void);
static void pair_end(void);
/* The rows of a tile's queries as pair_block wants them, zeros in place of those that are not there; what else a tile
 * begins with. */
static void pair_queries(struct pair_slot *x, const struct nbhd_params *p);
/* The tile's outputs; x->sum is then what they were divided by. */
static void pair_outputs(struct pair_slot *x, const struct nbhd_params *p);
/* The rows of a block's keys and values, WALK_KEYS times `d` or `columns`, padded to a multiple of VP. */
static void pair_keys(const struct key_block *b, int d, uint16_t *to);
static void pair_values(const struct key_block *b, int columns, uint16_t *to);
/* How often pair_block of so many keys asks ahead. */
static int pair_beats(const struct pair_slot *x, int keys, const struct nbhd_params *p);
/* n tiles that see the same keys, or are a band, through all of them: run_slots, or a way of its own. */
static void pair_slots(struct pair_slot *slots, int n, const struct nbhd_params *p, const struct nbhd_fwd *f,
                       struct pair_scratch *c);
/* A tile and the block c->b, whose keys and values are c->keys and c->values: O += P V for all its keys. unlike: there
 * is a bias, or lanes do not see all keys. follow: the tile that the same keys are for next, or NULL. */
static void pair_block(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                       struct pair_scratch *c, bool unlike);

#define PAIR_SLACK 8.0f

/* VP values from column c of a row of n; zeros after those, and of a row that is not there. */
V_FN vi pair_load(const void *row, bool there, int c, int n)
{
    return there ? v_pair_load_part((const uint16_t *)row + c, nbhd_min(VP, n - c)) : v_pair_zero();
}

static bool pair_row_is_odd(const uint16_t *row, int n)
{
    bool odd = false;
    for (int i = 0; i < n; i += VP)
        odd |= v_pair_is_odd(v_pair_load_part(row + i, nbhd_min(VP, n - i)));
    return odd;
}

/* As take_odd_values of fwd_broadcast.inc.h: values that are not finite, of keys that some lane does not see, leave
 * the block's product, to be added to the lanes that do. */
static int pair_odd_values(struct key_block *b, uint64_t everyone, int columns, const float *zeros, int odd[WALK_KEYS],
                           const uint16_t *odd_row[WALK_KEYS])
{
    int n = 0;
    for (int i = 0; i < b->count; i++) {
        const uint16_t *row = (const uint16_t *)(const void *)b->v[i];
        if (b->bits[i] == everyone || !pair_row_is_odd(row, columns))
            continue;
        odd[n] = i;
        odd_row[n++] = row;
        b->v[i] = zeros;
    }
    return n;
}

/* ---- tiles ---- */

/* A tile on its way through its keys. Up to FWD_TILES tiles go through them together, so that a block is copied once
 * for all: those that see the same keys, as in standard attention or where a stride gives them one window, and bands
 * (take_tiles). */
struct pair_slot {
    struct tile tile;
    struct key_walk walk;
    bool whole; /* all its lanes see the same keys */
    uint32_t *qt;
    float *ot, *reference, *sum, *alpha;
    bool fresh; /* tiles: ot is not there yet */
    int turn;   /* tiles: which of two copies of the sums is the present one */
};

static void slot_begin(struct pair_slot *x, const struct nbhd_params *p)
{
    for (int i = 0; i < FWD_LANES; i++) {
        x->reference[i] = -FLT_MAX;
        x->sum[i] = 0.0f;
    }
    pair_queries(x, p);
    x->walk = walk_begin(p, &x->tile);
    x->whole = !p->bias && sees_alike(&x->tile);
}

static void slot_end(struct pair_slot *x, const struct nbhd_params *p)
{
    char *rows[FWD_LANES];
    pair_outputs(x, p);
    if (!p->lse.data)
        return;
    lane_rows(&x->tile, &p->lse, rows);
    store_lse(rows, x->tile.lanes, x->tile.vectors, x->reference, x->sum);
}

struct pair_scratch {
    float *s;
    const float *zeros;
    uint16_t *keys, *values;
    struct key_block *b;      /* at hand, as the tile sees it */
    struct key_block *blocks; /* at hand, next; then one for each other tile */
    bool packed; /* values are those of the block, all of them */
    bool scored; /* the scores of the block's first keys are there already; `ring` says where */
    int ring;
    int odds, odd[WALK_KEYS]; /* keys whose values are not in c->values: pair_odd_values */
    const uint16_t *odd_row[WALK_KEYS];
    struct pair_ahead ahead;
    /* Tiles. */
    const uint16_t *k[FWD_GROUPS], *v[FWD_GROUPS]; /* each group of keys, as copied */
    const uint32_t *seen[FWD_GROUPS]; /* which of the group's keys lanes see, a bit a key; NULL: all see all */
    uint16_t *units;
    struct unit_cache *unit_state; /* of `units`, once there is a sequence */
    int sequence[5]; /* whose units these are: batch entry, head, and group of each axis; -1: nobody's */
};

static void slot_block(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                       struct pair_scratch *c)
{
    struct key_block *b = c->b;
    const int dv = p->head_dim_v;
    const bool masked = b->masked && !x->whole;
    c->odds = masked ? pair_odd_values(b, x->tile.everyone, dv, c->zeros, c->odd, c->odd_row) : 0;
    if (!c->packed || c->odds)
        pair_values(b, dv, c->values);
    c->packed = c->odds == 0;
    pair_block(x, follow, p, c, p->bias || masked);
    for (int i = 0; i < c->odds; i++)
        b->v[c->odd[i]] = (const float *)(const void *)c->odd_row[i];
}

/* The keys of the block that slots[0] has are those of the next block of this slot too, seen by its lanes. */
static struct key_block *slot_keys(struct pair_slot *x, const struct nbhd_params *p, struct key_block *first,
                                   struct key_block *own)
{
    if (!x->whole) {
        walk_block(p, &x->tile, &x->walk, own);
        return own;
    }
    if (nbhd_counters)
        nbhd_count_visits(first->count - first->extra, 0);
    return first;
}

/* A block, packed once, for those of n tiles that see some of its keys: all, or if the tiles are a band maybe none. */
static void slots_block(struct pair_slot *slots, int n, const struct nbhd_params *p, struct pair_scratch *c,
                        struct key_block *now)
{
    struct pair_slot *slot[FWD_TILES + 1];
    struct key_block *keys[FWD_TILES];
    int seeing = 0;
    for (int i = 0; i < n; i++) {
        slot[seeing] = &slots[i];
        keys[seeing] = i ? slot_keys(&slots[i], p, now, c->blocks + 1 + i) : now;
        seeing += keys[seeing]->seen != 0;
    }
    slot[seeing] = NULL;
    pair_keys(now, p->head_dim, c->keys);
    c->packed = false;
    for (int i = 0; i < seeing; i++) {
        c->b = keys[i];
        slot_block(slot[i], slot[i + 1], p, c);
    }
}

static void run_slots(struct pair_slot *slots, int n, const struct nbhd_params *p, struct pair_scratch *c)
{
    for (int i = 0; i < n; i++)
        slot_begin(&slots[i], p);
    struct key_block *now = c->blocks, *next = c->blocks + 1;
    bool more = walk_block(p, &slots[0].tile, &slots[0].walk, now);
    while (more) {
        more = walk_block(p, &slots[0].tile, &slots[0].walk, next);
        const int beats = n * pair_beats(&slots[0], now->count, p);
        c->ahead = (struct pair_ahead){.b = next, .d = p->head_dim, .columns = p->head_dim_v, .beats = beats};
        slots_block(slots, n, p, c, now);
        struct key_block *swap = now;
        now = next;
        next = swap;
    }
    for (int i = 0; i < n; i++)
        slot_end(&slots[i], p);
}

struct pair_call {
    const struct nbhd_params *params;
    const struct nbhd_fwd *fwd;
    char *workspace;
};

static void pair_task(void *context, long long task, int thread)
{
    const struct pair_call *call = context;
    const struct nbhd_params *p = call->params;
    const struct nbhd_fwd *f = call->fwd;
    const struct nbhd_fwd_part *part = f->part;
    for (; task >= part->tasks; part++)
        task -= part->tasks;
    const long long begin = part->begin + task * part->run, rest = part->end - begin;
    const long long end = begin + (rest < part->run ? rest : part->run);
    char *scratch = call->workspace + (size_t)thread * f->scratch;
    struct pair_scratch c = {.s = (float *)(void *)(scratch + f->at_s),
                             .zeros = (float *)(void *)(scratch + f->at_zeros),
                             .keys = (uint16_t *)(void *)(scratch + f->at_keys),
                             .values = (uint16_t *)(void *)(scratch + f->at_values),
                             .units = (uint16_t *)(void *)(scratch + f->at_units),
                             .unit_state = (struct unit_cache *)(void *)(scratch + f->at_unit_state),
                             .sequence = {-1},
                             .blocks = (struct key_block *)(void *)(scratch + f->at_block)};
    memset(scratch + f->at_zeros, 0, (size_t)p->head_dim_v * sizeof(float));
    struct pair_slot slots[FWD_TILES];
    struct tile *tiles[FWD_TILES];
    for (int i = 0; i < FWD_TILES; i++) {
        slots[i].qt = (uint32_t *)(void *)(scratch + f->at_q + (size_t)i * f->q_size);
        slots[i].ot = (float *)(void *)(scratch + f->at_o + (size_t)i * f->o_size);
        slots[i].reference = (float *)(void *)(scratch + f->at_lanes) + 3 * FWD_LANES * i;
        slots[i].sum = slots[i].reference + FWD_LANES;
        slots[i].alpha = slots[i].sum + FWD_LANES;
        tiles[i] = &slots[i].tile;
    }
    const unsigned state = v_flush_begin();
    pair_begin();
    int n;
    for (long long i = begin; i < end; i += n) {
        n = take_tiles(tiles, FWD_TILES, p, f, i, end);
        pair_slots(slots, n, p, f, &c);
    }
    pair_end();
    v_flush_end(state);
}

static nbhd_status pair_run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace,
                            void *stream)
{
    const struct nbhd_fwd *fwd = plan->state;
    struct pair_call call = {params, fwd, workspace};
    (void)stream;
    nbhd_parallel(fwd->threads, fwd->tasks, pair_task, &call);
    return NBHD_OK;
}
