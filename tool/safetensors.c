/* Finds a tensor in a .safetensors file: 8 bytes with the header's length, a JSON object, the data.
 * The JSON reader is a cursor over the text: no tree, no allocation, and a limit on nesting. */
#include "array.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { DEPTH = 32, HEADER_MAX = 100000000 /* as the format's own reader has it */ };

struct reader {
    const char *at, *end;
    char *why;
};

static bool fail(struct reader *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static bool fail(struct reader *r, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(r->why, NBHD_TEXT, format, list);
    va_end(list);
    return false;
}

/* The next character that is not white space; 0 at the end. */
static char peek(struct reader *r)
{
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\t' || *r->at == '\r'))
        r->at++;
    return r->at < r->end ? *r->at : 0;
}

static bool take(struct reader *r, char c)
{
    if (peek(r) != c || r->at == r->end)
        return false;
    r->at++;
    return true;
}

static int hex4(struct reader *r)
{
    int value = 0;
    for (int i = 0; i < 4; i++) {
        char c = r->at < r->end ? *r->at++ : 0;
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0)
            return -1;
        value = value << 4 | digit;
    }
    return value;
}

static size_t utf8(unsigned code, char out[4])
{
    if (code < 0x80)
        return out[0] = (char)code, 1;
    if (code < 0x800)
        return out[0] = (char)(0xC0 | code >> 6), out[1] = (char)(0x80 | (code & 63)), 2;
    if (code < 0x10000)
        return out[0] = (char)(0xE0 | code >> 12), out[1] = (char)(0x80 | (code >> 6 & 63)),
               out[2] = (char)(0x80 | (code & 63)), 3;
    out[0] = (char)(0xF0 | code >> 18), out[1] = (char)(0x80 | (code >> 12 & 63));
    return out[2] = (char)(0x80 | (code >> 6 & 63)), out[3] = (char)(0x80 | (code & 63)), 4;
}

/* After a backslash: the character meant, as UTF-8. Returns its bytes, 0 if there is no such escape. */
static size_t escape(struct reader *r, char out[4])
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    char c = r->at < r->end ? *r->at++ : 0;
    const char *found = c ? strchr(from, c) : NULL;
    if (found)
        return out[0] = to[found - from], 1;
    if (c != 'u')
        return 0;
    int code = hex4(r);
    if (code >= 0xD800 && code < 0xDC00 && r->end - r->at >= 6 && r->at[0] == '\\' && r->at[1] == 'u') {
        r->at += 2;
        int low = hex4(r);
        code = low >= 0xDC00 && low < 0xE000 ? 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00) : -1;
    }
    bool lone = code >= 0xD800 && code < 0xE000; /* half of a pair */
    return code < 0 || lone ? 0 : utf8((unsigned)code, out);
}

/* A string; *equal tells whether it is `expected`, and text (may be NULL) gets as much of it as fits,
 * fit to be printed. */
static bool string(struct reader *r, const char *expected, bool *equal, char *text, size_t capacity)
{
    size_t n = 0, wanted = strlen(expected);
    *equal = true;
    if (!take(r, '"'))
        return fail(r, "its header is not the JSON of a .safetensors file: a name in quotes is missing");
    for (;;) {
        char piece[4];
        size_t length = 1;
        if (r->at == r->end)
            return fail(r, "its header breaks off within a string");
        piece[0] = *r->at++;
        if (piece[0] == '"')
            break;
        if (piece[0] == '\\' && !(length = escape(r, piece)))
            return fail(r, "its header has a string with an unknown escape");
        *equal = *equal && n + length <= wanted && !memcmp(expected + n, piece, length);
        for (size_t i = 0; i < length && text && n + i + 1 < capacity; i++)
            text[n + i] = (unsigned char)piece[i] < 32 || piece[i] == 127 ? '?' : piece[i], text[n + i + 1] = 0;
        n += length;
    }
    if (text && !n)
        text[0] = 0;
    *equal = *equal && n == wanted;
    return true;
}

static bool number(struct reader *r, long long *value)
{
    peek(r);
    const char *start = r->at;
    *value = 0;
    while (r->at < r->end && *r->at >= '0' && *r->at <= '9' && r->at - start < 18)
        *value = 10 * *value + (*r->at++ - '0');
    const bool any = r->at > start;
    const char next = peek(r);
    return any && (!next || !strchr(".eE0123456789", next));
}

/* Passes over any value. */
static bool skip(struct reader *r)
{
    bool ignored;
    int depth = 0;
    do {
        char c = peek(r);
        if (c == '"') {
            if (!string(r, "", &ignored, NULL, 0))
                return false;
        } else if (c == '{' || c == '[') {
            if (++depth > DEPTH)
                return fail(r, "its header nests deeper than %d", DEPTH);
            r->at++;
        } else if (c == '}' || c == ']') {
            if (--depth < 0)
                return fail(r, "its header has a bracket too many");
            r->at++;
        } else if (!c) {
            return fail(r, "its header breaks off");
        } else {
            r->at++; /* a number, true, false, null, a comma or a colon */
            if (!depth)
                while (r->at < r->end && !strchr(",}] \t\r\n", *r->at))
                    r->at++;
        }
    } while (depth);
    return true;
}

/* [n, n, ...]; returns the count, or -1 */
static int numbers(struct reader *r, long long *values, int room)
{
    int count = 0;
    if (!take(r, '['))
        return -1;
    if (take(r, ']'))
        return 0;
    do {
        if (count == room || !number(r, &values[count++]))
            return -1;
    } while (take(r, ','));
    return take(r, ']') ? count : -1;
}

static bool dtype_of(struct reader *r, const char *name, int *dtype)
{
    static const struct {
        const char *name;
        int dtype;
    } known[] = {{"F32", NBHD_F32}, {"F16", NBHD_F16}, {"BF16", NBHD_BF16}, {"F64", NBHD_F64}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name))
            return *dtype = known[i].dtype, true;
    return fail(r, "the tensor's dtype is %s; it must be F16, BF16, F32 or F64", name);
}

/* {"dtype":"F32","shape":[..],"data_offsets":[begin,end]}, of a data section of `room` bytes that begins at `base`. */
static bool entry(struct reader *r, size_t base, size_t room, struct array_info *info)
{
    char key[16], type[16] = "";
    long long range[2] = {0, -1};
    bool equal;
    info->rank = -1;
    if (!take(r, '{'))
        return fail(r, "the tensor's entry is not a JSON object");
    do {
        if (!string(r, "", &equal, key, sizeof key))
            return false;
        if (!take(r, ':'))
            return fail(r, "the tensor's entry lacks a colon after '%s'", key);
        if (!strcmp(key, "dtype") && !string(r, "", &equal, type, sizeof type))
            return false;
        if (!strcmp(key, "shape") && (info->rank = numbers(r, info->shape, ARRAY_RANK)) < 0)
            return fail(r, "the tensor's shape is not a list of at most %d numbers", ARRAY_RANK);
        if (!strcmp(key, "data_offsets") && numbers(r, range, 2) != 2)
            return fail(r, "the tensor's data_offsets are not two numbers");
        if (strcmp(key, "dtype") && strcmp(key, "shape") && strcmp(key, "data_offsets") && !skip(r))
            return false;
    } while (take(r, ','));
    if (!take(r, '}'))
        return fail(r, "the tensor's entry breaks off");
    if (!*type || info->rank < 0 || range[1] < 0)
        return fail(r, "the tensor's entry lacks dtype, shape or data_offsets");
    if (!dtype_of(r, type, &info->dtype))
        return false;
    if (range[0] > range[1] || (unsigned long long)range[1] > room)
        return fail(r, "the tensor's data_offsets [%lld, %lld] are not within the file's %zu bytes of data", range[0],
                    range[1], room);
    info->offset = base + (size_t)range[0];
    info->bytes = dtype_size(info->dtype);
    for (int i = 0; i < info->rank; i++)
        if (__builtin_mul_overflow(info->bytes, (size_t)info->shape[i], &info->bytes))
            return fail(r, "the tensor's shape has more bytes than can be addressed");
    if (info->bytes != (size_t)(range[1] - range[0]))
        return fail(r, "the tensor's shape needs %zu bytes and its data_offsets span %lld", info->bytes,
                    range[1] - range[0]);
    return true;
}

/* The members of the outer object. names[] collects what there is, for the sentence when the name is not found. */
static bool members(struct reader *r, const char *name, size_t base, size_t room, struct array_info *info)
{
    char names[160] = "";
    int found = 0, tensors = 0;
    if (!take(r, '{'))
        return fail(r, "its header is not the JSON of a .safetensors file");
    bool more = !take(r, '}');
    while (more) {
        bool equal;
        char key[64];
        if (!string(r, name, &equal, key, sizeof key))
            return false;
        if (!take(r, ':'))
            return fail(r, "its header lacks a colon after '%s'", key);
        bool metadata = !strcmp(key, "__metadata__");
        tensors += !metadata;
        bool wanted = !metadata && (*name ? equal : tensors == 1);
        found += wanted;
        if (wanted ? !entry(r, base, room, info) : !skip(r))
            return false;
        if (!metadata && strlen(names) + strlen(key) + 6 < sizeof names)
            snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", tensors > 1 ? ", " : "", key);
        more = take(r, ',');
        if (!more && !take(r, '}'))
            return fail(r, "its header breaks off after '%s'", key);
    }
    if (peek(r) || r->at < r->end)
        return fail(r, "its header goes on after the JSON object");
    if (!*name && tensors > 1)
        return fail(r, "it holds %d tensors; say which as FILE.safetensors:NAME (%s)", tensors, names);
    if (!tensors)
        return fail(r, "it holds no tensor");
    if (!found)
        return fail(r, "it holds no tensor '%.80s' (it holds %s)", name, names);
    return found == 1 || fail(r, "it holds '%.80s' %d times", name, found);
}

bool safetensors_find(const unsigned char *file, size_t size, const char *name, struct array_info *info,
                      char why[NBHD_TEXT])
{
    memset(info, 0, sizeof *info);
    struct reader r = {.why = why};
    if (size < 8)
        return fail(&r, "it is not a .safetensors file: it has only %zu bytes", size);
    unsigned long long length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | file[i];
    if (length > HEADER_MAX || length > size - 8)
        return fail(&r, "its header claims %llu bytes and the file has %zu", length, size);
    r.at = (const char *)file + 8;
    r.end = r.at + length;
    size_t base = 8 + (size_t)length;
    return members(&r, name, base, size - base, info);
}
