/* Host half of fwd_sm90.cu: what it takes, its boxes (sm90_plan.c), its tensor maps, its launches. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/cuda.h"
#include "cuda/sm90_plan.h"

enum { MOST_MAPS = 32, MOST_PLANS = 4 };

struct state {
    struct nbhd_cuda_module *module;
    struct CUfunc_st *function;
    struct nbhd_sm90_plan plan;
    struct nbhd_boxes boxes;
    struct nbhd_cuda_grid grid;
    int dtype, slices, maps; /* slices: batch x dilation groups; maps: NBHD_MAPS */
};

/* ---- plan ---- */

/* Plans for this thread's machine. They are asked for three times (refuse, configs, build) and take milliseconds, so
 * the thread keeps those of its last problem. */
static int plans_here(const struct nbhd_problem *problem, struct nbhd_sm90_plan *plans, int room)
{
    static _Thread_local struct {
        nbhd_desc desc;
        int multiprocessors, shared_max, count;
        struct nbhd_sm90_plan plans[MOST_PLANS];
    } last;
    struct nbhd_cuda_machine machine;
    if (nbhd_cuda_machine(&machine))
        return 0;
    if (!last.count || last.multiprocessors != machine.multiprocessors || last.shared_max != machine.shared_max ||
        memcmp(&last.desc, &problem->desc, sizeof last.desc) != 0) {
        last.count = nbhd_sm90_plans(&nbhd_sm90_forward, problem, machine.multiprocessors, machine.shared_max, last.plans, MOST_PLANS);
        last.multiprocessors = machine.multiprocessors;
        last.shared_max = machine.shared_max;
        memcpy(&last.desc, &problem->desc, sizeof last.desc);
    }
    int count = nbhd_min(last.count, room);
    memcpy(plans, last.plans, (size_t)count * sizeof *plans);
    return count;
}

static bool refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT])
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
        return nbhd_refuse(why, "scale=%g: it takes the maximum of unscaled scores, so scale must be positive",
                           d->scale);
    for (int a = 0; a < 3; a++)
        if (problem->axis[a].edge == NBHD_EDGE_PERIODIC)
            return nbhd_refuse(why, "edge of axis %d is periodic, which no kernel computes yet", a);
    struct nbhd_sm90_plan plan;
    if (!plans_here(problem, &plan, 1))
        return nbhd_refuse(why, "head_dim=%d with head_dim_v=%d: no tile fits into shared memory", d->head_dim,
                           d->head_dim_v);
    return false;
}


/* config->variant is the plan's rank. */
static int configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room)
{
    struct nbhd_sm90_plan plans[MOST_PLANS];
    int count = plans_here(problem, plans, nbhd_min(room, MOST_PLANS));
    for (int i = 0; i < count; i++) {
        configs[i] = (struct nbhd_config){.variant = i,
                                          .stages = plans[i].variant.stages,
                                          .threads = 128 * (plans[i].variant.groups + 1),
                                          .predicted_ms = plans[i].ms};
        memcpy(configs[i].q_tile, plans[i].q_box, sizeof configs[i].q_tile);
        if (plans[i].shapes == 1 && plans[i].pack == 1) /* else none that nbhd_sim_plan_tiles could tell */
            memcpy(configs[i].k_tile, plans[i].k_box[0], sizeof configs[i].k_tile);
    }
    return count;
}

static void add_options(struct nbhd_options *o, const struct nbhd_problem *problem, const struct state *state)
{
    const struct nbhd_sm90_variant *v = &state->plan.variant;
    nbhd_options_problem(o, problem, false);
    nbhd_option(o, "-DNBHD_MMA_TYPE=\"%s\"", problem->desc.dtype == NBHD_BF16 ? "bf16" : "f16");
    nbhd_option(o, "-DNBHD_N=%d -DNBHD_QK=wgmma_ss_n%d -DNBHD_PV=wgmma_rs_bt_n%d", v->n, v->n,
                problem->desc.head_dim_v);
    nbhd_option(o, "-DNBHD_GROUPS=%d -DNBHD_CTAS=%d -DNBHD_STAGES=%d -DNBHD_TAKE_TURNS=%d", v->groups, v->ctas,
                v->stages, v->take_turns);
    nbhd_option(o, "-DNBHD_MAPS=%d", state->maps);
    nbhd_option(o, "-DNBHD_MASK_STEPS=%d -DNBHD_MASK=wgmma_rs_n%d -DNBHD_MASK_BITS=%d", state->plan.mask_steps, v->n,
                state->plan.mask_bits);
    static const int registers[4][4] = {[1] = {[2] = 216, [3] = 120}, [2] = {[1] = 232}, [3] = {[1] = 152}};
    nbhd_option(o, "-DNBHD_REGISTERS_LOAD=40 -DNBHD_REGISTERS_MATH=%d", registers[v->groups][v->ctas]);
}

static void describe(struct nbhd_plan *plan, const struct nbhd_sm90_plan *p)
{
    char *text = plan->describe;
    size_t room = sizeof plan->describe, used = 0;
    used += (size_t)snprintf(text, room, "queries %dx%dx%d", p->q_box[0], p->q_box[1], p->q_box[2]);
    if (p->pack > 1)
        used += (size_t)snprintf(text + used, room - used, " x %d heads", p->pack);
    for (int i = 0; i < p->shapes && used < room; i++)
        used += (size_t)snprintf(text + used, room - used, "%s%dx%dx%d", i ? " or " : ", keys ", p->k_box[i][0],
                                 p->k_box[i][1], p->k_box[i][2]);
    if (used < room)
        snprintf(text + used, room - used, " of %d, %.0f%% masked, %d warpgroup%s", p->variant.n,
                 100 * (1 - p->full_boxes / p->boxes), p->variant.groups, p->variant.groups > 1 ? "s" : " x 2");
}

static nbhd_status build(struct nbhd_plan *plan)
{
    const struct nbhd_problem *problem = &plan->problem;
    struct nbhd_sm90_plan plans[MOST_PLANS];
    int count = plans_here(problem, plans, MOST_PLANS);
    if (plan->config.variant >= count)
        return nbhd_fail(NBHD_ERROR_INVALID, "configuration %d of fwd_sm90: there are %d", plan->config.variant, count);
    struct state *state = plan->state = calloc(1, sizeof *state);
    if (!state)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a plan's state could not be allocated");
    const struct nbhd_sm90_plan *p = &state->plan;
    state->plan = plans[plan->config.variant];
    nbhd_sm90_boxes(&state->boxes, problem, p);
    state->dtype = problem->desc.dtype;
    state->slices = problem->desc.batch;
    for (int a = 0; a < 3; a++)
        state->slices *= problem->axis[a].dilation;
    state->maps = p->sliced ? nbhd_min(state->slices, MOST_MAPS) : p->shapes;
    for (int power = 1; power <= MOST_MAPS; power *= 2) /* few numbers: few kernels to compile */
        if (power >= state->maps) {
            state->maps = power;
            break;
        }
    const int *tiles = state->boxes.tiles;
    state->grid = (struct nbhd_cuda_grid){
        .blocks = {(unsigned)(tiles[0] * tiles[1] * tiles[2]), (unsigned)(problem->desc.heads / p->pack), 1},
        .threads = {128 * ((unsigned)p->variant.groups + 1), 1, 1},
        .shared = (unsigned)nbhd_sm90_shared(problem, p)};
    describe(plan, p);
    plan->picky = true;
    struct nbhd_options options = {.used = 0};
    add_options(&options, problem, state);
    nbhd_status status = nbhd_cuda_acquire(&state->module, "fwd_sm90.cu", &options, problem->flags);
    return status ? status : nbhd_cuda_function(&state->function, state->module, "nbhd_fwd_sm90");
}

/* ---- run ---- */

/* The copy engine takes addresses and strides in units of 16 bytes. */
static nbhd_status check_view(const char *name, const struct nbhd_view *view)
{
    if ((size_t)view->data % 16)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "%s.data=%p: fwd_sm90 needs it aligned to 16 bytes", name,
                         (void *)view->data);
    const long long strides[] = {view->batch, view->axis[0], view->axis[1], view->axis[2], view->head};
    for (size_t i = 0; i < sizeof strides / sizeof *strides; i++)
        if (strides[i] % 16 || strides[i] < 0)
            return nbhd_fail(NBHD_ERROR_UNSUPPORTED,
                             "%s.stride[%zu] is %lld bytes: fwd_sm90 needs multiples of 16, not negative", name, i,
                             strides[i]);
    return NBHD_OK;
}

/* A dimension of one element may have any stride: it is never used. */
static void set_dimension(struct nbhd_cuda_box *box, int i, int size, long long stride, int extent, int step)
{
    box->size[i] = (uint64_t)size;
    box->stride[i] = size > 1 ? (uint64_t)stride : 16;
    box->box[i] = (uint32_t)(extent * step);
    box->step[i] = (uint32_t)step;
}

/* Map of a box of `extent` tokens x `heads_in_box` heads x 64 columns, for one slice or for all of them. */
static nbhd_status token_map(struct nbhd_tensor_map *map, const struct nbhd_params *p, const struct state *state,
                             const struct nbhd_view *view, int dim, int heads, int heads_in_box, const int *extent,
                             int keys, int slice)
{
    struct nbhd_cuda_box box = {.dtype = state->dtype, .rank = 5, .data = view->data, .swizzle = 128};
    box.size[0] = (uint64_t)dim;
    box.box[0] = 64;
    box.step[0] = 1;
    set_dimension(&box, 1, heads, view->head, heads_in_box, 1);
    for (int a = 2; a >= 0; a--) {
        struct nbhd_axis axis = p->axis[a];
        int size = keys ? axis.keys : axis.length;
        if (!state->plan.sliced) {
            set_dimension(&box, 4 - a, size, view->axis[a], extent[a], axis.dilation);
            continue;
        }
        int group = slice % axis.dilation;
        slice /= axis.dilation;
        box.data = (char *)box.data + group * view->axis[a];
        set_dimension(&box, 4 - a, axis.dilation > 1 ? nbhd_group_size(axis, group) : size,
                      view->axis[a] * axis.dilation, extent[a], 1);
    }
    if (state->plan.sliced)
        box.data = (char *)box.data + slice * view->batch;
    else if (p->batch > 1) /* then axis 0 has length 1, and gives the batch its place */
        set_dimension(&box, 4, p->batch, view->batch, 1, 1);
    return nbhd_cuda_tensor_map(map, &box);
}

static nbhd_status extra_map(struct nbhd_tensor_map *map, const struct nbhd_params *p, const struct state *state,
                             const struct nbhd_view *view, int dim)
{
    struct nbhd_cuda_box box = {.dtype = state->dtype, .rank = 5, .data = view->data, .swizzle = 128};
    box.size[0] = (uint64_t)dim;
    box.box[0] = 64;
    box.step[0] = 1;
    set_dimension(&box, 1, p->kv_heads, view->head, 1, 1);
    set_dimension(&box, 2, p->extra, view->axis[2], state->plan.variant.n, 1);
    set_dimension(&box, 3, p->batch, view->batch, 1, 1);
    set_dimension(&box, 4, 1, 16, 1, 1);
    return nbhd_cuda_tensor_map(map, &box);
}

/* maps: struct maps of fwd_sm90.cu: q[maps], k[maps], v[maps], extra k, extra v. */
static nbhd_status make_maps(struct nbhd_tensor_map *maps, const struct state *state, const struct nbhd_params *p,
                             int first_slice, int slices)
{
    const struct nbhd_sm90_plan *plan = &state->plan;
    struct nbhd_tensor_map *k = maps + state->maps, *v = k + state->maps, *extra = v + state->maps;
    nbhd_status status = NBHD_OK;
    for (int i = 0; i < slices && !status; i++) {
        int slice = first_slice + i;
        status = token_map(maps + i, p, state, &p->q, p->head_dim, p->heads, plan->pack, plan->q_box, 0, slice);
        for (int s = 0; s < plan->shapes && !status; s++) {
            int at = i * plan->shapes + s;
            status = token_map(k + at, p, state, &p->k, p->head_dim, p->kv_heads, 1, plan->k_box[s], 1, slice);
            if (!status)
                status = token_map(v + at, p, state, &p->v, p->head_dim_v, p->kv_heads, 1, plan->k_box[s], 1, slice);
        }
    }
    if (p->extra && !status)
        status = extra_map(extra, p, state, &p->extra_k, p->head_dim);
    if (p->extra && !status)
        status = extra_map(extra + 1, p, state, &p->extra_v, p->head_dim_v);
    return status;
}

static nbhd_status check_views(const struct nbhd_params *p)
{
    nbhd_status status = check_view("q", &p->q);
    if (!status)
        status = check_view("k", &p->k);
    if (!status)
        status = check_view("v", &p->v);
    if (!status)
        status = check_view("o", &p->o);
    if (!status && p->extra)
        status = check_view("extra_k", &p->extra_k);
    if (!status && p->extra)
        status = check_view("extra_v", &p->extra_v);
    return status;
}

static nbhd_status run(const struct nbhd_plan *plan, const struct nbhd_params *params, void *workspace, void *stream)
{
    const struct state *state = plan->state;
    (void)workspace;
    nbhd_status status = check_views(params);
    struct nbhd_tensor_map maps[3 * MOST_MAPS + 2];
    struct nbhd_boxes boxes = state->boxes;
    struct nbhd_cuda_grid grid = state->grid;
    int most = state->plan.sliced ? state->maps : 65535; /* slices of one launch */
    for (int first = 0; first < state->slices && !status; first += most) {
        int slices = nbhd_min(most, state->slices - first);
        boxes.slice_begin = first;
        grid.blocks[2] = (unsigned)slices;
        if (state->plan.sliced || first == 0)
            status = make_maps(maps, state, params, first, state->plan.sliced ? slices : 1);
        if (!status)
            status = nbhd_cuda_launch(state->module, state->function, &grid, stream,
                                      (void *[]){(void *)params, &boxes, maps});
    }
    return status;
}

static void drop(struct nbhd_plan *plan)
{
    struct state *state = plan->state;
    if (state)
        nbhd_cuda_release(state->module);
    free(state);
}

const struct nbhd_kernel_ops nbhd_cuda_fwd_sm90 = {refuse, configs, build, run, drop};
