/* Sums of products by tiles, over the vocabulary of amx.h. Registers: 0 .. 3 sums, 2 x 2 tiles of 16 rows and 16 columns
 * of floats; 4, 5 the left factors; 6, 7 the right ones: four loads for four products. Included by the rows on tiles,
 * forward and backward. */

enum {
    TILE_ROWS = 16,
    TILE = TILE_ROWS * VP, /* bfloat16 values of a factor */
    TILE_STEP = 64         /* bytes between its rows, where it is packed */
};

static int padded(int n) { return (n + VP - 1) / VP * VP; }

/* The sums: 32 rows from x on, `step` bytes apart, of 32 columns. */
V_FN void sums_zero(void)
{
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
}

V_FN void sums_load(const float *x, int step)
{
    const float *below = x + TILE_ROWS * step / 4;
    TILE_LOAD(0, x, step);
    TILE_LOAD(1, x + VF, step);
    TILE_LOAD(2, below, step);
    TILE_LOAD(3, below + VF, step);
}

V_FN void sums_store(float *x, int step)
{
    float *below = x + TILE_ROWS * step / 4;
    TILE_STORE(0, x, step);
    TILE_STORE(1, x + VF, step);
    TILE_STORE(2, below, step);
    TILE_STORE(3, below + VF, step);
}

/* 32 rows from `left` on, `step` bytes apart, and two packed tiles. */
V_FN void factors_load(const uint16_t *left, int step, const uint16_t *first, const uint16_t *second)
{
    TILE_LOAD(4, left, step);
    TILE_LOAD(6, first, TILE_STEP);
    TILE_LOAD(7, second, TILE_STEP);
    TILE_LOAD(5, left + TILE_ROWS * step / 2, step);
}

/* Their products, of the upper and of the lower 16 rows: work on vectors goes between. */
V_FN void sums_add_upper(void)
{
    TILE_DOT(0, 4, 6);
    TILE_DOT(1, 4, 7);
}

V_FN void sums_add_lower(void)
{
    TILE_DOT(2, 5, 6);
    TILE_DOT(3, 5, 7);
}

V_FN void sums_add(const uint16_t *left, int step, const uint16_t *first, const uint16_t *second)
{
    factors_load(left, step, first, second);
    sums_add_upper();
    sums_add_lower();
}
