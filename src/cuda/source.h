/* The text of the kernel files, as embedded, or as NBHD_KERNEL_DIR has it at this moment. */
#ifndef NBHD_CUDA_SOURCE_H
#define NBHD_CUDA_SOURCE_H

#include "cuda/jit.h"

struct nbhd_sources {
    const struct nbhd_source *list;
    int count;
    char hash[65]; /* of all names and texts */
    void *owned;   /* NULL: embedded */
};

/* NULL without memory. */
const struct nbhd_sources *nbhd_sources_acquire(void);
void nbhd_sources_release(const struct nbhd_sources *sources);

#endif
