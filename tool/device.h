/* Memory of a device, and waiting for it. The GPU's driver is opened at run time, so the tool links no CUDA. */
#ifndef NBHD_TOOL_DEVICE_H
#define NBHD_TOOL_DEVICE_H

#include <stdbool.h>
#include <stddef.h>

#include "nbhd.h"

/* All but device_about return an exit status and tell the sentence of a failure. */
int device_open(nbhd_device device); /* makes its context current; may be called again */
int device_alloc(nbhd_device device, size_t bytes, void **memory); /* aligned to 64 at least */
void device_free(nbhd_device device, void *memory);
int device_upload(nbhd_device device, void *to, const void *from, size_t bytes);
int device_download(nbhd_device device, void *to, const void *from, size_t bytes);
int device_wait(nbhd_device device);
/* Time between two marks on the device's null stream (CPU: the clock). Mark 0 begins, mark 1 ends. */
int device_mark(nbhd_device device, int mark);
int device_elapsed(nbhd_device device, double *ms);

struct device_about {
    char name[128], driver[32];
    int major, minor, multiprocessors;
    double memory_gib;
};
/* Of GPU 0; false, and a reason, where there is none. Tells nothing. */
bool device_about(struct device_about *about, char why[NBHD_TEXT]);

#endif
