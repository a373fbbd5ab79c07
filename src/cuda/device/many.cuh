/* One launch for many sequences. A kernel begins with NBHD_LAUNCH as its first parameters and NBHD_ENTER as its first
 * line, and then has p, its block's parameters, and turn, the block's place among those of p's problem. Compiled with
 * NBHD_MANY, p is a copy in shared memory, made into that of the sequence whose block it is; else the kernel's
 * parameter. */
#ifndef NBHD_DEVICE_MANY_CUH
#define NBHD_DEVICE_MANY_CUH

#include "nbhd_params.h"

struct nbhd_turn {
    int block, blocks; /* blocks: a later one of p's problem is so far away */
    long long before;  /* tokens of other sequences in the workspace */
};

#if NBHD_MANY
#define NBHD_LAUNCH                                                                                                    \
    const __grid_constant__ struct nbhd_params nbhd_all, const __grid_constant__ struct nbhd_parts nbhd_list
#define NBHD_ENTER                                                                                                     \
    __shared__ struct nbhd_params p;                                                                                   \
    const struct nbhd_turn turn = nbhd_enter(&p, &nbhd_all, &nbhd_list);

/* The last sequence whose first block is not after this one. Ends synchronized. */
NBHD_FN struct nbhd_turn nbhd_enter(struct nbhd_params *p, const struct nbhd_params *all, const struct nbhd_parts *list)
{
    const int block = (int)blockIdx.x, thread = (int)threadIdx.x;
    int low = 0, high = list->count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (list->part[middle].block <= block)
            low = middle;
        else
            high = middle;
    }
    const struct nbhd_part *part = &list->part[low];
    for (int i = thread; i < (int)(sizeof *p / 8); i += (int)blockDim.x)
        ((long long *)p)[i] = ((const long long *)all)[i];
    __syncthreads();
    if (thread < 16)
        nbhd_part_view(part, list->padded, thread, (struct nbhd_view *)p + thread);
    else if (thread < 19) {
        p->axis[thread - 16].length = part->length[thread - 16];
        p->axis[thread - 16].keys = part->keys[thread - 16];
        p->axis[thread - 16].window = part->window[thread - 16];
    } else if (thread == 19)
        p->batch = 1;
    __syncthreads();
    struct nbhd_turn turn = {block - part->block, low + 1 < list->count ? list->part[low + 1].block - part->block
                                                                        : (int)gridDim.x - part->block,
                             part->before};
    return turn;
}
#else
#define NBHD_LAUNCH const __grid_constant__ struct nbhd_params p
#define NBHD_ENTER  const struct nbhd_turn turn = {(int)blockIdx.x, (int)gridDim.x, 0};
#endif

#endif
