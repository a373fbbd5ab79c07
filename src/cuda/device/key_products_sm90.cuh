/* Products, probabilities and gradients of a CTA that holds a tile of keys (keys_sm90.cuh), and its rows out. */
#ifndef NBHD_DEVICE_KEY_PRODUCTS_SM90_CUH
#define NBHD_DEVICE_KEY_PRODUCTS_SM90_CUH

#include "device/keys_sm90.cuh"

/* x = A B^T for 64 rows of a key tile and a box of queries, to be committed. */
NBHD_FN void add_scores(float *x, unsigned long long a, unsigned long long b, int steps)
{
    wgmma_fence();
    NBHD_SCORES_FIRST(x, a, b);
#pragma unroll
    for (int i = 1; i < steps; i++)
        NBHD_SCORES(x, wgmma_advance(a, i / 4 * (ROWS * 8) + i % 4 * 2),
                    wgmma_advance(b, i / 4 * (NBHD_N * 8) + i % 4 * 2), 1);
}

NBHD_FN void issue_scores(float *x, unsigned long long a, unsigned long long b, int steps)
{
    add_scores(x, a, b, steps);
    wgmma_commit();
}

/* S becomes P, also packed. */
NBHD_FN void probabilities(float *s, unsigned *packed, const float *lse, float scale_log2)
{
    lse += 2 * (threadIdx.x & 3);
#pragma unroll
    for (int j = 0; j < NBHD_N / 8; j++) {
        float2 l = *(const float2 *)&lse[8 * j];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float *x = &s[4 * j + 2 * r];
            x[0] = ex2_approx_ftz_f32(fmaf(x[0], scale_log2, -l.x));
            x[1] = ex2_approx_ftz_f32(fmaf(x[1], scale_log2, -l.y));
            packed[2 * j + r] = pack(x[0], x[1]);
        }
    }
}

NBHD_FN float2 unpack(unsigned x)
{
    if (NBHD_DTYPE == 2)
        return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
    return make_float2(cvt_f32_f16((unsigned short)x), cvt_f32_f16((unsigned short)(x >> 16)));
}

/* dS = P (dP - delta), packed. */
NBHD_FN void score_gradients(unsigned *packed, const float *p, const float *dp, const float *delta)
{
    delta += 2 * (threadIdx.x & 3);
#pragma unroll
    for (int j = 0; j < NBHD_N / 8; j++) {
        float2 d = *(const float2 *)&delta[8 * j];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int i = 4 * j + 2 * r;
            packed[2 * j + r] = pack(p[i] * (dp[i] - d.x), p[i + 1] * (dp[i + 1] - d.y));
        }
    }
}

/* The same from a packed P. */
NBHD_FN void score_gradients_packed(unsigned *ds, const unsigned *p, const float *dp, const float *delta)
{
    delta += 2 * (threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < NBHD_N / 4; i++) {
        float2 d = *(const float2 *)&delta[8 * (i / 2)], x = unpack(p[i]);
        ds[i] = pack(x.x * (dp[2 * i] - d.x), x.y * (dp[2 * i + 1] - d.y));
    }
}

NBHD_FN void zero(float *x, int count)
{
#pragma unroll
    for (int i = 0; i < count; i++)
        x[i] = 0;
}

/* Issues dV += P dO (of_v) or dK += dS Q. a: P or dS; tile: of dO or Q. */
NBHD_FN void issue_sum(float *sum, const unsigned *a, unsigned tile, int of_v)
{
    unsigned long long b = wgmma_mn_major(tile, NBHD_N);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < NBHD_N / 16; i++)
        if (of_v)
            NBHD_DV_PRODUCT(sum, a + 4 * i, wgmma_advance(b, 128 * i), 1);
        else
            NBHD_DK_PRODUCT(sum, a + 4 * i, wgmma_advance(b, 128 * i), 1);
    wgmma_commit();
}

NBHD_FN void issue_dv(float *dv, const unsigned *p, unsigned tile) { issue_sum(dv, p, tile, 1); }
NBHD_FN void issue_dk(float *dk, const unsigned *ds, unsigned tile) { issue_sum(dk, ds, tile, 0); }

/* ---- the results ---- */

/* Writes a warp's 16 rows of dK or dV. stage: the first row's place in shared memory. */
NBHD_FN void store_rows(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct tables *tab,
                        const struct nbhd_view *view, const float *sum, int dim, float scale, unsigned stage,
                        int number)
{
    const struct place *t = &tab->place;
    int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int j = 0; j < dim / 8; j++)
            st_shared_b32(stage + j / 8 * (ROWS * 128) + (g + 8 * r) * 128 + ((j % 8 ^ g) << 4) + q * 4,
                          pack(sum[4 * j + 2 * r] * scale, sum[4 * j + 2 * r + 1] * scale));
    __syncwarp();
    /* Eight lanes a row, 16 bytes each. */
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
        int at = 4 * i + (lane >> 3), piece = lane & 7, inside = number + at < b->rows;
        char *dst = view->data + t->batch * view->batch + (long long)t->kv_head * view->head + 16 * piece;
        for (int a = 0; a < 3; a++) {
            int x = t->origin[a] + coordinate(tab->row[number + at], a);
            inside &= x < t->keys[a];
            dst += ((long long)x * p->axis[a].dilation + t->group[a]) * view->axis[a];
        }
        if (!inside)
            continue;
        for (int c = 0; c < (dim + 63) / 64; c++)
            if (64 * c + 8 * piece < dim)
                *(uint4 *)(dst + 128 * c) = ld_shared_v4(stage + c * (ROWS * 128) + at * 128 + ((piece ^ at & 7) << 4));
    }
}

#endif
