/* The order in which tasks of the backward add to sums that they share: that of their rounds (bwd_rounds.h), which no
 * number of threads changes. A task begins when those of earlier rounds are done that may touch its keys or queries,
 * and where slots have sums (of extra keys, of the bias table) the one of its slot in the round before. Of others it
 * takes no notice, so threads do not meet at the end of a round, whose tasks differ in length.
 *
 * Tasks are numbered round by round, and handed out in that order, so one waits only for what some thread has taken. */
#ifndef NBHD_CPU_BWD_ORDER_H
#define NBHD_CPU_BWD_ORDER_H

#include <stdatomic.h>
#include "cpu/bwd_plan.h"

/* Which task a number stands for. */
struct nbhd_bwd_task {
    int batch, part;          /* part: of the kv heads, nbhd_bwd.heads of them */
    int slot;                 /* of its round, over all axes */
    struct nbhd_turn turn[3]; /* on each axis */
};

struct nbhd_bwd_task nbhd_bwd_task_at(const struct nbhd_bwd *b, long long number);
/* Returns when task `number` may begin. done: a flag for each task, set when it has ended; void ones too. */
void nbhd_bwd_wait(const struct nbhd_bwd *b, long long number, atomic_uchar *done);

#endif
