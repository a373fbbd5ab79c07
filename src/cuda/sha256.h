/* SHA-256 (FIPS 180-4): names and verifies what lies in the kernel cache. */
#ifndef NBHD_CUDA_SHA256_H
#define NBHD_CUDA_SHA256_H

#include <stddef.h>
#include <stdint.h>

struct nbhd_sha256 {
    uint32_t state[8];
    uint64_t bytes;
    unsigned char block[64];
};

void nbhd_sha256_begin(struct nbhd_sha256 *sha);
void nbhd_sha256_add(struct nbhd_sha256 *sha, const void *data, size_t bytes);
/* 64 hexadecimal digits and a 0. */
void nbhd_sha256_end(struct nbhd_sha256 *sha, char hex[65]);

#endif
