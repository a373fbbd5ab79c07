/* What a kernel visited, for tests and for looking: every CPU kernel reports here. Off, and then one test of a pointer
 * a block, unless somebody sets nbhd_counters before a call and takes it away after. Extra keys are not counted. */
#ifndef NBHD_CORE_COUNTERS_H
#define NBHD_CORE_COUNTERS_H

#include <stdatomic.h>

struct nbhd_counters {
    atomic_llong visits; /* keys times tiles of queries that loaded them; by keys: queries times tiles of keys */
    atomic_llong masked; /* of these, where some of the tile's queries does not see the key */
};

extern struct nbhd_counters *nbhd_counters; /* counters.c */

static inline void nbhd_count_visits(long long visits, long long masked)
{
    atomic_fetch_add_explicit(&nbhd_counters->visits, visits, memory_order_relaxed);
    atomic_fetch_add_explicit(&nbhd_counters->masked, masked, memory_order_relaxed);
}

#endif
