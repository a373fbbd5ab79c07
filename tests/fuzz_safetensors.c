/* libFuzzer target: the reader of .safetensors headers. What it accepts must lie within the file. */
#include <stdint.h>
#include <stdlib.h>

#include "array.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const names[] = {"", "q"};
    for (int i = 0; i < 2; i++) {
        struct array_info info;
        char why[NBHD_TEXT] = "";
        if (safetensors_find(data, size, names[i], &info, why)) {
            if (info.offset > size || info.bytes > size - info.offset)
                abort();
        } else if (!*why || !memchr(why, 0, sizeof why)) {
            abort();
        }
    }
    return 0;
}
