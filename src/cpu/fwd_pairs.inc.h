/* Forward in bfloat16 with products of pairs, in the tiles of broadcast.inc.h: lanes are queries, as there.
 *
 *     S[key][64]      = sum over pairs of dimensions of Q[pair][64] * K[key][pair]       float32
 *     P[key pair][64] = exp2(f S - reference)                                            rounded to bfloat16
 *     O[column][64]   = O * alpha + sum over pairs of keys of P[pair][64] * V[pair][column]
 *
 * A block's keys and values are copied: keys as they are, values in the order that the product wants. The reference is no
 * exact maximum: it moves only where a score exceeds it by PAIR_SLACK, so that O is rarely rescaled; probabilities of up to
 * 2^PAIR_SLACK lose nothing, as both types have the exponents.
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

#include "cpu/rows.inc.h"
#include "cpu/fwd_common.inc.h"
#include "cpu/broadcast.inc.h"

/* The rows of the next block, asked for a few at a time beside the work on this one: they come from far away. */
struct pair_ahead {
    const struct key_block *b; /* count 0: there is none */
    int next, d, columns, step; /* next key; keys at a time */
};

V_FN void ask_ahead(struct pair_ahead *a)
{
    const int end = nbhd_min(a->next + a->step, a->b->count);
    for (; a->next < end; a->next++) {
        for (int c = 0; c < a->d; c += VP)
            __builtin_prefetch((const uint16_t *)(const void *)a->b->k[a->next] + c, 0, 2);
        for (int c = 0; c < a->columns; c += VP)
            __builtin_prefetch((const uint16_t *)(const void *)a->b->v[a->next] + c, 0, 2);
    }
}

/* ---- the products, for `vectors` vectors of lanes; rows of lanes are FWD_LANES apart, others padded to a multiple of VP ---- */

/* Before and after a thread's tiles. */
static void pair_begin(void);
static void pair_end(void);
struct pair_slot;
struct pair_scratch;
/* The rows of a block's values as pair_finish wants them: FWD_BLOCK times `columns`, padded. */
static void pair_values(const struct key_block *b, int columns, uint16_t *to);
/* Scores of a block, c->s[key][lane], from the tile's qt and c->keys. */
static void pair_scores(struct pair_slot *x, struct pair_scratch *c, int d);
/* Softmax of c->s; ot[column][lane] = alpha[lane] * ot + sum over keys of its pairs and c->values. */
static void pair_finish(struct pair_slot *x, struct pair_scratch *c, int columns, float factor);
/* Both, where nothing comes in between. */
static void pair_plain(struct pair_slot *x, struct pair_scratch *c, int d, int columns, float factor);

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

/* As block_odd_values of fwd_broadcast.inc.h: values that are not finite, of keys that some lane does not see, leave the
 * block's product, to be added to the lanes that do. */
static int pair_odd_values(struct key_block *b, uint64_t everyone, int columns, const float *zeros, int odd[FWD_BLOCK],
                           const uint16_t *odd_row[FWD_BLOCK])
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

/* ---- softmax of a block ---- */

/* Scores become pairs of probabilities, in place: row i of pairs is where the rows 2 i and 2 i + 1 of scores were, or before.
 * An odd last key is paired with 0. Some pairs at a time, so that it can be done beside products. */
struct pair_softmax {
    float *s;
    int keys, next; /* next key */
    vf factor, m[V_STRIP], l[V_STRIP];
};

/* Moves the reference of nv vectors of lanes where it must, and gives what older sums are to be multiplied by. True if that is
 * not 1 in all lanes. */
V_FN bool softmax_begin(struct pair_softmax *x, float *s, int keys, float factor, float *reference, const float *sum,
                        float *alpha, const int nv)
{
    unsigned moved = 0;
    x->s = s;
    x->keys = keys;
    x->next = 0;
    x->factor = v_set1(factor);
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++)
        x->m[v] = v_set1(-INFINITY);
    for (int i = 0; i < keys; i++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            x->m[v] = v_max(v_load(s + i * FWD_LANES + v * VF), x->m[v]);
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) {
        const vf old = v_load(reference + v * VF), top = v_mul(x->m[v], x->factor);
        const unsigned higher = v_less(v_add(old, v_set1(PAIR_SLACK)), top);
        x->m[v] = v_select(higher, top, old);
        const vf a = v_exp2(v_sub(old, x->m[v]));
        moved |= higher;
        v_store(reference + v * VF, x->m[v]);
        v_store(alpha + v * VF, a);
        x->l[v] = v_mul(a, v_load(sum + v * VF));
    }
    return moved != 0;
}

/* The next n pairs of keys, or what is left. */
V_FN void softmax_some(struct pair_softmax *x, int n, const int nv)
{
    const int end = nbhd_min(x->next + 2 * n, x->keys);
    for (; x->next < end; x->next += 2)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) {
            const float *at = x->s + x->next * FWD_LANES + v * VF;
            const vf first = v_exp2(v_fms(v_load(at), x->factor, x->m[v]));
            vf second = v_zero();
            if (x->next + 1 < x->keys)
                second = v_exp2(v_fms(v_load(at + FWD_LANES), x->factor, x->m[v]));
            x->l[v] = v_add(x->l[v], v_add(first, second));
            v_pair_store((uint32_t *)(void *)x->s + x->next / 2 * FWD_LANES + v * VF, v_pair_of(first, second));
        }
}

V_FN void softmax_end(struct pair_softmax *x, float *sum, const int nv)
{
    softmax_some(x, FWD_BLOCK, nv);
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++)
        v_store(sum + v * VF, x->l[v]);
}

/* ---- tiles ---- */

/* A tile on its way through its keys. Tiles that visit the same keys go through them together, up to FWD_PAIR_TILES of them, so
 * that a block is copied once for all: those of standard attention, those that a stride gives one window. */
struct pair_slot {
    struct tile tile;
    struct key_walk walk;
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
    struct pair_ahead ahead;
};

/* One tile and the block of its next keys, some of which some lanes do not see, or with bias. */
static void slot_masked_block(struct pair_slot *x, const struct nbhd_params *p, struct pair_scratch *c, float factor)
{
    const struct tile *t = &x->tile;
    struct key_block *b = c->b;
    const int dv = p->head_dim_v;
    int odd[FWD_BLOCK];
    const uint16_t *odd_row[FWD_BLOCK];
    pair_scores(x, c, p->head_dim);
    if (p->bias)
        strip_bias(b, t, factor, c->s, FWD_LANES, 0, t->vectors);
    strip_mask(b, t->everyone, c->s, FWD_LANES, 0, t->vectors);
    const int odds = pair_odd_values(b, t->everyone, dv, c->zeros, odd, odd_row);
    if (!c->packed || odds)
        pair_values(b, dv, c->values);
    c->packed = odds == 0;
    pair_finish(x, c, dv, p->bias ? 1.0f : factor);
    for (int i = 0; i < odds; i++)
        add_odd_pair(x->ot, (const uint32_t *)(const void *)c->s, odd[i], odd_row[i], dv, b->bits[odd[i]]);
}

static void slot_block(struct pair_slot *x, const struct nbhd_params *p, struct pair_scratch *c)
{
    const float factor = fabsf(p->scale) * LOG2E;
    if (p->bias || c->b->masked) {
        slot_masked_block(x, p, c, factor);
        return;
    }
    if (!c->packed)
        pair_values(c->b, p->head_dim_v, c->values);
    c->packed = true;
    pair_plain(x, c, p->head_dim, p->head_dim_v, factor);
}

static bool same_keys(const struct tile *a, const struct tile *b)
{
    bool same = a->batch == b->batch && a->kv_head == b->kv_head;
    for (int i = 0; i < 3; i++)
        same &= a->axis[i].cell.group == b->axis[i].cell.group && a->axis[i].any.begin == b->axis[i].any.begin &&
                a->axis[i].any.end == b->axis[i].any.end;
    return same;
}

/* How often the products of a tile and a block ask ahead, at least. */
enum { BEATS = 12 };

static void run_slots(struct pair_slot *slots, int n, const struct nbhd_params *p, struct pair_scratch *c)
{
    for (int i = 0; i < n; i++)
        slot_begin(&slots[i], p);
    struct key_block *now = c->blocks, *next = c->blocks + 1, *other = c->blocks + 2;
    bool more = walk_block(p, &slots[0].tile, &slots[0].walk, now);
    while (more) {
        more = walk_block(p, &slots[0].tile, &slots[0].walk, next);
        c->ahead = (struct pair_ahead){next, 0, p->head_dim, p->head_dim_v, (next->count + BEATS * n - 1) / (BEATS * n)};
        c->b = now;
        pack_key_pairs(now, p->head_dim, c->keys);
        c->packed = false;
        slot_block(&slots[0], p, c);
        c->b = other;
        for (int i = 1; i < n; i++) {
            walk_block(p, &slots[i].tile, &slots[i].walk, other); /* the same keys, seen by its lanes */
            slot_block(&slots[i], p, c);
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
    struct pair_scratch c = {.s = (float *)(void *)(scratch + f->at_s), .zeros = (float *)(void *)(scratch + f->at_zeros),
                             .keys = (uint16_t *)(void *)(scratch + f->at_keys),
                             .values = (uint16_t *)(void *)(scratch + f->at_values),
                             .blocks = (struct key_block *)(void *)(scratch + f->at_block)};
    memset(scratch + f->at_zeros, 0, (size_t)p->head_dim_v * sizeof(float));
    struct pair_slot slots[FWD_PAIR_TILES];
    for (int i = 0; i < FWD_PAIR_TILES; i++) {
        slots[i].qt = (uint32_t *)(void *)(scratch + f->at_q + (size_t)i * f->q_size);
        slots[i].ot = (float *)(void *)(scratch + f->at_o + (size_t)i * f->o_size);
        slots[i].reference = (float *)(void *)(scratch + f->at_lanes) + 3 * FWD_LANES * i;
        slots[i].sum = slots[i].reference + FWD_LANES;
        slots[i].alpha = slots[i].sum + FWD_LANES;
    }
    pair_begin();
    int n = 0;
    for (long long i = task * f->run; i < end; i++) {
        if (n == 0)
            tile_number(&slots[0].tile, p, f, i);
        n++;
        if (n < FWD_PAIR_TILES && i + 1 < end) {
            tile_number(&slots[n].tile, p, f, i + 1);
            if (same_keys(&slots[0].tile, &slots[n].tile))
                continue;
        }
        run_slots(slots, n, p, &c);
        n = 0;
    }
    pair_end();
}

static nbhd_status pair_run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const struct nbhd_fwd *fwd = plan->state;
    struct pair_call call = {params, fwd, workspace};
    (void)stream;
    nbhd_parallel(fwd->threads, fwd->tasks, pair_task, &call);
    return NBHD_OK;
}
