/* Noise in photographs. */
#include "noise.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { BINS = 4096 }; /* of the histogram whose median is wanted; 1/8 grey level each */

static double grey(const struct image *image, int y, int x, int colour)
{
    size_t pixel = (size_t)y * (size_t)image->width + (size_t)x;
    return 255.0 / ((1 << image->bits) - 1) * image_get(image, pixel * (size_t)image->channels + (size_t)colour);
}

double noise_estimate(const struct image *image)
{
    static const double per_bin = 0.125, median_of_normal = 0.67449;
    long long histogram[BINS] = {0}, total = 0, below = 0;
    for (int y = 0; y + 1 < image->height; y++)
        for (int x = 0; x + 1 < image->width; x++)
            for (int c = 0; c < image_colours(image); c++) {
                /* of the noise's own deviation: four samples, halved */
                double d = 0.5 * (grey(image, y, x, c) - grey(image, y, x + 1, c) - grey(image, y + 1, x, c) +
                                  grey(image, y + 1, x + 1, c));
                histogram[(int)fmin(fabs(d) / per_bin, BINS - 1)]++;
                total++;
            }
    for (int i = 0; i < BINS; i++) {
        below += histogram[i];
        if (2 * below >= total && total) /* interpolated within the bin */
            return per_bin * (i + 1 - (double)(2 * below - total) / (2 * (double)histogram[i])) / median_of_normal;
    }
    return 0;
}

/* Uniform in (0, 1]. */
static double uniform(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (double)(((z ^ z >> 31) >> 11) + 1) * 0x1p-53;
}

void noise_add(struct image *image, double sigma, unsigned seed)
{
    uint64_t state = seed;
    double scale = sigma * ((1 << image->bits) - 1) / 255;
    size_t pixels = (size_t)image->width * (size_t)image->height;
    for (size_t i = 0; i < pixels; i++)
        for (int c = 0; c < image_colours(image); c++) {
            size_t at = i * (size_t)image->channels + (size_t)c;
            double radius = sqrt(-2 * log(uniform(&state)));
            image_put(image, at, image_get(image, at) + scale * radius * cos(6.283185307179586 * uniform(&state)));
        }
}

double image_psnr(const struct image *a, const struct image *b)
{
    double sum = 0, max_a = (1 << a->bits) - 1, max_b = (1 << b->bits) - 1;
    size_t pixels = (size_t)a->width * (size_t)a->height;
    for (size_t i = 0; i < pixels; i++)
        for (int c = 0; c < image_colours(a); c++) {
            double x = image_get(a, i * (size_t)a->channels + (size_t)c) / max_a;
            double y = image_get(b, i * (size_t)b->channels + (size_t)c) / max_b;
            sum += (x - y) * (x - y);
        }
    return -10 * log10(sum / ((double)pixels * image_colours(a)));
}
