/* Non-local means as 2-D neighborhood attention. */
#ifndef NBHD_TOOL_NLM_H
#define NBHD_TOOL_NLM_H

#include "image.h"

struct nlm {
    int window[2]; /* rows, columns; clipped to the image */
    int patch[2];  /* odd */
    double strength; /* h: weights are exp(-distance / h^2), in grey levels of 0 to 255 */
    int device, threads;
    const char *kernel;
    double memory_mib; /* for features; a photograph that needs more is done in overlapping parts */
};

struct nlm_report {
    char kernel[96];
    int parts;
    double flops; /* useful */
    double features_ms, attention_ms;
};

/* Writes the colours of out, which must have in's shape; alpha stays. Exit status. */
int nlm_denoise(const struct nlm *nlm, const struct image *in, struct image *out, struct nlm_report *report);

#endif
