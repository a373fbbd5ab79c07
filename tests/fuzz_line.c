/* libFuzzer target: problem lines. A line that parses formats, and its canonical form parses to itself. */
#include <stdint.h>
#include <stdlib.h>

#include "fuzz.h"
#include "nbhd.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    nbhd_desc desc, again;
    char text[NBHD_TEXT], line[NBHD_TEXT], twice[NBHD_TEXT];
    if (size >= sizeof text)
        return 0;
    memcpy(text, data, size);
    text[size] = 0;
    if (nbhd_desc_parse(&desc, text) != NBHD_OK) {
        if (!*nbhd_last_error())
            abort();
        return 0;
    }
    if (nbhd_desc_format(&desc, line, sizeof line) != NBHD_OK || nbhd_desc_parse(&again, line) != NBHD_OK ||
        nbhd_desc_format(&again, twice, sizeof twice) != NBHD_OK || strcmp(line, twice))
        abort();
    if ((double)desc.length[0] + desc.length[1] + desc.length[2] < 1e5) { /* they take time in proportion */
        nbhd_desc_pairs(&desc);
        nbhd_desc_flops(&desc);
    }
    return 0;
}
