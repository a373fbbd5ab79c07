/* Numbers as text with a point: the C library's functions follow the process's locale, which belongs to the host
 * program, and a problem line or wisdom written under one locale must read the same under another. */
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "core/kernel.h"

double nbhd_read_number(const char *text, const char **end)
{
    char local[64];
    const char *const point = localeconv()->decimal_point;
    const size_t length = strspn(text, "+-.0123456789eE"), before = strcspn(text, "."), width = strlen(point);
    *end = text;
    if (length + width >= sizeof local)
        return 0;
    memcpy(local, text, length);
    local[length] = '\0';
    if (before < length) {
        memcpy(local + before, point, width);
        memcpy(local + before + width, text + before + 1, length - before - 1);
        local[length - 1 + width] = '\0';
    }
    char *stop;
    const double value = strtod(local, &stop);
    const size_t used = (size_t)(stop - local);
    *end = text + (before < length && used > before ? used + 1 - width : used);
    return value;
}

void nbhd_write_number(char text[32], int digits, double value)
{
    const char *const point = localeconv()->decimal_point;
    snprintf(text, 32, "%.*g", digits, value);
    char *at = strstr(text, point);
    if (at) {
        memmove(at + 1, at + strlen(point), strlen(at + strlen(point)) + 1);
        *at = '.';
    }
}
