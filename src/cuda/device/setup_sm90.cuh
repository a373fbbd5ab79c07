/* How a CTA of the Hopper forward begins: barriers, zeros where no copy writes, and its first tile. Included by
 * fwd_sm90.cu, after loaders_sm90.cuh. */
#ifndef NBHD_DEVICE_SETUP_SM90_CUH
#define NBHD_DEVICE_SETUP_SM90_CUH

/* Zeros in the rows of Q past the tile's, which no copy fills: a warp moves its references together, so that what lies
 * there by chance would decide over bits of the rows beside it. */
NBHD_FN void clear_padding_rows(const struct nbhd_boxes *b, unsigned q_tiles)
{
    int pieces = (Q_ROWS - b->rows) * 8; /* of 16 bytes, in each chunk */
    if (pieces == 0)
        return;
#pragma unroll 1
    for (int c = 0; c < NBHD_Q_STAGES * QK_CHUNKS; c++)
#pragma unroll 1
        for (int i = threadIdx.x; i < pieces; i += THREADS)
            st_shared_v4(q_tiles + (c * Q_ROWS + b->rows) * 128 + 16 * i, make_uint4(0, 0, 0, 0));
    fence_proxy_async();
}

NBHD_FN void init_barriers(struct tables *tab)
{
    for (int i = 0; i < 2; i++) {
        mbar_init(smem_address(&tab->q_full[i]), 1);
        mbar_init(smem_address(&tab->q_empty[i]), 4 * NBHD_GROUPS); /* one lane of each consumer warp */
        for (int stage = 0; stage < NBHD_STAGES; stage++) {
            mbar_init(smem_address(&tab->full[i][stage]), 1);
            mbar_init(smem_address(&tab->empty[i][stage]), 4 * NBHD_GROUPS);
            tab->filled[i][stage] = NBHD_N;
        }
    }
    for (int i = 0; i < NBHD_TILES; i++) {
        mbar_init(smem_address(&tab->tile_full[i]), 1);
        mbar_init(smem_address(&tab->tile_empty[i]), 4 * NBHD_GROUPS);
        tab->tile[i].shape = -1;
    }
    mbar_fence_init();
}

/* Barriers, where the tiles lie, the first one's Q and windows, and what all tiles share. Returns whether there are
 * tiles. */
NBHD_FN int begin_cta(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct maps *maps,
                      struct tables *tab, unsigned q_tiles, unsigned mask_keys)
{
    if (threadIdx.x / 32 == 2) {
        if (threadIdx.x == 64)
            init_barriers(tab);
        find_tiles(p, b, tab);
        if (threadIdx.x == 64 && tab->tiles > 0)
            load_q_box(b, tab, &tab->place[0], maps->q, q_tiles, 0);
    }
    clear_padding_rows(b, q_tiles);
    for (int i = threadIdx.x; i < Q_ROWS; i += THREADS)
        tab->row[i] = b->row[i];
    if (NBHD_SHAPES == 1)
        write_mask_keys(&b->shape[0], mask_keys, threadIdx.x, THREADS);
    __syncthreads();
    if (tab->tiles == 0)
        return 0;
    write_windows(p, b, windows_of(b, tab, 0), &tab->place[0], threadIdx.x, THREADS);
    __syncthreads();
    return 1;
}

#endif
