/* A folder for a test's files, and processes of its own for what happens once in one. */
#ifndef NBHD_TESTS_FOLDER_H
#define NBHD_TESTS_FOLDER_H

#include <errno.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"

static char root[] = "/tmp/nbhd-test-XXXXXX";

/* root/name; several at a time. */
static inline const char *in_root(const char *name)
{
    static char paths[4][1024];
    static int turn;
    char *path = paths[turn++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", root, name);
    return path;
}

/* The kernel cache of a test, in root: two folders that are not there before it is used. */
#define CACHE "cache/deep"

static inline void use_cache(void) { setenv("NBHD_CACHE_DIR", in_root(CACHE), 1); }

static inline const char *in_cache(const char *name)
{
    char path[512];
    snprintf(path, sizeof path, CACHE "/%s", name);
    return in_root(path);
}

static inline void write_file(const char *path, const void *bytes, size_t size)
{
    FILE *file = fopen(path, "wb");
    CHECK(file && fwrite(bytes, 1, size, file) == size, "%s: %s", path, strerror(errno));
    if (file)
        fclose(file);
}

static inline void write_text(const char *path, const char *text) { write_file(path, text, strlen(text)); }

/* Runs function in a process of its own, where the environment and opened libraries are fresh; false if a check
 * failed there, which does not count here. */
static inline bool passes_in_child(void (*function)(const void *), const void *context)
{
    int status = -1;
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        test_failed = 0;
        function(context);
        fflush(NULL);
        _exit(test_failed != 0);
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static inline void in_child(void (*function)(const void *), const void *context, const char *what)
{
    CHECK(passes_in_child(function, context), "%s: checks failed in a process of its own, or it did not end", what);
}

static inline bool folder_begin(void)
{
    return CHECK(mkdtemp(root) && !chmod(root, 0755), "%s: %s", root, strerror(errno));
}

static inline int folder_end(void)
{
    char command[64];
    snprintf(command, sizeof command, "rm -rf '%s'", root);
    if (system(command))
        printf("note: %s could not be removed\n", root);
    return test_done();
}

#endif
