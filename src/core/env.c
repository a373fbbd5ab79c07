/* The only reader of the environment. Variables: NBHD_ISA, NBHD_THREADS, NBHD_KERNEL, NBHD_LOG, and the CUDA backend's
 * NBHD_CACHE_DIR, NBHD_KERNEL_DIR (cuda/jit.h) and NBHD_NVRTC (cuda/driver.h). */
#include <stdlib.h>
#include "core/kernel.h"

const char *nbhd_env(const char *name)
{
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}
