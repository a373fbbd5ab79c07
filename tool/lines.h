/* Problem lines from the command line: "LINE", or "@FILE" with one a line and comments after '#'. */
#ifndef NBHD_TOOL_LINES_H
#define NBHD_TOOL_LINES_H

#include "problem.h"

/* Calls each() for every problem until one returns something other than TOOL_DONE or TOOL_FAILED; a failure is
 * remembered and the others still run. threads > 0 overrides; deterministic: so are its plans to be. */
int problems_each(char **operands, int count, int threads, bool deterministic,
                  int (*each)(const struct problem *problem, void *context), void *context);
/* The same for commands that plan nothing and take no ragged batches: those are refused. */
int lines_each(char **operands, int count, int (*each)(const nbhd_desc *desc, const char *line, void *context),
               void *context);

#endif
