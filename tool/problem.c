/* See problem.h. */
#include "problem.h"

#include <ctype.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

enum { MOST_SEQUENCES = 1 << 20 };

/* A grid "30x40" at *text, and "*3" behind it. */
static bool read_grid(const char **text, int grid[3], int *rank, int *times)
{
    char *end;
    *times = 1;
    for (*rank = 0; *rank < 3; (*text)++) {
        if (!isdigit((unsigned char)**text))
            return false;
        const long n = strtol(*text, &end, 10);
        if (n < 1 || n > 0x7fffffff)
            return false;
        grid[(*rank)++] = (int)n;
        *text = end;
        if (**text != 'x')
            break;
    }
    if (**text == '*') {
        const long n = isdigit((unsigned char)(*text)[1]) ? strtol(*text + 1, &end, 10) : 0;
        if (n < 1)
            return false;
        *times = n > MOST_SEQUENCES ? MOST_SEQUENCES + 1 : (int)n;
        *text = end;
    }
    return true;
}

int problem_grids(const char *name, const char *text, int *rank, int *sequences, int **lengths)
{
    int grid[3], axes, times;
    const char *at = text;
    *sequences = 0;
    *lengths = NULL;
    do {
        if (!read_grid(&at, grid, &axes, &times) || (*at && *at != '+' && *at != ','))
            return tool_fail(TOOL_USAGE, "%s: '%.40s' is not of the form 30x40+16x16+9x33*2", name, text);
        if (*rank && axes != *rank)
            return tool_fail(TOOL_USAGE, "%s: '%.40s' has grids of %d and of %d axes", name, text, *rank, axes);
        *rank = axes;
        if (*sequences + times > MOST_SEQUENCES)
            return tool_fail(TOOL_USAGE, "%s: more than %d sequences", name, MOST_SEQUENCES);
        int *grown = realloc(*lengths, (size_t)(*sequences + times) * (size_t)axes * sizeof **lengths);
        if (!grown)
            return tool_fail(TOOL_FAILED, "out of memory");
        *lengths = grown;
        for (; times > 0; times--, (*sequences)++)
            memcpy(*lengths + (size_t)*sequences * (size_t)axes, grid, (size_t)axes * sizeof *grid);
    } while (*at++);
    return TOOL_DONE;
}

/* ---- text ---- */

struct text {
    char *to;
    size_t used;
};

static void add(struct text *t, const char *word, int length)
{
    if (t->used < NBHD_TEXT)
        t->used += (size_t)snprintf(t->to + t->used, NBHD_TEXT - t->used, "%s%.*s", t->used ? " " : "", length, word);
}

static void add_grids(struct text *t, const char *prefix, const int *lengths, int sequences, int rank)
{
    char *to = t->to;
    add(t, prefix, (int)strlen(prefix));
    for (int s = 0, times; s < sequences; s += times) {
        const int *grid = lengths + (size_t)s * (size_t)rank;
        times = 1;
        while (s + times < sequences && !memcmp(grid, grid + (size_t)times * (size_t)rank, (size_t)rank * sizeof *grid))
            times++;
        for (int i = 0; i < rank && t->used < NBHD_TEXT; i++)
            t->used += (size_t)snprintf(to + t->used, NBHD_TEXT - t->used, "%s%d", i ? "x" : s ? "+" : "", grid[i]);
        if (times > 1 && t->used < NBHD_TEXT)
            t->used += (size_t)snprintf(to + t->used, NBHD_TEXT - t->used, "*%d", times);
    }
}

static bool is_list(const char *word, int length)
{
    return (isdigit((unsigned char)*word) || !strncmp(word, "kv=", 3)) &&
           (memchr(word, '+', (size_t)length) || memchr(word, '*', (size_t)length));
}

/* A ragged batch's: that of its first sequence, with the lists in place of its axes, and without windows that were not
 * given. */
int problem_write_line(struct problem *p)
{
    char first[NBHD_TEXT];
    struct text t = {p->line, 0};
    const nbhd_desc desc = problem_part(p, 0);
    const nbhd_status status = nbhd_desc_format(&desc, first, sizeof first);
    if (status != NBHD_OK)
        return tool_fail_library(status);
    if (!p->sequences)
        return memcpy(p->line, first, sizeof first), TOOL_DONE;
    for (const char *word = first; *word; word += strspn(word, " ")) {
        const int length = (int)strcspn(word, " ");
        if (isdigit((unsigned char)*word)) {
            add_grids(&t, "", p->lengths, p->sequences, p->desc.rank);
            if (p->kv_lengths)
                add_grids(&t, "kv=", p->kv_lengths, p->sequences, p->desc.rank);
        } else if (strncmp(word, "kv=", 3) && (*word != 'w' || p->desc.window[0])) {
            add(&t, word, length);
        }
        word += length;
    }
    return t.used < NBHD_TEXT ? TOOL_DONE
                              : tool_fail(TOOL_USAGE, "a problem line is longer than %d characters", NBHD_TEXT - 1);
}

/* Cuts text into lists of grids and the rest, a line with the first grids. */
static int read_lists(struct problem *p, const char *text, char rest[NBHD_TEXT])
{
    char word[NBHD_TEXT];
    struct text t = {rest, 0};
    int rank = 0, kv_sequences = 0, status = TOOL_DONE;
    rest[0] = 0;
    while (*(text += strspn(text, " \t\r\n")) && !status) {
        const int length = (int)strcspn(text, " \t\r\n");
        snprintf(word, sizeof word, "%.*s", length, text);
        if (!is_list(text, length)) {
            add(&t, word, length);
        } else if (*word == 'k') {
            if (p->kv_lengths)
                return tool_fail(TOOL_USAGE, "kv= is given twice");
            status = problem_grids("kv=", word + 3, &rank, &kv_sequences, &p->kv_lengths);
            add(&t, word, (int)strcspn(word, "+*,"));
        } else {
            if (p->lengths)
                return tool_fail(TOOL_USAGE, "'%.40s': the axes are given twice", word);
            status = problem_grids("axes", word, &rank, &p->sequences, &p->lengths);
            add(&t, word, (int)strcspn(word, "+*,"));
        }
        text += length;
    }
    if (!status && p->kv_lengths && kv_sequences != p->sequences)
        return tool_fail(TOOL_USAGE, "kv= lists %d grids and the axes list %d", kv_sequences, p->sequences);
    if (!status && p->sequences && !p->kv_lengths && strstr(rest, "kv="))
        return tool_fail(TOOL_USAGE, "kv= is one grid where the axes list %d", p->sequences);
    return status;
}

int problem_parse(struct problem *p, const char *text, const char *where)
{
    char rest[NBHD_TEXT];
    *p = (struct problem){.sequences = 0};
    int status = read_lists(p, text, rest);
    if (status)
        return status;
    nbhd_status result = nbhd_desc_parse(&p->desc, rest);
    if (result == NBHD_OK && !p->sequences)
        result = nbhd_desc_format(&p->desc, p->line, sizeof p->line);
    if (result != NBHD_OK)
        return tool_fail(result == NBHD_ERROR_INVALID ? TOOL_USAGE : TOOL_FAILED, "%s%s", where, nbhd_last_error());
    if (p->sequences && p->desc.batch > 1)
        return tool_fail(TOOL_USAGE, "%sb%d: the batch of a ragged problem is its sequences, %d", where, p->desc.batch,
                         p->sequences);
    return p->sequences ? problem_write_line(p) : TOOL_DONE;
}

void problem_release(struct problem *p)
{
    free(p->lengths);
    free(p->kv_lengths);
    p->lengths = p->kv_lengths = NULL;
}

/* ---- what the commands ask ---- */

nbhd_desc problem_part(const struct problem *p, int sequence)
{
    nbhd_desc d = p->desc;
    for (int i = 0; p->sequences && i < d.rank; i++) {
        d.batch = 0;
        d.length[i] = p->lengths[(size_t)sequence * (size_t)d.rank + (size_t)i];
        d.kv_length[i] = p->kv_lengths ? p->kv_lengths[(size_t)sequence * (size_t)d.rank + (size_t)i] : 0;
    }
    return d;
}

static unsigned plan_flags(const struct problem *p) { return p->deterministic ? NBHD_PLAN_DETERMINISTIC : 0; }

nbhd_status problem_plan(nbhd_plan **plan, const struct problem *p, int pass, nbhd_device device, const char *kernel)
{
    nbhd_desc desc = p->desc;
    desc.pass = pass;
    if (!p->sequences)
        return nbhd_plan_create_with(plan, &desc, device, plan_flags(p), kernel);
    nbhd_ragged ragged = NBHD_RAGGED_INIT;
    ragged.sequences = p->sequences;
    ragged.lengths = p->lengths;
    ragged.kv_lengths = p->kv_lengths;
    memset(desc.length, 0, sizeof desc.length);
    memset(desc.kv_length, 0, sizeof desc.kv_length);
    return nbhd_plan_create_ragged(plan, &desc, &ragged, device, plan_flags(p), kernel);
}

double problem_pairs(const struct problem *p)
{
    double pairs = 0;
    for (int s = 0; s < problem_parts(p); s++) {
        const nbhd_desc d = problem_part(p, s);
        pairs += nbhd_desc_pairs(&d);
    }
    return pairs;
}

double problem_flops(const struct problem *p)
{
    double flops = 0;
    for (int s = 0; s < problem_parts(p); s++) {
        const nbhd_desc d = problem_part(p, s);
        flops += nbhd_desc_flops(&d);
    }
    return flops;
}

void problem_refusal(const struct problem *p, int i, nbhd_device device, char why[NBHD_TEXT])
{
    why[0] = 0;
    for (int s = 0; s < problem_parts(p) && !why[0]; s++) {
        const nbhd_desc d = problem_part(p, s);
        if (nbhd_kernel_refusal_with(i, &d, device, plan_flags(p), why, NBHD_TEXT) != NBHD_OK)
            snprintf(why, NBHD_TEXT, "%s", nbhd_last_error());
    }
}

void problem_tokens(const struct problem *p, long long *tokens, long long *keys)
{
    *tokens = *keys = 0;
    for (int s = 0; s < problem_parts(p); s++) {
        const nbhd_desc one = problem_part(p, s);
        long long length = 1, kv = 1;
        for (int i = 0; i < one.rank; i++) {
            length *= one.length[i];
            kv *= one.kv_length[i] ? one.kv_length[i] : one.length[i];
        }
        *tokens += length;
        *keys += kv;
    }
}

nbhd_desc problem_tensors(const struct problem *p)
{
    nbhd_desc d = p->desc;
    long long tokens, keys;
    problem_tokens(p, &tokens, &keys);
    if (!p->sequences || tokens > 0x7fffffff || keys > 0x7fffffff)
        return d;
    for (int i = 0; i < d.rank; i++) {
        d.length[i] = i == d.rank - 1 ? (int)tokens : 1;
        d.kv_length[i] = i == d.rank - 1 ? (int)keys : 1;
    }
    d.extra *= p->sequences;
    return d;
}
