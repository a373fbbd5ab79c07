/* The launches of a backward on Hopper, as bwd_sm90.c planned them, with the tensor maps of the caller's tensors. */
#include <string.h>
#include "cuda/bwd_sm90.h"

enum { MAPS_OF_SLICE = 5 };

/* Rows that the copy engine does not move are moved in pieces of 16 bytes. */
static nbhd_status check_views(const struct nbhd_params *p)
{
    const struct {
        const char *name;
        const struct nbhd_view *view;
    } views[] = {{"q", &p->q},   {"k", &p->k},   {"v", &p->v},   {"o", &p->o}, {"dout", &p->dout}, {"dq", &p->dq},
                 {"dk", &p->dk}, {"dv", &p->dv}, {"extra_k", &p->extra_k}, {"extra_v", &p->extra_v},
                 {"dextra_k", &p->dextra_k}, {"dextra_v", &p->dextra_v}};
    nbhd_status status = NBHD_OK;
    for (size_t i = 0; i < sizeof views / sizeof *views && !status; i++)
        if (i < 8 || p->extra)
            status = nbhd_sm90_check_view("bwd_sm90", views[i].name, views[i].view);
    return status;
}

/* dQ in the workspace: float32 or integers, [batch][queries][heads][head_dim]. */
static struct nbhd_view sum_view(const struct nbhd_params *p, void *workspace)
{
    struct nbhd_view view = {.data = workspace, .head = 4ll * p->head_dim};
    view.axis[2] = view.head * p->heads;
    view.axis[1] = view.axis[2] * p->axis[2].length;
    view.axis[0] = view.axis[1] * p->axis[1].length;
    view.batch = view.axis[0] * p->axis[0].length;
    return view;
}

/* maps: struct maps of bwd_sm90.cu: q[maps], dout[maps], dq[maps], k[maps], v[maps]. */
static nbhd_status make_maps(struct nbhd_tensor_map *maps, const struct nbhd_bwd_sm90_keys *keys,
                             const struct nbhd_params *p, int dtype, void *workspace, int first, int slices)
{
    const struct nbhd_sm90_bwd_plan *plan = &keys->plan;
    const struct nbhd_view dq = sum_view(p, workspace);
    const int sums = plan->adds_dq == NBHD_DQ_INTEGERS ? NBHD_CUDA_INT32 : NBHD_F32;
    const int n = keys->maps;
    nbhd_status status = NBHD_OK;
    for (int i = 0; i < nbhd_max(slices, plan->shapes) && !status; i++) {
        struct nbhd_tensor_map *map = maps + i;
        const int slice = plan->sliced ? first + i : -1, *box = plan->q_box[plan->sliced ? 0 : i];
        const struct nbhd_sm90_tokens q = {0, slice, p->heads, p->head_dim, 0};
        const struct nbhd_sm90_tokens dout = {0, slice, p->heads, p->head_dim_v, 0};
        const struct nbhd_sm90_tokens k = {1, slice, p->kv_heads, p->head_dim, 0};
        const struct nbhd_sm90_tokens v = {1, slice, p->kv_heads, p->head_dim_v, 0};
        status = nbhd_sm90_token_map(map, p, dtype, &p->q, &q, 1, box);
        if (!status)
            status = nbhd_sm90_token_map(map + n, p, dtype, &p->dout, &dout, 1, box);
        if (!status && plan->adds_dq)
            status = nbhd_sm90_token_map(map + 2 * n, p, sums, &dq, &q, 1, box);
        if (!status)
            status = nbhd_sm90_token_map(map + 3 * n, p, dtype, &p->k, &k, 1, plan->k_box);
        if (!status)
            status = nbhd_sm90_token_map(map + 4 * n, p, dtype, &p->v, &v, 1, plan->k_box);
    }
    return status;
}

static nbhd_status run_keys(const struct nbhd_bwd_sm90_keys *keys, const struct nbhd_params *params,
                            const struct nbhd_bwd_sm90 *state, char *workspace, void *stream)
{
    struct nbhd_tensor_map maps[MAPS_OF_SLICE * NBHD_BWD_SM90_MAPS];
    struct nbhd_bwd_boxes boxes = keys->boxes;
    struct nbhd_cuda_grid grid = keys->grid;
    const int most = keys->plan.sliced ? keys->maps : NBHD_BWD_SM90_SLICES; /* of one launch */
    nbhd_status status = NBHD_OK;
    void *arguments[] = {(void *)params, &boxes, maps};
    boxes.lse = (const float *)(workspace + state->lse);
    boxes.delta = (const float *)(workspace + state->delta);
    boxes.fineness = (const float *)(workspace + state->fineness);
    boxes.sums = (float *)workspace;
    boxes.units = params->kv_heads * params->batch;
    boxes.unit_tiles = boxes.tiles[0] * boxes.tiles[1] * boxes.tiles[2];
    nbhd_bwd_sm90_tell_shares(&boxes, &state->shares, (unsigned *)(workspace + state->counts));
    for (int first = 0; first < keys->slices && !status; first += most) {
        const int slices = nbhd_min(most, keys->slices - first);
        boxes.slice_begin = first;
        grid.blocks[2] = state->shares.parts > 1 ? 1 : (unsigned)slices;
        status = make_maps(maps, keys, params, state->dtype, workspace, first, keys->plan.sliced ? slices : 1);
        if (!status)
            status = nbhd_cuda_launch(keys->module, keys->function, &grid, stream, arguments);
    }
    return status;
}

/* dQ from its sums, of the units that nobody has converted: heads of one batch element, then whole ones. */
static nbhd_status convert(const struct nbhd_bwd_sm90 *state, const struct nbhd_params *params,
                           struct nbhd_bwd_rows *rows, void *stream)
{
    const int units = params->kv_heads * params->batch, first = state->shares.lag ? units - state->shares.lag : 0;
    nbhd_status status = NBHD_OK;
    rows->batch = first / params->kv_heads;
    rows->head = first % params->kv_heads * (params->heads / params->kv_heads);
    while (rows->batch < params->batch && !status) {
        struct nbhd_cuda_grid grid = state->rows_grid;
        const int all = rows->head ? 1 : params->batch - rows->batch;
        grid.blocks[1] = (unsigned)(params->heads - rows->head);
        grid.blocks[2] = (unsigned)all;
        status = nbhd_cuda_launch(state->rows, state->post, &grid, stream, (void *[]){(void *)params, rows});
        rows->batch += all;
        rows->head = 0;
    }
    return status;
}

nbhd_status nbhd_bwd_sm90_run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace,
                              void *stream)
{
    const struct nbhd_bwd_sm90 *state = plan->state;
    char *at = workspace;
    const int units = params->kv_heads * params->batch;
    struct nbhd_bwd_rows rows = {.lse = (float *)(at + state->lse),
                                 .delta = (float *)(at + state->delta),
                                 .fineness = (float *)(at + state->fineness),
                                 .bounds = (float *)(at + state->bounds),
                                 .sums = (float *)at,
                                 .counts = (unsigned *)(at + state->counts),
                                 .count = state->shares.count,
                                 .units = state->dq ? 0 : state->shares.lag ? state->shares.lag : units};
    nbhd_status status = check_views(params);
    if (!status && state->bounds_of) {
        struct nbhd_cuda_grid grid = state->rows_grid;
        grid.blocks[0] = NBHD_BWD_SM90_BOUNDS;
        grid.blocks[1] = (unsigned)params->kv_heads;
        status = nbhd_cuda_launch(state->rows, state->bounds_of, &grid, stream, (void *[]){(void *)params, &rows});
    }
    if (!status)
        status = nbhd_cuda_launch(state->rows, state->pre, &state->rows_grid, stream,
                                  (void *[]){(void *)params, &rows});
    if (!status)
        status = run_keys(&state->grid, params, state, at, stream);
    if (!status && params->extra) {
        struct nbhd_params extra = *params;
        extra.k = params->extra_k;
        extra.v = params->extra_v;
        extra.dk = params->dextra_k;
        extra.dv = params->dextra_v;
        memcpy(extra.axis, state->extra.axis, sizeof extra.axis);
        status = run_keys(&state->extra, &extra, state, at, stream);
    }
    if (status)
        return status;
    if (state->dq)
        return nbhd_bwd_sm90_dq_run(state->dq, params, rows.lse, rows.delta, stream);
    return convert(state, params, &rows, stream);
}
