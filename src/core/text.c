/* A problem as one line of text: "fwd bf16 b2 h24/8 d128/64 30x48x80 w18x24x24 s16x8x8 r1x1x2 enct extra=512
 * scale=0.088". */
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

/* The fields, and what their values must look like. */
enum { PASS, DTYPE, BATCH, HEADS, DIM, LENGTH, WINDOW, STRIDE, DILATION, KV, EDGE, EXTRA, SCALE, BIAS, TF32 };
static const struct {
    const char *name, *form;
} fields[] = {
    [PASS] = {"the pass", ""},
    [DTYPE] = {"the dtype", ""},
    [BATCH] = {"b (batch)", "one whole number of at least 1, as b2"},
    [HEADS] = {"h (heads)", "one or two whole numbers of at least 1, as h24 or h24/8"},
    [DIM] = {"d (head_dim)", "one or two whole numbers of at least 1, as d128 or d128/64"},
    [LENGTH] = {"the axes' lengths", "one to three whole numbers of at least 1, as 30x48x80"},
    [WINDOW] = {"w (window)", "one to three whole numbers of at least 1, as w18x24x24"},
    [STRIDE] = {"s (stride)", "one to three whole numbers of at least 1, as s16x8x8"},
    [DILATION] = {"r (dilation)", "one to three whole numbers of at least 1, as r1x1x2"},
    [KV] = {"kv (key tokens)", "one to three whole numbers of at least 1, as kv=8x8"},
    [EDGE] = {"e (edge)", "one to three letters of n, c, t, p, as enct"},
    [EXTRA] = {"extra", "one whole number, as extra=512"},
    [SCALE] = {"scale", "a number other than 0, as scale=0.125"},
    [BIAS] = {"bias", "without a value"},
    [TF32] = {"tf32", "without a value"},
};

struct parse {
    nbhd_desc desc;
    unsigned seen;       /* one bit a field, against a field given twice */
    int counts[EDGE + 1]; /* numbers, or letters, of axes given */
};

static bool positive(const int *values, int count)
{
    for (int i = 0; i < count; i++)
        if (values[i] < 1)
            return false;
    return count > 0;
}

static bool read_edges(struct parse *p, const char *letters)
{
    int count = 0;
    for (; letters[count]; count++) {
        const char *at = strchr(edge_letters, letters[count]);
        if (!at || count == 3)
            return false;
        p->desc.edge[count] = (int)(at - edge_letters);
    }
    return (p->counts[EDGE] = count) > 0;
}

/* Which field a word gives, and where its value begins; -1: none. */
static int field_of(const char *word, const char **value)
{
    static const char *const options[] = {"kv", "extra", "scale", "bias", "tf32"};
    static const int option_fields[] = {KV, EXTRA, SCALE, BIAS, TF32};
    static const char letters[] = "bhdwsre"; /* in the order of the fields from BATCH, but for LENGTH and KV */
    static const int letter_fields[] = {BATCH, HEADS, DIM, WINDOW, STRIDE, DILATION, EDGE};
    *value = word;
    if (isdigit((unsigned char)*word))
        return LENGTH;
    if (find_name(pass_names, 6, word) >= 0)
        return PASS;
    if (find_name(dtype_names, 4, word) >= 0)
        return DTYPE;
    const size_t name = strcspn(word, "=");
    for (int i = 0; i < 5; i++)
        if (strlen(options[i]) == name && !strncmp(word, options[i], name))
            return *value += name, option_fields[i];
    *value += 1;
    const char *letter = strchr(letters, *word);
    return letter && (isdigit((unsigned char)**value) || **value == '-' || *word == 'e' || !**value)
               ? letter_fields[letter - letters]
               : -1;
}

static bool read_axis_field(struct parse *p, int field, const char *text, int values[3])
{
    return positive(values, p->counts[field] = read_axes(text, values));
}

/* A field's value; false if it is not of the field's form. */
static bool read_value(struct parse *p, int field, const char *value)
{
    nbhd_desc *d = &p->desc;
    const char *end;
    switch (field) {
    case PASS: return (d->pass = find_name(pass_names, 6, value)) >= 0;
    case DTYPE: return (d->dtype = find_name(dtype_names, 4, value)) >= 0;
    case BATCH: return read_int(&value, &d->batch) && !*value && d->batch > 0;
    case HEADS: return read_pair(value, &d->heads, &d->kv_heads) && d->heads > 0;
    case DIM: return read_pair(value, &d->head_dim, &d->head_dim_v) && d->head_dim > 0;
    case LENGTH: return positive(d->length, d->rank = read_axes(value, d->length));
    case WINDOW: return read_axis_field(p, field, value, d->window);
    case STRIDE: return read_axis_field(p, field, value, d->stride);
    case DILATION: return read_axis_field(p, field, value, d->dilation);
    case KV: return *value++ && read_axis_field(p, field, value, d->kv_length);
    case EDGE: return read_edges(p, value);
    case EXTRA: return *value++ && read_int(&value, &d->extra) && !*value;
    case SCALE:
        d->scale = (float)nbhd_read_number(*value ? ++value : value, &end);
        return end != value && !*end && d->scale != 0.0f;
    case BIAS: return d->bias = 1, !*value;
    default: return d->tf32 = 1, !*value;
    }
}

/* A number that an int cannot hold is of no other form than one that it can. */
static bool is_too_large(const char *word)
{
    const char *digits = word + strcspn(word, "0123456789");
    errno = 0;
    for (; *digits && !errno && strtol(digits, NULL, 10) <= INT_MAX; digits += strcspn(digits, "0123456789"))
        digits += strspn(digits, "0123456789");
    return errno || *digits; /* errno: where a long is an int */
}

static nbhd_status read_word(struct parse *p, const char *word)
{
    const char *value;
    const int field = field_of(word, &value);
    if (field < 0)
        return nbhd_fail(NBHD_ERROR_INVALID, "'%s' is no field of a problem line", word);
    if (p->seen & 1u << field)
        return nbhd_fail(NBHD_ERROR_INVALID, "'%s': %s is given twice", word, fields[field].name);
    p->seen |= 1u << field;
    if (!read_value(p, field, value))
        return nbhd_fail(NBHD_ERROR_INVALID, "'%s': %s must be %s%s", word, fields[field].name, fields[field].form,
                         field != SCALE && is_too_large(word) ? ", and at most 2147483647" : "");
    return NBHD_OK;
}

static nbhd_status check_axis_counts(const struct parse *p)
{
    if (!(p->seen & 1u << LENGTH))
        return nbhd_fail(NBHD_ERROR_INVALID, "the axes' lengths are missing, e.g. 56x56");
    if (!(p->seen & 1u << DIM))
        return nbhd_fail(NBHD_ERROR_INVALID, "d (head_dim) is missing, e.g. d64");
    for (int i = WINDOW; i <= EDGE; i++)
        if (p->counts[i] && p->counts[i] != p->desc.rank)
            return nbhd_fail(NBHD_ERROR_INVALID, "%s has %d %s%s for %d ax%s", fields[i].name,
                             p->counts[i], i == EDGE ? "letter" : "number", p->counts[i] > 1 ? "s" : "",
                             p->desc.rank, p->desc.rank > 1 ? "es" : "is");
    return NBHD_OK;
}

nbhd_status nbhd_desc_parse(nbhd_desc *desc, const char *text)
{
    struct parse p = {.desc = NBHD_DESC_INIT};
    nbhd_status status;
    if (!desc || !text)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is NULL", desc ? "text" : "desc");
    while (*(text += strspn(text, " \t\r\n"))) {
        const size_t length = strcspn(text, " \t\r\n");
        char word[64];
        snprintf(word, sizeof word, "%.*s", (int)(length < 63 ? length : 63), text);
        if (length > 63)
            return nbhd_fail(NBHD_ERROR_INVALID, "'%s...' is no field of a problem line: it has %zu characters", word,
                             length);
        if ((status = read_word(&p, word)))
            return status;
        text += length;
    }
    struct nbhd_problem problem;
    if ((status = check_axis_counts(&p)) || (status = nbhd_problem_init(&problem, &p.desc)))
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
    const char *end;
    for (int digits = 3; digits <= 9; digits++) {
        nbhd_write_number(text, digits, (double)scale);
        if ((float)nbhd_read_number(text, &end) == scale)
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
    struct writer w = {text, text ? capacity : 0, 0};
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
    if (w.length >= w.capacity)
        return nbhd_fail(NBHD_ERROR_INVALID, "%s is %zu; the problem line needs %zu bytes",
                         text ? "capacity" : "text is NULL; its capacity", w.capacity, w.length + 1);
    return NBHD_OK;
}
