/* Finds and opens the driver and NVRTC. Both stay open until the process ends. */
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#include <glob.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "cuda/driver.h"

/* ISO C has no cast from an object pointer to a function pointer; POSIX promises that the bytes are the same. */
static bool resolve(void *library, const char *name, void *function)
{
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != NULL;
}

/* ---- the driver ---- */
struct nbhd_driver nbhd_cu;
static char driver_why[NBHD_TEXT]; /* empty: the driver is usable */
static pthread_once_t driver_once = PTHREAD_ONCE_INIT;

static void open_driver(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        nbhd_refuse(driver_why, "there is no CUDA driver on this machine (%s)", dlerror());
        return;
    }
    const char *missing = NULL;
#define RESOLVE(name, arguments)                 \
    if (!resolve(library, #name, &nbhd_cu.name)) \
        missing = #name;
    NBHD_DRIVER_LIST(RESOLVE)
    if (missing) {
        nbhd_refuse(driver_why, "the CUDA driver is too old: it lacks %s; version 12.0 or later is needed", missing);
        return;
    }
    unsigned result = nbhd_cu.cuInit(0);
    if (result) {
        const char *text = NULL;
        nbhd_cu.cuGetErrorString(result, &text);
        if (result == NBHD_CU_ERROR_NO_DEVICE)
            nbhd_refuse(driver_why, "the CUDA driver finds no GPU on this machine");
        else
            nbhd_refuse(driver_why, "the CUDA driver could not be initialized: %s (error %u)",
                        text ? text : "no description", result);
        return;
    }
    nbhd_cu.cuDriverGetVersion(&nbhd_cu.version);
}

bool nbhd_driver_open(char why[NBHD_TEXT])
{
    pthread_once(&driver_once, open_driver);
    return !driver_why[0] || !nbhd_refuse(why, "%s", driver_why);
}

nbhd_status nbhd_driver_check(unsigned result, const char *what)
{
    if (result == NBHD_CU_SUCCESS)
        return NBHD_OK;
    const char *name = NULL, *text = NULL;
    nbhd_cu.cuGetErrorName(result, &name);
    nbhd_cu.cuGetErrorString(result, &text);
    if (result == NBHD_CU_ERROR_UNSUPPORTED_PTX_VERSION || result == NBHD_CU_ERROR_NO_BINARY_FOR_GPU ||
        result == NBHD_CU_ERROR_INVALID_IMAGE)
        return nbhd_fail(NBHD_ERROR_DEVICE,
                         "%s: %s; the CUDA driver (%d.%d) does not take what this NVRTC compiles: update the driver, "
                         "or set NBHD_NVRTC to an NVRTC of the driver's version",
                         what, name ? name : "unknown error", nbhd_cu.version / 1000, nbhd_cu.version % 1000 / 10);
    return nbhd_fail(NBHD_ERROR_DEVICE, "%s: %s, %s (error %u)", what, name ? name : "unknown error",
                     text ? text : "no description", result);
}

/* ---- NVRTC ---- */
static struct nbhd_nvrtc nvrtc;
static char nvrtc_why[NBHD_TEXT];
static char last_why[NBHD_TEXT]; /* why the library that was tried last does not serve */
static pthread_once_t nvrtc_once = PTHREAD_ONCE_INIT;

/* libnvrtc opens its builtins by bare name, which fails where the linker does not search its directory (as in a Python
 * package); what is already loaded under that name is found. */
static void load_builtins(const char *file)
{
    const char *slash = strrchr(file, '/');
    if (!slash)
        return;
    char pattern[PATH_MAX];
    snprintf(pattern, sizeof pattern, "%.*s/libnvrtc-builtins.so.*", (int)(slash - file), file);
    glob_t found;
    if (glob(pattern, 0, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc; i++)
            dlopen(found.gl_pathv[i], RTLD_NOW | RTLD_GLOBAL);
    globfree(&found);
}

/* Of an open library: true if it is an NVRTC that serves. */
static bool take_nvrtc(void *library, const char *file)
{
    const char *missing = NULL;
    int major = 0, minor = 0;
#define RESOLVE_NVRTC(name, arguments)          \
    if (!resolve(library, #name, &nvrtc.name)) \
        missing = #name;
    NBHD_NVRTC_LIST(RESOLVE_NVRTC)
    if (missing)
        return !nbhd_refuse(last_why, "%s lacks %s", file, missing);
    if (nvrtc.nvrtcVersion(&major, &minor) || major < 12)
        return !nbhd_refuse(last_why, "%s is NVRTC %d.%d; 12.0 or later is needed", file, major, minor);
    if (nvrtc.nvrtcGetNumSupportedArchs(&nvrtc.arch_count) || nvrtc.arch_count < 1 ||
        nvrtc.arch_count > (int)(sizeof nvrtc.archs / sizeof *nvrtc.archs) || nvrtc.nvrtcGetSupportedArchs(nvrtc.archs))
        return !nbhd_refuse(last_why, "%s does not tell what it compiles for", file);
    nvrtc.version = major * 100 + minor;
    return true;
}

static bool open_nvrtc_file(const char *file)
{
    load_builtins(file);
    void *library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return !nbhd_refuse(last_why, "%s", dlerror());
    if (!take_nvrtc(library, file)) {
        dlclose(library);
        return false;
    }
    Dl_info where;
    void *symbol = dlsym(library, "nvrtcVersion");
    snprintf(nvrtc.path, sizeof nvrtc.path, "%s",
             symbol && dladdr(symbol, &where) && where.dli_fname ? where.dli_fname : file);
    load_builtins(nvrtc.path);
    return true;
}

static bool open_nvrtc_pattern(const char *pattern);

/* A pattern with {one,other}: each of them in turn. Not every C library's glob() has that. */
static bool open_nvrtc_choice(const char *pattern, const char *open, const char *close)
{
    bool opened = false;
    for (const char *one = open + 1; one <= close && !opened; one += strcspn(one, ",}") + 1) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%.*s%.*s%s", (int)(open - pattern), pattern, (int)strcspn(one, ",}"), one,
                 close + 1);
        opened = open_nvrtc_pattern(path);
    }
    return opened;
}

/* Tries every file that the pattern matches, the last in the alphabet first: newer versions. */
static bool open_nvrtc_pattern(const char *pattern)
{
    const char *open = strchr(pattern, '{'), *close = open ? strchr(open, '}') : NULL;
    if (close)
        return open_nvrtc_choice(pattern, open, close);
    bool opened = false;
    glob_t found;
    if (glob(pattern, 0, NULL, &found) == 0)
        for (size_t i = found.gl_pathc; i-- > 0 && !opened;)
            if (!strstr(found.gl_pathv[i], ".alt.so"))
                opened = open_nvrtc_file(found.gl_pathv[i]);
    globfree(&found);
    return opened;
}

/* A directory with Python packages of NVIDIA: site-packages of CUDA 13, of CUDA 12, and in torch's own folder. */
static bool open_nvrtc_python(const char *site, int length, int major)
{
    char pattern[PATH_MAX];
    snprintf(pattern, sizeof pattern, "%.*s/nvidia/{cu%d,cuda_nvrtc}/lib/libnvrtc.so.%d", length, site, major, major);
    return open_nvrtc_pattern(pattern);
}

static bool open_nvrtc_python_paths(int major)
{
    Dl_info own; /* installed as site-packages/nbhd/libnbhd.so, or a folder deeper */
    if (dladdr((const void *)&nvrtc, &own) && own.dli_fname) {
        char folder[PATH_MAX];
        snprintf(folder, sizeof folder, "%s", own.dli_fname);
        for (int up = 0; up < 3; up++) {
            char *slash = strrchr(folder, '/');
            if (!slash || slash == folder)
                break;
            *slash = 0;
            if (open_nvrtc_python(folder, (int)strlen(folder), major))
                return true;
        }
    }
    const char *path = nbhd_env("PATH"); /* an environment's bin directory lies beside its lib directory */
    for (const char *at = path, *end; at && *at; at = *end ? end + 1 : end) {
        end = at + strcspn(at, ":");
        char site[PATH_MAX];
        snprintf(site, sizeof site, "%.*s/../lib/python3*/{site,dist}-packages", (int)(end - at), at);
        if (end > at && open_nvrtc_python(site, (int)strlen(site), major))
            return true;
    }
    return false;
}

static bool open_nvrtc_major(int major)
{
    char name[PATH_MAX];
    snprintf(name, sizeof name, "libnvrtc.so.%d", major);
    if (open_nvrtc_file(name))
        return true;
    snprintf(name, sizeof name, "{/usr/local/cuda,/usr/local/cuda-%d*,/opt/cuda}/{lib64,targets/*/lib}/libnvrtc.so.%d",
             major, major);
    return open_nvrtc_pattern(name) || open_nvrtc_python_paths(major);
}

static void open_nvrtc(void)
{
    const char *chosen = nbhd_env("NBHD_NVRTC");
    if (chosen) {
        char pattern[PATH_MAX];
        struct stat info;
        bool folder = stat(chosen, &info) == 0 && S_ISDIR(info.st_mode);
        snprintf(pattern, sizeof pattern, folder ? "%s/libnvrtc.so.[0-9]*" : "%s", chosen);
        nbhd_refuse(last_why, "no libnvrtc.so.* is in it");
        if (!(folder ? open_nvrtc_pattern(pattern) : open_nvrtc_file(chosen)))
            nbhd_refuse(nvrtc_why, "NBHD_NVRTC is '%s', where no NVRTC could be opened: %s", chosen, last_why);
        return;
    }
    /* A driver loads what a compiler of its own major version or an older one made. */
    char ignored[NBHD_TEXT];
    bool old = nbhd_driver_open(ignored) && nbhd_cu.version < 13000;
    for (int major = old ? 12 : 13; major >= 12; major--)
        if (open_nvrtc_major(major))
            return;
    nbhd_refuse(nvrtc_why,
                "NVRTC%s, the compiler of CUDA kernels, was not found: install it, e.g. by 'pip install "
                "nvidia-cuda-nvrtc%s', or set NBHD_NVRTC to libnvrtc.so or its directory",
                old ? " 12, which the driver's version wants" : "", old ? "-cu12" : "");
}

const struct nbhd_nvrtc *nbhd_nvrtc(char why[NBHD_TEXT])
{
    pthread_once(&nvrtc_once, open_nvrtc);
    if (!nvrtc_why[0])
        return &nvrtc;
    nbhd_refuse(why, "%s", nvrtc_why);
    return NULL;
}
