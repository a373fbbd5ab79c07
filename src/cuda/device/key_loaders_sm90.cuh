/* The loading warps of a kernel that holds a tile of keys (keys_sm90.cuh): the boxes of Q by warp 0, those of dO by
 * warp 1, and what is small and goes with them. That lies in SLOTS, more than there are stages, and is written before
 * a box's stage is free. */
#ifndef NBHD_DEVICE_KEY_LOADERS_SM90_CUH
#define NBHD_DEVICE_KEY_LOADERS_SM90_CUH

/* The thread's number, read anew: loading warps have no register to keep what follows from it. */
NBHD_FN int fresh_thread(void)
{
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/* The flags of this warp's box, a lane looks for each bit; the mask of keys 64.. stands above that of keys 0..63. */
NBHD_FN unsigned box_flags(const struct tables *tab)
{
    int lane = fresh_thread() & 31, set = 0; /* of warp 0 */
    int axis = lane < 9 ? lane % 3 : lane > 9 ? (lane - 10) % 3 : 3;
    int origin = ld_shared_b32(smem_address(&tab->at[0]) + 4 * axis);
    if (lane < 3 * BLOCKS) {
        int2 all = tab->all[lane >= 3][axis];
        set = origin < all.x || origin + tab->q.extent[axis] > all.y;
    } else if (lane >= 6 && lane < 9) {
        set = origin + tab->q.extent[axis] < tab->any[axis].y;
    } else if (lane == 9) {
        set = origin + 1 < tab->place.head_end;
    } else if (SKIPS && lane < 10 + 3 * BLOCKS) {
        int2 some = tab->some[lane >= 13][axis];
        set = origin >= some.y || origin + tab->q.extent[axis] <= some.x;
    }
    return __ballot_sync(~0u, set);
}

/* One lane's part of a box's statistics: rows lane, lane + 32, ...; those outside the tensor get 0. */
NBHD_FN void load_statistics(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, const struct tables *tab,
                             int step)
{
    const struct place *t = &tab->place;
    struct box x = box_at(tab);
    unsigned first = (unsigned)t->batch * p->heads + x.head;
#pragma unroll
    for (int a = 0; a < 3; a++) {
        first = first * p->axis[a].length + x.origin[a] * p->axis[a].dilation + t->group[a];
        x.origin[a] = t->queries[a] - x.origin[a]; /* rows that are inside */
    }
#pragma unroll 1
    for (int r = fresh_thread() & 31; r < tab->q.queries; r += 32) {
        int2 query = tab->query[r];
        int inside = coordinate(query.x, 0) < x.origin[0] && coordinate(query.x, 1) < x.origin[1] &&
                     coordinate(query.x, 2) < x.origin[2];
        unsigned token = inside ? first + query.y : 0;
        cp_async_4(smem_address(&tab->lse[step % SLOTS][r]), b->lse + token, inside);
        cp_async_4(smem_address(&tab->delta[step % SLOTS][r]), b->delta + token, inside);
        if (NBHD_INTEGERS)
            cp_async_4(smem_address(fineness_in(tab, step % SLOTS) + r), b->fineness + token, inside);
    }
}

/* Warp 0: all boxes of Q, and what the consumers must know of each. */
NBHD_FN void load_queries(const struct nbhd_bwd_boxes *b, struct tables *tab, const struct nbhd_tensor_map *maps,
                          unsigned q_tiles)
{
    int step = 0, lane = threadIdx.x & 31, axis = NBHD_MASK_STEPS ? column_axis(&tab->q, lane) : 3;
    set_first_box(tab);
    do {
        unsigned flags = box_flags(tab);
        if (lane == 0)
            tab->flags[step % SLOTS] = flags;
        if (NBHD_MASK_BITS && lane == 2)
            tab->origin[step % SLOTS] = ld_shared_b32(smem_address(&tab->at[0]) + 8);
        if (NBHD_MASK_STEPS && axis < 3) {
            int origin = ld_shared_b32(smem_address(&tab->at[0]) + 4 * axis);
            tab->position[step % SLOTS][lane] = (unsigned)(origin - tab->any[axis].x + MASK_BIAS) * 0x10001;
        }
        __syncwarp();
        if (lane == 0) {
            struct box x = box_at(tab);
            unsigned full = smem_address(&tab->q_full[step % STAGES]), dst = q_tiles + step % STAGES * Q_BYTES;
            mbar_wait(smem_address(&tab->q_empty[step % STAGES]), ~(step / STAGES) & 1);
            mbar_arrive_expect(full, K_CHUNKS * tab->q.queries * 128);
            for (int c = 0; c < K_CHUNKS; c++)
                tma_load_5d(dst + c * NBHD_N * 128, map_of(maps, tab), full, 64 * c, x.head, x.origin[2], x.origin[1],
                            slowest(b, tab, x.origin));
        }
        step = (step + 1) % (2 * SLOTS);
    } while (set_next_box(tab));
}

/* Warp 1: all boxes of dO, and their statistics; these arrive only after the stage is free, or they would count for
 * the box before. */
NBHD_FN void load_gradients(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab,
                            const struct nbhd_tensor_map *maps, unsigned do_tiles)
{
    int step = 0;
    set_first_box(tab);
    do {
        load_statistics(p, b, tab, step);
        mbar_wait(smem_address(&tab->do_empty[step % STAGES]), ~(step / STAGES) & 1);
        cp_async_mbar_arrive(smem_address(&tab->do_full[step % STAGES]));
        if ((threadIdx.x & 31) == 0) {
            struct box x = box_at(tab);
            unsigned full = smem_address(&tab->do_full[step % STAGES]), dst = do_tiles + step % STAGES * DO_BYTES;
            mbar_arrive_expect(full, V_CHUNKS * tab->q.queries * 128);
            for (int c = 0; c < V_CHUNKS; c++)
                tma_load_5d(dst + c * NBHD_N * 128, map_of(maps, tab), full, 64 * c, x.head, x.origin[2], x.origin[1],
                            slowest(b, tab, x.origin));
        }
        step = (step + 1) % (2 * SLOTS);
    } while (set_next_box(tab));
}

#endif
