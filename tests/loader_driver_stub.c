/* Every entry point that the library asks of a driver, for loader_stub.c, which has those that do something. */
#include "cuda/driver.h"

#define STUB(name, arguments)                    \
    __attribute__((weak)) unsigned name(void);   \
    unsigned name(void) { return 0; }
NBHD_DRIVER_LIST(STUB)
