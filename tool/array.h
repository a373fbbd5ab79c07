/* Tensors in files: "x.npy" and "x.safetensors:name", mapped into memory both ways.
 * The parsers work on bytes in memory, print nothing and trust nothing: tests/fuzz_npy.c, tests/fuzz_safetensors.c. */
#ifndef NBHD_TOOL_ARRAY_H
#define NBHD_TOOL_ARRAY_H

#include <stdbool.h>
#include <stddef.h>

#include "nbhd.h"

enum { ARRAY_RANK = 8 }; /* more axes than any tensor of ours has */

/* What a header says. The parsers guarantee: shape[] >= 0, offset + bytes <= the file's size, bytes = the product. */
struct array_info {
    int dtype; /* nbhd_dtype */
    int rank;
    long long shape[ARRAY_RANK];
    size_t offset, bytes;
    bool fortran, big_endian; /* as numpy may save; array_open makes a copy in C's order and bytes */
};

/* false: why[] holds a sentence without the file's name. */
bool npy_parse(const unsigned char *file, size_t size, struct array_info *info, char why[NBHD_TEXT]);
/* name "": the only tensor of the file. */
bool safetensors_find(const unsigned char *file, size_t size, const char *name, struct array_info *info,
                      char why[NBHD_TEXT]);

/* Copies the elements of source, which info tells of, in C's order and with this machine's bytes. */
void array_reorder(void *result, const void *source, const struct array_info *info);

struct array {
    struct array_info info;
    void *data; /* aligned to the element */
    void *map;
    size_t map_bytes;
    void *copy; /* where the file holds it unaligned, or not in our order */
};

/* Exit status; on failure the sentence has been told. */
int array_open(struct array *array, const char *spec);
void array_close(struct array *array);

/* A tensor to be written. spec, dtype, rank and shape are the caller's; outputs_open sets data. */
struct output {
    const char *spec;
    int dtype, rank;
    long long shape[ARRAY_RANK];
    void *data; /* written by the caller, in place in the file */
    size_t bytes;
};

/* Files under temporary names beside their final ones, so that a failure or an input of the same name loses nothing.
 * Outputs with one .safetensors path share the file. */
struct outputs;
/* TOOL_USAGE, told, where an output replaces the .safetensors file of an input that is named in it, and no output takes
 * that tensor's place. */
int outputs_spare(const char *input, const struct output *list, int count);
int outputs_open(struct outputs **files, struct output *list, int count);
int outputs_commit(struct outputs **files);   /* gives the files their names */
void outputs_abandon(struct outputs **files); /* removes them; NULL is allowed */

size_t dtype_size(int dtype);
const char *dtype_name(int dtype);
/* "2x56x56x4x32" */
const char *shape_text(const long long *shape, int rank, char text[ARRAY_RANK * 21]);

#endif
