/* Reads the header of a .npy file: magic, version, then a Python dict of three entries and the data. */
#include "array.h"

#include <stdio.h>
#include <string.h>

struct cursor {
    const char *at, *end;
};

static void skip_space(struct cursor *c)
{
    while (c->at < c->end && (*c->at == ' ' || *c->at == '\n' || *c->at == '\t'))
        c->at++;
}

static bool take(struct cursor *c, const char *text)
{
    size_t length = strlen(text);
    skip_space(c);
    if ((size_t)(c->end - c->at) < length || memcmp(c->at, text, length))
        return false;
    c->at += length;
    return true;
}

/* A quoted string without escapes. */
static bool take_string(struct cursor *c, char *text, size_t capacity)
{
    skip_space(c);
    if (c->at == c->end || (*c->at != '\'' && *c->at != '"'))
        return false;
    char quote = *c->at++;
    size_t n = 0;
    while (c->at < c->end && *c->at != quote && n + 1 < capacity)
        text[n++] = *c->at++;
    text[n] = 0;
    return c->at < c->end && *c->at++ == quote;
}

static bool take_number(struct cursor *c, long long *number)
{
    skip_space(c);
    const char *start = c->at;
    long long n = 0;
    while (c->at < c->end && *c->at >= '0' && *c->at <= '9' && c->at - start < 18)
        n = 10 * n + (*c->at++ - '0');
    *number = n;
    bool whole = c->at > start && (c->at == c->end || *c->at < '0' || *c->at > '9');
    take(c, "L"); /* as Python 2 wrote them */
    return whole;
}

static bool take_shape(struct cursor *c, struct array_info *info)
{
    info->rank = 0;
    if (!take(c, "("))
        return false;
    while (!take(c, ")")) {
        if (info->rank == ARRAY_RANK || !take_number(c, &info->shape[info->rank++]))
            return false;
        if (!take(c, ","))
            return take(c, ")");
    }
    return true;
}

static bool say(char why[NBHD_TEXT], const char *sentence)
{
    snprintf(why, NBHD_TEXT, "%s", sentence);
    return false;
}

static bool read_dtype(const char *descr, struct array_info *info, char why[NBHD_TEXT])
{
    static const struct {
        const char *descr;
        int dtype;
    } known[] = {{"f4", NBHD_F32}, {"f2", NBHD_F16}, {"f8", NBHD_F64}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(descr + 1, known[i].descr))
            continue;
        info->dtype = known[i].dtype;
        info->big_endian = descr[0] == '>';
        if (strchr("<=>", descr[0]))
            return true;
    }
    snprintf(why, NBHD_TEXT,
             "its dtype is '%.60s'; a .npy must be 'f2', 'f4' or 'f8' (bfloat16 travels in .safetensors)", descr);
    return false;
}

/* The dict; the three keys in any order, each once. */
static bool read_dict(struct cursor *c, struct array_info *info, char why[NBHD_TEXT])
{
    char key[32], descr[64] = "";
    bool shape = false, order = false;
    if (!take(c, "{"))
        return say(why, "its header is not a dict");
    while (!take(c, "}")) {
        if (!take_string(c, key, sizeof key) || !take(c, ":"))
            return say(why, "its header is not a dict of descr, fortran_order and shape");
        bool good = false;
        if (!strcmp(key, "descr") && !*descr)
            good = take_string(c, descr, sizeof descr) && *descr;
        else if (!strcmp(key, "fortran_order") && !order)
            good = order = take(c, "False") || (info->fortran = take(c, "True"));
        else if (!strcmp(key, "shape") && !shape)
            good = shape = take_shape(c, info);
        if (!good) {
            snprintf(why, NBHD_TEXT, "its header's entry '%s' cannot be read%s", key,
                     strcmp(key, "shape") ? "" : "; it must be a tuple of at most 8 whole numbers");
            return false;
        }
        if (!take(c, ",") && !take(c, "}"))
            return say(why, "its header breaks off");
        else if (c->at[-1] == '}')
            break;
    }
    if (!*descr || !order || !shape)
        return say(why, "its header lacks descr, fortran_order or shape");
    return read_dtype(descr, info, why);
}

bool npy_parse(const unsigned char *file, size_t size, struct array_info *info, char why[NBHD_TEXT])
{
    memset(info, 0, sizeof *info);
    if (size < 10 || memcmp(file, "\x93NUMPY", 6))
        return say(why, "it is not a .npy file");
    if (file[6] < 1 || file[6] > 3) {
        snprintf(why, NBHD_TEXT, "its format version is %d.%d; known are 1.0 to 3.0", file[6], file[7]);
        return false;
    }
    size_t start = file[6] == 1 ? 10 : 12;
    size_t length = (size_t)(file[8] | file[9] << 8);
    if (start == 12 && size >= 12)
        length |= (size_t)file[10] << 16 | (size_t)file[11] << 24;
    if (size < start || length > size - start) {
        snprintf(why, NBHD_TEXT, "its header claims %zu bytes and the file ends after %zu", length,
                 size < start ? 0 : size - start);
        return false;
    }
    struct cursor c = {(const char *)file + start, (const char *)file + start + length};
    if (!read_dict(&c, info, why))
        return false;
    info->offset = start + length;
    info->bytes = dtype_size(info->dtype);
    for (int i = 0; i < info->rank; i++)
        if (__builtin_mul_overflow(info->bytes, (size_t)info->shape[i], &info->bytes))
            return say(why, "its shape has more bytes than can be addressed");
    if (info->bytes > size - info->offset) {
        snprintf(why, NBHD_TEXT, "its shape needs %zu bytes of data and the file holds %zu", info->bytes,
                 size - info->offset);
        return false;
    }
    return true;
}
