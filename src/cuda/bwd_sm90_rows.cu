/* What bwd_sm90 does row by row of the queries, before and after its products.
 *
 *     pre    logsumexp x log2(e) and delta = rowsum(O dO) - dlse of every query, float32 [batch][heads][queries];
 *            zeros in the float32 dQ, where there is one
 *     post   that dQ x scale, as the caller wants it
 *
 * Zeros and post are bwd_sm90.cu's own work for most heads where it can (device/tend_sm90.cuh).
 *
 * LANES threads a row, 16 bytes of 16-bit elements each. The grid's y is a head, z a batch element. */
#if !defined(NBHD_HEAD_DIM) || !defined(NBHD_HEAD_DIM_V) || !defined(NBHD_DTYPE) || !defined(NBHD_LANES)
#error "NBHD_HEAD_DIM, NBHD_HEAD_DIM_V: multiples of 8; NBHD_DTYPE: 1 float16, 2 bfloat16; NBHD_LANES: a power of two"
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
    float sum = 0;
    if (inside && 8 * piece < NBHD_HEAD_DIM_V) {
        uint4 o = *(const uint4 *)(address(&p.o, batch, head, &q) + 16 * piece);
        uint4 dout = *(const uint4 *)(address(&p.dout, batch, head, &q) + 16 * piece);
        unsigned a[4] = {o.x, o.y, o.z, o.w}, b[4] = {dout.x, dout.y, dout.z, dout.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum += element(a[i], 0) * element(b[i], 0) + element(a[i], 1) * element(b[i], 1);
    }
    if (inside && unit < rows.units && 8 * piece < NBHD_HEAD_DIM) {
        float4 *to = (float4 *)sum_address(&p, rows.sums, batch, head, query) + 2 * piece;
        to[0] = to[1] = make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 1; i < NBHD_LANES; i *= 2)
        sum += __shfl_xor_sync(~0u, sum, i);
    if (!inside || piece)
        return;
    long long row = ((long long)batch * p.heads + head) * queries_of(&p) + query;
    if (p.dlse.data)
        sum -= *(const float *)address(&p.dlse, batch, head, &q);
    rows.lse[row] = *(const float *)address(&p.lse, batch, head, &q) * 1.44269504f;
    rows.delta[row] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    nbhd_bwd_sm90_post(const __grid_constant__ struct nbhd_params p, const __grid_constant__ struct nbhd_bwd_rows rows)
{
    int batch = rows.batch + blockIdx.z, head = rows.head + blockIdx.y, piece = threadIdx.x % NBHD_LANES;
    int query = query_of_thread();
    struct query q = query_at(&p, query);
    if (query >= queries_of(&p) || 8 * piece >= NBHD_HEAD_DIM)
        return;
    const float4 *from = (const float4 *)sum_address(&p, rows.sums, batch, head, query) + 2 * piece;
    float4 a = from[0], b = from[1];
    *(uint4 *)(address(&p.dq, batch, head, &q) + 16 * piece) =
        make_uint4(pack(a.x * p.scale, a.y * p.scale), pack(a.z * p.scale, a.w * p.scale),
                   pack(b.x * p.scale, b.y * p.scale), pack(b.z * p.scale, b.w * p.scale));
}
