/* One JSON object a line on stdout. */
#include "json.h"

#include <math.h>
#include <stdio.h>

static void put_text(const char *text)
{
    putchar('"');
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\')
            printf("\\%c", c);
        else if (c < 32)
            printf("\\u%04x", c);
        else
            putchar(c);
    }
    putchar('"');
}

static void member(struct json *j, const char *name)
{
    if (j->comma)
        printf(", ");
    j->comma = true;
    put_text(name);
    printf(": ");
}

struct json json_begin(void)
{
    putchar('{');
    return (struct json){.comma = false};
}

void json_text(struct json *j, const char *name, const char *value)
{
    member(j, name);
    if (value)
        put_text(value);
    else
        printf("null");
}

void json_real(struct json *j, const char *name, double value)
{
    member(j, name);
    if (isfinite(value))
        printf(value == floor(value) && fabs(value) < 1e15 ? "%.0f" : "%.6g", value);
    else
        printf("null");
}

void json_bool(struct json *j, const char *name, bool value)
{
    member(j, name);
    printf(value ? "true" : "false");
}

void json_list(struct json *j, const char *name)
{
    member(j, name);
    putchar('[');
    j->comma = false;
}

void json_object(struct json *j)
{
    printf(j->comma ? ", {" : "{");
    j->comma = false;
}

void json_object_end(struct json *j)
{
    putchar('}');
    j->comma = true;
}

void json_list_end(struct json *j)
{
    putchar(']');
    j->comma = true;
}

void json_end(struct json *j)
{
    puts("}");
    fflush(stdout);
    j->comma = false;
}
