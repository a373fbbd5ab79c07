/* libFuzzer target: tables of measurements. What parses can be predicted from, and says why if not. */
#include <stdint.h>
#include <stdlib.h>

#include "fuzz.h"
#include "nbhd_sim.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    enum { ROOM = 16 };
    static nbhd_sim_sample samples[ROOM];
    char *text = malloc(size + 1); /* its own piece: a read past the end shows */
    int count = 0;
    if (!text)
        return 0;
    memcpy(text, data, size);
    text[size] = 0;
    if (nbhd_sim_samples_parse(text, samples, ROOM, &count) != NBHD_OK && !*nbhd_last_error())
        abort();
    free(text);
    nbhd_sim_device device = NBHD_SIM_DEVICE_INIT;
    nbhd_sim_device_get(&device, "h200");
    for (int i = 0; i < count; i++) {
        double ms = -1;
        if ((double)samples[i].desc.length[0] + samples[i].desc.length[1] + samples[i].desc.length[2] > 1e4 ||
            samples[i].tiles.tiling == NBHD_SIM_FLAT) /* they take time in proportion */
            continue;
        if (nbhd_sim_predict(&device, &samples[i].desc, &samples[i].tiles, &ms) ? !*nbhd_last_error() : !(ms > 0))
            abort();
    }
    return 0;
}
