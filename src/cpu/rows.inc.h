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

/* As unpack_row, but where a row of bf16 has two more whole vectors, the elements at even places of both come first: a
 * load, a shift and a mask instead of a permute for each vector. What is made of such rows goes back by store_mixed. */
static inline void unpack_mixed(float *to, const char *row, int dtype, int n)
{
    int i = 0;
    for (; dtype == NBHD_BF16 && i + 2 * VF <= n; i += 2 * VF) {
        const vf pairs = v_load((const float *)(const void *)(row + i * 2));
        v_store(to + i, v_even_bf16(pairs));
        v_store(to + i + VF, v_odd_bf16(pairs));
    }
    for (; i < n; i += VF)
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

/* Two vectors' worth of dimensions of bf16 transposed as pairs: half as many permutes. */
V_FN void pack_pairs(float *qt, int width, const char *const rows[VF], int lanes, int i, vf sign)
{
    vf x[VF];
#pragma GCC unroll 16
    for (int l = 0; l < VF; l++)
        x[l] = l < lanes ? v_load((const float *)(const void *)(rows[l] + i * 2)) : v_zero();
    v_transpose(x);
#pragma GCC unroll 16
    for (int j = 0; j < VF; j++) {
        v_store(qt + (i + 2 * j) * width, v_mul(v_even_bf16(x[j]), sign));
        v_store(qt + (i + 2 * j + 1) * width, v_mul(v_odd_bf16(x[j]), sign));
    }
}

/* qt[i][lane] = rows[lane][i], negated if asked, for i < d and one vector of lanes; lanes from `lanes` on are 0.
 * Row i starts at qt + i * width; rows are of the dtype. */
static inline void pack_vector(float *qt, int width, const char *const rows[VF], int dtype, int lanes, int d,
                               bool negate)
{
    const vf sign = v_set1(negate ? -1.0f : 1.0f);
    int i = 0;
    for (; dtype == NBHD_BF16 && i + 2 * VF <= d; i += 2 * VF)
        if (lanes == VF)
            pack_pairs(qt, width, rows, VF, i, sign);
        else
            pack_pairs(qt, width, rows, lanes, i, sign);
    for (; i < d; i += VF) {
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
