/* The model of time: what a call that works in tiles takes on a device, from what it visits and the device's prices.
 * One for the simulator, which counts a tiling, and for planners, which rank by it. docs/simulator.md derives it. */
#ifndef NBHD_CORE_MODEL_H
#define NBHD_CORE_MODEL_H

#include <stdbool.h>
#include "nbhd_sim.h"

/* A call: tiles that stay (a query tile forward), and the tiles that each of them visits. */
struct nbhd_model_call {
    double tiles;    /* that stay, over batch and heads */
    double visited;  /* by one of them, in the mean */
    double longest;  /* by the one that visits most */
    double masked;   /* share of the visited that need a mask */
    double pairs;    /* scores of a visited tile, as computed: padding included */
    double flops;    /* of a pair, multiply-adds counted two */
    double mask;     /* how many times the device's price a mask costs */
    double bytes;    /* loaded for a visited tile */
    double tile;     /* how many times the device's price a tile costs */
    int resident;    /* tiles that a worker computes at once, which hide each other's fixed prices */
};

enum nbhd_price {
    NBHD_PRICE_MATRIX, NBHD_PRICE_SOFTMAX, NBHD_PRICE_MASK, NBHD_PRICE_STEP, NBHD_PRICE_TILE,
    NBHD_PRICES
};

/* us that a unit of each price costs. */
void nbhd_model_prices(const nbhd_sim_device *device, double price[NBHD_PRICES]);
/* The call's units, whose sum of products with the prices is its time in us; true if its products alone take longer
 * than products and softmax together by their prices. Those units are then 0, and *bound are the us that they take. */
bool nbhd_model_amounts(const nbhd_sim_device *device, const struct nbhd_model_call *call, double amount[NBHD_PRICES],
                        double *bound);
/* us of the call, without its launch: never less than its loads from the L2 take. */
double nbhd_model_us(const nbhd_sim_device *device, const struct nbhd_model_call *call);

/* Prices of a known device; NULL if there is none of that name. names: the list of those there are, ", " in between. */
const nbhd_sim_device *nbhd_model_device(const char *name);
void nbhd_model_names(char names[NBHD_TEXT]);

#endif
