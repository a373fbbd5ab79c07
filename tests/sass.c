/* See sass.h. */
#define _GNU_SOURCE
#include "sass.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- reading ---- */

static bool add_line(struct sass *s, unsigned address, const char *text, const char *label)
{
    if (s->count % 1024 == 0) {
        struct sass_line *more = realloc(s->line, (size_t)(s->count + 1024) * sizeof *more);
        if (!more)
            return false;
        s->line = more;
    }
    struct sass_line *l = &s->line[s->count++];
    l->address = address;
    snprintf(l->text, sizeof l->text, "%.*s", (int)strcspn(text, ";"), text);
    snprintf(l->label, sizeof l->label, "%s", label);
    return true;
}

bool sass_read(struct sass *s, const void *cubin, size_t bytes)
{
    char path[] = "/tmp/nbhd-cubin-XXXXXX", command[2048], line[1024], label[24] = "";
    const char *tool = getenv("NBHD_NVDISASM");
    *s = (struct sass){NULL, 0};
    const int file = mkstemp(path);
    if (file < 0)
        return false;
    const bool written = write(file, cubin, bytes) == (ssize_t)bytes;
    close(file);
    snprintf(command, sizeof command, "%s -c %s 2>/dev/null", tool ? tool : "nvdisasm", path);
    FILE *pipe = written ? popen(command, "r") : NULL;
    bool ok = pipe != NULL;
    while (ok && fgets(line, sizeof line, pipe)) {
        unsigned address;
        int text = 0;
        if (line[0] == '.' && strchr(line, ':'))
            snprintf(label, sizeof label, "%.*s", (int)strcspn(line, ":"), line);
        else if (sscanf(line, " /*%x*/ %n", &address, &text) == 1 && text) {
            ok = add_line(s, address, line + text, label);
            label[0] = 0;
        }
    }
    if (pipe)
        pclose(pipe);
    unlink(path);
    return ok && s->count > 0;
}

void sass_free(struct sass *s) { free(s->line); }

bool sass_has(const struct sass *s, const char *instruction)
{
    for (int i = 0; i < s->count; i++)
        if (strstr(s->line[i].text, instruction))
            return true;
    return false;
}

/* ---- operands in flight ---- */

enum { REGISTERS = 256, NEVER = -1 };

/* Per register: the group of the HGMMA that reads it, or NEVER, and that HGMMA. */
struct flight {
    int group[REGISTERS];
    unsigned reader[REGISTERS];
    int next; /* group */
};

/* The instruction without its predicate. */
static const char *operation(const char *text)
{
    return text[0] == '@' ? text + strcspn(text, " ") + strspn(text + strcspn(text, " "), " ") : text;
}

/* Whose first operand is a source. */
static bool writes_none(const char *op)
{
    static const char *const names[] = {"ST", "RED", "SYNCS", "BAR", "BR", "R2UR", "U", "WARP", "HGMMA"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strncmp(op, names[i], strlen(names[i])))
            return true;
    return false;
}

/* The registers that an instruction writes: *count of them from the one returned. */
static int written(const char *op, int *count)
{
    const size_t name = strcspn(op, " ");
    int reg = 0;
    *count = 0;
    const char *operand = op + name + strspn(op + name, " ");
    if (operand[0] == 'P' && strchr(operand, ','))
        operand = strchr(operand, ',') + 2; /* a predicate before the register */
    if (writes_none(op) || sscanf(operand, "R%d", &reg) != 1)
        return 0;
    const char *wide = strstr(op, ".128"), *pair = strstr(op, ".64"), *full = strstr(op, ".WIDE");
    const bool matrices = !strncmp(op, "LDSM", 4);
    *count = (wide && wide < op + name) || matrices                     ? 4
             : (pair && pair < op + name) || (full && full < op + name) ? 2
                                                                        : 1;
    return reg;
}

/* Follows one instruction; true if it overwrites what is read. */
static bool follow(struct flight *f, const struct sass_line *line, char *why, size_t room)
{
    const char *op = operation(line->text);
    int count, a;
    unsigned left;
    if (sscanf(op, "WARPGROUP.DEPBAR.LE gsb0, 0x%x", &left) == 1) {
        for (int r = 0; r < REGISTERS; r++)
            if (f->group[r] != NEVER && f->group[r] < f->next - (int)left)
                f->group[r] = NEVER;
        return false;
    }
    if (!strncmp(op, "HGMMA", 5)) {
        if (sscanf(op, "HGMMA%*s %*[^,], R%d, gdesc", &a) == 1)
            for (int r = a; r < a + 4 && r < REGISTERS; r++) {
                f->group[r] = f->next;
                f->reader[r] = line->address;
            }
        f->next += strstr(op, "gsb0") != NULL;
        return false;
    }
    const int first = written(op, &count);
    for (int r = first; r < first + count && r < REGISTERS; r++)
        if (f->group[r] != NEVER) {
            snprintf(why, room, "R%d, which the HGMMA at %x reads, is overwritten at %x: %s", r, f->reader[r],
                     line->address, line->text);
            return true;
        }
    return false;
}

/* Where a branch goes if that is back; NEVER otherwise. */
static int back_edge(const struct sass *s, int at)
{
    const char *op = operation(s->line[at].text), *to = strstr(op, "`(");
    if (strncmp(op, "BRA", 3) || !to)
        return NEVER;
    const size_t length = strcspn(to + 2, ")");
    for (int i = 0; i < at; i++)
        if (strlen(s->line[i].label) == length && !strncmp(s->line[i].label, to + 2, length))
            return i;
    return NEVER;
}

/* Two turns of each loop that has products. */
bool sass_overwrites(const struct sass *s, char *why, size_t room)
{
    for (int end = 0; end < s->count; end++) {
        const int begin = back_edge(s, end);
        struct flight f = {.next = 0};
        for (int r = 0; r < REGISTERS; r++)
            f.group[r] = NEVER;
        for (int turn = 0; begin != NEVER && turn < 2; turn++)
            for (int i = begin; i <= end; i++)
                if (follow(&f, &s->line[i], why, room))
                    return true;
    }
    return false;
}
