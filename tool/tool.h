/* What every command shares: its row in the table of nbhd.c, and how it says that something went wrong.
 * A command is one file cmd_NAME.c that defines `const struct command cmd_NAME`, and one row in nbhd.c. */
#ifndef NBHD_TOOL_H
#define NBHD_TOOL_H

#include "nbhd.h"

struct command {
    const char *name;
    const char *summary;                /* one line, for `nbhd --help` */
    int (*run)(int argc, char **argv); /* argv[0] is the command's name; returns the exit status */
};

/* Exit status, as docs/nbhd.1 promises it to scripts. */
enum {
    TOOL_DONE = 0,
    TOOL_FAILED = 1, /* a check failed, or the computation could not be done */
    TOOL_USAGE = 2   /* the input or the usage was wrong */
};

/* Writes "nbhd COMMAND: sentence" to stderr; returns status. */
int tool_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same for something worth knowing that is no failure. */
void tool_note(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* After a call of nbhd.h failed: its sentence, and the exit status that goes with it. */
int tool_fail_library(nbhd_status status);

#endif
