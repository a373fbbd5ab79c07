/* A file of input, mapped into memory. */
#ifndef NBHD_TOOL_INFILE_H
#define NBHD_TOOL_INFILE_H

#include <stddef.h>

/* Maps a regular file that is not empty, for reading; munmap it. Exit status; the sentence of a failure has been
 * told. What is no such file, a FIFO say, is not waited for. */
int infile_map(void **map, size_t *bytes, const char *path);

#endif
