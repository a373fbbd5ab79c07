/* Photographs: samples as the PNG has them, 8 or 16 bits, grey or colour, with or without alpha.
 * The decoder works on bytes in memory, prints nothing and trusts nothing: tests/fuzz_png.c. */
#ifndef NBHD_TOOL_IMAGE_H
#define NBHD_TOOL_IMAGE_H

#include <stdbool.h>
#include <stddef.h>

#include "nbhd.h"
#include "outfile.h"

/* A chunk of the file that says what samples mean (a colour profile, the resolution): carried along unread. */
struct image_chunk {
    char name[5];
    unsigned char location; /* as libpng counts */
    unsigned char *data;
    size_t size;
};

struct image {
    int width, height;
    int channels;    /* 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA */
    int bits;        /* 8 or 16 */
    void *sample;    /* [height][width][channels], unsigned char or unsigned short */
    struct image_chunk *chunk;
    int chunks;
};

static inline int image_colours(const struct image *image) { return image->channels < 3 ? 1 : 3; }
static inline size_t image_count(const struct image *image)
{
    return (size_t)image->width * (size_t)image->height * (size_t)image->channels;
}
static inline double image_get(const struct image *image, size_t i)
{
    return image->bits == 8 ? ((const unsigned char *)image->sample)[i] : ((const unsigned short *)image->sample)[i];
}
/* Rounds and clips to the samples' range. */
void image_put(struct image *image, size_t i, double value);
bool image_copy(struct image *to, const struct image *from); /* of samples, not of chunks; false: out of memory */
void image_free(struct image *image);

/* false: why[] holds a sentence without the file's name. */
bool png_decode(const unsigned char *file, size_t size, struct image *image, char why[NBHD_TEXT]);

/* Exit status; the sentence of a failure has been told. */
int image_read(struct image *image, const char *path);
int image_write(const struct image *image, const char *path);
int image_save(const struct image *image, struct outfile **file); /* commits it, or abandons it */

#endif
