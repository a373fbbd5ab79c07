/* The problems that every kernel is tested on: by hand, and by a seeded generator. See case.h. */
#include <math.h>
#include <stdint.h>
#include "case.h"

const char *const case_lines[] = {
    /* the smallest of everything */
    "fwd d1 1", "fwd d1 1x1x1", "fwd d3/2 2 w1", "fwd d8 5x3 w1x1",
    /* one axis: window odd, even, whole; lengths around multiples of vector widths and tiles */
    "fwd d8 15 w3", "fwd d16 16 w4", "fwd d16 17 w16", "fwd d32 31 w31", "fwd d32 33 w2", "fwd d64 63 w7",
    "fwd d64 64 w7", "fwd d64 65 w7", "fwd d128 130 w40", "fwd d20 100 w96", "fwd d12 97 w5 r16", "fwd d12 97 w6 r16",
    "fwd b2 h2 d16 96 w3 r32", "fwd h4/2 d20 5x70 w3x3 s2x2 r1x20 bias extra=3 ecn",
    /* stride, from sliding window to blocked attention */
    "fwd d16 64 w16 s16", "fwd d16 61 w16 s16", "fwd d16 61 w15 s4", "fwd d16 61 w9 s9", "fwd d16 50 w8 s3",
    /* causal and truncated */
    "fwd d16 40 w40 ec", "fwd d16 41 w8 ec", "fwd d16 41 w8 s4 ec", "fwd d16 41 w7 s7 ec", "fwd d16 43 w5 r3 ec",
    "fwd d16 43 w9 et", "fwd d16 43 w8 s3 et", "fwd d16 43 w5 r4 et",
    /* periodic: window odd, even and whole; strides that do and do not meet the seam; groups of two sizes; the union of
     * a tile longer than the axis; mixed with other edges; extra keys and biases */
    "fwd d16 43 w9 ep", "fwd d16 40 w8 ep", "fwd d16 21 w21 ep", "fwd d16 5 w4 ep", "fwd d8 3 w3 s2 ep", "fwd d8 1 ep",
    "fwd d16 43 w8 s3 ep", "fwd d16 45 w9 s9 ep", "fwd d16 43 w5 r4 ep", "fwd d12 97 w6 s4 r16 ep",
    "fwd d20 130 w120 ep",
    "fwd h2 d32 13x20 w5x7 enp", "fwd d16 8x33 w8x1 epp", "fwd d24 18x21 w9x8 s4x8 epc", "fwd h4/2 d16 10x11 w4x5 etp",
    "fwd b2 h4/2 d32 9x20 w5x7 r1x2 extra=5 epp", "fwd h2 d16 9x12 w5x4 s2x3 bias epp", "fwd h3 d40 2x70 w2x7 bias enp",
    "fwd h2 d16 11x13 w5x5 bias extra=3 epn", "fwd d32 4x9x18 w3x5x5 ennp", "fwd h2 d8 4x5x6 w3x4x3 bias epnp",
    "fwd d16 5x9x11 w3x5x5 r1x1x2 eptp", "fwd d8 7x6x5 w3x4x5 s3x2x1 epcp", "fwd h4/2 d256 9x20 w5x7 extra=9 epp",
    "fwd h2 d16 12x1x9 w5x1x3 bias epnp",
    /* two axes */
    "fwd d32 14x14 w7x7", "fwd d32 7x7 w7x7", "fwd h2 d32 9x20 w3x5", "fwd d16 8x33 w8x1", "fwd d16 12x19 w1x6",
    "fwd d32 13x17 w7x7 r1x2", "fwd d32 28x28 w7x7 r4x4", "fwd d32 29x31 w7x7 r4x4", "fwd d24 16x16 w8x8 s4x4",
    "fwd d24 18x21 w9x8 s4x8 enc", "fwd d16 10x11 w4x5 ecc", "fwd d16 10x11 w4x5 etc", "fwd d40 6x50 w3x33 s1x8",
    /* three axes */
    "fwd d16 4x6x10 w3x3x3", "fwd d16 5x7x9 w2x4x6", "fwd d16 5x9x11 w3x5x5 r1x1x2", "fwd d8 6x8x16 w4x4x8 s2x4x8",
    "fwd d8 3x5x17 w3x5x17", "fwd d8 7x6x5 w3x4x5 s3x2x1 ecnt", "fwd d32 4x9x18 w3x5x5 ecnn",
    /* axes of one token */
    "fwd d16 299x1 w40x1", "fwd h2 d32 1x70x1 w1x9x1 encn", "fwd h2 d16 12x1x9 w5x1x3 bias", "fwd d8 9x1 kv=9x31",
    "fwd b2 d40 1x1x1 kv=1x50x1 extra=3", "fwd h4/2 d64 64x1x1 w20x1x1 s4x1x1 r2x1x1",
    /* batch, heads, grouped queries, widths */
    "fwd b3 h2 d32 20 w7", "fwd b2 h6/2 d24 9x9 w5x5", "fwd h4/1 d16 33 w9", "fwd h8/4 d8/40 6x7 w3x3",
    "fwd d5/11 30 w8", "fwd d100/36 19x5 w3x3", "fwd d256 40 w12", "fwd d512/8 20 w5", "fwd d7/300 20 w5",
    "fwd d48/72 6x13 w5x7",
    /* extra keys, bias, scale, standard and cross attention */
    "fwd d32 40 w8 extra=5", "fwd b2 h4/2 d16 9x10 w3x4 extra=17", "fwd d16 4x5x6 w3x3x3 extra=1 ecnn",
    "fwd h2 d16 30 w7 bias", "fwd h3 d16 9x12 w5x4 bias", "fwd h2 d16 9x12 w3x3 r2x3 s1x2 bias",
    "fwd h2 d8 4x5x6 w3x3x3 bias", "fwd h2 d16 11x13 w5x5 bias extra=3 ecn", "fwd d16 30 w7 scale=1",
    "fwd d16 30 w7 scale=-0.5", "fwd h2 d64 70", "fwd h2 d64 70 ec", "fwd h2 d32 50 kv=77",
    "fwd h4/2 d32 9x10 kv=9x31 extra=2", "fwd d16 1 kv=100", "fwd d16 200 kv=1",
    /* wide rows */
    "fwd h4/2 d256 9x20 w5x7 extra=9 ecn", "fwd h2 d136/256 5x9x8 w3x5x4 s2x1x1 r1x1x2", "fwd b2 d200/8 150 w61 s4 et",
    NULL,
};

static uint64_t advance(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

static int between(uint64_t *state, int low, int high)
{
    return low + (int)(advance(state) % (uint64_t)(high - low + 1));
}

static int one_of(uint64_t *state, const int *values, int count) { return values[advance(state) % (uint64_t)count]; }

static void random_axis(uint64_t *s, nbhd_desc *d, int i)
{
    static const int longest[] = {200, 26, 12};
    const int most = longest[d->rank - 1];
    d->length[i] = between(s, 1, most);
    d->dilation[i] = between(s, 0, 3) ? 1 : between(s, 1, d->length[i]);
    const int room = d->length[i] / d->dilation[i];
    d->window[i] = between(s, 0, 5) ? between(s, 1, room) : room;
    d->stride[i] = between(s, 0, 1) ? 1 : between(s, 1, d->window[i]);
    d->edge[i] = between(s, 0, 1) ? NBHD_NEAREST : between(s, NBHD_NEAREST, NBHD_PERIODIC);
}

nbhd_desc case_random(unsigned seed, double most_pairs)
{
    static const int dims[] = {1, 3, 8, 12, 16, 24, 32, 40, 48, 64, 72, 80, 96, 128, 136, 160, 256};
    uint64_t s = seed * 0x9e3779b97f4a7c15u + 1;
    nbhd_desc d;
    do {
        d = (nbhd_desc)NBHD_DESC_INIT;
        d.rank = between(&s, 1, 3);
        d.batch = between(&s, 0, 3) ? 1 : between(&s, 2, 3);
        d.kv_heads = between(&s, 1, 2);
        d.heads = d.kv_heads * between(&s, 1, 3);
        d.head_dim = one_of(&s, dims, 17);
        d.head_dim_v = between(&s, 0, 2) ? d.head_dim : one_of(&s, dims, 17);
        d.extra = between(&s, 0, 3) ? 0 : between(&s, 1, 40);
        for (int i = 0; i < d.rank; i++)
            random_axis(&s, &d, i);
        d.bias = between(&s, 0, 5) == 0;
    } while (nbhd_desc_pairs(&d) <= 0 || nbhd_desc_pairs(&d) * (d.head_dim + d.head_dim_v) > most_pairs);
    return d;
}
