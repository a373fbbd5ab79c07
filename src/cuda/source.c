/* The embedded kernel files, or those of the directory NBHD_KERNEL_DIR (the repository's src/cuda): there .cu, device/
 * and the two shared headers beside it are read anew for each kernel, so that one is edited and run without a build. */
#define _POSIX_C_SOURCE 200809L
#include <glob.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/sha256.h"
#include "cuda/source.h"

static void hash_all(struct nbhd_sources *sources)
{
    struct nbhd_sha256 sha;
    nbhd_sha256_begin(&sha);
    for (int i = 0; i < sources->count; i++) {
        nbhd_sha256_add(&sha, sources->list[i].name, strlen(sources->list[i].name) + 1);
        nbhd_sha256_add(&sha, sources->list[i].text, sources->list[i].size + 1);
    }
    nbhd_sha256_end(&sha, sources->hash);
}

/* ---- embedded ---- */
static struct nbhd_sources embedded;
static pthread_once_t embedded_once = PTHREAD_ONCE_INIT;

static void index_embedded(void)
{
    embedded.list = nbhd_embedded;
    while (nbhd_embedded[embedded.count].name)
        embedded.count++;
    hash_all(&embedded);
}

/* ---- a directory ---- */
enum { FILES_MAX = 256 };

struct folder {
    struct nbhd_sources sources;
    struct nbhd_source list[FILES_MAX];
};

static void drop(struct folder *folder)
{
    for (int i = 0; i < folder->sources.count; i++) {
        free((void *)folder->list[i].name);
        free((void *)folder->list[i].text);
    }
    free(folder);
}

/* Reads path as the file called name. */
static bool add(struct folder *folder, const char *path, const char *name)
{
    FILE *file = folder->sources.count < FILES_MAX ? fopen(path, "rb") : NULL;
    if (!file)
        return false;
    struct nbhd_source *source = &folder->list[folder->sources.count];
    long size = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
    char *text = size < 0 ? NULL : malloc((size_t)size + 1);
    char *copy = text ? malloc(strlen(name) + 1) : NULL;
    if (copy && fseek(file, 0, SEEK_SET) == 0) {
        source->size = fread(text, 1, (size_t)size, file);
        text[source->size] = 0;
        source->text = text;
        source->name = strcpy(copy, name);
        folder->sources.count++;
    } else {
        free(text);
        free(copy);
        copy = NULL;
    }
    fclose(file);
    return copy != NULL;
}

/* Adds what pattern matches in the directory, called by its name behind base. */
static bool add_all(struct folder *folder, const char *directory, const char *base, const char *pattern)
{
    char text[PATH_MAX];
    snprintf(text, sizeof text, "%s/%s%s", directory, base, pattern);
    size_t prefix = strlen(directory) + 1 + strlen(base);
    bool all = true;
    glob_t found;
    if (glob(text, 0, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc; i++)
            all = add(folder, found.gl_pathv[i], found.gl_pathv[i] + prefix) && all;
    globfree(&found);
    return all;
}

static const struct nbhd_sources *read_directory(const char *path)
{
    struct folder *folder = calloc(1, sizeof *folder);
    if (!folder)
        return NULL;
    if (!add_all(folder, path, "", "*.cu") || !add_all(folder, path, "", "device/*.cuh") ||
        !add_all(folder, path, "../", "nbhd_*.h")) {
        nbhd_log(0, "NBHD_KERNEL_DIR is '%s'; a kernel file there could not be read", path);
        drop(folder);
        return NULL;
    }
    folder->sources.list = folder->list;
    folder->sources.owned = folder;
    hash_all(&folder->sources);
    return &folder->sources;
}

const struct nbhd_sources *nbhd_sources_acquire(void)
{
    const char *path = nbhd_env("NBHD_KERNEL_DIR");
    if (path)
        return read_directory(path);
    pthread_once(&embedded_once, index_embedded);
    return &embedded;
}

void nbhd_sources_release(const struct nbhd_sources *sources)
{
    if (sources && sources->owned)
        drop(sources->owned);
}
