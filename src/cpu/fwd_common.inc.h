/* What both forward algorithms share: queries in, outputs and logsumexp out, a lane each. Included by fwd.inc.h. */

static inline void pack_queries(float *qt, int width, const char *const *rows, int dtype, int lanes, int vectors, int d,
                                bool negate)
{
    for (int v = 0; v < vectors; v++)
        pack_vector(qt + v * VF, width, rows + v * VF, dtype, nbhd_min(lanes - v * VF, VF), d, negate);
}

/* rows[lane][c] = ot[c][lane] / sum[lane] for c < columns. */
static inline void unpack_outputs(const float *ot, int width, char *const *rows, int dtype, int lanes, int vectors,
                           int columns, const float *sum)
{
    for (int v = 0; v < vectors; v++) {
        vf factor = v_div(v_set1(1.0f), v_load(sum + v * VF));
        for (int c = 0; c < columns; c += VF) {
            int n = nbhd_min(columns - c, VF);
            vf x[VF];
#pragma GCC unroll 16
            for (int j = 0; j < VF; j++)
                x[j] = j < n ? v_mul(factor, v_load(ot + (c + j) * width + v * VF)) : v_zero();
            v_transpose(x);
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++)
                if (v * VF + l < lanes)
                    v_store_as(rows[v * VF + l], dtype, c, x[l], n);
        }
    }
}

/* *out[lane] = ln(2^maximum * sum), natural. */
static void store_lse(char *const *out, int lanes, int vectors, const float *maximum, const float *sum)
{
    for (int v = 0; v < vectors; v++) {
        float lse[VF];
        v_store(lse, v_mul(v_set1(LN2), v_add(v_load(maximum + v * VF), v_log2(v_load(sum + v * VF)))));
        for (int l = 0; l < VF && v * VF + l < lanes; l++)
            *(float *)out[v * VF + l] = lse[l];
    }
}
