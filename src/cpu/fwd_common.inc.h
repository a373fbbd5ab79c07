/* What both forward algorithms share: queries in, outputs and logsumexp out, a lane each. Included by fwd.inc.h. */

/* qt[i][lane] = rows[lane][i], negated if asked, for i < d; row i starts at qt + i * width. Lanes past `lanes` are 0. */
static void pack_queries(float *qt, int width, const char *const *rows, int lanes, int vectors, int d, bool negate)
{
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < d; i += VF) {
            int n = nbhd_min(d - i, VF);
            vf x[VF];
#pragma GCC unroll 16
            for (int l = 0; l < VF; l++) {
                x[l] = v_zero();
                if (v * VF + l < lanes)
                    x[l] = v_load_part((const float *)rows[v * VF + l] + i, n);
            }
            v_transpose(x);
#pragma GCC unroll 16
            for (int j = 0; j < VF; j++)
                if (j < n)
                    v_store(qt + (i + j) * width + v * VF, negate ? v_sub(v_zero(), x[j]) : x[j]);
        }
}

/* rows[lane][c] = ot[c][lane] / sum[lane] for c < columns. */
static void unpack_outputs(const float *ot, int width, char *const *rows, int lanes, int vectors, int columns,
                           const float *sum)
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
                    v_store_part((float *)rows[v * VF + l] + c, x[l], n);
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
