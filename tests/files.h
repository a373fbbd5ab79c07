/* What tests of the command's files share: its way to tell a failure, and seeds for the fuzzers. */
#ifndef NBHD_TESTS_FILES_H
#define NBHD_TESTS_FILES_H

#include <stdarg.h>

#include "folder.h"
#include "tool.h"

/* What nbhd.c provides to the command; here it keeps the sentence. */
static char told[1024];

int tool_fail(int status, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(told, sizeof told, format, list);
    va_end(list);
    return status;
}

static const char *seeds; /* directory for them, or NULL */

static inline void seed(const char *kind, const void *bytes, size_t size)
{
    static int number;
    char path[512];
    if (!seeds)
        return;
    snprintf(path, sizeof path, "%s/%s", seeds, kind);
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/%s/%03d", seeds, kind, number++);
    write_file(path, bytes, size);
}

#endif
