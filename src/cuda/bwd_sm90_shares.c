/* How tiles of bwd_sm90 share what comes beside their products; see bwd_sm90_shares.h. */
#include "cuda/bwd_sm90_shares.h"
#include <limits.h>
#include <math.h>
#include "core/tiles.h"
#include "cuda/cuda.h"

enum {
    MOST_PARTS = 4,   /* of a tile's queries */
    FIXED_COUNTS = 2, /* the next tile's number, tiles that have converted */
    LEAST_WORK = 12   /* queries visited, of each that is cleared and converted beside */
};

/* Shares out the queries of the last wave's tiles (device/split_sm90.cuh) if the wave is less than half full and that
 * saves 0.4 % of the time: a part costs four steps more. Their sums must have room where the first head's dQ was, which
 * tiles before theirs must have converted. */
static void split_last_wave(struct nbhd_bwd_sm90_shares *shares, const struct nbhd_problem *problem,
                            const struct nbhd_sm90_bwd_plan *plan, double queries, int multiprocessors)
{
    const nbhd_desc *d = &problem->desc;
    const double tiles = plan->tiles * d->kv_heads * d->batch, waves = tiles / multiprocessors;
    const double steps = plan->boxes / plan->tiles * d->heads / d->kv_heads; /* of a tile */
    const int last = (int)fmod(tiles, multiprocessors), parts = last ? nbhd_min(multiprocessors / last, MOST_PARTS) : 1;
    if (parts < 2 || tiles - last < (shares->lag + 1) * plan->tiles ||
        steps - steps / parts - 4 < 0.004 * waves * steps ||
        last * (double)NBHD_BWD_SM90_ROWS * (d->head_dim + d->head_dim_v) > queries * d->head_dim)
        return;
    shares->last = last;
    shares->parts = parts;
    shares->whole = (int)tiles - last;
    for (int a = 0, most = 0; a < 3; a++) { /* of the axis on which a tile has the most boxes */
        const struct nbhd_axis axis = problem->axis[a];
        const int k = plan->k_box[a], q = plan->q_box[0][a], middle = axis.keys / k / 2 * k;
        const struct nbhd_tile t = nbhd_tile_at_inverse(axis, axis.length, nbhd_min(middle, axis.keys - 1), k, q,
                                                        NBHD_TILING_DYNAMIC);
        const int boxes = (t.any.end - t.any.begin + q - 1) / q;
        if (boxes > most) {
            most = boxes;
            shares->part_axis = a;
            shares->part_queries = (boxes + parts - 1) / parts * q;
        }
    }
}

/* Lets tiles clear and convert sums beside their products (device/tend_sm90.cuh), `lag` units ahead and behind: so far
 * that they need not wait. Launches of their own do it where units are not heads, as there is dilation; where extra
 * keys add to dQ, too; where tiles are too short to hide it; and up to head_dim 64, whose steps it made slower. */
static void set_lag(struct nbhd_bwd_sm90_shares *shares, const struct nbhd_problem *problem,
                    const struct nbhd_sm90_bwd_plan *plan)
{
    const nbhd_desc *d = &problem->desc;
    const int share = d->heads / d->kv_heads, shared = nbhd_sm90_bwd_shared(problem, plan);
    const double units = d->kv_heads * (double)d->batch;
    struct nbhd_cuda_machine machine;
    double queries = 1;
    bool dilated = false;
    for (int a = 0; a < 3; a++) {
        queries *= problem->axis[a].length;
        dilated |= problem->axis[a].dilation > 1;
    }
    if (!plan->adds_dq || dilated || d->extra || d->head_dim <= 64 || plan->tiles < share ||
        plan->boxes * plan->n < LEAST_WORK * queries || plan->tiles * units > INT_MAX || nbhd_cuda_machine(&machine))
        return;
    const double lag = 1 + ceil(machine.multiprocessors / plan->tiles);
    if (lag >= units || shared + NBHD_BWD_SM90_TENDING(d->head_dim) > machine.shared_max)
        return;
    shares->lag = (int)lag;
    shares->part = (int)ceil(queries / floor(plan->tiles / share));
    if (!plan->sliced)
        split_last_wave(shares, problem, plan, queries, machine.multiprocessors);
}

struct nbhd_bwd_sm90_shares nbhd_bwd_sm90_share(const struct nbhd_problem *problem,
                                                const struct nbhd_sm90_bwd_plan *plan)
{
    const nbhd_desc *d = &problem->desc;
    struct nbhd_bwd_sm90_shares shares = {.lag = 0};
    set_lag(&shares, problem, plan);
    if (shares.lag)
        shares.count = (unsigned)(FIXED_COUNTS + shares.last + 2.0 * d->kv_heads * d->batch);
    return shares;
}

void nbhd_bwd_sm90_tell_shares(struct nbhd_bwd_boxes *boxes, const struct nbhd_bwd_sm90_shares *shares,
                               unsigned *counts)
{
    boxes->next = counts;
    boxes->converted = counts + 1;
    boxes->joined = counts + FIXED_COUNTS;
    boxes->counts = boxes->joined + shares->last;
    boxes->lag = shares->lag;
    boxes->part = shares->part;
    boxes->whole = shares->parts > 1 ? (unsigned)shares->whole : UINT_MAX;
    boxes->last = (unsigned)shares->last;
    boxes->parts = shares->parts;
    boxes->part_axis = shares->part_axis;
    boxes->part_queries = shares->part_queries;
}
