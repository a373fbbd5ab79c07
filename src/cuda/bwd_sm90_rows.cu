/* What bwd_sm90 does row by row of the queries, before and after its products.
 *
 *     bounds  the largest |k| and |row of v| of each head, where dQ is added up in integers
 *     pre     logsumexp x log2(e) and delta = rowsum(O dO) - dlse of every query, float32 [batch][heads][queries], and
 *             how fine its integers are; zeros in the dQ that is added up, where there is one
 *     post    that dQ x scale, as the caller wants it
 *
 * Zeros and post are bwd_sm90.cu's own work for most heads where it can (device/tend_sm90.cuh).
 *
 * LANES threads a row, 16 bytes of 16-bit elements each. The grid's y is a head, z a batch element. */
#if !defined(NBHD_HEAD_DIM) || !defined(NBHD_HEAD_DIM_V) || !defined(NBHD_DTYPE) || !defined(NBHD_LANES)
#error "NBHD_HEAD_DIM, NBHD_HEAD_DIM_V: multiples of 8; NBHD_DTYPE: 1 float16, 2 bfloat16; NBHD_LANES: a power of two"
#endif
#ifndef NBHD_INTEGERS
#error "NBHD_INTEGERS: 1 where dQ is added up in integers (device/sums_sm90.cuh)"
#endif

#include "nbhd_params.h"
#include "device/bwd_boxes_sm90.cuh"
#include "device/ptx.cuh"
#include "device/sums_sm90.cuh"

#define THREADS 256

NBHD_FN float element(unsigned pair, int upper)
{
    unsigned short x = (unsigned short)(pair >> 16 * upper);
    return NBHD_DTYPE == 2 ? cvt_f32_bf16(x) : cvt_f32_f16(x);
}

NBHD_FN unsigned pack(float low, float high)
{
    unsigned short x = NBHD_DTYPE == 2 ? cvt_rn_bf16_f32(low) : cvt_rn_f16_f32(low);
    unsigned short y = NBHD_DTYPE == 2 ? cvt_rn_bf16_f32(high) : cvt_rn_f16_f32(high);
    return x | (unsigned)y << 16;
}

/* The number of the thread's query; past the last, there is none. */
NBHD_FN int query_of_thread(void) { return blockIdx.x * (THREADS / NBHD_LANES) + threadIdx.x / NBHD_LANES; }

NBHD_FN char *address(const struct nbhd_view *view, int batch, int head, const struct query *q)
{
    return view->data + batch * view->batch + head * view->head + place_of(view, q);
}

/* A row's sum. */
NBHD_FN float sum_of_lanes(float x)
{
#pragma unroll
    for (int i = 1; i < NBHD_LANES; i *= 2)
        x += __shfl_xor_sync(~0u, x, i);
    return x;
}

/* ---- bounds of integers ---- */

/* The greater of numbers that are not negative; NaN if one is. */
NBHD_FN float most(float x, float y) { return x > y || x != x ? x : y; }

NBHD_FN float most_of_warp(float x)
{
#pragma unroll
    for (int i = 1; i < 32; i *= 2)
        x = most(x, __shfl_xor_sync(~0u, x, i));
    return x;
}

NBHD_FN float element_of(uint4 x, int i)
{
    return element(i < 2 ? x.x : i < 4 ? x.y : i < 6 ? x.z : x.w, i % 2);
}

/* The largest |k| and |row of v|^2 of a head's keys, block by block. */
extern "C" __global__ void __launch_bounds__(THREADS)
    nbhd_bwd_sm90_bounds(const __grid_constant__ struct nbhd_params p,
                         const __grid_constant__ struct nbhd_bwd_rows rows)
{
    __shared__ float of_warp[2][THREADS / 32];
    const int each = THREADS / NBHD_LANES, piece = threadIdx.x % NBHD_LANES, warp = threadIdx.x / 32;
    int batch = blockIdx.z, head = blockIdx.y, keys = p.axis[0].keys * p.axis[1].keys * p.axis[2].keys;
    float k_most = 0, v_most = 0;
    for (int first = blockIdx.x * each; first < keys; first += NBHD_BWD_SM90_BOUNDS * each) {
        int key = first + threadIdx.x / NBHD_LANES, inside = key < keys, line = key / p.axis[2].keys;
        struct query at = {{line / p.axis[1].keys, line % p.axis[1].keys, key % p.axis[2].keys}};
        uint4 k = make_uint4(0, 0, 0, 0), v = k;
        float sum = 0;
        if (inside && 8 * piece < NBHD_HEAD_DIM)
            k = *(const uint4 *)(address(&p.k, batch, head, &at) + 16 * piece);
        if (inside && 8 * piece < NBHD_HEAD_DIM_V)
            v = *(const uint4 *)(address(&p.v, batch, head, &at) + 16 * piece);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            k_most = most(k_most, fabsf(element_of(k, i)));
            sum += element_of(v, i) * element_of(v, i);
        }
        v_most = most(v_most, sum_of_lanes(sum));
    }
    k_most = most_of_warp(k_most);
    v_most = most_of_warp(v_most);
    if (threadIdx.x % 32 == 0) {
        of_warp[0][warp] = k_most;
        of_warp[1][warp] = v_most;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        float x = 0;
        for (int i = 0; i < THREADS / 32; i++)
            x = most(x, of_warp[threadIdx.x][i]);
        rows.bounds[((batch * p.kv_heads + head) * NBHD_BWD_SM90_BOUNDS + blockIdx.x) * 2 + threadIdx.x] = x;
    }
}

/* Of what dQ of a query can be. By a warp, for one head. */
NBHD_FN float bound_of(const float *bounds, float dout_squared, float delta)
{
    float k_most = 0, v_most = 0;
    for (int i = threadIdx.x & 31; i < NBHD_BWD_SM90_BOUNDS; i += 32) {
        k_most = most(k_most, bounds[2 * i]);
        v_most = most(v_most, bounds[2 * i + 1]);
    }
    /* P sums up to 1, and all is computed, but for rounding. */
    return 1.03f * most_of_warp(k_most) * (sqrtf(dout_squared) * sqrtf(most_of_warp(v_most)) + fabsf(delta));
}

/* ---- before and after ---- */

extern "C" __global__ void __launch_bounds__(THREADS)
    nbhd_bwd_sm90_pre(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_bwd_rows rows)
{
    int batch = blockIdx.z, head = blockIdx.y, piece = threadIdx.x % NBHD_LANES;
    int query = query_of_thread(), inside = query < queries_of(&p);
    int unit = batch * p.kv_heads + head / (p.heads / p.kv_heads);
    if (blockIdx.y + blockIdx.z == 0)
        for (unsigned i = blockIdx.x * THREADS + threadIdx.x; i < rows.count; i += gridDim.x * THREADS)
            rows.counts[i] = 0;
    struct query q = query_at(&p, query);
    float sum = 0, squared = 0;
    if (inside && 8 * piece < NBHD_HEAD_DIM_V) {
        uint4 o = *(const uint4 *)(address(&p.o, batch, head, &q) + 16 * piece);
        uint4 dout = *(const uint4 *)(address(&p.dout, batch, head, &q) + 16 * piece);
        unsigned a[4] = {o.x, o.y, o.z, o.w}, b[4] = {dout.x, dout.y, dout.z, dout.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum += element(a[i], 0) * element(b[i], 0) + element(a[i], 1) * element(b[i], 1);
            squared += element(b[i], 0) * element(b[i], 0) + element(b[i], 1) * element(b[i], 1);
        }
    }
    if (inside && unit < rows.units && 8 * piece < NBHD_HEAD_DIM) {
        float4 *to = (float4 *)sum_address(&p, rows.sums, batch, head, query) + 2 * piece;
        to[0] = to[1] = make_float4(0, 0, 0, 0);
    }
    sum = sum_of_lanes(sum);
    if (inside && p.dlse.data)
        sum -= *(const float *)address(&p.dlse, batch, head, &q);
    float bound =
        NBHD_INTEGERS ? bound_of(rows.bounds + unit * (2 * NBHD_BWD_SM90_BOUNDS), sum_of_lanes(squared), sum) : 0;
    if (!inside || piece)
        return;
    long long row = ((long long)batch * p.heads + head) * queries_of(&p) + query;
    float lse = *(const float *)address(&p.lse, batch, head, &q) * 1.44269504f;
    rows.lse[row] = lse;
    rows.delta[row] = sum;
    if (NBHD_INTEGERS)
        rows.fineness[row] = fineness_of(bound + 0 * lse); /* NaN if that is */
}

extern "C" __global__ void __launch_bounds__(THREADS)
    nbhd_bwd_sm90_post(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_bwd_rows rows)
{
    int batch = rows.batch + blockIdx.z, head = rows.head + blockIdx.y, piece = threadIdx.x % NBHD_LANES;
    int query = query_of_thread();
    struct query q = query_at(&p, query);
    if (query >= queries_of(&p) || 8 * piece >= NBHD_HEAD_DIM)
        return;
    const uint4 *from = (const uint4 *)sum_address(&p, rows.sums, batch, head, query) + 2 * piece;
    uint4 a = from[0], b = from[1];
    float w = p.scale * weight_of(rows.fineness, (batch * p.heads + head) * queries_of(&p) + query);
    *(uint4 *)(address(&p.dq, batch, head, &q) + 16 * piece) =
        make_uint4(pack(sum_of(a.x) * w, sum_of(a.y) * w), pack(sum_of(a.z) * w, sum_of(a.w) * w),
                   pack(sum_of(b.x) * w, sum_of(b.y) * w), pack(sum_of(b.z) * w, sum_of(b.w) * w));
}
