/* A file that appears under its name only when it is whole: written under a temporary name, then renamed. */
#ifndef NBHD_TOOL_OUTFILE_H
#define NBHD_TOOL_OUTFILE_H

#include <stddef.h>

struct outfile;

/* Exit status; the sentence of a failure has been told. Refuses a name that another unfinished file will have. */
int outfile_open(struct outfile **file, const char *path);
int outfile_write(struct outfile *file, const void *bytes, size_t size);
/* Reserves size bytes on the disk and maps them; NULL after telling why. The caller unmaps. */
void *outfile_map(struct outfile *file, size_t size);
int outfile_commit(struct outfile **file);
void outfile_abandon(struct outfile **file);

#endif
