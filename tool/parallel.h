/* Rows shared out among the library's threads: for the tool's own loops. */
#ifndef NBHD_TOOL_PARALLEL_H
#define NBHD_TOOL_PARALLEL_H

int threads_of(int threads); /* threads, or where that is 0 as many as the library then uses */
/* Calls work(context, begin, end) on disjoint ranges that cover 0..rows, on threads_of(threads). */
void parallel_rows(int threads, int rows, void (*work)(void *context, int begin, int end), void *context);

#endif
