/* What the kernels share that hold a tile of queries, fwd_sm90.cu and bwd_sm90_dq.cu: its rows' places, and the boxes
 * of keys that it visits. Each has a struct place of its own, with origin, group, size, shift,
 * batch and head.
 * NBHD_DILATED: 1 where an axis may be dilated. */
#ifndef NBHD_DEVICE_QUERY_TILES_SM90_CUH
#define NBHD_DEVICE_QUERY_TILES_SM90_CUH

NBHD_FN int map_coordinate(const struct nbhd_boxes *b, const struct place *at, const int *origin, int axis)
{
    return origin[axis] * b->step[axis] + at->shift[axis];
}

/* Token of a row, in the tensor; 0 if the row has none. */
NBHD_FN int row_token(const struct nbhd_params *p, const struct nbhd_boxes *b, const struct place *t, unsigned row,
                      int number, int *x)
{
    int inside = number < b->rows;
#pragma unroll
    for (int a = 0; a < 3; a++) {
        int at = t->origin[a] + coordinate(row, a);
        inside &= at < t->size[a];
        x[a] = NBHD_DILATED ? at * p->axis[a].dilation + t->group[a] : at;
    }
    return inside;
}

NBHD_FN char *row_address(const struct nbhd_view *view, const struct place *t, unsigned row, const int *x)
{
    return view->data + t->batch * view->batch + x[0] * view->axis[0] + x[1] * view->axis[1] + x[2] * view->axis[2] +
           (long long)(t->head + (int)(row >> 24)) * view->head;
}

/* ---- boxes of keys ---- */

/* Moves origin to the next box of the union, which has the keys in `any` of each axis. */
NBHD_FN void next_box(const struct nbhd_key_box *k, const int2 *any, int *origin)
{
#pragma unroll
    for (int a = 2; a >= 0; a--) {
        origin[a] += k->extent[a];
        if (origin[a] < any[a].y)
            return;
        origin[a] = any[a].x;
    }
}

NBHD_FN int is_last_box(const struct nbhd_key_box *k, const int2 *any, const int *origin)
{
    return origin[0] + k->extent[0] >= any[0].y && origin[1] + k->extent[1] >= any[1].y &&
           origin[2] + k->extent[2] >= any[2].y;
}

/* Flags of a box of extra keys, of which `left` are left. */
NBHD_FN int extra_flags(int left) { return NBHD_SM90_EXTRA | (left < NBHD_N) * NBHD_SM90_ALL_GROUPS; }

#endif
