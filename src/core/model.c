/* The model of time. A worker takes one tile at a time; a tile that it visits costs its products, its softmax, its mask
 * if it needs one, and a fixed price; the tile itself costs a fixed price; the L2 bounds the whole from below. Products
 * and softmax add up: kernels overlap them in part, and the two rates are those that are left; where the products are
 * much the longer, their own ceiling decides. */
#include <math.h>
#include <string.h>
#include "core/model.h"

static const struct {
    const char *name;
    nbhd_sim_device device;
} known[] = {
    /* Hopper, 16-bit, burst clocks. L2 and memory were measured alone, the peak is the tensor cores' own at 1.9 GHz;
     * the rest is `nbhd sim --fit` of bench/results/h200-forward-sm90.csv, and, for head_dim 128 only, of
     * h200-forward-sm80.csv and h200-backward-prototype.csv. */
    {"h200", {sizeof(nbhd_sim_device), 132, 1808, 4.343, 26.89, 0.4307, 2.601, 4, 9.5, 4.0, 2, 1027}},
    {"h200-sm80", {sizeof(nbhd_sim_device), 132, 431, 4.733, 5.696, 0.02646, 5.836, 4, 9.5, 4.0, 2, 0}},
    {"h200-bwd", {sizeof(nbhd_sim_device), 132, 842.3, 4.536, 3.096, 0.05976, 6.702, 4, 9.5, 4.0, 2, 0}},
};

const nbhd_sim_device *nbhd_model_device(const char *name)
{
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name))
            return &known[i].device;
    return NULL;
}

void nbhd_model_names(char names[NBHD_TEXT])
{
    names[0] = '\0';
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        strcat(strcat(names, i ? ", " : ""), known[i].name);
}

void nbhd_model_prices(const nbhd_sim_device *d, double price[NBHD_PRICES])
{
    const double prices[NBHD_PRICES] = {1 / d->matrix, 1 / d->softmax, 1 / d->mask, d->step, d->tile};
    memcpy(price, prices, sizeof prices);
}

/* Workers run dry one by one: whole rounds of mean tiles, and never less than the longest tile. */
bool nbhd_model_amounts(const nbhd_sim_device *device, const struct nbhd_model_call *call, double amount[NBHD_PRICES],
                        double *bound)
{
    const double resident = call->resident > 1 ? call->resident : 1;
    const double rounds = ceil(call->tiles / (device->processors * resident));
    const bool one = rounds * call->visited <= call->longest;
    const double visited = one ? call->longest : rounds * call->visited;
    /* A worker's rate is its share of the device's; its residents take turns, so a round of theirs is as long as they
     * are many, but for the fixed prices. */
    const double pairs = visited * call->pairs * resident * device->processors * 1e-6;
    const double matrix = pairs * call->flops;
    const bool bounded = device->peak > 0 && matrix / device->peak > matrix / device->matrix + pairs / device->softmax;
    amount[NBHD_PRICE_MATRIX] = bounded ? 0 : matrix;
    amount[NBHD_PRICE_SOFTMAX] = bounded ? 0 : pairs;
    amount[NBHD_PRICE_MASK] = pairs * call->masked * call->mask;
    amount[NBHD_PRICE_STEP] = visited;
    amount[NBHD_PRICE_TILE] = (one ? 1 : rounds) * call->tile;
    *bound = bounded ? matrix / device->peak : 0;
    return bounded;
}

double nbhd_model_us(const nbhd_sim_device *device, const struct nbhd_model_call *call)
{
    double amount[NBHD_PRICES], price[NBHD_PRICES], us;
    nbhd_model_amounts(device, call, amount, &us);
    nbhd_model_prices(device, price);
    for (int i = 0; i < NBHD_PRICES; i++)
        us += amount[i] * price[i];
    return fmax(us, call->tiles * call->visited * call->bytes / device->l2 * 1e-6);
}
