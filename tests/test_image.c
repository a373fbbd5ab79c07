/* Pictures in PNG files, good ones and hostile ones, and their noise. With a directory as argument it also writes every
 * file there: seeds for the fuzzers (scripts/fuzz). */
#include <math.h>

#include "files.h"
#include "image.h"
#include "noise.h"

#if NBHD_HAVE_PNG
#include <png.h>

/* ---- PNG ---- */

struct png_buffer {
    unsigned char at[1 << 16];
    size_t size;
};

static void append(png_structp png, png_bytep bytes, size_t count)
{
    struct png_buffer *to = png_get_io_ptr(png);
    if (to->size + count > sizeof to->at)
        png_error(png, "full");
    memcpy(to->at + to->size, bytes, count);
    to->size += count;
}

static void no_flush(png_structp png) { (void)png; }

/* A picture of any of PNG's kinds, whose raw bytes are 0, 1, 2 ... modulo `modulus`. */
static struct png_buffer make_png(int width, int height, int type, int bits, bool interlaced, int modulus)
{
    static struct png_buffer out;
    memset(&out, 0, sizeof out);
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png_create_info_struct(png);
    png_set_write_fn(png, &out, append, no_flush);
    png_set_IHDR(png, info, (png_uint_32)width, (png_uint_32)height, bits, type,
                 interlaced ? PNG_INTERLACE_ADAM7 : PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
                 PNG_FILTER_TYPE_DEFAULT);
    png_color palette[4] = {{1, 2, 3}, {10, 20, 30}, {100, 110, 120}, {255, 254, 253}};
    png_byte alpha[4] = {255, 0, 128, 7};
    if (type == PNG_COLOR_TYPE_PALETTE) {
        png_set_PLTE(png, info, palette, 4);
        png_set_tRNS(png, info, alpha, 4, NULL);
    }
    png_write_info(png, info);
    size_t row = png_get_rowbytes(png, info);
    unsigned char *pixels = malloc(row * (size_t)height);
    png_bytep *rows = malloc((size_t)height * sizeof *rows);
    for (size_t i = 0; i < row * (size_t)height; i++)
        pixels[i] = (unsigned char)(i % (size_t)modulus);
    for (int y = 0; y < height; y++)
        rows[y] = pixels + row * (size_t)y;
    png_write_image(png, rows);
    png_write_end(png, info);
    png_destroy_write_struct(&png, &info);
    free(rows);
    free(pixels);
    return out;
}

static bool decode(const struct png_buffer *b, size_t size, struct image *image, char why[NBHD_TEXT])
{
    unsigned char *exact = malloc(size + 1);
    memcpy(exact, b->at, size);
    bool good = png_decode(exact, size, image, why);
    free(exact);
    return good;
}

static void expect_png(const struct png_buffer *b, int channels, int bits, const char *samples)
{
    struct image image;
    char why[NBHD_TEXT] = "";
    seed("png", b->at, b->size);
    if (!CHECK(decode(b, b->size, &image, why), "%s", why))
        return;
    CHECK(image.channels == channels && image.bits == bits, "%d channels of %d bits", image.channels, image.bits);
    char found[64] = "";
    for (size_t i = 0; i < 6 && i < image_count(&image); i++)
        snprintf(found + strlen(found), sizeof found - strlen(found), "%g ", image_get(&image, i));
    CHECK(!strcmp(found, samples), "samples %s, expected %s", found, samples);
    image_free(&image);
    for (size_t size = 0; size < b->size - 12; size += size < 64 ? 1 : 7) /* IEND carries nothing */
        if (!CHECK(!decode(b, size, &image, why), "cut to %zu of %zu bytes it was still good", size, b->size))
            image_free(&image);
}

static void test_png(void)
{
    static const struct {
        int width, height, type, bits;
        bool interlaced;
        int modulus, channels, bits_read;
        const char *samples;
    } pictures[] = {
        {9, 5, PNG_COLOR_TYPE_RGB, 8, false, 251, 3, 8, "0 1 2 3 4 5 "},
        {9, 5, PNG_COLOR_TYPE_RGB, 8, true, 251, 3, 8, "0 1 2 3 4 5 "},
        {9, 5, PNG_COLOR_TYPE_RGB_ALPHA, 8, false, 251, 4, 8, "0 1 2 3 4 5 "},
        {9, 5, PNG_COLOR_TYPE_GRAY, 16, false, 251, 1, 16, "1 515 1029 1543 2057 2571 "},
        {9, 5, PNG_COLOR_TYPE_GRAY_ALPHA, 16, true, 251, 2, 16, "1 515 1029 1543 2057 2571 "},
        {8, 3, PNG_COLOR_TYPE_GRAY, 1, false, 251, 1, 8, "0 0 0 0 0 0 "},
        {2, 2, PNG_COLOR_TYPE_PALETTE, 8, false, 4, 4, 8, "1 2 3 255 10 20 "},
        {1, 1, PNG_COLOR_TYPE_GRAY, 8, false, 251, 1, 8, "0 "},
    };
    struct png_buffer b = {.size = 0};
    for (size_t i = 0; i < sizeof pictures / sizeof *pictures; i++) {
        b = make_png(pictures[i].width, pictures[i].height, pictures[i].type, pictures[i].bits, pictures[i].interlaced,
                     pictures[i].modulus);
        expect_png(&b, pictures[i].channels, pictures[i].bits_read, pictures[i].samples);
    }
    struct image image;
    char why[NBHD_TEXT] = "";
    memcpy(b.at + 16, "\x00\x00\x80\x00\x00\x00\x80\x00", 8); /* 32768 x 32768, in a hundred bytes */
    CHECK(!decode(&b, b.size, &image, why), "a picture of a gigabyte in %zu bytes", b.size);
    seed("png", b.at, b.size);
    CHECK(!decode(&b, 7, &image, why) && strstr(why, "not a PNG"), "%s", why);
    memcpy(b.at, "GIF89a..", 8);
    CHECK(!decode(&b, b.size, &image, why) && strstr(why, "not a PNG"), "%s", why);
}

/* The colour profile and the resolution of a photograph come out as they went in. */
static void test_png_chunks(void)
{
    char path[256];
    unsigned char pixel = 7, gamma[4] = {0, 0, 177, 143}, resolution[9] = {0, 0, 11, 19, 0, 0, 11, 19, 1};
    struct image_chunk chunks[2] = {{"gAMA", PNG_HAVE_IHDR, gamma, 4}, {"pHYs", PNG_HAVE_IHDR, resolution, 9}};
    struct image image = {
        .width = 1, .height = 1, .channels = 1, .bits = 8, .sample = &pixel, .chunk = chunks, .chunks = 2};
    struct image back;
    snprintf(path, sizeof path, "%s/chunks.png", root);
    CHECK(!image_write(&image, path), "%s", told);
    if (!CHECK(!image_read(&back, path) && back.chunks == 2, "%d chunks, %s", back.chunks, told))
        return;
    for (int i = 0; i < 2; i++)
        CHECK(!strcmp(back.chunk[i].name, chunks[i].name) && back.chunk[i].size == chunks[i].size &&
                  !memcmp(back.chunk[i].data, chunks[i].data, chunks[i].size), "chunk %s", back.chunk[i].name);
    image_free(&back);
}

static void test_png_write(void)
{
    char path[256];
    snprintf(path, sizeof path, "%s/x.png", root);
    for (int bits = 8; bits <= 16; bits += 8)
        for (int channels = 1; channels <= 4; channels++) {
            struct image image = {.width = 5, .height = 3, .channels = channels, .bits = bits}, back;
            image.sample = malloc(image_count(&image) * (size_t)(bits / 8));
            for (size_t i = 0; i < image_count(&image); i++)
                image_put(&image, i, (double)i * 4.2 * (bits == 16 ? 257 : 1));
            CHECK(!image_write(&image, path), "%s", told);
            if (CHECK(!image_read(&back, path), "%s", told)) {
                CHECK(back.channels == channels && back.bits == bits, "%d channels of %d bits", back.channels,
                      back.bits);
                CHECK(isinf(image_psnr(&image, &back)), "%d channels of %d bits differ", channels, bits);
                CHECK(image_get(&back, 1) == (bits == 16 ? 1079 : 4), "%g", image_get(&back, 1));
            }
            image_free(&image);
            image_free(&back);
        }
    struct image dot = {.width = 1, .height = 1, .channels = 1, .bits = 8, .sample = told};
    CHECK(image_write(&dot, "/dev/null") == TOOL_USAGE, "%s", told);
}
#endif

/* ---- noise ---- */

static void test_noise(void)
{
    struct image image = {.width = 200, .height = 200, .channels = 1, .bits = 8, .sample = calloc(40000, 1)}, noisy;
    for (size_t i = 0; i < 40000; i++)
        image_put(&image, i, 128);
    for (int sigma = 0; sigma <= 30; sigma += 10) {
        CHECK(image_copy(&noisy, &image), "out of memory");
        noise_add(&noisy, sigma, 7);
        double found = noise_estimate(&noisy);
        CHECK(fabs(found - sigma) < 0.03 * sigma + 0.2, "noise of %d was found to be %g", sigma, found);
        double psnr = image_psnr(&image, &noisy), expected = 20 * log10(255.0 / sigma);
        CHECK(sigma ? fabs(psnr - expected) < 0.1 : isinf(psnr), "noise of %d: %g dB, expected %g", sigma, psnr,
              expected);
        image_free(&noisy);
    }
    image_free(&image);
}

int main(int argc, char **argv)
{
    seeds = argc > 1 ? argv[1] : NULL;
    if (folder_begin()) {
#if NBHD_HAVE_PNG
        test_png();
        test_png_write();
        test_png_chunks();
#else
        test_skip("built without libpng");
#endif
        test_noise();
    }
    return folder_end();
}
