/* How bwd_sm90.cu adds up dQ in one order, so that its bits are the same in every run.
 *
 * Boxes of queries lie on a grid, so that all tiles which need a query meet it in the same box. At each box of each
 * head they come in descending order of their place, the first axis's fastest: a tile adds its part when as many have
 * as there are before it, which follows from the keys that the box's queries see. One float32 sum, one order: one
 * result.
 *
 * A CTA takes the next number when it begins, and of a head's tiles the last has the lowest. So a tile waits only for
 * tiles of lower numbers, which have begun; the lowest that is not done waits for nobody, and all come to an end,
 * however many CTAs run at a time and in whatever order they are started. Several heads' tiles take turns in the
 * numbers: few of one head run at once, so that the waits of each for the one before it, 3 to 5 us, do not add up to
 * much.
 *
 * Tiles meet their boxes in ascending order, so that on one axis the tile before this one begins no earlier in them
 * than this one. On several axes waits are long (docs/notes/hopper-backward-dq.md); plans know. */
#ifndef NBHD_DEVICE_IN_ORDER_SM90_CUH
#define NBHD_DEVICE_IN_ORDER_SM90_CUH

/* The next tile that nobody has begun. For the whole CTA. */
NBHD_FN struct place next_tile_in_order(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab)
{
    uint3 at;
    if (threadIdx.x == 0)
        tab->scratch = take_number(b->next);
    __syncthreads();
    unsigned units = gridDim.y * gridDim.z; /* of this launch: slices of key/value heads */
    unsigned number = tab->scratch - b->slice_begin * p->kv_heads * b->unit_tiles;
    unsigned first = number / (b->at_once * b->unit_tiles) * b->at_once;
    unsigned count = nbhd_min(b->at_once, units - first); /* of units that take turns */
    number -= first * b->unit_tiles;
    at.x = b->unit_tiles - 1 - number / count;
    at.z = first + number % count;
    at.y = at.z % p->kv_heads;
    at.z /= p->kv_heads;
    return tile_place(p, b, at);
}

/* Of a warp's box, in shared memory: how many tiles add their part before this one, and what counts them. */
struct turn {
    unsigned before, cell;
};

NBHD_FN struct turn *turn_of(struct tables *tab) { return (struct turn *)tab->own + (fresh_thread() >> 5 & 1); }

/* By a warp; lanes 0 to 2 look at an axis each. */
NBHD_FN void find_turn(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab)
{
    const struct place *t = &tab->place;
    int a = fresh_thread() & 31, behind = 0, count = 1, cell = 0;
    unsigned box = smem_address(&tab->at[fresh_thread() >> 5]), place = t->batch, before = 0;
    if (a < 3) {
        int begin = ld_shared_b32(box + 4 * a), extent = tab->q.extent[a];
        struct nbhd_range visitors = nbhd_bwd_visitors(p->axis[a], t->queries[a], b->k_box[a], begin, extent);
        behind = visitors.end - 1 - (unsigned)t->origin[a] / b->k_box[a];
        count = visitors.end - visitors.begin;
        cell = (unsigned)begin / extent;
    }
    for (int i = 0; i < 3; i++)
        place = place * p->axis[i].dilation + t->group[i];
    place = place * p->heads + ld_shared_b32(box + 12);
    for (int i = 0; i < 3; i++)
        place = place * b->cells[i] + __shfl_sync(~0u, cell, i);
    for (int i = 2; i >= 0; i--)
        before = before * __shfl_sync(~0u, count, i) + __shfl_sync(~0u, behind, i);
    if (a == 0) {
        turn_of(tab)->before = before;
        turn_of(tab)->cell = place;
    }
}

/* Warps 2 and 3: every other box each, those whose parts one warpgroup stages. So one waits for its turn, or until its
 * part has arrived, while the other adds. */
NBHD_FN void add_dq_in_order(const struct nbhd_params *p, const struct nbhd_bwd_boxes *b, struct tables *tab,
                             const struct nbhd_tensor_map *maps, unsigned dq_tile)
{
    int group = __shfl_sync(~0u, threadIdx.x >> 5, 0) & 1, lane = threadIdx.x & 31, more;
    set_first_box(tab);
    if (group == 0)
        group_arrive(BARRIER_DQ_EMPTY, 0, 160);
    else if (!set_next_box(tab))
        return;
    do {
        find_turn(p, b, tab);
        if (lane == 0)
            await_turn(&b->counts[turn_of(tab)->cell], turn_of(tab)->before);
        __syncwarp();
        group_sync(BARRIER_DQ_FULL, group, 160);
        if (lane == 0) {
            struct box x = box_at(tab);
            issue_add(b, tab, &x, maps, dq_tile);
        }
        more = set_next_box(tab);
        if (more)
            group_arrive(BARRIER_DQ_EMPTY, group ^ 1, 160);
        if (lane == 0) {
            bulk_wait_0();
            count_up(&b->counts[turn_of(tab)->cell]);
        }
        more = more && set_next_box(tab);
    } while (more);
}

#endif
