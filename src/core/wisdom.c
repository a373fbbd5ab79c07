/* Wisdom: see wisdom.h and, for the file, nbhd_wisdom_save in nbhd.h. Lines of other machines are kept and saved again,
 * so that one file can serve several. A list under a lock: there are as many entries as a program has problems. */
#define _XOPEN_SOURCE 700
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "core/plan.h"
#include "core/wisdom.h"

#define HEADER "nbhd wisdom 1"

enum { LINE = 2 * NBHD_TEXT, MACHINE = 96, CONFIGS = 16 };

struct entry {
    struct entry *next;
    double ms;
    char machine[MACHINE], problem[NBHD_TEXT], kernel[64], config[96];
};

static struct {
    pthread_mutex_t lock;
    struct entry *first, **end;
} wisdom = {.lock = PTHREAD_MUTEX_INITIALIZER, .end = &wisdom.first};

static char this_machine[MACHINE]; /* what a measurement depends on: the processor's name */

static void read_machine(void)
{
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");
    snprintf(this_machine, MACHINE, "unknown");
    while (file && fgets(line, sizeof line, file)) {
        char *at = strchr(line, ':');
        if (strncmp(line, "model name", 10) || !at)
            continue;
        at += strspn(at, ": \t");
        at[strcspn(at, "\r\n")] = '\0';
        snprintf(this_machine, MACHINE, "%.*s", MACHINE - 1, at);
        break;
    }
    if (file)
        fclose(file);
}

/* Read once: planning must not open files. */
static const char *machine_name(void)
{
    static pthread_once_t control = PTHREAD_ONCE_INIT;
    pthread_once(&control, read_machine);
    return this_machine;
}

/* The problem as text, with what its line does not say. */
static void problem_text(const struct nbhd_problem *problem, char text[NBHD_TEXT])
{
    char line[NBHD_TEXT];
    if (nbhd_desc_format(&problem->desc, line, sizeof line))
        line[0] = '\0';
    snprintf(text, NBHD_TEXT, "%s %.*s threads=%d", problem->device == NBHD_DEVICE_CPU ? "cpu" : "cuda", NBHD_TEXT - 40,
             line, problem->desc.threads);
}

static void config_text(const struct nbhd_config *c, char text[96])
{
    snprintf(text, 96, "%d,%dx%dx%d,%dx%dx%d,%d,%d", c->variant, c->q_tile[0], c->q_tile[1], c->q_tile[2], c->k_tile[0],
             c->k_tile[1], c->k_tile[2], c->stages, c->threads);
}

static struct entry *find(const char *machine, const char *problem)
{
    for (struct entry *e = wisdom.first; e; e = e->next)
        if (!strcmp(e->machine, machine) && !strcmp(e->problem, problem))
            return e;
    return NULL;
}

/* Keeps a copy of the entry, in place of one for the same machine and problem. */
static nbhd_status keep(const struct entry *given)
{
    pthread_mutex_lock(&wisdom.lock);
    struct entry *e = find(given->machine, given->problem);
    const bool fresh = !e;
    if (fresh)
        e = calloc(1, sizeof *e);
    if (e) {
        struct entry *next = e->next;
        *e = *given;
        e->next = next;
        if (fresh) {
            *wisdom.end = e;
            wisdom.end = &e->next;
        }
    }
    pthread_mutex_unlock(&wisdom.lock);
    return e ? NBHD_OK
             : nbhd_fail(NBHD_ERROR_MEMORY, "an entry of wisdom of %zu bytes could not be allocated", sizeof *e);
}

nbhd_status nbhd_wisdom_add(const struct nbhd_problem *problem, const struct nbhd_kernel *kernel,
                            const struct nbhd_config *config, double ms)
{
    struct entry e = {.ms = ms};
    snprintf(e.machine, sizeof e.machine, "%s", machine_name());
    problem_text(problem, e.problem);
    snprintf(e.kernel, sizeof e.kernel, "%s", kernel->name);
    config_text(config, e.config);
    return keep(&e);
}

bool nbhd_wisdom_find(const struct nbhd_problem *problem, const struct nbhd_kernel **kernel, struct nbhd_config *config)
{
    char key[NBHD_TEXT], why[NBHD_TEXT], text[96];
    struct entry found;
    pthread_mutex_lock(&wisdom.lock);
    const bool any = wisdom.first != NULL;
    pthread_mutex_unlock(&wisdom.lock);
    if (!any)
        return false;
    problem_text(problem, key);
    pthread_mutex_lock(&wisdom.lock);
    const struct entry *e = find(machine_name(), key);
    if (e)
        found = *e;
    pthread_mutex_unlock(&wisdom.lock);
    if (!e)
        return false;
    const struct nbhd_kernel *k = nbhd_kernel_named(found.kernel);
    if (!k || nbhd_kernel_refuses(k, problem, why)) {
        nbhd_log(1, "wisdom names %s for '%s', which %s", found.kernel, key, k ? why : "this build does not have");
        return false;
    }
    struct nbhd_config offered[CONFIGS];
    const int count = k->ops->configs(problem, offered, CONFIGS);
    for (int i = 0; i < count; i++) {
        config_text(&offered[i], text);
        if (strcmp(text, found.config))
            continue;
        *kernel = k;
        *config = offered[i];
        return true;
    }
    nbhd_log(1, "wisdom names the configuration %s for '%s', which %s no longer offers", found.config, key,
             found.kernel);
    return false;
}

/* ---- files ---- */

/* A line "<kernel> <configuration> <ms> <problem>" of the machine. */
static bool read_entry(char *line, const char *machine, struct entry *e)
{
    int at = 0;
    char ms[32];
    const char *end = ms;
    memset(e, 0, sizeof *e);
    snprintf(e->machine, sizeof e->machine, "%.*s", MACHINE - 1, machine);
    if (sscanf(line, "%63s %95s %31s %n", e->kernel, e->config, ms, &at) != 3 || !at ||
        strlen(line + at) >= NBHD_TEXT || !((e->ms = nbhd_read_number(ms, &end)) > 0) || *end ||
        (strncmp(line + at, "cpu ", 4) && strncmp(line + at, "cuda ", 5)))
        return false;
    snprintf(e->problem, sizeof e->problem, "%s", line + at);
    return true;
}

static nbhd_status read_file(FILE *file, const char *path, int *ignored)
{
    char line[LINE], machine[MACHINE] = "";
    struct entry e;
    const bool begun = fgets(line, sizeof line, file);
    if (ferror(file))
        return nbhd_fail(NBHD_ERROR_IO, "%s could not be read: %s", path, strerror(errno));
    if (!begun || strncmp(line, HEADER, strlen(HEADER)) || line[strlen(HEADER)] != '\n')
        return nbhd_fail(NBHD_ERROR_INVALID, "%s does not begin with the line '" HEADER "'", path);
    for (int number = 2; fgets(line, sizeof line, file); number++) {
        line[strcspn(line, "\r\n")] = '\0';
        nbhd_status status;
        if (!line[0] || line[0] == '#')
            continue;
        if (!strncmp(line, "machine ", 8)) {
            snprintf(machine, sizeof machine, "%.*s", MACHINE - 1, line + 8);
        } else if (machine[0] && read_entry(line, machine, &e)) {
            if ((status = keep(&e)))
                return status;
        } else if (!(*ignored)++) {
            nbhd_fail(NBHD_ERROR_INVALID, "%s:%d is no line of wisdom and was ignored: '%.80s'", path, number, line);
        }
    }
    return ferror(file) ? nbhd_fail(NBHD_ERROR_IO, "%s could not be read", path) : NBHD_OK;
}

nbhd_status nbhd_wisdom_load(const char *path, int *ignored)
{
    int bad = 0;
    if (!path || !*path)
        return nbhd_fail(NBHD_ERROR_INVALID, "path is %s; it must name a file", path ? "empty" : "NULL");
    FILE *file = fopen(path, "r");
    if (!file)
        return nbhd_fail(NBHD_ERROR_IO, "%s could not be opened: %s", path, strerror(errno));
    const nbhd_status status = read_file(file, path, &bad);
    fclose(file);
    if (ignored)
        *ignored = bad;
    return status;
}

static bool write_entries(FILE *file)
{
    const char *machine = "";
    bool ok = fprintf(file, HEADER "\n") > 0;
    for (const struct entry *e = wisdom.first; e && ok; e = e->next) {
        if (strcmp(machine, e->machine))
            ok = fprintf(file, "machine %s\n", machine = e->machine) > 0;
        char ms[32];
        nbhd_write_number(ms, 6, e->ms);
        ok = ok && fprintf(file, "%s %s %s %s\n", e->kernel, e->config, ms, e->problem) > 0;
    }
    return ok;
}

/* Under another name first: whoever loads it meanwhile has the old file or the new one. */
static nbhd_status save(const char *path)
{
    char temporary[4096];
    if (snprintf(temporary, sizeof temporary, "%s.%ld", path, (long)getpid()) >= (int)sizeof temporary)
        return nbhd_fail(NBHD_ERROR_INVALID, "path is longer than 4000 characters");
    pthread_mutex_lock(&wisdom.lock); /* to the end: other threads would use the same temporary file */
    FILE *file = fopen(temporary, "w");
    bool ok = file && write_entries(file);
    if (file)
        ok = !fclose(file) && ok;
    ok = ok && !rename(temporary, path);
    const int error = errno;
    if (file && !ok)
        remove(temporary);
    pthread_mutex_unlock(&wisdom.lock);
    return ok ? NBHD_OK : nbhd_fail(NBHD_ERROR_IO, "%s could not be written: %s", path, strerror(error));
}

nbhd_status nbhd_wisdom_save(const char *path)
{
    struct stat s;
    if (!path || !*path)
        return nbhd_fail(NBHD_ERROR_INVALID, "path is %s; it must name a file", path ? "empty" : "NULL");
    if (!stat(path, &s) && !S_ISREG(s.st_mode)) /* a new file in the place of a device would be no device */
        return nbhd_fail(NBHD_ERROR_IO, "%s could not be written: it is no regular file", path);
    char *real = realpath(path, NULL); /* so that a link stays one */
    const nbhd_status status = save(real ? real : path);
    free(real);
    return status;
}

void nbhd_wisdom_forget(void)
{
    pthread_mutex_lock(&wisdom.lock);
    while (wisdom.first) {
        struct entry *e = wisdom.first;
        wisdom.first = e->next;
        free(e);
    }
    wisdom.end = &wisdom.first;
    pthread_mutex_unlock(&wisdom.lock);
}
