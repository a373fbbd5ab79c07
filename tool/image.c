/* Photographs as PNG, by libpng. Built without it (NBHD_PNG=OFF), reading and writing refuse in a sentence. */
#include "image.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "infile.h"
#include "tool.h"

#if NBHD_HAVE_PNG
#include <png.h>
#else
#include <stdio.h>
#endif

void image_put(struct image *image, size_t i, double value)
{
    int max = (1 << image->bits) - 1;
    int rounded = value <= 0 ? 0 : value >= max ? max : (int)(value + 0.5);
    if (image->bits == 8)
        ((unsigned char *)image->sample)[i] = (unsigned char)rounded;
    else
        ((unsigned short *)image->sample)[i] = (unsigned short)rounded;
}

bool image_copy(struct image *to, const struct image *from)
{
    size_t bytes = image_count(from) * (size_t)(from->bits / 8);
    *to = *from;
    to->chunk = NULL;
    to->chunks = 0;
    to->sample = malloc(bytes);
    if (to->sample)
        memcpy(to->sample, from->sample, bytes);
    return to->sample != NULL;
}

void image_free(struct image *image)
{
    free(image->sample);
    for (int i = 0; i < image->chunks; i++)
        free(image->chunk[i].data);
    free(image->chunk);
    memset(image, 0, sizeof *image);
}

int image_read(struct image *image, const char *path)
{
    size_t size;
    void *file;
    char why[NBHD_TEXT];
    memset(image, 0, sizeof *image);
    const int status = infile_map(&file, &size, path);
    if (status)
        return status;
    bool good = png_decode(file, size, image, why);
    munmap(file, size);
    return good ? TOOL_DONE : tool_fail(TOOL_USAGE, "%s: %s", path, why);
}

#if !NBHD_HAVE_PNG

bool png_decode(const unsigned char *file, size_t size, struct image *image, char why[NBHD_TEXT])
{
    (void)file, (void)size, (void)image;
    snprintf(why, NBHD_TEXT, "this nbhd was built without libpng (NBHD_PNG=OFF)");
    return false;
}

int image_save(const struct image *image, struct outfile **file)
{
    (void)image;
    outfile_abandon(file);
    return tool_fail(TOOL_FAILED, "this nbhd was built without libpng (NBHD_PNG=OFF) and writes no PNG");
}

#else

/* All that outlives a longjmp out of libpng lives here, and no function that calls setjmp has locals. */
struct decoder {
    png_structp png;
    png_infop info;
    const unsigned char *at;
    size_t left, size;
    png_bytep *rows;
    struct image *image;
    char *why;
};

static void on_error(png_structp png, png_const_charp message)
{
    struct decoder *d = png_get_error_ptr(png);
    snprintf(d->why, NBHD_TEXT, "it cannot be read as a PNG: %s", message);
    png_longjmp(png, 1);
}

static void on_warning(png_structp png, png_const_charp message) { (void)png, (void)message; }

static void read_bytes(png_structp png, png_bytep to, size_t count)
{
    struct decoder *d = png_get_io_ptr(png);
    if (count > d->left)
        png_error(png, "the file ends too early");
    memcpy(to, d->at, count);
    d->at += count;
    d->left -= count;
}

/* Whatever the PNG is, 8 or 16 bits of grey or RGB, with alpha if it has any. */
static void normalise(struct decoder *d)
{
    int type = png_get_color_type(d->png, d->info);
    if (type == PNG_COLOR_TYPE_PALETTE)
        png_set_palette_to_rgb(d->png);
    if (type == PNG_COLOR_TYPE_GRAY)
        png_set_expand_gray_1_2_4_to_8(d->png);
    if (png_get_valid(d->png, d->info, PNG_INFO_tRNS))
        png_set_tRNS_to_alpha(d->png);
    if (png_get_bit_depth(d->png, d->info) == 16)
        png_set_swap(d->png); /* samples as the machine has them; nbhd runs on little-endian ones only */
    png_set_interlace_handling(d->png);
    png_read_update_info(d->png, d->info);
}

/* Deflate makes at most 1032 bytes of one: a header that claims more than the file can hold costs no memory. */
static void refuse_lies(struct decoder *d)
{
    double bits = (double)png_get_bit_depth(d->png, d->info) * png_get_channels(d->png, d->info);
    double claimed = bits / 8 * png_get_image_width(d->png, d->info) * png_get_image_height(d->png, d->info);
    if (claimed > 1100.0 * (double)d->size)
        png_error(d->png, "the file is too short for the width and height that it claims");
}

/* What is carried from the photograph that is read to the one that is written. */
static const png_byte carried[] = "iCCP\0sRGB\0gAMA\0cHRM\0pHYs\0eXIf";
enum { CARRIED = sizeof carried / 5 };

static void keep_chunks(struct decoder *d)
{
    png_unknown_chunkp chunk;
    int count = png_get_unknown_chunks(d->png, d->info, &chunk);
    struct image *image = d->image;
    image->chunk = count ? calloc((size_t)count, sizeof *image->chunk) : NULL;
    for (int i = 0; image->chunk && i < count; i++) {
        struct image_chunk *to = &image->chunk[i];
        image->chunks++;
        memcpy(to->name, chunk[i].name, sizeof to->name);
        to->location = chunk[i].location;
        to->size = chunk[i].size;
        to->data = malloc(to->size ? to->size : 1);
        if (!to->data)
            png_error(d->png, "out of memory");
        memcpy(to->data, chunk[i].data, to->size);
    }
}

static void decode(struct decoder *d)
{
    png_set_read_fn(d->png, d, read_bytes);
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
    png_set_crc_action(d->png, PNG_CRC_QUIET_USE, PNG_CRC_QUIET_USE); /* or a fuzzer never gets past them */
#endif
    png_set_user_limits(d->png, 1 << 20, 1 << 20);
    png_set_keep_unknown_chunks(d->png, PNG_HANDLE_CHUNK_ALWAYS, carried, CARRIED);
    png_read_info(d->png, d->info);
    refuse_lies(d);
    normalise(d);
    struct image *image = d->image;
    image->width = (int)png_get_image_width(d->png, d->info);
    image->height = (int)png_get_image_height(d->png, d->info);
    image->channels = png_get_channels(d->png, d->info);
    image->bits = png_get_bit_depth(d->png, d->info);
    size_t row = png_get_rowbytes(d->png, d->info);
    image->sample = malloc(row * (size_t)image->height);
    d->rows = malloc((size_t)image->height * sizeof *d->rows);
    if (!image->sample || !d->rows)
        png_error(d->png, "out of memory");
    for (int y = 0; y < image->height; y++)
        d->rows[y] = (png_bytep)image->sample + row * (size_t)y;
    png_read_image(d->png, d->rows);
    png_read_end(d->png, d->info);
    keep_chunks(d);
}

static bool decode_guarded(struct decoder *d)
{
    if (setjmp(png_jmpbuf(d->png)))
        return false;
    decode(d);
    return true;
}

bool png_decode(const unsigned char *file, size_t size, struct image *image, char why[NBHD_TEXT])
{
    struct decoder d = {.at = file, .left = size, .size = size, .image = image, .why = why};
    memset(image, 0, sizeof *image);
    if (size < 8 || png_sig_cmp(file, 0, 8)) {
        snprintf(why, NBHD_TEXT, "it is not a PNG file");
        return false;
    }
    snprintf(why, NBHD_TEXT, "out of memory");
    d.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &d, on_error, on_warning);
    d.info = d.png ? png_create_info_struct(d.png) : NULL;
    bool good = d.info && decode_guarded(&d);
    png_destroy_read_struct(&d.png, &d.info, NULL);
    free(d.rows);
    if (!good)
        image_free(image);
    return good;
}

struct encoder {
    png_structp png;
    png_infop info;
    struct outfile *file;
    bool told;
};

static void write_bytes(png_structp png, png_bytep from, size_t count)
{
    struct encoder *e = png_get_io_ptr(png);
    if (outfile_write(e->file, from, count)) {
        e->told = true;
        png_longjmp(png, 1);
    }
}

static void flush(png_structp png) { (void)png; }

static void encode(struct encoder *e, const struct image *image)
{
    static const int type[] = {0, PNG_COLOR_TYPE_GRAY, PNG_COLOR_TYPE_GRAY_ALPHA, PNG_COLOR_TYPE_RGB,
                               PNG_COLOR_TYPE_RGB_ALPHA};
    png_set_write_fn(e->png, e, write_bytes, flush);
    png_set_IHDR(e->png, e->info, (png_uint_32)image->width, (png_uint_32)image->height, image->bits,
                 type[image->channels], PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    png_set_keep_unknown_chunks(e->png, PNG_HANDLE_CHUNK_ALWAYS, carried, CARRIED);
    for (int i = 0; i < image->chunks; i++) {
        png_unknown_chunk chunk = {.data = image->chunk[i].data, .size = image->chunk[i].size,
                                   .location = image->chunk[i].location};
        memcpy(chunk.name, image->chunk[i].name, sizeof chunk.name);
        png_set_unknown_chunks(e->png, e->info, &chunk, 1);
    }
    png_write_info(e->png, e->info);
    if (image->bits == 16)
        png_set_swap(e->png);
    size_t row = (size_t)image->width * (size_t)image->channels * (size_t)(image->bits / 8);
    for (int y = 0; y < image->height; y++)
        png_write_row(e->png, (png_const_bytep)image->sample + row * (size_t)y);
    png_write_end(e->png, e->info);
}

static bool encode_guarded(struct encoder *e, const struct image *image)
{
    if (setjmp(png_jmpbuf(e->png)))
        return false;
    encode(e, image);
    return true;
}

int image_save(const struct image *image, struct outfile **file)
{
    struct encoder e = {.file = *file};
    e.png = png_create_write_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    e.info = e.png ? png_create_info_struct(e.png) : NULL;
    bool good = e.info && encode_guarded(&e, image);
    png_destroy_write_struct(&e.png, &e.info);
    if (good)
        return outfile_commit(file);
    outfile_abandon(file);
    return e.told ? TOOL_FAILED : tool_fail(TOOL_FAILED, "the picture cannot be written: libpng failed");
}

#endif

int image_write(const struct image *image, const char *path)
{
    struct outfile *file;
    const int status = outfile_open(&file, path);
    return status ? status : image_save(image, &file);
}
