/* Rows of tensors and vectors: what every vector kernel needs of them. */

/* As v_load_part and v_store_part, for 1 <= n <= VF where n is mostly VF: masked stores are slow on some machines. */
V_FN vf load_up_to(const float *p, int n) { return n == VF ? v_load(p) : v_load_part(p, n); }

V_FN void store_up_to(float *p, vf x, int n)
{
    if (n == VF)
        v_store(p, x);
    else
        v_store_part(p, x, n);
}

/* n <= VF elements of a row of the dtype, from element i on. */
V_FN vf v_load_as(const char *row, int dtype, int i, int n)
{
    if (dtype == NBHD_F32)
        return load_up_to((const float *)(const void *)row + i, n);
    const uint16_t *half = (const uint16_t *)(const void *)row + i;
    return dtype == NBHD_F16 ? v_load_f16(half, n) : v_load_bf16(half, n);
}

V_FN void v_store_as(char *row, int dtype, int i, vf x, int n)
{
    if (dtype == NBHD_F32)
        store_up_to((float *)(void *)row + i, x, n);
    else if (dtype == NBHD_F16)
        v_store_f16((uint16_t *)(void *)row + i, x, n);
    else
        v_store_bf16((uint16_t *)(void *)row + i, x, n);
}

/* A row as float32, padded with zeros to whole vectors. */
static inline void unpack_row(float *to, const char *row, int dtype, int n)
{
    for (int i = 0; i < n; i += VF)
        v_store(to + i, v_load_as(row, dtype, i, nbhd_min(VF, n - i)));
}

/* No NaN and no infinity in row: 0 times them is not 0. */
static inline bool row_is_finite(const float *row, int n)
{
    vf x = v_zero();
    for (int i = 0; i < n; i += VF)
        x = v_fma(v_load_part(row + i, nbhd_min(n - i, VF)), v_zero(), x);
    return v_is_nan(x) == 0;
}

/* qt[i][lane] = rows[lane][i], negated if asked, for i < d and one vector of lanes; lanes from `lanes` on are 0.
 * Row i starts at qt + i * width; rows are of the dtype. */
static inline void pack_vector(float *qt, int width, const char *const rows[VF], int dtype, int lanes, int d,
                               bool negate)
{
    const vf sign = v_set1(negate ? -1.0f : 1.0f);
    for (int i = 0; i < d; i += VF) {
        vf x[VF];
        if (d - i >= VF && lanes == VF && dtype == NBHD_F32) {
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++)
                x[l] = v_load((const float *)rows[l] + i);
        } else {
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++)
                x[l] = l < lanes ? v_load_as(rows[l], dtype, i, nbhd_min(d - i, VF)) : v_zero();
        }
        v_transpose(x);
#pragma GCC unroll 16
        for (int j = 0; j < VF; j++)
            if (j < d - i)
                v_store(qt + (i + j) * width, v_mul(x[j], sign));
    }
}
