/* The model of time (core/model.h) on the simulator's counts, and its fit to measurements. */
#include <math.h>
#include <string.h>
#include "core/model.h"
#include "sim/sim.h"

nbhd_status nbhd_sim_device_get(nbhd_sim_device *device, const char *name)
{
    char names[NBHD_TEXT];
    const nbhd_sim_device *known = nbhd_model_device(name);
    if (known)
        return nbhd_return_sized(device, known, sizeof *known, "nbhd_sim_device");
    nbhd_model_names(names);
    return nbhd_fail(NBHD_ERROR_INVALID, "device is '%s'; there are %s", name, names);
}

nbhd_status nbhd_sim_device_check(nbhd_sim_device *to, const nbhd_sim_device *from)
{
    nbhd_status status = nbhd_copy_sized(to, sizeof *to, from, "nbhd_sim_device");
    if (status)
        return status;
    if (to->processors < 1)
        return nbhd_fail(NBHD_ERROR_INVALID, "device.processors is %d; it must be at least 1", to->processors);
    if (!(to->matrix > 0 && to->softmax > 0 && to->mask > 0 && to->l2 > 0 && to->memory > 0))
        return nbhd_fail(NBHD_ERROR_INVALID,
                         "device.matrix, softmax, mask, l2, memory are %g, %g, %g, %g, %g; rates must be more than 0",
                         to->matrix, to->softmax, to->mask, to->l2, to->memory);
    if (!(to->step >= 0 && to->tile >= 0 && to->launch >= 0 && to->peak >= 0))
        return nbhd_fail(NBHD_ERROR_INVALID, "device.step, tile, launch, peak are %g, %g, %g, %g; none may be negative",
                         to->step, to->tile, to->launch, to->peak);
    return NBHD_OK;
}

nbhd_status nbhd_sim_model_check(const nbhd_sim_device *device, const nbhd_desc *desc)
{
    const size_t size = nbhd_dtype_size(desc->dtype);
    if (device->element && (size_t)device->element != size)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "dtype is %s; these prices are of kernels with elements of %d bytes",
                         nbhd_dtype_name(desc->dtype), device->element);
    if (desc->pass > NBHD_BACKWARD)
        return nbhd_fail(NBHD_ERROR_UNSUPPORTED, "pass is %s; the model of time knows fwd and bwd",
                         nbhd_pass_name(desc->pass));
    return NBHD_OK;
}

/* Multiply-adds of one pair, counted two each. */
static double flops_of_pair(const nbhd_desc *d)
{
    const double qk = 2.0 * d->head_dim, av = 2.0 * d->head_dim_v;
    return d->pass == NBHD_BACKWARD ? 3 * qk + 2 * av : qk + av;
}

/* Loads are of all visited tiles, also of those that all warpgroups skip. */
static struct nbhd_model_call call_of(const struct nbhd_sim_case *c, const nbhd_sim_counts *counts)
{
    const nbhd_desc *d = &c->problem.desc;
    const double skip = counts->computed_mean / counts->visited_mean;
    const double inner = nbhd_sim_volume(d->pass == NBHD_BACKWARD ? c->q_tile : c->kv_tile);
    return (struct nbhd_model_call){
        .tiles = counts->tiles_outer * d->batch * d->heads,
        .visited = counts->visited_mean * skip,
        .longest = counts->visited_max * skip,
        .masked = counts->masked_fraction,
        .pairs = (c->q_rows ? c->q_rows : nbhd_sim_volume(c->q_tile)) *
                 (c->kv_rows ? c->kv_rows : nbhd_sim_volume(c->kv_tile)),
        .flops = flops_of_pair(d),
        .mask = c->mask_steps ? c->mask_steps : 1,
        .bytes = inner * (d->head_dim + d->head_dim_v) * (double)nbhd_dtype_size(d->dtype) / skip,
        .tile = 1,
        .resident = c->resident,
    };
}

/* Bytes of q, k, v, o, each once. */
static double tensor_bytes(const struct nbhd_sim_case *c)
{
    const nbhd_desc *d = &c->problem.desc;
    double queries = d->batch, keys = d->batch;
    for (int i = 0; i < 3; i++) {
        queries *= c->problem.axis[i].length;
        keys *= c->problem.axis[i].keys;
    }
    keys += (double)d->batch * d->extra;
    return (queries * d->heads + keys * d->kv_heads) * (d->head_dim + d->head_dim_v) *
           (double)nbhd_dtype_size(d->dtype);
}

/* us of what stands around the main launch. Permuted: q, k, v, o are copied. Backward: o and its gradient are read for
 * their products, and dQ is cleared, summed in float32 and converted, each by a launch of its own. */
static double around(const nbhd_sim_device *device, const struct nbhd_sim_case *c)
{
    double us = c->tiling == NBHD_SIM_PERMUTED ? 2e-6 * tensor_bytes(c) / device->memory : 0;
    if (c->problem.desc.pass != NBHD_BACKWARD)
        return us;
    const nbhd_desc *d = &c->problem.desc;
    const double size = (double)nbhd_dtype_size(d->dtype);
    double rows = (double)d->batch * d->heads;
    for (int i = 0; i < 3; i++)
        rows *= c->problem.axis[i].length;
    return us + rows * (2 * d->head_dim_v * size + d->head_dim * (8 + size)) / device->memory * 1e-6 +
           2 * device->launch;
}

double nbhd_sim_model_ms(const nbhd_sim_device *device, const struct nbhd_sim_case *c, const nbhd_sim_counts *counts)
{
    const struct nbhd_model_call call = call_of(c, counts);
    const double us = fmax(nbhd_model_us(device, &call), tensor_bytes(c) / device->memory * 1e-6);
    return (us + around(device, c) + device->launch) * 1e-3;
}

nbhd_status nbhd_sim_predict(const nbhd_sim_device *device, const nbhd_desc *desc, const nbhd_sim_tiles *tiles,
                             double *ms)
{
    nbhd_sim_device d;
    struct nbhd_sim_case c;
    nbhd_sim_counts counts;
    nbhd_status status = nbhd_sim_device_check(&d, device);
    if (status || (status = nbhd_sim_case_init(&c, desc, tiles)) || (status = nbhd_sim_case_count(&c, &counts)))
        return status;
    if ((status = nbhd_sim_model_check(&d, &c.problem.desc)))
        return status;
    *ms = nbhd_sim_model_ms(&d, &c, &counts);
    return NBHD_OK;
}

/* ---- fitting ---- */

#define HOLD 0.003      /* weight of staying near the given prices, against one squared relative error */
#define LEAST 0.05      /* a price may fall to this share of the given one, so that no rate becomes infinite */
#define MAX_SAMPLES 4096

struct normal { /* of the least squares over factors on the given prices */
    double matrix[NBHD_PRICES][NBHD_PRICES], right[NBHD_PRICES];
};

/* share: of the sample's time that the row is to explain. */
static void add_sample(struct normal *n, const double row[NBHD_PRICES], double share)
{
    for (int i = 0; i < NBHD_PRICES; i++) {
        n->right[i] += row[i] * share;
        for (int j = 0; j < NBHD_PRICES; j++)
            n->matrix[i][j] += row[i] * row[j];
    }
}

/* Coordinate descent: the problem is convex and small, and the bound on each factor costs nothing. */
static void solve(const struct normal *n, double factor[NBHD_PRICES])
{
    for (int i = 0; i < NBHD_PRICES; i++)
        factor[i] = 1;
    for (int sweep = 0; sweep < 20000; sweep++)
        for (int i = 0; i < NBHD_PRICES; i++) {
            double rest = n->right[i] + HOLD;
            for (int j = 0; j < NBHD_PRICES; j++)
                rest -= j == i ? 0 : n->matrix[i][j] * factor[j];
            factor[i] = fmax(rest / (n->matrix[i][i] + HOLD), LEAST);
        }
}

static nbhd_status fit_rows(const nbhd_sim_device *device, const nbhd_sim_sample *samples, int count, struct normal *n)
{
    double price[NBHD_PRICES];
    nbhd_model_prices(device, price);
    for (int s = 0; s < count; s++) {
        struct nbhd_sim_case c;
        nbhd_sim_counts counts;
        if (!samples[s].tiles.q_tile[0] || !samples[s].tiles.kv_tile[0])
            return nbhd_fail(NBHD_ERROR_INVALID, "sample %d has no tiles; a fit needs q_tile and kv_tile of each", s);
        nbhd_status status = nbhd_sim_case_init(&c, &samples[s].desc, &samples[s].tiles);
        if (status || (status = nbhd_sim_model_check(device, &c.problem.desc)) ||
            (status = nbhd_sim_case_count(&c, &counts)))
            return nbhd_fail(status, "sample %d: %s", s, nbhd_last_error());
        const struct nbhd_model_call call = call_of(&c, &counts);
        double row[NBHD_PRICES], bound;
        nbhd_model_amounts(device, &call, row, &bound);
        const double fixed = around(device, &c) + device->launch, us = samples[s].ms * 1e3 - fixed;
        if (!(us > 0) || !isfinite(us))
            return nbhd_fail(NBHD_ERROR_INVALID, "sample %d took %g ms; launches and copies alone take %g", s,
                             samples[s].ms, fixed * 1e-3);
        for (int i = 0; i < NBHD_PRICES; i++)
            row[i] *= price[i] / us;
        add_sample(n, row, 1 - bound / us);
    }
    return NBHD_OK;
}

static nbhd_status errors_of(const nbhd_sim_device *device, const nbhd_sim_sample *samples, int count,
                             double *error_median, double *error_max)
{
    double errors[MAX_SAMPLES];
    for (int s = 0; s < count; s++) {
        double ms;
        nbhd_status status = nbhd_sim_predict(device, &samples[s].desc, &samples[s].tiles, &ms);
        if (status)
            return nbhd_fail(status, "sample %d: %s", s, nbhd_last_error());
        const double error = fabs(ms / samples[s].ms - 1);
        int at = s; /* insertion sort */
        for (; at > 0 && errors[at - 1] > error; at--)
            errors[at] = errors[at - 1];
        errors[at] = error;
    }
    *error_median = count % 2 ? errors[count / 2] : (errors[count / 2 - 1] + errors[count / 2]) / 2;
    *error_max = errors[count - 1];
    return NBHD_OK;
}

nbhd_status nbhd_sim_fit(nbhd_sim_device *device, const nbhd_sim_sample *samples, int count, double *error_median,
                         double *error_max)
{
    nbhd_sim_device d;
    nbhd_status status = nbhd_sim_device_check(&d, device);
    if (status)
        return status;
    if (count < 1 || count > MAX_SAMPLES)
        return nbhd_fail(NBHD_ERROR_INVALID, "count is %d; a fit takes 1 to %d samples", count, MAX_SAMPLES);
    struct normal n;
    memset(&n, 0, sizeof n);
    if ((status = fit_rows(&d, samples, count, &n)))
        return status;
    double factor[NBHD_PRICES];
    solve(&n, factor);
    d.matrix /= factor[NBHD_PRICE_MATRIX];
    d.softmax /= factor[NBHD_PRICE_SOFTMAX];
    d.mask /= factor[NBHD_PRICE_MASK];
    d.step *= factor[NBHD_PRICE_STEP];
    d.tile *= factor[NBHD_PRICE_TILE];
    if ((status = errors_of(&d, samples, count, error_median, error_max)))
        return status;
    return nbhd_return_sized(device, &d, sizeof d, "nbhd_sim_device");
}
