/* The kernel cache's directory. A file is
 *     nbhd-jit 1
 *     sha256 <of all bytes after this line>
 *     identity <bytes> log <bytes> cubin <bytes>
 *     <identity><log><cubin>
 * so `head` shows what it is. It is written under a temporary name and renamed, so that it appears whole; a reader
 * trusts it only if the checksum and the identity agree. Hence any number of processes, a kill at any time, a full or
 * read-only disk and stray bytes do no harm. Nothing is ever locked. */
#define _POSIX_C_SOURCE 200809L
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "cuda/jit.h"
#include "cuda/sha256.h"

#define SUFFIX ".nbhd"
#define TEMPORARY ".tmp-"
static const char magic[] = "nbhd-jit 1\nsha256 ";

bool nbhd_cache_directory(char *path, size_t capacity)
{
    const char *own = nbhd_env("NBHD_CACHE_DIR"), *xdg = nbhd_env("XDG_CACHE_HOME"), *home = nbhd_env("HOME");
    int length = -1;
    if (own)
        length = snprintf(path, capacity, "%s", own);
    else if (xdg && *xdg == '/') /* by its standard others do not count */
        length = snprintf(path, capacity, "%s/nbhd", xdg);
    else if (home)
        length = snprintf(path, capacity, "%s/.cache/nbhd", home);
    return length > 0 && (size_t)length < capacity;
}

static bool path_of(char path[PATH_MAX], const char *name)
{
    char folder[PATH_MAX];
    if (!nbhd_cache_directory(folder, sizeof folder))
        return false;
    int length = snprintf(path, PATH_MAX, "%s/%s", folder, name);
    return length > 0 && length < PATH_MAX;
}

/* mkdir -p */
static void make_directories(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0777);
        *slash = '/';
    }
    mkdir(path, 0777);
}

static bool ends_with(const char *text, const char *end)
{
    size_t a = strlen(text), b = strlen(end);
    return a > b && !strcmp(text + a - b, end);
}

/* The whole file and a 0 after it; NULL if it cannot be read, or is none. */
static char *read_file(const char *path, size_t *bytes)
{
    struct stat info;
    const int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* does not wait for a pipe's other end */
    if (file < 0)
        return NULL;
    const bool regular = fstat(file, &info) == 0 && S_ISREG(info.st_mode);
    char *data = regular ? malloc((size_t)info.st_size + 1) : NULL;
    ssize_t part = 1;
    for (*bytes = 0; data && part > 0 && *bytes < (size_t)info.st_size; *bytes += part > 0 ? (size_t)part : 0)
        part = read(file, data + *bytes, (size_t)info.st_size - *bytes);
    close(file);
    if (data)
        data[*bytes] = 0;
    return data;
}

static char *copy_bytes(const char *from, size_t bytes)
{
    char *copy = malloc(bytes + 1);
    if (copy) {
        memcpy(copy, from, bytes);
        copy[bytes] = 0;
    }
    return copy;
}

static void checksum(const char *data, size_t bytes, char hex[65])
{
    struct nbhd_sha256 sha;
    nbhd_sha256_begin(&sha);
    nbhd_sha256_add(&sha, data, bytes);
    nbhd_sha256_end(&sha, hex);
}

/* Takes the file apart. False: it is damaged. */
static bool parse(const char *data, size_t bytes, struct nbhd_jit *code)
{
    size_t head = sizeof magic - 1 + 64 + 1, identity, log, cubin;
    int used = 0;
    char hex[65];
    if (bytes < head || memcmp(data, magic, sizeof magic - 1) || data[head - 1] != '\n')
        return false;
    checksum(data + head, bytes - head, hex);
    if (memcmp(hex, data + sizeof magic - 1, 64))
        return false;
    if (sscanf(data + head, "identity %zu log %zu cubin %zu%n", &identity, &log, &cubin, &used) != 3)
        return false;
    size_t body = head + (size_t)used + 1;
    if (body > bytes || identity > bytes - body || log > bytes - body - identity ||
        cubin != bytes - body - identity - log)
        return false;
    code->identity = copy_bytes(data + body, identity);
    code->log = copy_bytes(data + body + identity, log);
    code->cubin = copy_bytes(data + body + identity + log, cubin);
    code->cubin_bytes = cubin;
    return code->identity && code->log && code->cubin;
}

static void drop_parts(struct nbhd_jit *code)
{
    free(code->identity);
    free(code->log);
    free(code->cubin);
    code->identity = code->log = NULL;
    code->cubin = NULL;
}

static bool load_exact(const char *name, const char *identity, struct nbhd_jit *code)
{
    char path[PATH_MAX];
    size_t bytes = 0;
    char *data = path_of(path, name) ? read_file(path, &bytes) : NULL;
    if (!data)
        return false;
    bool whole = parse(data, bytes, code);
    free(data);
    if (whole && (!identity || !strncmp(code->identity, identity, strlen(identity)))) {
        snprintf(code->name, sizeof code->name, "%s", name);
        return true;
    }
    nbhd_log(1, "kernel cache: %s is %s and is not used", path, whole ? "of another kernel" : "damaged");
    drop_parts(code);
    return false;
}

bool nbhd_cache_load(const char *name, const char *identity, struct nbhd_jit *code)
{
    size_t stem = strlen(name);
    if (!stem || name[stem - 1] != '*')
        return load_exact(name, identity, code);
    char path[PATH_MAX];
    DIR *folder = nbhd_cache_directory(path, sizeof path) ? opendir(path) : NULL;
    bool found = false;
    for (struct dirent *at; folder && !found && (at = readdir(folder));)
        if (!strncmp(at->d_name, name, stem - 1) && ends_with(at->d_name, SUFFIX))
            found = load_exact(at->d_name, identity, code);
    if (folder)
        closedir(folder);
    return found;
}

static bool write_all(int file, const void *data, size_t bytes)
{
    for (const char *at = data; bytes > 0;) {
        ssize_t part = write(file, at, bytes);
        if (part < 0 && errno == EINTR)
            continue;
        if (part <= 0)
            return false;
        at += part;
        bytes -= (size_t)part;
    }
    return true;
}

/* The file's bytes; NULL without memory. */
static char *compose(const struct nbhd_jit *code, size_t *bytes)
{
    size_t identity = strlen(code->identity), log = strlen(code->log), head = sizeof magic - 1 + 64 + 1;
    char *data = malloc(head + 100 + identity + log + code->cubin_bytes);
    if (!data)
        return NULL;
    size_t at =
        head + (size_t)sprintf(data + head, "identity %zu log %zu cubin %zu\n", identity, log, code->cubin_bytes);
    memcpy(data + at, code->identity, identity);
    memcpy(data + at + identity, code->log, log);
    memcpy(data + at + identity + log, code->cubin, code->cubin_bytes);
    *bytes = at + identity + log + code->cubin_bytes;
    char hex[65];
    checksum(data + head, *bytes - head, hex);
    memcpy(data, magic, sizeof magic - 1);
    memcpy(data + sizeof magic - 1, hex, 64);
    data[head - 1] = '\n';
    return data;
}

bool nbhd_cache_store(const struct nbhd_jit *code)
{
    static atomic_uint counter;
    char folder[PATH_MAX], path[PATH_MAX], temporary[PATH_MAX], name[256];
    if (!nbhd_cache_directory(folder, sizeof folder))
        return false;
    make_directories(folder);
    snprintf(name, sizeof name, TEMPORARY "%ld-%u-%s", (long)getpid(), atomic_fetch_add(&counter, 1), code->name);
    if (!path_of(path, code->name) || !path_of(temporary, name))
        return false;
    size_t bytes = 0;
    char *data = compose(code, &bytes);
    int file = data ? open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666) : -1;
    bool written = file >= 0 && write_all(file, data, bytes);
    int error = errno;
    if (file >= 0 && close(file) && written) {
        written = false;
        error = errno;
    }
    free(data);
    if (written && rename(temporary, path)) {
        written = false;
        error = errno;
    }
    if (!written) {
        nbhd_log(1, "kernel cache: %s could not be written (%s); the kernel stays in memory", path, strerror(error));
        if (file >= 0)
            unlink(temporary);
    }
    return written;
}

int nbhd_cache_list(void (*visit)(const char *name, const struct nbhd_jit *code, void *context), void *context)
{
    char path[PATH_MAX];
    DIR *folder = nbhd_cache_directory(path, sizeof path) ? opendir(path) : NULL;
    int count = 0;
    for (struct dirent *at; folder && (at = readdir(folder));) {
        if (!ends_with(at->d_name, SUFFIX))
            continue;
        struct nbhd_jit code = {.log = NULL};
        bool whole = at->d_name[0] != '.' && load_exact(at->d_name, NULL, &code);
        visit(at->d_name, whole ? &code : NULL, context);
        drop_parts(&code);
        count++;
    }
    if (folder)
        closedir(folder);
    return count;
}

int nbhd_cache_clear(void)
{
    char path[PATH_MAX];
    DIR *folder = nbhd_cache_directory(path, sizeof path) ? opendir(path) : NULL;
    int count = 0, stayed = 0;
    for (struct dirent *at; folder && (at = readdir(folder));) {
        if (!ends_with(at->d_name, SUFFIX))
            continue;
        if (unlinkat(dirfd(folder), at->d_name, 0))
            stayed++;
        else
            count++;
    }
    if (folder)
        closedir(folder);
    return stayed ? -1 : count;
}
