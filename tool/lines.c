/* Problem lines from operands and files. Operands without a space are fields of one line: quotes may be forgotten. */
#include "lines.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

/* What is done with each line: the arguments of problems_each. */
struct doing {
    int threads;
    bool deterministic;
    int (*each)(const struct problem *problem, void *context);
    void *context;
};

/* where: "FILE:LINE: " or "" */
static int one(const char *text, const char *where, const struct doing *doing)
{
    struct problem problem;
    int status = problem_parse(&problem, text, where);
    if (doing->threads)
        problem.desc.threads = doing->threads;
    problem.deterministic = doing->deterministic;
    if (!status)
        status = doing->each(&problem, doing->context);
    problem_release(&problem);
    return status;
}

static int from_file(const char *path, const struct doing *doing)
{
    FILE *file = strcmp(path, "-") ? fopen(path, "r") : stdin;
    if (!file)
        return tool_fail(TOOL_USAGE, "%s: %s", path, strerror(errno));
    char text[NBHD_TEXT], where[NBHD_TEXT];
    int status = TOOL_DONE, found = 0;
    for (int number = 1; status != TOOL_USAGE && fgets(text, sizeof text, file); number++) {
        snprintf(where, sizeof where, "%.400s:%d: ", path, number);
        if (!strchr(text, '\n') && !feof(file)) {
            status = strlen(text) < sizeof text - 1
                         ? tool_fail(TOOL_USAGE, "%sthe line holds a character of value 0; is this text?", where)
                         : tool_fail(TOOL_USAGE, "%sthe line is longer than %d characters", where, NBHD_TEXT - 2);
            break;
        }
        const char *line = number == 1 && !strncmp(text, "\xef\xbb\xbf", 3) ? text + 3 : text; /* some editors' mark */
        text[strcspn(text, "#\n")] = 0;
        if (!line[strspn(line, " \t\r")])
            continue;
        found++;
        int result = one(line, where, doing);
        status = result ? result : status;
    }
    if (ferror(file))
        status = tool_fail(TOOL_USAGE, "%s: cannot be read: %s", path, strerror(errno));
    if (file != stdin)
        fclose(file);
    if (!found && status == TOOL_DONE)
        return tool_fail(TOOL_USAGE, "%s: no problem line in it", path);
    return status;
}

int problems_each(char **operands, int count, int threads, bool deterministic,
                  int (*each)(const struct problem *problem, void *context), void *context)
{
    const struct doing doing = {threads, deterministic, each, context};
    int status = TOOL_DONE;
    for (int i = 0; i < count && status != TOOL_USAGE;) {
        int result;
        char text[NBHD_TEXT] = "";
        if (operands[i][0] == '@') {
            result = from_file(operands[i++] + 1, &doing);
        } else {
            bool fragments = !strchr(operands[i], ' ');
            size_t n = 0;
            do
                n += (size_t)snprintf(text + n, sizeof text - n, "%s%s", n ? " " : "", operands[i++]);
            while (n < sizeof text && fragments && i < count && !strchr(operands[i], ' ') && operands[i][0] != '@');
            result = n < sizeof text
                         ? one(text, "", &doing)
                         : tool_fail(TOOL_USAGE, "a problem line is longer than %d characters", NBHD_TEXT - 1);
        }
        status = result ? result : status;
    }
    return status;
}

struct dense {
    int (*each)(const nbhd_desc *desc, const char *line, void *context);
    void *context;
};

static int dense_only(const struct problem *problem, void *context)
{
    const struct dense *d = context;
    if (problem->sequences)
        return tool_fail(TOOL_USAGE, "%s: this command takes no ragged batch; ask for one of its sequences",
                         problem->line);
    return d->each(&problem->desc, problem->line, d->context);
}

int lines_each(char **operands, int count, int (*each)(const nbhd_desc *desc, const char *line, void *context),
               void *context)
{
    struct dense dense = {each, context};
    return problems_each(operands, count, 0, false, dense_only, &dense);
}
