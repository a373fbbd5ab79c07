/* The cut of the backward into rounds (cpu/bwd_rounds.h), one axis, against membership by definition: within a round no
 * two tasks add to the same key or query, over all rounds each visible pair is some task's exactly once, and tasks of
 * different rounds that touch the same key or query know of each other. */
#include "cpu/bwd_rounds.h"
#include "oracle.h"
#include "test.h"

enum { MOST = 24, FEW = 14, TURNS = 2 * MOST };

/* Which tasks touch the tokens of an axis in the round at hand, how often each pair has been met, and of each task the
 * queries and keys, a bit each. */
struct tally {
    int query_task[MOST], key_task[MOST];
    int met[MOST][MOST];
    unsigned queries[TURNS][TURNS], keys[TURNS][TURNS]; /* [round][slot] */
};

static struct oracle_axis oracle_of(const struct nbhd_axis *a)
{
    static const enum oracle_edge edges[] = {ORACLE_NEAREST, ORACLE_CAUSAL, ORACLE_TRUNCATED,
                                            ORACLE_PERIODIC};
    return (struct oracle_axis){a->length, a->keys, a->window, a->stride, a->dilation, edges[a->edge]};
}

static bool inside(struct nbhd_range r, int x) { return r.begin <= x && x < r.end; }

static bool claim(int *owner, int task)
{
    const bool fine = *owner < 0 || *owner == task;
    *owner = task;
    return fine;
}

/* All pairs of a task; false if another of the round has one of its keys or queries. */
static bool meet(const struct nbhd_axis *a, const struct nbhd_region *region, int round, int task, struct tally *t)
{
    const struct oracle_axis o = oracle_of(a);
    bool apart = true;
    for (int q = region->q.begin; q < region->q.end; q++)
        for (int k = region->keys.begin; k < region->keys.end; k++) {
            const int query = q * a->dilation + region->group;
            const int key = nbhd_wrap(*a, region->size, k) * a->dilation + region->group;
            if (!inside(nbhd_keys(*a, region->size, q), k))
                continue; /* another image of a key that it sees */
            if (!oracle_sees(&o, query, key))
                continue;
            apart &= claim(&t->query_task[query], task) && claim(&t->key_task[key], task);
            t->met[query][key]++;
            t->queries[round][task] |= 1u << query;
            t->keys[round][task] |= 1u << key;
        }
    return apart;
}

/* Whether the rivals of a turn have all with which it has tokens in common. */
static bool knows_rivals(const struct nbhd_rounds *r, const struct nbhd_axis *a, struct nbhd_turn turn, bool queries,
                         const unsigned tokens[TURNS][TURNS])
{
    struct nbhd_turn rivals[NBHD_MOST_REGIONS];
    static bool known[TURNS][TURNS];
    memset(known, 0, sizeof known);
    const int n = nbhd_rounds_rivals(r, *a, turn, queries, rivals);
    for (int i = 0; i < n; i++)
        known[rivals[i].round][rivals[i].slot] = true;
    for (int round = 0; round < r->rounds; round++)
        for (int slot = 0; slot < r->slots; slot++) {
            struct nbhd_region region;
            const bool there = nbhd_rounds_at(r, *a, round, slot, &region);
            if (known[round][slot] && !there)
                return false;
            if (tokens[round][slot] & tokens[turn.round][turn.slot] && !known[round][slot])
                return false;
        }
    return true;
}

static void check_rivals(const struct nbhd_rounds *r, const struct nbhd_axis *a, const struct tally *t)
{
    bool known = true;
    for (int round = 0; round < r->rounds; round++)
        for (int slot = 0; slot < r->slots; slot++) {
            const struct nbhd_turn turn = {round, slot};
            known &= knows_rivals(r, a, turn, false, t->keys) && knows_rivals(r, a, turn, true, t->queries);
        }
    CHECK(known, "length %d keys %d window %d stride %d dilation %d edge %d, tile %d, %d regions, %s: a task does not "
          "know of one that has its tokens, or knows of one that is not there", a->length, a->keys, a->window, a->stride,
          a->dilation, a->edge, r->regions.tile, r->regions.tiles_long, r->paired ? "paired" : "coloured");
}

static void check_rounds(const struct nbhd_axis *a, int tile, int regions, bool paired)
{
    const struct nbhd_rounds r = nbhd_rounds_make(*a, tile, regions, paired);
    const struct oracle_axis o = oracle_of(a);
    static struct tally t;
    memset(&t, 0, sizeof t);
    bool apart = true, once = true;
    for (int round = 0; round < r.rounds; round++) {
        for (int i = 0; i < MOST; i++)
            t.query_task[i] = t.key_task[i] = -1;
        for (int slot = 0; slot < r.slots; slot++) {
            struct nbhd_region region;
            if (nbhd_rounds_at(&r, *a, round, slot, &region))
                apart &= meet(a, &region, round, slot, &t);
        }
    }
    for (int q = 0; q < a->length; q++)
        for (int k = 0; k < a->keys; k++)
            once &= t.met[q][k] == oracle_sees(&o, q, k);
    CHECK(apart && once, "length %d keys %d window %d stride %d dilation %d edge %d, tile %d, %d regions, %s: %s",
          a->length, a->keys, a->window, a->stride, a->dilation, a->edge, tile, regions, paired ? "paired" : "coloured",
          apart ? "a pair is missed or met twice" : "tasks of a round share a token");
    check_rivals(&r, a, &t);
}

static void check_axis(struct nbhd_axis a)
{
    for (int tile = 1; tile <= 4; tile += tile)
        for (int regions = 1; regions <= 6; regions++)
            for (int paired = 0; paired < (a.edge == NBHD_EDGE_PERIODIC ? 1 : 2); paired++)
                check_rounds(&a, tile, regions, paired);
}

static void check_windows(int length)
{
    struct nbhd_axis a = {.length = length, .keys = length};
    for (a.dilation = 1; a.dilation <= nbhd_min(length, 4); a.dilation++)
        for (a.window = 1; a.window * a.dilation <= length; a.window++)
            for (a.stride = 1; a.stride <= a.window; a.stride++)
                for (a.edge = NBHD_EDGE_NEAREST; a.edge <= NBHD_EDGE_PERIODIC; a.edge++)
                    check_axis(a);
}

int main(void)
{
    for (int length = 1; length <= (test_full() ? MOST : FEW); length++)
        check_windows(length);
    for (int keys = 1; keys <= FEW; keys++) /* cross attention */
        check_axis((struct nbhd_axis){.length = 9, .window = keys, .stride = 1, .dilation = 1, .keys = keys});
    return test_done();
}
