/* What the machine could do at most. */
#include "rates.h"

double peak_gflops(nbhd_device device, const char *kernel, int dtype, int threads)
{
    (void)device, (void)kernel, (void)dtype, (void)threads;
    return 0;
}
