/* What the host halves of the kernels of Hopper share; see sm90.h. */
#include "cuda/sm90.h"
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include "cuda/sm90_axis.h"

bool nbhd_sm90_refuses(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    const nbhd_desc *d = &problem->desc;
    struct nbhd_cuda_machine machine;
    if (nbhd_cuda_machine(&machine))
        return nbhd_refuse(why, "%s", nbhd_last_error());
    if (machine.cc != 90)
        return nbhd_refuse(why, "the GPU has compute capability %d.%d; wgmma is an instruction of 9.0 alone",
                           machine.cc / 10, machine.cc % 10);
    if (d->dtype != NBHD_F16 && d->dtype != NBHD_BF16)
        return nbhd_refuse(why, "dtype %s: the tensor cores take f16 and bf16", nbhd_dtype_name(d->dtype));
    if (d->bias)
        return nbhd_refuse(why, "bias=1: it adds no relative biases");
    if (d->head_dim % 8 || d->head_dim > 256)
        return nbhd_refuse(why, "head_dim=%d: it takes multiples of 8 up to 256", d->head_dim);
    if (d->head_dim_v % 8 || d->head_dim_v > 256)
        return nbhd_refuse(why, "head_dim_v=%d: it takes multiples of 8 up to 256", d->head_dim_v);
    if (!(d->scale > 0))
        return nbhd_refuse(why, "scale=%g: it masks unscaled scores, so scale must be positive",
                           d->scale);
    for (int a = 0; a < 3; a++)
        if (problem->axis[a].edge == NBHD_EDGE_PERIODIC)
            return nbhd_refuse(why, "edge of axis %d is periodic: its boxes of keys do not wrap around", a);
    return false;
}

bool nbhd_sm90_asks_anew(struct nbhd_sm90_asked *last, const struct nbhd_problem *problem)
{
    struct nbhd_cuda_machine machine;
    if (nbhd_cuda_machine(&machine)) {
        last->count = 0;
        return false;
    }
    if (last->count && last->machine.multiprocessors == machine.multiprocessors &&
        last->machine.shared_max == machine.shared_max && last->flags == problem->flags &&
        !memcmp(&last->desc, &problem->desc, sizeof last->desc))
        return false;
    last->machine = machine;
    last->flags = problem->flags;
    memcpy(&last->desc, &problem->desc, sizeof last->desc);
    return true;
}

nbhd_status nbhd_sm90_check_view(const char *kernel, const char *name, const struct nbhd_view *view)
{
    if ((size_t)view->data % 16)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "%s.data=%p: %s needs it aligned to 16 bytes", name,
                         (void *)view->data, kernel);
    const long long strides[] = {view->batch, view->axis[0], view->axis[1], view->axis[2], view->head};
    for (size_t i = 0; i < sizeof strides / sizeof *strides; i++)
        if (strides[i] % 16 || strides[i] < 0)
            return nbhd_fail(NBHD_ERROR_UNSUPPORTED,
                             "%s.stride[%zu] is %lld bytes: %s needs multiples of 16, not negative", name, i,
                             strides[i], kernel);
    return NBHD_OK;
}

/* ---- tensor maps ---- */

/* A dimension of one element may have any stride: it is never used. */
static void set_dimension(struct nbhd_cuda_box *box, int i, int size, long long stride, int extent, int step)
{
    box->size[i] = (uint64_t)size;
    box->stride[i] = size > 1 ? (uint64_t)stride : 16;
    box->box[i] = (uint32_t)(extent * step);
    box->step[i] = (uint32_t)step;
}

nbhd_status nbhd_sm90_token_map(struct nbhd_tensor_map *map, const struct nbhd_params *p, int dtype,
                                const struct nbhd_view *view, const struct nbhd_sm90_tokens *tokens, int heads_in_box,
                                const int extent[3])
{
    struct nbhd_cuda_box box = {.dtype = dtype, .rank = 5, .data = view->data, .swizzle = 128};
    int slice = tokens->slice;
    box.size[0] = (uint64_t)tokens->dim;
    box.box[0] = dtype == NBHD_F32 || dtype == NBHD_CUDA_INT32 ? 32 : 64;
    box.step[0] = 1;
    set_dimension(&box, 1, tokens->heads, view->head, heads_in_box, 1);
    if (tokens->flat) {
        box.size[0] *= (uint64_t)tokens->heads;
        set_dimension(&box, 1, 1, 0, 1, 1);
    }
    for (int a = 2; a >= 0; a--) {
        struct nbhd_axis axis = p->axis[a];
        int size = tokens->keys ? axis.keys : axis.length;
        if (tokens->slice < 0) {
            set_dimension(&box, 4 - a, size, view->axis[a], extent[a], axis.dilation);
            continue;
        }
        int group = slice % axis.dilation;
        slice /= axis.dilation;
        box.data = (char *)box.data + group * view->axis[a];
        set_dimension(&box, 4 - a, axis.dilation > 1 ? nbhd_group_size(axis, group) : size,
                      view->axis[a] * axis.dilation, extent[a], 1);
    }
    if (tokens->slice >= 0)
        box.data = (char *)box.data + slice * view->batch;
    else if (p->batch > 1) /* then axis 0 has length 1, and gives the batch its place */
        set_dimension(&box, 4, p->batch, view->batch, 1, 1);
    return nbhd_cuda_tensor_map(map, &box);
}

/* Map of boxes of n extra keys of one head: coordinates column, head, key, batch, 0. */
static nbhd_status extra_map(struct nbhd_tensor_map *map, const struct nbhd_params *p, int dtype,
                             const struct nbhd_view *view, int dim, int n)
{
    struct nbhd_cuda_box box = {.dtype = dtype, .rank = 5, .data = view->data, .swizzle = 128};
    box.size[0] = (uint64_t)dim;
    box.box[0] = 64;
    box.step[0] = 1;
    set_dimension(&box, 1, p->kv_heads, view->head, 1, 1);
    set_dimension(&box, 2, p->extra, view->axis[2], n, 1);
    set_dimension(&box, 3, p->batch, view->batch, 1, 1);
    set_dimension(&box, 4, 1, 16, 1, 1);
    return nbhd_cuda_tensor_map(map, &box);
}

/* ---- what the kernels are told ---- */

void nbhd_sm90_boxes(struct nbhd_boxes *boxes, const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan)
{
    memset(boxes, 0, sizeof *boxes);
    const int *q = plan->q_box;
    int tokens = q[0] * q[1] * q[2], rows = 64 * plan->variant.groups;
    boxes->shapes = plan->shapes;
    boxes->rows = tokens * plan->pack;
    boxes->pack = plan->pack;
    boxes->sliced = plan->sliced;
    for (int r = 0; r < rows; r++) { /* rows past the last repeat it */
        int token = nbhd_min(r, boxes->rows - 1) / plan->pack, head = nbhd_min(r, boxes->rows - 1) % plan->pack;
        boxes->row[r] = (unsigned)(token / (q[1] * q[2]) | token / q[2] % q[1] << 8 | token % q[2] << 16) |
                        (unsigned)head << 24;
    }
    for (int g = 0; g < plan->variant.groups; g++) {
        boxes->low[g] = 0xffffff;
        for (int r = 64 * g; r < 64 * g + 64; r++)
            for (int a = 0; a < 3; a++) {
                unsigned at = boxes->row[r] & 0xffu << 8 * a, mask = 0xffu << 8 * a;
                if (at < (boxes->low[g] & mask))
                    boxes->low[g] = (boxes->low[g] & ~mask) | at;
                if (at > (boxes->high[g] & mask))
                    boxes->high[g] = (boxes->high[g] & ~mask) | at;
            }
    }
    for (int a = 0; a < 3; a++) {
        boxes->q_box[a] = q[a];
        boxes->tiles[a] = ceil_div(nbhd_group_size(problem->axis[a], 0), q[a]);
        boxes->step[a] = plan->sliced ? 1 : problem->axis[a].dilation;
        boxes->uneven |= problem->axis[a].length % problem->axis[a].dilation != 0 ||
                         (plan->many && problem->axis[a].dilation > 1);
        boxes->reverse |= problem->axis[a].edge == NBHD_EDGE_CAUSAL;
    }
    for (int i = 0; i < plan->shapes; i++) {
        struct nbhd_key_box *k = &boxes->shape[i];
        memcpy(k->extent, plan->k_box[i], sizeof k->extent);
        k->tokens = k->extent[0] * k->extent[1] * k->extent[2];
        memcpy(k->mask_at, plan->mask_at[i], sizeof k->mask_at);
    }
    boxes->head_blocks = problem->desc.heads / plan->pack;
}

/* ---- a launch over query tiles ---- */

void nbhd_sm90_set_launch(struct nbhd_sm90_launch *launch, const struct nbhd_sm90_kernel *kernel,
                          const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan)
{
    const int *tiles = launch->boxes.tiles;
    launch->plan = *plan;
    nbhd_sm90_boxes(&launch->boxes, problem, plan);
    launch->dtype = problem->desc.dtype;
    launch->slices = problem->desc.batch;
    for (int a = 0; a < 3; a++)
        launch->slices *= problem->axis[a].dilation;
    int needed = plan->sliced ? nbhd_min(launch->slices, NBHD_SM90_MAPS) : plan->shapes;
    for (launch->maps = 1; launch->maps < needed;) /* few numbers: few kernels to compile */
        launch->maps *= 2;
    if (plan->many)
        launch->maps = NBHD_PARTS;
    launch->most_slices = plan->sliced ? launch->maps : 65535;
    launch->grid = (struct nbhd_cuda_grid){
        .blocks = {(unsigned)(tiles[0] * tiles[1] * tiles[2]), (unsigned)(problem->desc.heads / plan->pack), 1},
        .threads = {128 * ((unsigned)plan->variant.groups + 1), 1, 1},
        .shared = (unsigned)kernel->shared(problem, plan)};
}

void nbhd_sm90_options(struct nbhd_options *o, const struct nbhd_problem *problem,
                       const struct nbhd_sm90_launch *launch)
{
    static const int registers[4][4] = {[1] = {[2] = 216, [3] = 120}, [2] = {[1] = 232}, [3] = {[1] = 152}};
    const struct nbhd_sm90_variant *v = &launch->plan.variant;
    nbhd_options_problem(o, &problem->desc);
    nbhd_option(o, "-DNBHD_MMA_TYPE=\"%s\"", problem->desc.dtype == NBHD_BF16 ? "bf16" : "f16");
    nbhd_option(o, "-DNBHD_N=%d -DNBHD_QK=wgmma_ss_n%d -DNBHD_GROUPS=%d -DNBHD_CTAS=%d -DNBHD_STAGES=%d", v->n, v->n,
                v->groups, v->ctas, v->stages);
    nbhd_option(o, "-DNBHD_MAPS=%d -DNBHD_MASK_STEPS=%d -DNBHD_MASK=wgmma_rs_n%d -DNBHD_MASK_BITS=%d", launch->maps,
                launch->plan.mask_steps, v->n, launch->plan.mask_bits);
    nbhd_option(o, "-DNBHD_REGISTERS_LOAD=40 -DNBHD_REGISTERS_MATH=%d", registers[v->groups][v->ctas]);
}

size_t nbhd_sm90_describe(char *text, size_t room, const struct nbhd_sm90_plan *p)
{
    size_t used = (size_t)snprintf(text, room, "queries %dx%dx%d", p->q_box[0], p->q_box[1], p->q_box[2]);
    if (p->pack > 1 && used < room)
        used += (size_t)snprintf(text + used, room - used, " x %d heads", p->pack);
    for (int i = 0; i < p->shapes && used < room; i++)
        used += (size_t)snprintf(text + used, room - used, "%s%dx%dx%d", i ? " or " : ", keys ", p->k_box[i][0],
                                 p->k_box[i][1], p->k_box[i][2]);
    if (used < room)
        used += (size_t)snprintf(text + used, room - used, " of %d, %.0f%% masked, %d warpgroup%s", p->variant.n,
                                 100 * (1 - p->full_boxes / p->boxes), p->variant.groups,
                                 p->variant.groups > 1 ? "s" : " x 2");
    return used < room ? used : room - 1;
}

/* struct nbhd_boxes, flat: of a tensor whose heads lie side by side, in boxes of one head. Q K^T reads columns in steps
 * of 16. */
static int flat_columns(const struct nbhd_view *view, int heads, int dim, int in_box, int step)
{
    return in_box == 1 && heads > 1 && view->head == 2 * dim && dim % 64 != 0 && dim % step == 0 ? dim : 0;
}

static void set_flat(struct nbhd_boxes *boxes, const struct nbhd_params *p)
{
    boxes->flat[0] = flat_columns(&p->q, p->heads, p->head_dim, boxes->pack, 16);
    boxes->flat[1] = flat_columns(&p->k, p->kv_heads, p->head_dim, 1, 16);
    boxes->flat[2] = flat_columns(&p->v, p->kv_heads, p->head_dim_v, 1, 8);
}

/* The i-th maps of struct maps of the kernels: q[maps], k[maps], v[maps], extra k, extra v; then dout[maps]. slice: as
 * in struct nbhd_sm90_tokens. */
static nbhd_status make_slice(struct nbhd_tensor_map *maps, const struct nbhd_sm90_launch *launch,
                              const int flat[3], const struct nbhd_params *p, const struct nbhd_view *dout, int slice,
                              int i)
{
    const struct nbhd_sm90_plan *plan = &launch->plan;
    struct nbhd_tensor_map *k = maps + launch->maps, *v = k + launch->maps, *douts = v + launch->maps + 2;
    const struct nbhd_sm90_tokens q = {0, slice, p->heads, p->head_dim, flat[0] > 0};
    const struct nbhd_sm90_tokens o = {0, slice, p->heads, p->head_dim_v, 0};
    const struct nbhd_sm90_tokens kt = {1, slice, p->kv_heads, p->head_dim, flat[1] > 0};
    const struct nbhd_sm90_tokens vt = {1, slice, p->kv_heads, p->head_dim_v, flat[2] > 0};
    nbhd_status status = nbhd_sm90_token_map(maps + i, p, launch->dtype, &p->q, &q, plan->pack, plan->q_box);
    if (dout && !status)
        status = nbhd_sm90_token_map(douts + i, p, launch->dtype, dout, &o, plan->pack, plan->q_box);
    for (int s = 0; s < plan->shapes && !status; s++) {
        const int at = i * plan->shapes + s;
        status = nbhd_sm90_token_map(k + at, p, launch->dtype, &p->k, &kt, 1, plan->k_box[s]);
        if (!status)
            status = nbhd_sm90_token_map(v + at, p, launch->dtype, &p->v, &vt, 1, plan->k_box[s]);
    }
    return status;
}

/* All of slices [first, first + slices) if they have maps of their own, else the one for all. */
static nbhd_status make_maps(struct nbhd_tensor_map *maps, const struct nbhd_sm90_launch *launch, const int flat[3],
                             const struct nbhd_params *p, const struct nbhd_view *dout, int first, int slices)
{
    const int sliced = launch->plan.sliced, n = launch->plan.variant.n;
    struct nbhd_tensor_map *extra = maps + 3 * launch->maps;
    nbhd_status status = NBHD_OK;
    for (int i = 0; i < (sliced ? slices : 1) && !status; i++)
        status = make_slice(maps, launch, flat, p, dout, sliced ? first + i : -1, i);
    if (p->extra && !status)
        status = extra_map(extra, p, launch->dtype, &p->extra_k, p->head_dim, n);
    if (p->extra && !status)
        status = extra_map(extra + 1, p, launch->dtype, &p->extra_v, p->head_dim_v, n);
    return status;
}

nbhd_status nbhd_sm90_run(const struct nbhd_sm90_launch *launch, const struct nbhd_params *params,
                          const struct nbhd_view *dout, void *const *more, int count, void *stream)
{
    struct nbhd_tensor_map maps[4 * NBHD_SM90_MAPS + 2];
    struct nbhd_boxes boxes = launch->boxes;
    struct nbhd_cuda_grid grid = launch->grid;
    const int tiles = boxes.tiles[0] * boxes.tiles[1] * boxes.tiles[2] * boxes.head_blocks;
    void *arguments[5] = {(void *)params, &boxes, maps};
    nbhd_status status = NBHD_OK;
    if (launch->resident)
        set_flat(&boxes, params);
    for (int i = 0; i < count; i++)
        arguments[3 + i] = more[i];
    for (int first = 0; first < launch->slices && !status; first += launch->most_slices) {
        const int slices = nbhd_min(launch->most_slices, launch->slices - first);
        boxes.slice_begin = first;
        if (launch->resident)
            grid.blocks[0] = (unsigned)nbhd_sm90_share(&boxes, &launch->plan, launch->most_tiles, tiles * slices,
                                                       launch->resident);
        else
            grid.blocks[2] = (unsigned)slices;
        if (launch->plan.sliced || first == 0)
            status = make_maps(maps, launch, boxes.flat, params, dout, first, slices);
        if (!status)
            status = nbhd_cuda_launch(launch->module, launch->function, &grid, stream, arguments);
    }
    return status;
}

/* ---- a launch over the sequences of a ragged batch ---- */

/* The block of all sequences becomes that of one. */
static void select_part(struct nbhd_params *p, const struct nbhd_part *part, int padded)
{
    struct nbhd_view *views = &p->q;
    for (int i = 0; i < 5; i++) /* q, k, v, o, lse */
        nbhd_part_view(part, padded, i, &views[i]);
    p->batch = 1;
    for (int a = 0; a < 3; a++) {
        p->axis[a].length = part->length[a];
        p->axis[a].keys = part->keys[a];
        p->axis[a].window = part->window[a];
    }
}

/* Query tiles of all heads and dilation groups. */
static double tiles_of(const struct nbhd_params *p, const struct nbhd_boxes *boxes)
{
    double tiles = boxes->head_blocks;
    for (int a = 0; a < 3; a++)
        tiles *= p->axis[a].dilation * ceil_div(nbhd_group_size(p->axis[a], 0), boxes->q_box[a]);
    return tiles;
}

nbhd_status nbhd_sm90_run_many(const struct nbhd_sm90_launch *launch, const struct nbhd_params *params,
                               const struct nbhd_parts *parts, void *stream)
{
    struct nbhd_tensor_map maps[3 * NBHD_PARTS + 2];
    struct nbhd_boxes_many boxes = {launch->boxes, *parts};
    struct nbhd_cuda_grid grid = launch->grid;
    double work = 0;
    set_flat(&boxes.boxes, params);
    for (int i = 0; i < parts->count; i++) {
        struct nbhd_params p = *params;
        select_part(&p, &parts->part[i], parts->padded);
        const nbhd_status status = make_slice(maps, launch, boxes.boxes.flat, &p, NULL, -1, i);
        if (status)
            return status;
        boxes.parts.part[i].block = (int)work;
        work += tiles_of(&p, &launch->boxes);
        if (work > INT_MAX / 2)
            return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "%d sequences of a launch have more than %d query tiles",
                             parts->count, INT_MAX / 2);
    }
    grid.blocks[0] = (unsigned)nbhd_sm90_share(&boxes.boxes, &launch->plan, launch->most_tiles, (int)work,
                                               launch->resident);
    return nbhd_cuda_launch(launch->module, launch->function, &grid, stream, (void *[]){(void *)params, &boxes, maps});
}
