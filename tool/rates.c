/* What the machine could do at most. */
#include "rates.h"

#include <string.h>

#include "cpu/isa.h"
#include "cpu/peak.h"

/* The instruction set that ends a kernel's name, and those that it contains; all that this machine has if none does. */
static unsigned isa_of(const char *kernel)
{
    const char *suffix = strrchr(kernel, '_');
    for (unsigned bit = NBHD_ISA_NEON; suffix && bit; bit >>= 1)
        if (!strcmp(suffix + 1, nbhd_isa_name(bit)))
            return bit == NBHD_ISA_NEON ? bit : bit | (bit - 1);
    return nbhd_isa_available();
}

double peak_gflops(nbhd_device device, const char *kernel, int dtype, int threads)
{
    static struct {
        unsigned isa;
        int threads;
        double gflops;
    } known[16]; /* in use from the front; threads 0: free */
    enum { ROOM = sizeof known / sizeof *known };
    if (device != NBHD_DEVICE_CPU)
        return 0;
    unsigned isa = isa_of(kernel);
    int i = 0;
    while (i < ROOM - 1 && known[i].threads && (known[i].isa != isa || known[i].threads != threads))
        i++;
    if (known[i].isa != isa || known[i].threads != threads) {
        known[i].isa = isa;
        known[i].threads = threads;
        known[i].gflops = nbhd_cpu_peak_gflops(isa, threads);
    }
    return dtype == NBHD_F64 ? known[i].gflops / 2 : known[i].gflops;
}
