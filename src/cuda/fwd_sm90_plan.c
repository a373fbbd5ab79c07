/* What a plan of fwd_sm90 costs, for the search for boxes (sm90_plan.c): shared memory, registers, time; and who
 * computes which of its tiles. */
#include <math.h>
#include "core/model.h"
#include "cuda/sm90_axis.h"
#include "cuda/sm90_plan.h"

/* ---- what fits ---- */

static int variants_of(const nbhd_desc *d, struct nbhd_sm90_variant list[NBHD_SM90_VARIANTS])
{
    static const int sizes[] = {64, 80, 96, 112, 128, 144, 160, 176, 192};
    static const int kinds[][2] = {{1, 2}, {2, 1}, {3, 1}, {1, 3}}; /* warpgroups, CTAs; of equals the first is taken */
    int count = 0;
    (void)d;
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            list[count++] = (struct nbhd_sm90_variant){kinds[kind][0], sizes[i], kinds[kind][1], 2, 2};
    return count;
}

int nbhd_sm90_shared(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *plan)
{
    const struct nbhd_sm90_variant *v = &plan->variant;
    int qk = ceil_div(problem->desc.head_dim, 64), pv = ceil_div(problem->desc.head_dim_v, 64), rows = 64 * v->groups;
    int windows = plan->q_box[0] + plan->q_box[1] + plan->q_box[2];
    return 128 * (plan->q_stages * qk * rows + v->stages * (qk + pv) * v->n) +
           NBHD_FWD_SM90_TABLES(v->groups, v->stages, plan->slots, windows, plan->mask_steps) +
           (plan->many ? NBHD_SM90_TABLES_MANY(plan->slots) : 0) +
           (plan->shapes > 1 ? plan->slots : 1) * plan->mask_steps * v->n * 32;
}

/* Registers that S, P and O of a consumer thread may take, by its mask's steps: what compiles without spills. */
static int register_room(const struct nbhd_sm90_plan *p)
{
    static const struct {
        int groups, ctas, room[3];
    } kinds[] = {{2, 1, {188, 188, 172}}, {3, 1, {120, 100, 92}}, {1, 2, {176, 176, 160}}, {1, 3, {92, 80, 0}}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (kinds[i].groups == p->variant.groups && kinds[i].ctas == p->variant.ctas)
            return kinds[i].room[p->mask_steps];
    return 0;
}

static int has_registers(const nbhd_desc *d, const struct nbhd_sm90_plan *p)
{
    const int n = p->variant.n, tight = p->variant.ctas == 3 && n > 64; /* there a mask takes more than its columns */
    if (p->variant.groups == 1 && d->head_dim_v > 192) /* ptxas does not take so wide a product among 128 registers */
        return 0;
    /* What spills: columns, and bits for extra keys; boxes of 80 keys; two steps of columns with 248 columns of V. */
    if (d->head_dim_v > 192 && p->mask_steps && (p->mask_bits || n > 64 || (p->mask_steps > 1 && d->head_dim_v > 240)))
        return 0;
    return (!tight || n == 80) && n * 3 / 4 + (d->head_dim_v + 1) / 2 + 8 * tight * p->mask_steps <= register_room(p);
}

/* ---- time ---- */

/* Prices of the simulator's model (core/model.h), in its units, and five more: of a line of 128 bytes that a
 * multiprocessor loads, two clocks; of the mask of another shape of key box, by its steps and keys; of a score, by how
 * few registers are left, and of two warpgroups by how much of their work is softmax, as these overlap less. Fitted
 * together to bench/results/h200-forward-plans.csv: docs/notes/hopper-forward.md. */
static const nbhd_sim_device prices = {.size = sizeof prices,
                                       .processors = 132,
                                       .matrix = 1995,
                                       .softmax = 5.95,
                                       .mask = 9.25,
                                       .step = 0.347,
                                       .tile = 1.48,
                                       .launch = 23.1};
static const double line_us = 0.000935, shape_us = 0.00901, full_us = 0.00224, softmax_us = 0.0661;
/* Of the loads' time, however well it is hidden: they take power, which sets the clock of all that is longer than a
 * burst. */
static const double power = 0.16;

/* Lines that the rows of so many elements touch, in the mean: what their bytes fill, and for each chunk of 64 elements
 * the share of heads that begin inside of a line. Rows that are no multiple of 32 bytes are copied at half the rate,
 * whole chunks of them (device/boxes_sm90.cuh: flat). */
static double lines_of(int dim)
{
    const int chunks = ceil_div(dim, 64);
    const double at_begin = nbhd_min(dim & -dim, 64) / 64.0;
    return dim % 16 ? 1.875 * chunks : dim / 64.0 + chunks * (1 - at_begin);
}

/* What the mask of a box costs, in steps. Few boxes of two steps need both; bits are dear, but few boxes of a problem
 * with one axis need them; three warpgroups have no registers to overlap it with. */
static double mask_of(const struct nbhd_sm90_plan *p)
{
    static const double steps[] = {2, 1, 1.25};
    return steps[p->mask_steps] * (p->variant.groups == 3 ? 2 : 1);
}

static double plan_ms(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *p, int multiprocessors)
{
    const nbhd_desc *d = &problem->desc;
    const struct nbhd_sm90_variant *v = &p->variant;
    const double extra = ceil_div(d->extra, v->n), dims = (d->head_dim + 15) / 16 * 16 + d->head_dim_v;
    nbhd_sim_device device = prices;
    device.processors = multiprocessors;
    const struct nbhd_model_call call = {
        .tiles = p->tiles * nbhd_sm90_slices(problem, p),
        .visited = p->boxes / p->tiles + extra,
        .longest = p->longest + extra,
        .masked = (p->boxes - p->full_boxes) / (p->boxes + extra * p->tiles),
        .pairs = 64.0 * v->groups * v->n,
        .flops = 2 * dims,
        .mask = mask_of(p),
        .tile = 1,
        .resident = v->ctas,
    };
    double amount[NBHD_PRICES], price[NBHD_PRICES], us = device.launch;
    nbhd_model_amounts(&device, &call, amount, &(double){0});
    nbhd_model_prices(&device, price);
    for (int i = 0; i < NBHD_PRICES; i++)
        us += amount[i] * price[i];
    const int full = v->groups == 2 || v->ctas == 2 ? nbhd_max(0, v->n * 3 / 4 + d->head_dim_v / 2 - 160) : 0;
    const double softmax = v->groups == 2 ? fmax(0, 1 - dims / 256) : 0;
    us += amount[NBHD_PRICE_SOFTMAX] * (full * full_us + softmax * softmax_us);
    if (p->shapes > 1 && p->slots == 2) /* with tables of more tiles it is ready before it is needed */
        us += amount[NBHD_PRICE_TILE] * p->mask_steps * v->n * shape_us;
    const double load =
        amount[NBHD_PRICE_STEP] * v->ctas * v->n * (lines_of(d->head_dim) + lines_of(d->head_dim_v)) * line_us;
    /* The longer of both, and a little more where they are alike. */
    return (cbrt(us * us * us + load * load * load) + power * load) * 1e-3;
}

const struct nbhd_sm90_kernel nbhd_sm90_forward = {.variants = variants_of,
                                                   .shared = nbhd_sm90_shared,
                                                   .has_registers = has_registers,
                                                   .ms = plan_ms,
                                                   .takes_many = 1};

/* ---- who computes which tile ---- */

/* Keys of an axis that `tiles` neighbouring tiles see. */
static double keys_seen(const struct nbhd_axis axis, int extent, int tiles)
{
    return fmin((double)axis.keys / axis.dilation, (double)tiles * extent + axis.window);
}

/* The tiles that run at once should see few keys, which then stay in the L2: as near to a cube as the walk allows. */
int nbhd_sm90_strip(const struct nbhd_problem *problem, const struct nbhd_boxes *boxes, int resident)
{
    const int *tiles = boxes->tiles, column = nbhd_min(resident, tiles[0]), rest = ceil_div(resident, column);
    double least = INFINITY;
    int best = 1;
    for (int strip = 1; strip <= nbhd_min(tiles[1], rest); strip *= 2) {
        const int wide = nbhd_min(ceil_div(rest, strip), tiles[2]), high = strip * ceil_div(rest, strip * wide);
        const double keys = keys_seen(problem->axis[1], boxes->q_box[1], high) *
                            keys_seen(problem->axis[2], boxes->q_box[2], wide);
        if (keys < 0.97 * least) {
            least = keys;
            best = strip;
        }
    }
    return best;
}

static int is_uneven(const struct nbhd_sm90_plan *p) { return p->longest * p->tiles > 1.15 * p->boxes; }

/* CTAs that take several tiles drift apart where tiles differ in length. They then keep more keys in the L2, which
 * costs more than their starts if it does not even hold one head's. */
int nbhd_sm90_most_tiles(const struct nbhd_problem *problem, const struct nbhd_sm90_plan *p, int l2_bytes)
{
    double bytes = 2.0 * (problem->desc.head_dim + problem->desc.head_dim_v);
    for (int a = 0; a < 3; a++)
        bytes *= problem->axis[a].keys;
    return is_uneven(p) && bytes > 0.75 * l2_bytes ? 2 : NBHD_SM90_MOST;
}

int nbhd_sm90_share(struct nbhd_boxes *boxes, const struct nbhd_sm90_plan *plan, int most_tiles, int work, int resident)
{
    int left = work, blocks = 0;
    boxes->resident = resident;
    for (int kind = 0; kind < NBHD_SM90_RUNS - 1; kind++) {
        const int most = NBHD_SM90_MOST >> kind;
        const int rest = is_uneven(plan) ? most : 2; /* what later rounds need to even out */
        boxes->rounds[kind] = most > most_tiles ? 0 : nbhd_max(0, (left / resident - rest) / most);
        blocks += boxes->rounds[kind] * resident;
        left -= boxes->rounds[kind] * resident * most;
    }
    boxes->rounds[NBHD_SM90_RUNS - 1] = ceil_div(left, resident);
    return blocks + left;
}
