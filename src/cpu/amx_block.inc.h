/* A block's keys and a tile's queries by tiles: the order of the products of amx_products.inc.h and of the softmax.
 *
 * A half, 32 queries and all keys of the block, is a chain: scores, softmax, output. Products leave vectors a port, and
 * their own loads and stores leave the tile unit idle at times; so the softmax of a half runs beside the products of
 * others:
 *
 *     products    scores of half 1   output of half 0   scores of half 2   output of half 1
 *     softmax     half 0, end; half 1 ...               half 1, end; half 2 ...
 *
 * Halves of the tiles that go through the same keys follow each other; the last one of a block ends by itself. */
#include "cpu/amx_products.inc.h"

enum { MOST_GROUPS = WALK_KEYS / GROUP, RING = 6 };

struct half {
    struct pair_slot *x;
    const uint32_t (*seen)[FWD_LANES]; /* [group][lane of the tile]: bits of keys */
    const bool *masked;                /* [group]: seen counts there */
    uint16_t *p;                       /* probabilities, a UNIT a group */
    int lane, groups;
    int scored, done; /* groups whose scores, whose probabilities are there */
};

/* What is on its way, at the end of c->s: after the probabilities of two halves and RING units of scores. */
struct halves {
    struct half half[2];
    int now;      /* the half whose scores are made; the other one may be `open`: not in O yet */
    bool open;
    int made, used; /* units of scores, in turn in the ring */
    bool busy;      /* `softmax` is under way */
    struct row_softmax softmax;
    int tile; /* which of two copies of these is the present tile's */
    bool masked[2][MOST_GROUPS];
    uint32_t seen[2][MOST_GROUPS][FWD_LANES];
};

enum { PROBABILITIES = 2 * MOST_GROUPS * UNIT / 2, SCORES = RING * UNIT }; /* floats */
NBHD_STATIC_ASSERT(PROBABILITIES + SCORES + sizeof(struct halves) / 4 <= WALK_KEYS * FWD_LANES, "they fit c->s");

static struct halves *halves_of(const struct pair_scratch *c)
{
    return (struct halves *)(void *)(c->s + PROBABILITIES + SCORES);
}

static void pair_begin(struct pair_scratch *c)
{
    memset(halves_of(c), 0, sizeof(struct halves));
    tile_begin();
}

static void pair_end(void) { tile_end(); }

/* ---- softmax ---- */

/* Whose softmax is next; NULL: nothing to do. */
static struct half *softmax_half(struct halves *x)
{
    struct half *const last = &x->half[1 - x->now], *const now = &x->half[x->now];
    if (x->open && last->done < last->groups)
        return last;
    return now->done < now->scored ? now : NULL;
}

/* Begins the softmax of the next unit, if none is under way and there is one. */
static void softmax_ready(struct halves *x, const struct pair_scratch *c, const struct nbhd_params *p)
{
    struct half *const h = softmax_half(x);
    if (x->busy || !h)
        return;
    struct pair_slot *const slot = h->x;
    struct row_softmax *const s = &x->softmax;
    const float factor = p->scale * LOG2E;
    const int turn = slot->turn[h->lane / UNIT_ROWS], dv = p->head_dim_v;
    float *const scores = c->s + PROBABILITIES + x->used % RING * UNIT;
    if (p->bias)
        unit_bias(c->b, h->done * GROUP, &slot->tile, h->lane, factor, scores);
    s->factor = v_set1(p->bias ? 1.0f : factor);
    s->s = scores;
    s->first = h->p;
    s->p = h->p + h->done * UNIT;
    s->reference = slot->reference + h->lane;
    s->from = slot_sums(slot, dv, turn) + h->lane * VF;
    s->to = slot_sums(slot, dv, turn + 1) + h->lane * VF;
    s->seen = h->masked[h->done] ? h->seen[h->done] + h->lane : NULL;
    if (slot->reference[h->lane] == -FLT_MAX)
        move_references(s, slot->ot + h->lane * padded(dv), padded(dv));
    softmax_begin(s);
    x->busy = true;
}

/* Ends the softmax under way once all its rows are done. */
static void softmax_settle(struct halves *x, const struct nbhd_params *p)
{
    if (!x->busy || x->softmax.next < UNIT_ROWS)
        return;
    struct half *const h = softmax_half(x);
    if (softmax_exceeds(&x->softmax)) { /* once more, with higher references */
        move_references(&x->softmax, h->x->ot + h->lane * padded(p->head_dim_v), padded(p->head_dim_v));
        softmax_begin(&x->softmax);
        softmax_rest(&x->softmax);
    }
    h->x->turn[h->lane / UNIT_ROWS]++;
    h->done++;
    x->used++;
    x->busy = false;
}

static void softmax_whole(struct halves *x, const struct pair_scratch *c, const struct nbhd_params *p)
{
    softmax_ready(x, c, p);
    softmax_rest(&x->softmax);
    softmax_settle(x, p);
}

static enum softmax_kind kind_of(const struct halves *x)
{
    return !x->busy ? SOFTMAX_NONE : x->softmax.seen ? SOFTMAX_MASKED : SOFTMAX_WHOLE;
}

/* ---- products ---- */

/* As many rows beside four products as make all of them beside all products. */
static struct beside beside_of(struct halves *x, struct pair_scratch *c, int d, int columns)
{
    const int rows = (UNIT_ROWS * VP - 1) / (d + columns) / 2 * 2 + 2, first = (rows + 2) / 4 * 2;
    return (struct beside){&c->ahead, &x->softmax, {first, rows - first}};
}

static void half_scores(struct halves *x, struct half *h, struct pair_scratch *c, const struct nbhd_params *p)
{
    const int d = padded(p->head_dim);
    struct beside b = beside_of(x, c, d, padded(p->head_dim_v));
    const uint16_t *const q = slot_queries(h->x) + h->lane * d;
    for (int g = 0; g < h->groups; g++) {
        while (x->made - x->used >= RING)
            softmax_whole(x, c, p);
        const uint16_t *const k = c->keys + g * GROUP * d;
        float *const s = c->s + PROBABILITIES + x->made % RING * UNIT;
        softmax_ready(x, c, p);
        switch (kind_of(x)) {
        case SOFTMAX_NONE: scores_alone(q, k, d, s, &b); break;
        case SOFTMAX_WHOLE: scores_beside(q, k, d, s, &b); break;
        case SOFTMAX_MASKED: scores_beside_masked(q, k, d, s, &b); break;
        }
        h->scored++;
        x->made++;
        softmax_settle(x, p);
    }
}

/* Of the values that are not in c->values: pair_odd_values. */
static void add_odd_values(const struct half *h, const struct pair_scratch *c, int columns)
{
    for (int i = 0; i < c->odds; i++) {
        const int key = c->odd[i];
        for (int lane = h->lane; lane < h->lane + UNIT_ROWS; lane++) {
            const uint16_t *weight = h->p + key / GROUP * UNIT + lane % UNIT_ROWS * GROUP + key % GROUP;
            for (int at = 0; at < columns && (c->b->bits[key] >> lane & 1); at++) {
                const int place = at % VP / 8 * 4 + at % 4 + at % 8 / 4 * VF; /* see v_pair_mix_low */
                h->x->ot[lane * padded(columns) + at / VP * VP + place] +=
                    nbhd_from_bf16(*weight) * nbhd_from_bf16(c->odd_row[i][at]);
            }
        }
    }
}

static void half_output(struct halves *x, struct half *h, struct pair_scratch *c, const struct nbhd_params *p)
{
    const int columns = padded(p->head_dim_v);
    struct beside b = beside_of(x, c, padded(p->head_dim), columns);
    struct unit_output u = {.p = h->p, .groups = h->groups, .next = GROUP * columns, .step = columns * 4,
                            .fresh = h->x->fresh};
    while (h->done < h->groups)
        softmax_whole(x, c, p);
    for (int i = 0; i < columns; i += VP) {
        u.values = c->values + i * GROUP;
        u.o = h->x->ot + h->lane * columns + i;
        softmax_ready(x, c, p);
        switch (kind_of(x)) {
        case SOFTMAX_NONE: output_alone(&u, &b); break;
        case SOFTMAX_WHOLE: output_beside(&u, &b); break;
        case SOFTMAX_MASKED: output_beside_masked(&u, &b); break;
        }
        softmax_settle(x, p);
    }
    h->x->fresh &= h->lane + UNIT_ROWS < h->x->tile.lanes;
    add_odd_values(h, c, p->head_dim_v);
}

static void pair_block(struct pair_slot *x, const struct pair_slot *follow, const struct nbhd_params *p,
                       struct pair_scratch *c, bool unlike)
{
    struct halves *const all = halves_of(c);
    const int groups = (c->b->count + GROUP - 1) / GROUP, tile = all->tile = 1 - all->tile;
    for (int g = 0; g < groups; g++)
        all->masked[tile][g] = group_seen(c->b, g * GROUP, x->tile.everyone, unlike, all->seen[tile][g]);
    for (int lane = 0; lane < x->tile.lanes; lane += UNIT_ROWS) {
        all->now = 1 - all->now;
        struct half *const h = &all->half[all->now];
        *h = (struct half){.x = x, .seen = all->seen[tile], .masked = all->masked[tile], .lane = lane, .groups = groups,
                           .p = (uint16_t *)(void *)c->s + all->now * MOST_GROUPS * UNIT};
        half_scores(all, h, c, p);
        if (all->open)
            half_output(all, &all->half[1 - all->now], c, p);
        all->open = true;
    }
    if (follow && follow->whole && !c->odds)
        return;
    all->now = 1 - all->now; /* no scores beside the last one */
    all->half[all->now].scored = all->half[all->now].done;
    half_output(all, &all->half[1 - all->now], c, p);
    all->open = false;
}
