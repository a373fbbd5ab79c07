/* Messages for a person, to stderr: level 0 always, 1 (choices) and 2 (details) when NBHD_LOG asks for them. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include "core/kernel.h"

void nbhd_log(int level, const char *format, ...)
{
    const char *wanted = nbhd_env("NBHD_LOG");
    if (level > (wanted ? atoi(wanted) : 0))
        return;
    char text[NBHD_TEXT];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fprintf(stderr, "nbhd: %s\n", text);
}
