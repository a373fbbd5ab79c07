/* Machine code of sm_90, as nvdisasm prints it, for the tests that look at it. */
#ifndef NBHD_TESTS_SASS_H
#define NBHD_TESTS_SASS_H

#include <stdbool.h>
#include <stddef.h>

struct sass_line {
    unsigned address;
    char text[120];  /* "@P0 BRA `(.L_x_5)" */
    char label[24];  /* before it; "" if there is none */
};

struct sass {
    struct sass_line *line;
    int count;
};

/* Disassembles a cubin. False where there is no disassembler: on PATH, or $NBHD_NVDISASM. */
bool sass_read(struct sass *s, const void *cubin, size_t bytes);
void sass_free(struct sass *s);
bool sass_has(const struct sass *s, const char *instruction);

/* Looks for a register that an HGMMA reads as its A operand and that another instruction of the same loop overwrites
 * before the wait for that HGMMA, in this turn of the loop or the next: ptxas sometimes gives it away (NBHD_KEEP_R).
 * Writes a sentence. */
bool sass_overwrites(const struct sass *s, char *why, size_t room);

#endif
