/* A pool of worker threads, one for the process, that runs the tasks of one call at a time. */
#ifndef NBHD_CPU_THREADS_H
#define NBHD_CPU_THREADS_H

#include <stdatomic.h>

/* CPUs that this process may use, by its affinity and its control groups' quota, or what NBHD_THREADS says. */
int nbhd_threads_available(void);
/* CPUs that the control groups named in the file `groups` grant, by their files under `mount`; INT_MAX: no quota. */
int nbhd_threads_quota(const char *groups, const char *mount);
/* Starts workers until `threads` can run at once (the caller's thread is one of them). For plan creation: it allocates.
 * Returns how many can. */
int nbhd_threads_prepare(int threads);
/* Calls work(context, task, thread) once for each task 0 .. tasks - 1, in any order, on at most `threads` threads of
 * which the caller is number 0; thread < threads. Returns when all are done. While another call has the workers, the
 * caller does all of its tasks alone. Work must not depend on which thread does it. */
void nbhd_parallel(int threads, long long tasks, void (*work)(void *context, long long task, int thread),
                   void *context);
/* For work that needs what an earlier task has made: returns when that has set *flag. Tasks are begun in the order of
 * their numbers. */
void nbhd_wait_for(atomic_uchar *flag);

#endif
