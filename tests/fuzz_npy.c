/* libFuzzer target: the reader of .npy headers. What it accepts must lie within the file. */
#include <stdint.h>
#include <stdlib.h>

#include "array.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct array_info info;
    char why[NBHD_TEXT];
    if (npy_parse(data, size, &info, why)) {
        if (info.offset > size || info.bytes > size - info.offset)
            abort();
    } else if (!*why || !memchr(why, 0, sizeof why)) {
        abort(); /* refused without a sentence */
    }
    return 0;
}
