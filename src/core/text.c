/* A problem as one line of text: "fwd bf16 b2 h24/8 d128/64 30x48x80 w18x24x24 s16x8x8 r1x1x2 enct extra=512 scale=0.088". */
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "core/kernel.h"

static const char *const pass_names[] = {"fwd", "bwd", "qk", "av", "qk_bwd", "av_bwd"};
static const char *const dtype_names[] = {"f32", "f16", "bf16", "f64"};
static const char edge_letters[] = "nctp";

const char *nbhd_pass_name(int pass) { return pass_names[pass]; }
const char *nbhd_dtype_name(int dtype) { return dtype_names[dtype]; }

static int find_name(const char *const *names, int count, const char *word)
{
    for (int i = 0; i < count; i++)
        if (!strcmp(names[i], word))
            return i;
    return -1;
}

/* A whole decimal number at *p, advanced past it. */
static bool read_int(const char **p, int *value)
{
    if (!isdigit((unsigned char)**p))
        return false;
    errno = 0;
    char *end;
    long read = strtol(*p, &end, 10);
    if (errno || read > INT_MAX)
        return false;
    *value = (int)read;
    *p = end;
    return true;
}

/* "30x48x80": up to three numbers; how many, or 0 if text is not of that form. */
static int read_axes(const char *text, int axes[3])
{
    int count = 0;
    for (const char *p = text;; p++) {
        if (count == 3 || !read_int(&p, &axes[count]))
            return 0;
        count++;
        if (*p == '\0')
            return count;
        if (*p != 'x')
            return 0;
    }
}

/* "24/8": one or two numbers; the second is 0 if left out. */
static bool read_pair(const char *p, int *first, int *second)
{
    *second = 0;
    if (!read_int(&p, first))
        return false;
    if (*p == '\0')
        return true;
    return *p++ == '/' && read_int(&p, second) && *second > 0 && *p == '\0';
}

struct parse {
    nbhd_desc desc;
    unsigned seen;    /* one bit a field, against a field given twice */
    int edges, counts[4]; /* numbers of axes given: window, stride, dilation, kv */
};

enum { SEEN_PASS, SEEN_DTYPE, SEEN_BATCH, SEEN_HEADS, SEEN_DIM, SEEN_LENGTH, SEEN_WINDOW, SEEN_STRIDE, SEEN_DILATION,
       SEEN_KV, SEEN_EDGE, SEEN_EXTRA, SEEN_SCALE, SEEN_BIAS, SEEN_TF32 };

static bool once(struct parse *p, int field)
{
    bool first = !(p->seen & 1u << field);
    p->seen |= 1u << field;
    return first;
}

static bool positive(const int *values, int count)
{
    for (int i = 0; i < count; i++)
        if (values[i] < 1)
            return false;
    return count > 0;
}

static bool read_edges(struct parse *p, const char *letters)
{
    for (p->edges = 0; letters[p->edges]; p->edges++) {
        const char *at = strchr(edge_letters, letters[p->edges]);
        if (!at || p->edges == 3)
            return false;
        p->desc.edge[p->edges] = (int)(at - edge_letters);
    }
    return p->edges > 0;
}

static bool read_option(struct parse *p, const char *word)
{
    nbhd_desc *d = &p->desc;
    if (!strcmp(word, "bias"))
        return d->bias = 1, once(p, SEEN_BIAS);
    if (!strcmp(word, "tf32"))
        return d->tf32 = 1, once(p, SEEN_TF32);
    if (!strncmp(word, "extra=", 6)) {
        const char *at = word + 6;
        return once(p, SEEN_EXTRA) && read_int(&at, &d->extra) && !*at;
    }
    if (!strncmp(word, "kv=", 3))
        return once(p, SEEN_KV) && positive(d->kv_length, p->counts[3] = read_axes(word + 3, d->kv_length));
    if (!strncmp(word, "scale=", 6)) {
        char *end;
        d->scale = strtof(word + 6, &end);
        return once(p, SEEN_SCALE) && end != word + 6 && !*end && d->scale != 0.0f;
    }
    return false;
}

static bool read_word(struct parse *p, const char *word)
{
    nbhd_desc *d = &p->desc;
    int found;
    if (isdigit((unsigned char)word[0]))
        return once(p, SEEN_LENGTH) && positive(d->length, d->rank = read_axes(word, d->length));
    if ((found = find_name(pass_names, 6, word)) >= 0)
        return d->pass = found, once(p, SEEN_PASS);
    if ((found = find_name(dtype_names, 4, word)) >= 0)
        return d->dtype = found, once(p, SEEN_DTYPE);
    if (strchr(word, '=') || !strcmp(word, "bias") || !strcmp(word, "tf32"))
        return read_option(p, word);
    const char *value = word + 1;
    switch (word[0]) {
    case 'b': return once(p, SEEN_BATCH) && read_int(&value, &d->batch) && !*value && d->batch > 0;
    case 'h': return once(p, SEEN_HEADS) && read_pair(value, &d->heads, &d->kv_heads) && d->heads > 0;
    case 'd': return once(p, SEEN_DIM) && read_pair(value, &d->head_dim, &d->head_dim_v) && d->head_dim > 0;
    case 'w': return once(p, SEEN_WINDOW) && positive(d->window, p->counts[0] = read_axes(value, d->window));
    case 's': return once(p, SEEN_STRIDE) && positive(d->stride, p->counts[1] = read_axes(value, d->stride));
    case 'r': return once(p, SEEN_DILATION) && positive(d->dilation, p->counts[2] = read_axes(value, d->dilation));
    case 'e': return once(p, SEEN_EDGE) && read_edges(p, value);
    }
    return false;
}

static nbhd_status check_axis_counts(const struct parse *p)
{
    static const char *const fields[] = {"w (window)", "s (stride)", "r (dilation)", "kv"};
    if (!(p->seen & 1u << SEEN_LENGTH))
        return nbhd_fail(NBHD_ERROR_INVALID, "the axes' lengths are missing, e.g. 56x56");
    if (!(p->seen & 1u << SEEN_DIM))
        return nbhd_fail(NBHD_ERROR_INVALID, "d (head_dim) is missing, e.g. d64");
    for (int i = 0; i < 4; i++)
        if (p->counts[i] && p->counts[i] != p->desc.rank)
            return nbhd_fail(NBHD_ERROR_INVALID, "%s has %d numbers where the problem has %d axes", fields[i],
                             p->counts[i], p->desc.rank);
    if (p->edges && p->edges != p->desc.rank)
        return nbhd_fail(NBHD_ERROR_INVALID, "e (edge) has %d letters where the problem has %d axes", p->edges,
                         p->desc.rank);
    return NBHD_OK;
}

nbhd_status nbhd_desc_parse(nbhd_desc *desc, const char *text)
{
    struct parse p = {.desc = NBHD_DESC_INIT};
    while (*text) {
        size_t space = strspn(text, " \t\r\n"), length = strcspn(text + space, " \t\r\n");
        char word[64];
        snprintf(word, sizeof word, "%.*s", (int)(length < 63 ? length : 63), text + space);
        if (length && (length > 63 || !read_word(&p, word)))
            return nbhd_fail(NBHD_ERROR_INVALID, "'%s' is no field of a problem line, or is given twice or out of range",
                             word);
        text += space + length;
    }
    nbhd_status status = check_axis_counts(&p);
    struct nbhd_problem problem;
    if (status || (status = nbhd_problem_init(&problem, &p.desc)))
        return status;
    *desc = p.desc;
    return NBHD_OK;
}

/* ---- writing ---- */

struct writer {
    char *text;
    size_t capacity, length;
};

static void put(struct writer *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(struct writer *w, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    size_t room = w->length < w->capacity ? w->capacity - w->length : 0;
    int written = vsnprintf(room ? w->text + w->length : NULL, room, format, list);
    va_end(list);
    w->length += (size_t)written;
}

static void put_axes(struct writer *w, const char *prefix, const int *values, int rank)
{
    put(w, "%s%d", prefix, values[0]);
    for (int i = 1; i < rank; i++)
        put(w, "x%d", values[i]);
}

static bool all_equal_to(const int *values, int rank, int value)
{
    for (int i = 0; i < rank; i++)
        if (values[i] != value)
            return false;
    return true;
}

/* The shortest decimal that reads back as the same float. */
static void put_scale(struct writer *w, float scale)
{
    char text[32];
    for (int digits = 3; digits <= 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)scale);
        if (strtof(text, NULL) == scale)
            break;
    }
    put(w, " scale=%s", text);
}

nbhd_status nbhd_desc_format(const nbhd_desc *desc, char *text, size_t capacity)
{
    struct nbhd_problem problem, plain;
    nbhd_status status = nbhd_problem_init(&problem, desc);
    if (status)
        return status;
    const nbhd_desc *d = &problem.desc;
    nbhd_desc unscaled = *d;
    unscaled.scale = 0.0f;
    nbhd_problem_init(&plain, &unscaled); /* for the default scale */
    struct writer w = {text, capacity, 0};
    put(&w, "%s %s", nbhd_pass_name(d->pass), nbhd_dtype_name(d->dtype));
    if (d->batch != 1)
        put(&w, " b%d", d->batch);
    if (d->heads != 1)
        put(&w, " h%d", d->heads);
    if (d->kv_heads != d->heads)
        put(&w, "/%d", d->kv_heads);
    put(&w, " d%d", d->head_dim);
    if (d->head_dim_v != d->head_dim)
        put(&w, "/%d", d->head_dim_v);
    put_axes(&w, " ", d->length, d->rank);
    if (memcmp(d->kv_length, d->length, sizeof(int) * (size_t)d->rank))
        put_axes(&w, " kv=", d->kv_length, d->rank);
    put_axes(&w, " w", d->window, d->rank);
    if (!all_equal_to(d->stride, d->rank, 1))
        put_axes(&w, " s", d->stride, d->rank);
    if (!all_equal_to(d->dilation, d->rank, 1))
        put_axes(&w, " r", d->dilation, d->rank);
    if (!all_equal_to(d->edge, d->rank, NBHD_NEAREST)) {
        put(&w, " e");
        for (int i = 0; i < d->rank; i++)
            put(&w, "%c", edge_letters[d->edge[i]]);
    }
    if (d->extra)
        put(&w, " extra=%d", d->extra);
    if (d->scale != plain.desc.scale)
        put_scale(&w, d->scale);
    if (d->bias)
        put(&w, " bias");
    if (d->tf32)
        put(&w, " tf32");
    if (w.length >= capacity)
        return nbhd_fail(NBHD_ERROR_INVALID, "capacity is %zu; the problem line needs %zu bytes", capacity, w.length + 1);
    return NBHD_OK;
}
