/* The online softmax of fwd_sm90, for a warpgroup that holds S of 64 rows in accumulator order: a reference for each
 * row, which rarely moves. NBHD_* as in fwd_sm90.cu. */
#ifndef NBHD_DEVICE_SOFTMAX_SM90_CUH
#define NBHD_DEVICE_SOFTMAX_SM90_CUH

/* How far above the reference, as a power of 2, a score may be: probabilities up to 2^8 lose nothing in 16 bits. */
#define SLACK 8.0f

/* State of a thread's two rows: the score that probabilities are relative to, the thread's part of the running sum, and
 * the factor that scales what was summed before when the reference moves. */
struct rows {
    float reference[2], sum[2], scale[2];
};

NBHD_FN void begin_rows(struct rows *r)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        r->reference[i] = -1e30f;
        r->sum[i] = 0;
    }
}

/* Whether the reference of one of the warp's rows must move. Compares bits, since integers have a maximum of three: it
 * is right for limits that are not negative. A row whose limit would be has one that all scores are above. */
NBHD_FN int must_move(const float *s, const struct rows *r, float scale_log2)
{
    float slack = __fdividef(SLACK, scale_log2);
    int above = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int high = nbhd_max(__float_as_int(s[2 * i]), __float_as_int(s[2 * i + 1]));
#pragma unroll
        for (int j = 1; j < NBHD_N / 8; j++)
            high = nbhd_max(nbhd_max(high, __float_as_int(s[4 * j + 2 * i])), __float_as_int(s[4 * j + 2 * i + 1]));
        float limit = r->reference[i] + slack;
        above |= high > (limit >= 0 ? __float_as_int(limit) : (int)0x80000000);
    }
    return __any_sync(~0u, above);
}

/* Moves the references to the rows' maxima. */
NBHD_FN void move_references(const float *s, struct rows *r, float scale_log2)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float high = s[2 * i];
#pragma unroll
        for (int j = 0; j < NBHD_N / 8; j++)
            high = fmaxf(high, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        high = fmaxf(high, r->reference[i]);
        r->scale[i] = ex2_approx_ftz_f32((r->reference[i] - high) * scale_log2);
        r->reference[i] = high;
        r->sum[i] *= r->scale[i];
    }
}

/* The scores of the blocks of 8 keys from `from` to `to` become probabilities relative to the references, and are added
 * to the rows' sums. */
NBHD_FN void exponentials(float *s, const struct rows *r, float scale_log2, float *sum, int from, int to)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float offset = r->reference[i] * scale_log2;
#pragma unroll
        for (int j = from; j < to; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float *x = &s[4 * j + 2 * i + c];
                *x = ex2_approx_ftz_f32(fmaf(*x, scale_log2, -offset));
                sum[i] += *x;
            }
    }
}

/* Ends a tile's sums: what normalises O, and the logsumexp, for the warp's rows from `number` on. To shared memory:
 * there are no registers to keep them in until O is complete. */
NBHD_FN void finish_rows(struct tables *tab, const struct rows *r, float scale, int number)
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = r->sum[i];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if ((lane & 3) == 0)
            tab->finished[number + (lane >> 2) + 8 * i] =
                make_float2(__fdividef(1, sum), r->reference[i] * scale + __logf(sum));
    }
    __syncwarp();
}

NBHD_FN void read_scale(struct rows *r, const struct tables *tab, int number)
{
    int lane = threadIdx.x & 31;
    r->scale[0] = tab->finished[number + (lane >> 2)].x;
    r->scale[1] = tab->finished[number + (lane >> 2) + 8].x;
}

#endif
