/* Memory of a device: the C library's on the CPU, the driver's (by dlopen) on a GPU. */
#include "device.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "timing.h"
#include "tool.h"

typedef int result;              /* CUresult */
typedef unsigned long long dptr; /* CUdeviceptr */

/* The driver's entry points that the tool calls: name, exported symbol, arguments. */
#define DRIVER(ENTRY)                                                                                                  \
    ENTRY(init, "cuInit", (unsigned))                                                                                  \
    ENTRY(version, "cuDriverGetVersion", (int *))                                                                      \
    ENTRY(count, "cuDeviceGetCount", (int *))                                                                          \
    ENTRY(name, "cuDeviceGetName", (char *, int, int))                                                                 \
    ENTRY(attribute, "cuDeviceGetAttribute", (int *, int, int))                                                        \
    ENTRY(total, "cuDeviceTotalMem_v2", (size_t *, int))                                                               \
    ENTRY(retain, "cuDevicePrimaryCtxRetain", (void **, int))                                                          \
    ENTRY(current, "cuCtxSetCurrent", (void *))                                                                        \
    ENTRY(synchronize, "cuCtxSynchronize", (void))                                                                     \
    ENTRY(alloc, "cuMemAlloc_v2", (dptr *, size_t))                                                                    \
    ENTRY(release, "cuMemFree_v2", (dptr))                                                                             \
    ENTRY(to_device, "cuMemcpyHtoD_v2", (dptr, const void *, size_t))                                                  \
    ENTRY(to_host, "cuMemcpyDtoH_v2", (void *, dptr, size_t))                                                          \
    ENTRY(event, "cuEventCreate", (void **, unsigned))                                                                 \
    ENTRY(record, "cuEventRecord", (void *, void *))                                                                   \
    ENTRY(event_wait, "cuEventSynchronize", (void *))                                                                  \
    ENTRY(elapsed, "cuEventElapsedTime", (float *, void *, void *))                                                    \
    ENTRY(error, "cuGetErrorString", (result, const char **))

#define DECLARE(field, symbol, arguments) result(*field) arguments;
static struct {
    bool open;
    void *context, *event_of[2];
    DRIVER(DECLARE)
} cu;

static double mark_ms[2];

/* Copies a symbol's address without a cast between object and function pointers. */
static bool resolve(void *library, const char *symbol, void *field, char why[NBHD_TEXT])
{
    void *address = dlsym(library, symbol);
    memcpy(field, &address, sizeof address);
    if (!address)
        snprintf(why, NBHD_TEXT, "libcuda.so.1 lacks %s", symbol);
    return address != NULL;
}

static const char *error_text(result r)
{
    const char *text = NULL;
    return !cu.error(r, &text) && text ? text : "unknown error";
}

static bool load(char why[NBHD_TEXT])
{
    if (cu.open)
        return true;
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(why, NBHD_TEXT, "no CUDA driver here (libcuda.so.1 not found)");
        return false;
    }
#define RESOLVE(field, symbol, arguments)                                                                              \
    if (!resolve(library, symbol, &cu.field, why))                                                                     \
        return false;
    DRIVER(RESOLVE)
    int devices = 0;
    result r = cu.init(0);
    if (!r)
        r = cu.count(&devices);
    if (r || !devices) {
        snprintf(why, NBHD_TEXT, "the CUDA driver has no device: %s", r ? error_text(r) : "it counts none");
        return false;
    }
    return cu.open = true;
}

static int check(result r, const char *what)
{
    return r ? tool_fail(TOOL_FAILED, "the GPU's driver says on %s: %s", what, error_text(r)) : TOOL_DONE;
}

int device_open(nbhd_device device)
{
    char why[NBHD_TEXT];
    if (device == NBHD_DEVICE_CPU || cu.context)
        return TOOL_DONE;
    if (!load(why))
        return tool_fail(TOOL_FAILED, "--device cuda: %s", why);
    int status = check(cu.retain(&cu.context, 0), "opening device 0");
    if (!status)
        status = check(cu.current(cu.context), "opening device 0");
    for (int i = 0; !status && i < 2; i++)
        status = check(cu.event(&cu.event_of[i], 0), "making an event");
    return status;
}

int device_alloc(nbhd_device device, size_t bytes, void **memory)
{
    size_t rounded = bytes / 64 * 64 + 64; /* never 0 */
    *memory = NULL;
    if (rounded < bytes)
        return tool_fail(TOOL_FAILED, "out of memory: a tensor has more bytes than can be addressed");
    if (device == NBHD_DEVICE_CPU) {
        *memory = aligned_alloc(64, rounded);
        return *memory ? TOOL_DONE : tool_fail(TOOL_FAILED, "out of memory: %.1f MiB", (double)bytes / 1048576);
    }
    dptr p = 0;
    int status = check(cu.alloc(&p, rounded), "allocating memory");
    *memory = (void *)(uintptr_t)p;
    return status;
}

void device_free(nbhd_device device, void *memory)
{
    if (device == NBHD_DEVICE_CPU)
        free(memory);
    else if (memory)
        cu.release((dptr)(uintptr_t)memory);
}

int device_upload(nbhd_device device, void *to, const void *from, size_t bytes)
{
    if (device != NBHD_DEVICE_CPU)
        return check(cu.to_device((dptr)(uintptr_t)to, from, bytes), "copying to the device");
    memcpy(to, from, bytes);
    return TOOL_DONE;
}

int device_download(nbhd_device device, void *to, const void *from, size_t bytes)
{
    if (device != NBHD_DEVICE_CPU)
        return check(cu.to_host(to, (dptr)(uintptr_t)from, bytes), "copying from the device");
    memcpy(to, from, bytes);
    return TOOL_DONE;
}

int device_wait(nbhd_device device)
{
    return device == NBHD_DEVICE_CPU ? TOOL_DONE : check(cu.synchronize(), "running the kernel");
}

int device_mark(nbhd_device device, int mark)
{
    if (device != NBHD_DEVICE_CPU)
        return check(cu.record(cu.event_of[mark], NULL), "recording an event");
    mark_ms[mark] = now_ms();
    return TOOL_DONE;
}

int device_elapsed(nbhd_device device, double *ms)
{
    *ms = mark_ms[1] - mark_ms[0];
    if (device == NBHD_DEVICE_CPU)
        return TOOL_DONE;
    float elapsed = 0;
    int status = check(cu.event_wait(cu.event_of[1]), "running the kernel");
    if (!status)
        status = check(cu.elapsed(&elapsed, cu.event_of[0], cu.event_of[1]), "timing the kernel");
    *ms = elapsed;
    return status;
}

bool device_about(struct device_about *about, char why[NBHD_TEXT])
{
    enum { MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76 }; /* CUdevice_attribute */
    size_t bytes = 0;
    int version = 0;
    memset(about, 0, sizeof *about);
    if (!load(why))
        return false;
    cu.name(about->name, sizeof about->name, 0);
    cu.attribute(&about->major, MAJOR, 0);
    cu.attribute(&about->minor, MINOR, 0);
    cu.attribute(&about->multiprocessors, MULTIPROCESSORS, 0);
    cu.total(&bytes, 0);
    cu.version(&version);
    about->memory_gib = (double)bytes / (1 << 30);
    snprintf(about->driver, sizeof about->driver, "%d.%d", version / 1000, version % 1000 / 10);
    return true;
}
