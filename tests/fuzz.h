/* What every fuzzer needs: its declaration, and the command's way to tell a failure, here silent. */
#ifndef NBHD_TESTS_FUZZ_H
#define NBHD_TESTS_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "tool.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int tool_fail(int status, const char *format, ...)
{
    (void)format;
    return status;
}

#endif
