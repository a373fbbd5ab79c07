/* Parses options by table; every mistake gets a sentence that names the option and its value. */
#include "args.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

enum { FLAG, TEXT, INT, REAL, EXTENTS, CHOICE };

const char *const device_choices[] = {"cpu", "cuda", NULL};

struct option opt_flag(const char *name, char letter, bool *value, const char *help)
{
    return (struct option){.name = name, .letter = letter, .kind = FLAG, .value = value, .help = help};
}

struct option opt_text(const char *name, char letter, const char **value, const char *metavar, const char *help)
{
    return (struct option){
        .name = name, .letter = letter, .kind = TEXT, .value = value, .metavar = metavar, .help = help};
}

struct option opt_int(const char *name, char letter, int *value, int min, int max, const char *metavar,
                      const char *help)
{
    return (struct option){.name = name, .letter = letter, .kind = INT, .value = value, .min = min, .max = max,
                           .metavar = metavar, .help = help};
}

struct option opt_real(const char *name, char letter, double *value, double min, double max, const char *metavar,
                       const char *help)
{
    return (struct option){.name = name, .letter = letter, .kind = REAL, .value = value, .min = min, .max = max,
                           .metavar = metavar, .help = help};
}

struct option opt_extents(const char *name, char letter, struct extents *value, const char *metavar,
                          const char *help)
{
    return (struct option){
        .name = name, .letter = letter, .kind = EXTENTS, .value = value, .metavar = metavar, .help = help};
}

struct option opt_choice(const char *name, char letter, int *value, const char *const *choices, const char *metavar,
                         const char *help)
{
    return (struct option){.name = name, .letter = letter, .kind = CHOICE, .value = value, .choices = choices,
                           .metavar = metavar, .help = help};
}

struct option opt_deterministic(bool *value)
{
    return opt_flag("deterministic", 0, value, "the same bits at every execution, also where that is slower");
}

struct option opt_end(void) { return (struct option){.name = NULL}; }

static int set_int(const struct option *o, const char *text)
{
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (!*text || *end)
        return tool_fail(TOOL_USAGE, "--%s: '%s' is not a whole number", o->name, text);
    if (errno || (double)n < o->min || (double)n > o->max)
        return tool_fail(TOOL_USAGE, "--%s: %s is not between %.0f and %.0f", o->name, text, o->min, o->max);
    *(int *)o->value = (int)n;
    return ARGS_GO_ON;
}

static int set_real(const struct option *o, const char *text)
{
    char *end;
    double x = strtod(text, &end);
    if (!*text || *end || !isfinite(x))
        return tool_fail(TOOL_USAGE, "--%s: '%s' is not a number", o->name, text);
    if (x < o->min || x > o->max)
        return tool_fail(TOOL_USAGE, "--%s: %s is not between %g and %g", o->name, text, o->min, o->max);
    *(double *)o->value = x;
    return ARGS_GO_ON;
}

static int set_extents(const struct option *o, const char *text)
{
    struct extents e = {0};
    for (const char *at = text;;) {
        char *end;
        errno = 0;
        long n = strtol(at, &end, 10);
        if (end == at || *at < '0' || *at > '9' || (*end && *end != 'x') || e.count == 3)
            return tool_fail(TOOL_USAGE, "--%s: '%s' is not one to three whole numbers joined by x, as 7x7", o->name,
                             text);
        if (errno || n < 1 || n > INT_MAX)
            return tool_fail(TOOL_USAGE, "--%s: '%s': each number must be between 1 and %d", o->name, text, INT_MAX);
        e.at[e.count++] = (int)n;
        if (!*end)
            break;
        at = end + 1;
    }
    *(struct extents *)o->value = e;
    return ARGS_GO_ON;
}

static int set_choice(const struct option *o, const char *text)
{
    char list[256] = "";
    for (int i = 0; o->choices[i]; i++) {
        if (!strcmp(o->choices[i], text)) {
            *(int *)o->value = i;
            return ARGS_GO_ON;
        }
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? ", " : "", o->choices[i]);
    }
    return tool_fail(TOOL_USAGE, "--%s: '%s' is none of %s", o->name, text, list);
}

static int set(const struct option *o, const char *text)
{
    switch (o->kind) {
    case TEXT:
        if (!*text)
            return tool_fail(TOOL_USAGE, "--%s needs a value, and it is empty", o->name);
        *(const char **)o->value = text;
        return ARGS_GO_ON;
    case INT: return set_int(o, text);
    case REAL: return set_real(o, text);
    case EXTENTS: return set_extents(o, text);
    default: return set_choice(o, text);
    }
}

static void help(const struct usage *usage)
{
    printf("usage: %s\n\n%s\n\n", usage->synopsis, usage->about);
    for (const struct option *o = usage->options; o->name; o++) {
        char left[64];
        char letter[6] = "    ";
        if (o->letter)
            snprintf(letter, sizeof letter, "-%c, ", o->letter);
        snprintf(left, sizeof left, "%s--%s%s%s", letter, o->name, o->metavar ? " " : "", o->metavar ? o->metavar : "");
        printf(strlen(left) > 25 ? "  %s\n%29s" : "  %-27s%s", left, "");
        printf("%s\n", o->help);
    }
    printf("  %-27s%s\n", "-h, --help", "this text");
}

/* The table's option whose long name is name[0..length), or a unique name that begins with it. */
static const struct option *find_long(const struct option *table, const char *name, size_t length)
{
    const struct option *found = NULL;
    int matches = 0;
    for (const struct option *o = table; o->name; o++) {
        if (strncmp(o->name, name, length))
            continue;
        if (!o->name[length])
            return o;
        found = o;
        matches++;
    }
    return matches == 1 ? found : NULL;
}

static const struct option *find_letter(const struct option *table, char letter)
{
    for (const struct option *o = table; o->name; o++)
        if (o->letter == letter)
            return o;
    return NULL;
}

/* One option at argv[*i]; moves *i over a value that stands apart. "-o FILE", "-oFILE", "--out FILE", "--out=FILE". */
static int option_at(const struct option *table, int argc, char **argv, int *i)
{
    const char *arg = argv[*i], *value = NULL;
    const struct option *o;
    if (arg[1] == '-') {
        size_t length = strcspn(arg + 2, "=");
        o = find_long(table, arg + 2, length);
        if (arg[2 + length])
            value = arg + 3 + length;
    } else {
        o = find_letter(table, arg[1]);
        if (arg[2])
            value = arg + 2;
    }
    if (!o)
        return tool_fail(TOOL_USAGE, "unknown option '%s'; --help lists the options", arg);
    if (o->kind == FLAG) {
        if (value)
            return tool_fail(TOOL_USAGE, "--%s takes no value, but '%s' gives one", o->name, arg);
        *(bool *)o->value = true;
        return ARGS_GO_ON;
    }
    if (!value) {
        if (*i + 1 >= argc)
            return tool_fail(TOOL_USAGE, "--%s needs a value (%s)", o->name, o->metavar);
        value = argv[++*i];
    }
    return set(o, value);
}

int args_parse(const struct usage *usage, int argc, char **argv, int *count)
{
    bool options = true;
    *count = 0;
    for (int i = 1; i < argc; i++) {
        char *arg = argv[i];
        if (!options || arg[0] != '-' || !arg[1]) {
            argv[(*count)++] = arg;
        } else if (!strcmp(arg, "--")) {
            options = false;
        } else if (!strcmp(arg, "--help") || !strcmp(arg, "-h")) {
            help(usage);
            return TOOL_DONE;
        } else {
            int status = option_at(usage->options, argc, argv, &i);
            if (status != ARGS_GO_ON)
                return status;
        }
    }
    if (*count < usage->operands_min || *count > usage->operands_max)
        return tool_fail(TOOL_USAGE, "needs %s, and got %d; usage: %s", usage->operands_name, *count, usage->synopsis);
    return ARGS_GO_ON;
}
