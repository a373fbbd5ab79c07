/* See bwd_order.h. */
#include "cpu/bwd_order.h"
#include "cpu/threads.h"

struct nbhd_bwd_task nbhd_bwd_task_at(const struct nbhd_bwd *b, long long number)
{
    const long long place = number % b->tasks; /* the heads of a region follow one another, for they share pages */
    struct nbhd_bwd_task t = {.batch = (int)(place / b->parts / b->slots), .part = (int)(place % b->parts)};
    int round = (int)(number / b->tasks), slot = t.slot = (int)(place / b->parts % b->slots);
    for (int i = 2; i >= 0; i--) {
        t.turn[i] = (struct nbhd_turn){round % b->axis[i].rounds, slot % b->axis[i].slots};
        round /= b->axis[i].rounds;
        slot /= b->axis[i].slots;
    }
    return t;
}

static long long number_of(const struct nbhd_bwd *b, const struct nbhd_bwd_task *t)
{
    long long round = 0, slot = 0;
    for (int i = 0; i < 3; i++) {
        round = round * b->axis[i].rounds + t->turn[i].round;
        slot = slot * b->axis[i].slots + t->turn[i].slot;
    }
    return round * b->tasks + (t->batch * b->slots + slot) * b->parts + t->part;
}

/* For the tasks before this one with which it may have keys in common, or queries. */
static void wait_for_rivals(const struct nbhd_bwd *b, const struct nbhd_bwd_task *t, long long number, bool queries,
                            atomic_uchar *done)
{
    struct nbhd_turn rivals[3][NBHD_MOST_REGIONS];
    int n[3];
    for (int i = 0; i < 3; i++)
        n[i] = nbhd_rounds_rivals(&b->axis[i], b->cut[i], t->turn[i], queries, rivals[i]);
    struct nbhd_bwd_task other = *t;
    for (int x = 0; x < n[0]; x++)
        for (int y = 0; y < n[1]; y++)
            for (int z = 0; z < n[2]; z++) {
                other.turn[0] = rivals[0][x];
                other.turn[1] = rivals[1][y];
                other.turn[2] = rivals[2][z];
                const long long before = number_of(b, &other);
                if (before < number)
                    nbhd_wait_for(&done[before]);
            }
}

void nbhd_bwd_wait(const struct nbhd_bwd *b, long long number, atomic_uchar *done)
{
    const struct nbhd_bwd_task t = nbhd_bwd_task_at(b, number);
    if (b->slot_sums && number >= b->tasks)
        nbhd_wait_for(&done[number - b->tasks]); /* which has waited for that of the round before */
    wait_for_rivals(b, &t, number, false, done);
    if (b->sum_dq) /* elsewhere a query is one task's */
        wait_for_rivals(b, &t, number, true, done);
}
