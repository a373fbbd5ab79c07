/* One JSON object a line on stdout. */
#include "json.h"

#include <math.h>
#include <stdio.h>

/* Bytes of the UTF-8 character at text, 0 if it is none (RFC 3629: the shortest form, no surrogates). */
static int utf8_length(const unsigned char *text)
{
    const unsigned char c = *text;
    const int length = c < 0x80 ? 1 : c < 0xC2 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 0;
    for (int i = 1; i < length; i++)
        if ((text[i] & 0xC0) != 0x80)
            return 0;
    const bool shorter = (c == 0xE0 && text[1] < 0xA0) || (c == 0xF0 && text[1] < 0x90);
    const bool beyond = (c == 0xED && text[1] > 0x9F) || (c == 0xF4 && text[1] > 0x8F);
    return shorter || beyond ? 0 : length;
}

bool json_can_hold(const char *text)
{
    for (int length; *text; text += length)
        if (!(length = utf8_length((const unsigned char *)text)))
            return false;
    return true;
}

/* A file's name may be any bytes; what is not UTF-8 would not be JSON, and becomes the replacement character. */
static void put_text(const char *text)
{
    putchar('"');
    for (int length; *text; text += length ? length : 1) {
        unsigned char c = (unsigned char)*text;
        length = utf8_length((const unsigned char *)text);
        if (!length)
            printf("\\ufffd");
        else if (c == '"' || c == '\\')
            printf("\\%c", c);
        else if (c < 32)
            printf("\\u%04x", c);
        else
            printf("%.*s", length, text);
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
