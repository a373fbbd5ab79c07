/* What bwd_sm90 does row by row of the queries, before and after its products.
 *
 *     pre    logsumexp x log2(e) and delta = rowsum(O dO) - dlse of every query, float32 [batch][heads][queries];
 *            zeros in the float32 dQ [batch][queries][heads][head_dim], where there is one
 *     post   that dQ x scale, as the caller wants it
 *
 * LANES threads a row, 16 bytes of 16-bit elements each. The grid's y is a head, z a batch element. */
#if !defined(NBHD_HEAD_DIM) || !defined(NBHD_HEAD_DIM_V) || !defined(NBHD_DTYPE) || !defined(NBHD_LANES)
#error "NBHD_HEAD_DIM, NBHD_HEAD_DIM_V: multiples of 8; NBHD_DTYPE: 1 float16, 2 bfloat16; NBHD_LANES: a power of two"
#endif

#include "nbhd_params.h"
#include "device/ptx.cuh"

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

NBHD_FN char *row_address(const struct nbhd_view *view, int batch, int head, const int *x)
{
    return view->data + batch * view->batch + head * view->head + x[0] * view->axis[0] + x[1] * view->axis[1] +
           x[2] * view->axis[2];
}

/* The thread's query; 0 if there is none. */
NBHD_FN int find_query(const struct nbhd_params *p, int *x, int *query)
{
    *query = blockIdx.x * (THREADS / NBHD_LANES) + threadIdx.x / NBHD_LANES;
    x[2] = *query % p->axis[2].length;
    x[1] = *query / p->axis[2].length % p->axis[1].length;
    x[0] = *query / p->axis[2].length / p->axis[1].length;
    return x[0] < p->axis[0].length;
}

NBHD_FN long long queries_of(const struct nbhd_params *p)
{
    return (long long)p->axis[0].length * p->axis[1].length * p->axis[2].length;
}

NBHD_FN float *sum_address(const struct nbhd_params *p, float *dq, int query, int piece)
{
    return dq + ((blockIdx.z * queries_of(p) + query) * p->heads + blockIdx.y) * NBHD_HEAD_DIM + 8 * piece;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    nbhd_bwd_sm90_pre(const __grid_constant__ struct nbhd_params p, float *lse, float *delta, float *dq)
{
    int batch = blockIdx.z, head = blockIdx.y, piece = threadIdx.x % NBHD_LANES, x[3], query;
    int inside = find_query(&p, x, &query);
    float sum = 0;
    if (inside && 8 * piece < NBHD_HEAD_DIM_V) {
        uint4 o = *(const uint4 *)(row_address(&p.o, batch, head, x) + 16 * piece);
        uint4 dout = *(const uint4 *)(row_address(&p.dout, batch, head, x) + 16 * piece);
        unsigned a[4] = {o.x, o.y, o.z, o.w}, b[4] = {dout.x, dout.y, dout.z, dout.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum += element(a[i], 0) * element(b[i], 0) + element(a[i], 1) * element(b[i], 1);
    }
    if (inside && dq && 8 * piece < NBHD_HEAD_DIM) {
        float4 *to = (float4 *)sum_address(&p, dq, query, piece);
        to[0] = to[1] = make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 1; i < NBHD_LANES; i *= 2)
        sum += __shfl_xor_sync(~0u, sum, i);
    if (!inside || piece)
        return;
    long long row = ((long long)batch * p.heads + head) * queries_of(&p) + query;
    if (p.dlse.data)
        sum -= *(const float *)row_address(&p.dlse, batch, head, x);
    lse[row] = *(const float *)row_address(&p.lse, batch, head, x) * 1.44269504f;
    delta[row] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    nbhd_bwd_sm90_post(const __grid_constant__ struct nbhd_params p, float *dq)
{
    int piece = threadIdx.x % NBHD_LANES, x[3], query;
    if (!find_query(&p, x, &query) || 8 * piece >= NBHD_HEAD_DIM)
        return;
    const float4 *from = (const float4 *)sum_address(&p, dq, query, piece);
    float4 a = from[0], b = from[1];
    *(uint4 *)(row_address(&p.dq, blockIdx.z, blockIdx.y, x) + 16 * piece) =
        make_uint4(pack(a.x * p.scale, a.y * p.scale), pack(a.z * p.scale, a.w * p.scale),
                   pack(b.x * p.scale, b.y * p.scale), pack(b.z * p.scale, b.w * p.scale));
}
