/* A file under a temporary name until it is whole. An interrupt removes what is unfinished. */
#include "outfile.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tool.h"

struct outfile {
    char *path, *temporary;
    int fd, slot;
};

enum { OPEN_MAX = 32 };
static char *volatile unfinished[OPEN_MAX]; /* temporary names, for the signal handler */
static const char *final[OPEN_MAX];         /* and what they will be called */

static void interrupted(int signal)
{
    for (int i = 0; i < OPEN_MAX; i++)
        if (unfinished[i])
            unlink(unfinished[i]);
    raise(signal); /* SA_RESETHAND: now the default */
}

static void watch_signals(void)
{
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGBUS}; /* SIGBUS: a mapped input became shorter */
    struct sigaction action = {.sa_handler = interrupted, .sa_flags = (int)SA_RESETHAND | SA_NODEFER};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        struct sigaction now;
        if (!sigaction(signals[i], NULL, &now) && now.sa_handler == SIG_DFL)
            sigaction(signals[i], &action, NULL);
    }
}

static void release(struct outfile **file)
{
    struct outfile *f = *file;
    if (f->slot >= 0)
        unfinished[f->slot] = NULL, final[f->slot] = NULL;
    if (f->fd >= 0)
        close(f->fd);
    free(f->path);
    free(f->temporary);
    free(f);
    *file = NULL;
}

/* The path with links followed, so that a link stays a link, and a file has one name however it is spelled. Where there
 * is no such file yet, that of its directory. */
static char *final_path(const char *path)
{
    char *real = realpath(path, NULL);
    if (real)
        return real;
    char *copy = strdup(path), *other = strdup(path);
    char *folder = copy ? realpath(dirname(copy), NULL) : NULL;
    const char *name = other ? basename(other) : NULL;
    const size_t room = folder && name ? strlen(folder) + strlen(name) + 2 : 0;
    if (room && (real = malloc(room)))
        snprintf(real, room, "%s/%s", folder, name);
    else if (!folder)
        real = strdup(path); /* opening it tells why */
    free(copy);
    free(other);
    free(folder);
    return real;
}

/* A place in the lists above; -1 where another unfinished file will have the same name, or there is no room. */
static int find_slot(const char *path)
{
    int slot = -1;
    for (int i = OPEN_MAX - 1; i >= 0; i--) {
        if (final[i] && !strcmp(final[i], path))
            return -1;
        if (!final[i])
            slot = i;
    }
    return slot;
}

int outfile_open(struct outfile **file, const char *path)
{
    struct stat s;
    const bool exists = !stat(path, &s);
    *file = NULL;
    if (exists && !S_ISREG(s.st_mode))
        return tool_fail(TOOL_USAGE, "%s: not a regular file", path);
    if (exists && access(path, W_OK)) /* renaming onto it would not ask */
        return tool_fail(TOOL_USAGE, "%s: cannot be written: %s", path, strerror(errno));
    struct outfile *f = calloc(1, sizeof *f);
    if (!f)
        return tool_fail(TOOL_FAILED, "out of memory");
    f->fd = f->slot = -1;
    f->path = final_path(path);
    size_t room = f->path ? strlen(f->path) + 32 : 0;
    f->temporary = room ? malloc(room) : NULL;
    if (!f->temporary) {
        release(&f);
        return tool_fail(TOOL_FAILED, "out of memory");
    }
    f->slot = find_slot(f->path);
    if (f->slot < 0) {
        release(&f);
        return tool_fail(TOOL_USAGE, "%s: two outputs have this name", path);
    }
    snprintf(f->temporary, room, "%s.%ld.%d.part", f->path, (long)getpid(), f->slot);
    f->fd = open(f->temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (f->fd < 0) {
        int error = errno;
        release(&f);
        return tool_fail(TOOL_USAGE, "%s: cannot be written: %s", path, strerror(error));
    }
    if (exists)
        (void)!fchmod(f->fd, s.st_mode & 0777);
    unfinished[f->slot] = f->temporary;
    final[f->slot] = f->path;
    watch_signals();
    *file = f;
    return TOOL_DONE;
}

int outfile_write(struct outfile *file, const void *bytes, size_t size)
{
    for (const char *at = bytes; size;) {
        ssize_t n = write(file->fd, at, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return tool_fail(TOOL_FAILED, "%s: cannot be written: %s", file->path, strerror(errno));
        at += n;
        size -= (size_t)n;
    }
    return TOOL_DONE;
}

void *outfile_map(struct outfile *file, size_t size)
{
    int error = posix_fallocate(file->fd, 0, (off_t)size);
    if (!error) {
        void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, 0);
        if (map != MAP_FAILED)
            return map;
        error = errno;
    }
    tool_fail(TOOL_FAILED, "%s: no room for %zu bytes: %s", file->path, size, strerror(error));
    return NULL;
}

int outfile_commit(struct outfile **file)
{
    struct outfile *f = *file;
    int status = TOOL_DONE;
    if (close(f->fd) || rename(f->temporary, f->path)) {
        status = tool_fail(TOOL_FAILED, "%s: cannot be written: %s", f->path, strerror(errno));
        unlink(f->temporary);
    }
    f->fd = -1;
    release(file);
    return status;
}

void outfile_abandon(struct outfile **file)
{
    if (!*file)
        return;
    unlink((*file)->temporary);
    release(file);
}
