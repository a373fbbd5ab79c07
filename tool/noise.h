/* Noise in photographs: how much there is, adding some, and how far one picture is from another. */
#ifndef NBHD_TOOL_NOISE_H
#define NBHD_TOOL_NOISE_H

#include "image.h"

/* Standard deviation of the noise in grey levels of 0 to 255: the median of 2x2 differences, which edges move
 * little. */
double noise_estimate(const struct image *image);
/* Adds Gaussian noise to the colours; rounded and clipped as a photograph is. */
void noise_add(struct image *image, double sigma, unsigned seed);
/* Peak signal-to-noise ratio of the colours in dB; infinite if they are equal. */
double image_psnr(const struct image *a, const struct image *b);

#endif
