/* Rows shared out among threads: for the tool's own loops, beside the library's. */
#ifndef NBHD_TOOL_PARALLEL_H
#define NBHD_TOOL_PARALLEL_H

int cpu_count(void); /* that this process may use */
/* Calls work(context, begin, end) on disjoint ranges that cover 0..rows. threads 0: all. */
void parallel_rows(int threads, int rows, void (*work)(void *context, int begin, int end), void *context);

#endif
