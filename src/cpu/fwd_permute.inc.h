/* Forward for small windows. A tile is up to FWD_ROWS neighbouring query rows (along axis 1) of VF queries each (along
 * axis 2): a vector per row, or half a vector where so few are left. Here: what a tile is, its scores, which
 * permute.inc.h makes from lines that fwd_lines.inc.h keeps, and their softmax; fwd_tile.inc.h does the rest. The
 * second product needs no lanes of queries: with the head's dimensions in the lanes, V is read and O written as they
 * lie (of bf16 even and odd ones apart):
 *
 *     O[r][lane][dims] += P[j][r][lane] * V[key of lane, j][dims]
 *
 * Only visible pairs are ever computed there, so what lies outside a window may be NaN. */

/* Where up to FWD_ROWS query rows of one head begin: token 0 of axis 2. */
struct row_set {
    int rows;
    const char *q[FWD_ROWS];
    char *o[FWD_ROWS], *lse[FWD_ROWS];
};

/* A task's view of the problem. */
struct permute_task {
    const struct nbhd_params *p;
    const struct nbhd_fwd *f;
    int batch, kv_first, kv_head; /* kv_first: of the task's group */
    struct nbhd_cell cell[2];
    struct nbhd_range keys; /* key positions of axis 2 */
    int blocks;
    struct lane_block *block;
    int *token; /* [keys]: token of a key position */
    bool near;  /* the tokens of axis 2 are neighbours: */
    struct nbhd_range near_q, near_k;
    /* Keys. */
    long long *tag; /* [group][ring 0][ring 1]: which elements of axis 0 and 1 a slot's line is of */
    float *lines, *values;
    long long v_lane_step; /* bytes from key to key: of lane_block.key in packed values, else of .token */
    long long v_step;      /* bytes from column to column */
    const char *extra_v;
    long long extra_v_step, extra_v_head;
    /* The tile being computed. */
    const float *bias; /* table of the head */
    float *keys_row; /* extra keys of a run, unpacked from 16 bits */
    struct key_run *runs;
    int run_count;
    float *qt, *s, *o, *maximum, *sum, *alpha;
    struct look_ahead *ahead;
};

/* ---- scores ---- */

/* The vectors that hold rows [begin, end). */
static struct nbhd_range vectors_of(const struct lane_block *b, int begin, int end)
{
    return nbhd_range_of(begin >> b->shared, (end + b->shared) >> b->shared);
}

/* Bits of the lanes of vector v whose rows see the run. */
static unsigned lanes_of(const struct lane_block *b, const struct key_run *run, int v)
{
    const int row = VF >> b->shared;
    const unsigned begin = (unsigned)nbhd_max(run->begin * row - v * VF, 0);
    const unsigned end = (unsigned)nbhd_min(run->end * row - v * VF, VF);
    return V_ALL >> (VF - end) & V_ALL << begin;
}

static void window_scores(const struct permute_task *t, const struct lane_block *b, const struct key_run *run)
{
    const struct nbhd_range v = vectors_of(b, run->begin, run->end);
    look_up_product(b, t->qt + v.begin * VF, run->line, t->f->line_step, t->p->head_dim,
                    t->s + run->entry * ROW_WIDTH + v.begin * VF, v.end - v.begin, run->columns, t->f->columns);
}

/* Row i of the extra keys of a run as float32. */
static const float *extra_row(const struct permute_task *t, const char *row, int i)
{
    const int d = t->p->head_dim;
    if (t->f->dtype == NBHD_F32)
        return (const float *)row;
    float *to = t->keys_row + i * ((d + VF - 1) / VF * VF);
    unpack_row(to, row, t->f->dtype, d);
    return to;
}

static void extra_scores(const struct permute_task *t, const struct key_run *run)
{
    const float *k[FWD_BLOCK];
    for (int i = 0; i < run->columns; i++)
        k[i] = extra_row(t, run->k + i * t->p->extra_k.axis[2], i);
    for (int v = 0; v < FWD_ROWS; v += V_STRIP)
        qk_panel(t->qt + v * VF, t->p->head_dim, k, run->columns, t->s + run->entry * ROW_WIDTH + v * VF, ROW_WIDTH,
                 V_STRIP, PANEL_FLOATS, v == 0, NULL);
}

/* Bits of the lanes whose windows have a column j. */
static unsigned lanes_with(const struct lane_block *b, int j)
{
    unsigned bits = 0;
    for (int l = 0; l < VF; l++)
        bits |= (unsigned)(j < b->count[l]) << l;
    return bits;
}

/* Scores of columns that a lane's window does not have, and of rows that do not see the run, become -inf. */
static void mask_run(const struct permute_task *t, const struct lane_block *b, const struct key_run *run)
{
    const struct nbhd_range vectors = vectors_of(b, run->begin, run->end);
    for (int v = vectors.begin; v < vectors.end; v++) {
        const unsigned rows = lanes_of(b, run, v);
        for (int j = 0; j < run->columns; j++) {
            const unsigned bits = b->ragged ? rows & lanes_with(b, j) : rows;
            float *s = t->s + (run->entry + j) * ROW_WIDTH + v * VF;
            if (bits != V_ALL)
                v_store(s, v_select(bits, v_load(s), v_set1(-INFINITY)));
        }
    }
}

/* s = factor * s + log2(e) * bias. */
static void bias_run(const struct permute_task *t, const struct lane_block *b, const struct key_run *run, float factor)
{
    const int table_row = 2 * t->p->axis[2].window - 1;
    const struct nbhd_range vectors = vectors_of(b, run->begin, run->end);
    for (int j = 0; j < run->columns; j++) {
        const unsigned with = lanes_with(b, j);
        for (int v = vectors.begin; v < vectors.end; v++) {
            float *s = t->s + (run->entry + j) * ROW_WIDTH + v * VF;
            vf bias = v_zero();
            if (run->line) {
                const float *table = t->bias + run->bias - (v << b->shared) * table_row + j;
                const unsigned bits = with & lanes_of(b, run, v);
                bias = b->even_bias && bits == V_ALL ? v_set1(table[b->bias[0]])
                                                     : v_gather(table, v_iload(b->bias), bits);
            }
            v_store(s, v_fma(v_load(s), v_set1(factor), v_mul(bias, v_set1(LOG2E))));
        }
    }
}

/* ---- softmax of the runs whose scores are held, one vector of queries ---- */

static void softmax_vector(const struct permute_task *t, const struct lane_block *b, const struct key_run *runs, int n,
                           int v, float factor)
{
    const int first = v << b->shared, end = (v + 1) << b->shared; /* rows of queries */
    vf old = v_load(t->maximum + v * VF), m = v_set1(-INFINITY), other = m;
    for (const struct key_run *run = runs; run < runs + n; run++) {
        const float *s = t->s + run->entry * ROW_WIDTH + v * VF;
        const int columns = run->begin < end && first < run->end ? run->columns : 0;
        int j = 0;
        for (; j + 1 < columns; j += 2) {
            m = v_max(v_load(s + j * ROW_WIDTH), m);
            other = v_max(v_load(s + (j + 1) * ROW_WIDTH), other);
        }
        if (j < columns)
            m = v_max(v_load(s + j * ROW_WIDTH), m);
    }
    m = v_max(v_mul(v_max(m, other), v_set1(factor)), old);
    vf alpha = v_exp2(v_sub(old, m)), sum = v_mul(alpha, v_load(t->sum + v * VF));
    for (const struct key_run *run = runs; run < runs + n; run++) {
        float *s = t->s + run->entry * ROW_WIDTH + v * VF;
        const int columns = run->begin < end && first < run->end ? run->columns : 0;
        for (int j = 0; j < columns; j++) {
            vf x = v_exp2(v_fms(v_load(s + j * ROW_WIDTH), v_set1(factor), m));
            sum = v_add(sum, x);
            v_store(s + j * ROW_WIDTH, x);
        }
    }
    v_store(t->maximum + v * VF, m);
    v_store(t->alpha + v * VF, alpha);
    v_store(t->sum + v * VF, sum);
}
