/* How fwd_sm90 stores O: from accumulators, in pieces of 16 bytes. NBHD_* as in fwd_sm90.cu. */
#ifndef NBHD_DEVICE_OUTPUT_SM90_CUH
#define NBHD_DEVICE_OUTPUT_SM90_CUH

/* Transposes the 4 x 4 words of four neighbouring lanes: word j of lane q goes to word q of lane j. */
NBHD_FN void transpose_quad(unsigned *w)
{
    int lane = threadIdx.x;
#pragma unroll
    for (int step = 1; step <= 2; step *= 2)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (!(j & step)) {
                unsigned got = __shfl_xor_sync(~0u, lane & step ? w[j] : w[j + step], step);
                w[j + step] = lane & step ? w[j + step] : got;
                w[j] = lane & step ? got : w[j];
            }
}

/* Writes a warp's 16 rows of O, 64 bytes of eight rows at a time, and their logsumexp. number: of the first row. */
NBHD_FN void store_rows(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct tables *tab,
                        const struct tile *t, const float *o, int number)
{
    int lane = threadIdx.x & 31;
    int first = number + (lane >> 2);
#if NBHD_MANY
    const struct nbhd_view *view = &t->o, *lse = &t->lse;
#else
    const struct nbhd_view *view = &p->o, *lse = &p->lse;
#endif
    NBHD_PIN_R(&first, 1); /* else the second row's number has a register all along */
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int x[3];
        int at = first + 8 * i;
        unsigned row = tab->row[at];
        int inside = row_token(p, b, &t->place, row, at, x);
        char *to = row_address(view, &t->place, row, x) + 16 * (lane & 3);
        if (p->lse.data && inside && (lane & 3) == 0)
            *(float *)row_address(lse, &t->place, row, x) = tab->finished[at].y;
#pragma unroll
        for (int m = 0; m < (NBHD_HEAD_DIM_V + 31) / 32; m++) {
            unsigned w[4];
#pragma unroll
            for (int j = 0; j < 4; j++) /* columns 8 (4m + j) + 2q and the next */
                w[j] = 4 * m + j < NBHD_HEAD_DIM_V / 8
                           ? pack(o[16 * m + 4 * j + 2 * i], o[16 * m + 4 * j + 2 * i + 1])
                           : 0;
            transpose_quad(w);
            if (inside && 32 * m + 8 * (lane & 3) < NBHD_HEAD_DIM_V)
                *(uint4 *)(to + 64 * m) = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}

#endif
