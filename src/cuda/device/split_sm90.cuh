/* The tiles of the last wave, where they are few: several CTAs have a part each of such a tile's queries. The parts
 * add their dK and dV up in float32, one after the other in the order of their numbers, so that the sums' bits do not
 * depend on who is the faster; the last writes them out. A part waits for the one before it, the first part for all
 * tiles that convert dQ of the first head: all of lower numbers, so not for ever (device/tend_sm90.cuh).
 *
 * The sums stand where that dQ was, in the workspace: 16 bytes of each thread side by side. */
#ifndef NBHD_DEVICE_SPLIT_SM90_CUH
#define NBHD_DEVICE_SPLIT_SM90_CUH

/* Of a tile that is shared out, the i-th 16 bytes of this consumer thread. */
NBHD_FN float4 *joint_sum(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, int split, int i)
{
    const int row = NBHD_HEAD_DIM / 4, each = (NBHD_HEAD_DIM + NBHD_HEAD_DIM_V) / 8;
    unsigned at = (split * each + i) * 256 + threadIdx.x - 128;
    return (float4 *)b->sums + (unsigned long long)(at / row) * (unsigned)(row * p->heads) + at % row;
}

/* Adds what stands there to count floats of a thread, from the first-th 16 bytes on; puts the sum there unless it is
 * the last. */
NBHD_FN void join(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, int part, int split, float *sum,
                  int count, int first)
{
#pragma unroll
    for (int i = 0; i < count / 4; i++) {
        float4 *at = joint_sum(p, b, split, first + i);
        float4 x = make_float4(0, 0, 0, 0);
        if (part)
            x = __ldcg(at);
        sum[4 * i] += x.x;
        sum[4 * i + 1] += x.y;
        sum[4 * i + 2] += x.z;
        sum[4 * i + 3] += x.w;
        if (part < b->parts - 1)
            *at = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
    }
}

/* Adds the parts before this one to a consumer thread's sums. False if there are more: they have the sums. */
NBHD_FN int join_parts(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct tables *tab, float *dk,
                       float *dv)
{
    int split = __shfl_sync(~0u, tab->place.split, 0), part = __shfl_sync(~0u, tab->place.part, 0);
    if (split < 0)
        return 1;
    if (part)
        await_count(&b->joined[split], part);
    else
        await_count(b->converted, b->unit_tiles);
    join(p, b, part, split, dk, NBHD_HEAD_DIM / 2, 0);
    join(p, b, part, split, dv, NBHD_HEAD_DIM_V / 2, NBHD_HEAD_DIM / 8);
    if (part == b->parts - 1)
        return 1;
    named_barrier_sync(BARRIER_END, 256); /* all have stored theirs */
    if (threadIdx.x == 128)
        count_up(&b->joined[split]);
    return 0;
}

#endif
