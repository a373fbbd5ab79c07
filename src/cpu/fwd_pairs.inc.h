/* Forward in bfloat16 with products of pairs, in the tiles of broadcast.inc.h: lanes are queries, as there.
 *
 *     S[key][64]      = sum over pairs of dimensions of Q[pair][64] * K[key][pair]       float32
 *     P[key pair][64] = exp2(f S - reference)                                            rounded to bfloat16
 *     O[column][64]   = O * alpha + sum over pairs of keys of P[pair][64] * V[pair][column]
 *
 * A block's keys and values are copied: keys as they are, values in the order that the product wants. The reference is
 * no exact maximum: it moves only where a score exceeds it by PAIR_SLACK, so that O is rarely rescaled; probabilities
 * of up to 2^PAIR_SLACK lose nothing, as both types have the exponents.
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

/* ---- what a kernel file's products define ----
 * Rows of lanes are FWD_LANES apart, others padded to a multiple of VP. */

/* Before and after a thread's tiles. */
static void pair_begin(void);
static void pair_end(void);
struct pair_slot;
struct pair_scratch;
/* The rows of a block's values as pair_block wants them: WALK_KEYS times `columns`, padded. */
static void pair_values(const struct key_block *b, int columns, uint16_t *to);
/* A tile and the block c->b, whose keys and values are c->keys and c->values: scores, scores_finish where `unlike`,
 * softmax, and ot[column][lane] += probabilities times values. follow: the tile that the same keys are for next, or
 * NULL. */
static void pair_block(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                       struct pair_scratch *c, bool unlike);

#define PAIR_SLACK 8.0f

/* qt[pair][lane], zeros in lanes that no query has, up to an even number of vectors, and in dimensions from d up to a
 * multiple of VP. */
static void pack_query_pairs(uint32_t *qt, const char *const *rows, int lanes, int vectors, int d, bool negate)
{
    for (int v = 0; v < vectors + vectors % 2; v++)
        for (int i = 0; i < d; i += VP) {
            vi x[VF];
            for (int l = 0; l < VF; l++) {
                const int lane = v * VF + l;
                x[l] = v_pair_zero();
                if (lane < lanes)
                    x[l] = v_pair_load_part((const uint16_t *)(const void *)rows[lane] + i, nbhd_min(VP, d - i));
                if (negate)
                    x[l] = v_pair_negate(x[l]);
            }
            v_pair_transpose(x);
            for (int j = 0; j < VF; j++)
                v_pair_store(qt + (i / 2 + j) * FWD_LANES + v * VF, x[j]);
        }
}

/* to[key][dimension], zeros from d up to a multiple of VP. */
static void pack_key_pairs(const struct key_block *b, int d, uint16_t *to)
{
    for (int i = 0; i < b->count; i++)
        for (int c = 0; c < d; c += VP, to += VP)
            v_pair_store((uint32_t *)(void *)to,
                         v_pair_load_part((const uint16_t *)(const void *)b->k[i] + c, nbhd_min(VP, d - c)));
}

static bool pair_row_is_odd(const uint16_t *row, int n)
{
    bool odd = false;
    for (int i = 0; i < n; i += VP)
        odd |= v_pair_is_odd(v_pair_load_part(row + i, nbhd_min(VP, n - i)));
    return odd;
}

/* As block_odd_values of fwd_broadcast.inc.h: values that are not finite, of keys that some lane does not see, leave
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

static void add_odd_pair(float *ot, const uint32_t *p, int key, const uint16_t *row, int columns, uint64_t bits)
{
    for (int lane = 0; lane < FWD_LANES; lane++)
        for (int c = 0; c < columns && (bits >> lane & 1); c++) {
            const uint16_t weight = (uint16_t)(p[key / 2 * FWD_LANES + lane] >> key % 2 * 16);
            ot[c * FWD_LANES + lane] += nbhd_from_bf16(weight) * nbhd_from_bf16(row[c]);
        }
}

/* ---- softmax ---- */

/* Scores s[key][lane] become pairs of probabilities p[key / 2][lane], which may be the same memory. One pair of keys at
 * a time, so that it can be done beside products. */
struct pair_softmax {
    const float *s;
    uint32_t *p;
    int next; /* key */
    vf factor, m[V_STRIP], l[V_STRIP], top[V_STRIP];
};

/* With the reference as it is; softmax_exceeds tells afterwards whether it will do. */
V_FN void softmax_begin(struct pair_softmax *x, const float *s, uint32_t *p, float factor, const float *reference,
                        const float *sum, const int nv)
{
    x->s = s;
    x->p = p;
    x->next = 0;
    x->factor = v_set1(factor);
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) {
        x->m[v] = v_load(reference + v * VF);
        x->l[v] = v_load(sum + v * VF);
        x->top[v] = v_set1(-INFINITY);
    }
}

/* Of the next pair of keys, vectors v .. v + n - 1 for n <= 2. single: it is a last key with none beside it. */
V_FN void softmax_vectors(struct pair_softmax *x, const bool single, const int v, const int n)
{
    const float *at = x->s + x->next * FWD_LANES + v * VF;
    uint32_t *to = x->p + x->next / 2 * FWD_LANES + v * VF;
    const int both = single ? n : 2 * n;
    vf e[4];
#pragma GCC unroll 4
    for (int i = 0; i < both; i++) {
        e[i] = v_fms(v_load(at + i / n * FWD_LANES + i % n * VF), x->factor, x->m[v + i % n]);
        x->top[v + i % n] = v_max(e[i], x->top[v + i % n]);
    }
    v_pair_exp2(e, both);
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) {
        const vf second = single ? v_zero() : e[n + i];
        x->l[v + i] = v_add(x->l[v + i], v_add(e[i], second));
        v_pair_store(to + i * VF, v_pair_of(e[i], second));
    }
}

V_FN void softmax_pair(struct pair_softmax *x, const bool single, const int nv)
{
    const int n = nv < 2 ? 1 : 2;
#pragma GCC unroll 2
    for (int v = 0; v < nv; v += n)
        softmax_vectors(x, single, v, n);
    x->next += 2;
}

/* Some score exceeds its lane's reference by more than PAIR_SLACK. */
V_FN bool softmax_exceeds(const struct pair_softmax *x, const int nv)
{
    unsigned higher = 0;
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++)
        higher |= v_less(v_set1(PAIR_SLACK), x->top[v]);
    return higher != 0;
}

V_FN void softmax_end(const struct pair_softmax *x, float *sum, const int nv)
{
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++)
        v_store(sum + v * VF, x->l[v]);
}

/* Moves the reference of lanes where a score exceeds it by more than PAIR_SLACK, multiplies the sums by alpha, and says
 * whether O must be too: not where those lanes have seen no key yet. */
V_FN bool move_reference(const float *s, int keys, float factor, float *reference, float *sum, float *alpha,
                         const int nv)
{
    unsigned moved = 0;
    vf m[V_STRIP];
    strip_maximum(s, FWD_LANES, keys, m, nv);
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) {
        const vf old = v_load(reference + v * VF), top = v_mul(m[v], v_set1(factor));
        const unsigned higher = v_less(v_add(old, v_set1(PAIR_SLACK)), top);
        const vf now = v_select(higher, top, old), a = v_exp2(v_sub(old, now));
        moved |= higher & v_less(v_set1(-FLT_MAX), old);
        v_store(reference + v * VF, now);
        v_store(alpha + v * VF, a);
        v_store(sum + v * VF, v_mul(a, v_load(sum + v * VF)));
    }
    return moved != 0;
}

/* ---- tiles ---- */

/* A tile on its way through its keys. Tiles that visit the same keys go through them together, up to FWD_TILES of
 * them, so that a block is copied once for all: those of standard attention, those that a stride gives one window. */
struct pair_slot {
    struct tile tile;
    struct key_walk walk;
    bool whole; /* all its lanes see the same keys */
    uint32_t *qt;
    float *ot, *reference, *sum, *alpha;
};

static void slot_begin(struct pair_slot *x, const struct nbhd_params *p)
{
    char *rows[FWD_LANES];
    lane_rows(&x->tile, &p->q, rows);
    pack_query_pairs(x->qt, (const char *const *)rows, x->tile.lanes, x->tile.vectors, p->head_dim, p->scale < 0.0f);
    memset(x->ot, 0, (size_t)((p->head_dim_v + VP - 1) / VP * VP) * FWD_LANES * sizeof *x->ot);
    for (int i = 0; i < FWD_LANES; i++) {
        x->reference[i] = -FLT_MAX;
        x->sum[i] = 0.0f;
    }
    x->walk = walk_begin(p, &x->tile);
    x->whole = !p->bias && sees_alike(&x->tile);
}

static void slot_end(struct pair_slot *x, const struct nbhd_params *p)
{
    const struct tile *t = &x->tile;
    char *rows[FWD_LANES];
    lane_rows(t, &p->o, rows);
    unpack_outputs(x->ot, FWD_LANES, rows, NBHD_BF16, t->lanes, t->vectors, p->head_dim_v, x->sum);
    if (!p->lse.data)
        return;
    lane_rows(t, &p->lse, rows);
    store_lse(rows, t->lanes, t->vectors, x->reference, x->sum);
}

struct pair_scratch {
    float *s;
    const float *zeros;
    uint16_t *keys, *values;
    struct key_block *b, *blocks; /* the block at hand; three of them */
    bool packed; /* values are those of the block, all of them */
    bool scored; /* the scores of the block's first keys are there already; `ring` says where */
    int ring;
    int odds, odd[WALK_KEYS]; /* keys whose values are not in c->values: pair_odd_values */
    const uint16_t *odd_row[WALK_KEYS];
    struct pair_ahead ahead;
};

/* Scores s of keys [begin, end) of the block get the bias, and -infinity in lanes that do not see the key. */
static void scores_finish(const struct pair_slot *x, const struct nbhd_params *p, const struct key_block *b, int begin,
                          int end, float *s)
{
    if (p->bias)
        strip_bias(b, begin, end, &x->tile, fabsf(p->scale) * LOG2E, s, FWD_LANES, 0, x->tile.vectors);
    strip_mask(b, begin, end, x->tile.everyone, s, FWD_LANES, 0, x->tile.vectors);
}

/* What the softmax multiplies scores by, in powers of two. */
static float score_factor(const struct nbhd_params *p) { return p->bias ? 1.0f : fabsf(p->scale) * LOG2E; }

/* Of the keys [begin, end) of the block, given its pairs of probabilities. */
static void add_odd_pairs(struct pair_slot *x, const struct pair_scratch *c, int columns, const uint32_t *pairs,
                          int begin, int end)
{
    for (int i = 0; i < c->odds; i++)
        if (c->odd[i] >= begin && c->odd[i] < end)
            add_odd_pair(x->ot, pairs, c->odd[i], c->odd_row[i], columns, c->b->bits[c->odd[i]]);
}

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

/* How often a tile's products of a block of so many keys ask ahead: for every VP keys, a strip of two vectors of lanes,
 * and VP dimensions. */
static int block_beats(int keys, int vectors, const struct nbhd_params *p)
{
    return (keys + VP - 1) / VP * ((vectors + 1) / 2) * ((p->head_dim + VP - 1) / VP + (p->head_dim_v + VP - 1) / VP);
}

static void run_slots(struct pair_slot *slots, int n, const struct nbhd_params *p, struct pair_scratch *c)
{
    for (int i = 0; i < n; i++)
        slot_begin(&slots[i], p);
    struct key_block *now = c->blocks, *next = c->blocks + 1, *other = c->blocks + 2;
    bool more = walk_block(p, &slots[0].tile, &slots[0].walk, now);
    while (more) {
        more = walk_block(p, &slots[0].tile, &slots[0].walk, next);
        const int beats = n * block_beats(now->count, slots[0].tile.vectors, p);
        c->ahead = (struct pair_ahead){.b = next, .d = p->head_dim, .columns = p->head_dim_v, .beats = beats};
        c->b = now;
        pack_key_pairs(now, p->head_dim, c->keys);
        c->packed = false;
        slot_block(&slots[0], n > 1 ? &slots[1] : NULL, p, c);
        for (int i = 1; i < n; i++) {
            c->b = slot_keys(&slots[i], p, now, other);
            slot_block(&slots[i], i + 1 < n ? &slots[i + 1] : NULL, p, c);
        }
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
    char *scratch = call->workspace + (size_t)thread * f->scratch;
    const long long end = (task + 1) * f->run < f->tiles ? (task + 1) * f->run : f->tiles;
    struct pair_scratch c = {.s = (float *)(void *)(scratch + f->at_s),
                             .zeros = (float *)(void *)(scratch + f->at_zeros),
                             .keys = (uint16_t *)(void *)(scratch + f->at_keys),
                             .values = (uint16_t *)(void *)(scratch + f->at_values),
                             .blocks = (struct key_block *)(void *)(scratch + f->at_block)};
    memset(scratch + f->at_zeros, 0, (size_t)p->head_dim_v * sizeof(float));
    struct pair_slot slots[FWD_TILES];
    for (int i = 0; i < FWD_TILES; i++) {
        slots[i].qt = (uint32_t *)(void *)(scratch + f->at_q + (size_t)i * f->q_size);
        slots[i].ot = (float *)(void *)(scratch + f->at_o + (size_t)i * f->o_size);
        slots[i].reference = (float *)(void *)(scratch + f->at_lanes) + 3 * FWD_LANES * i;
        slots[i].sum = slots[i].reference + FWD_LANES;
        slots[i].alpha = slots[i].sum + FWD_LANES;
    }
    const unsigned state = v_flush_begin();
    pair_begin();
    int n = 0;
    for (long long i = task * f->run; i < end; i++) {
        if (n == 0)
            tile_number(&slots[0].tile, p, f, i);
        n++;
        if (n < FWD_TILES && i + 1 < end) {
            tile_number(&slots[n].tile, p, f, i + 1);
            if (same_keys(&slots[0].tile, &slots[n].tile))
                continue;
        }
        run_slots(slots, n, p, &c);
        n = 0;
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
