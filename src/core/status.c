/* Status values and the sentence that goes with a failure, one per thread. */
#include <stdarg.h>
#include <stdio.h>
#include "core/kernel.h"

static _Thread_local char sentence[NBHD_TEXT];

nbhd_status nbhd_fail(nbhd_status status, const char *format, ...)
{
    char text[NBHD_TEXT]; /* an argument may be the last sentence itself */
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    for (char *at = text; *at; at++)
        if (((unsigned char)*at < ' ' && *at != '\n' && *at != '\t') || *at == 127)
            *at = '?'; /* of a value that is quoted; a terminal would obey it */
    snprintf(sentence, sizeof sentence, "%s", text);
    return status;
}

bool nbhd_refuse(char why[NBHD_TEXT], const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(why, NBHD_TEXT, format, list);
    va_end(list);
    return true;
}

const char *nbhd_last_error(void) { return sentence; }

const char *nbhd_status_name(nbhd_status status)
{
    switch (status) {
    case NBHD_OK: return "ok";
    case NBHD_ERROR_INVALID: return "invalid";
    case NBHD_ERROR_UNSUPPORTED: return "unsupported";
    case NBHD_ERROR_MEMORY: return "out of memory";
    case NBHD_ERROR_DEVICE: return "device error";
    case NBHD_ERROR_COMPILE: return "compilation failed";
    case NBHD_ERROR_IO: return "input/output error";
    }
    return "unknown status";
}

int nbhd_version(void) { return NBHD_VERSION; }
