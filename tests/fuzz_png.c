/* libFuzzer target: the reader of photographs. Every sample that it promises is read. */
#include <stdint.h>
#include <stdlib.h>

#include "fuzz.h"
#include "image.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct image image;
    char why[NBHD_TEXT] = "";
    if (!png_decode(data, size, &image, why)) {
        if (!*why || image.sample)
            abort();
        return 0;
    }
    double sum = 0;
    for (size_t i = 0; i < image_count(&image); i++)
        sum += image_get(&image, i);
    if (sum < 0)
        abort();
    image_free(&image);
    return 0;
}
