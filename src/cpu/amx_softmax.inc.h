/* The softmax beside tiles: a unit of 32 queries and 32 keys at a time, a query's keys in a row of two vectors, so that
 * probabilities, rounded, are a row of a left-hand tile as they are. Sums stay one a lane until the tile ends. */

enum {
    GROUP = VP,        /* keys of a unit */
    UNIT_ROWS = 32,    /* queries of a unit */
    UNIT = UNIT_ROWS * GROUP,
    SUMS = FWD_LANES * VF /* partial sums of a tile's queries */
};

NBHD_STATIC_ASSERT(GROUP == 2 * VF, "a query's keys are two vectors");

struct row_softmax {
    const float *s; /* [UNIT_ROWS][GROUP] */
    uint16_t *p;    /* the same; of the same rows and keys before these, a UNIT each, from `first` on */
    uint16_t *first;
    float *reference, *from, *to; /* [UNIT_ROWS]; their sums before and after, [UNIT_ROWS][VF] */
    const uint32_t *seen;         /* [UNIT_ROWS], a bit a key; NULL: all see all */
    int next;                     /* row */
    vf factor, top;
};

/* Two rows side by side, with their references as they are: softmax_exceeds tells afterwards whether they will do. */
V_FN void softmax_rows(struct row_softmax *x, const bool masked)
{
    const int row = x->next;
    vf e[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        e[i] = v_fms(v_load(x->s + row * GROUP + i * VF), x->factor, v_set1(x->reference[row + i / 2]));
    v_pair_exp2_lookup(e, 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4 && masked; i++)
        e[i] = v_select(x->seen[row + i / 2] >> i % 2 * VF, e[i], v_zero());
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const vf sum = v_add(e[2 * i], e[2 * i + 1]);
        float *to = x->to + (row + i) * VF;
        x->top = v_max(sum, x->top);
        v_store(to, v_add(v_load(x->from + (row + i) * VF), sum));
        v_pair_store((uint32_t *)(void *)(x->p + (row + i) * GROUP), v_pair_round(e[2 * i], e[2 * i + 1]));
    }
    x->next += 2;
}

V_FN void softmax_begin(struct row_softmax *x)
{
    x->next = 0;
    x->top = v_zero();
}

static __attribute__((noinline)) void softmax_rest(struct row_softmax *x)
{
    while (x->next < UNIT_ROWS && x->seen)
        softmax_rows(x, true);
    while (x->next < UNIT_ROWS)
        softmax_rows(x, false);
}

/* Some score exceeds its row's reference by so much that the sum of two probabilities is more than 2^PAIR_SLACK. */
V_FN bool softmax_exceeds(const struct row_softmax *x)
{
    return v_less(v_set1((float)(1 << (int)PAIR_SLACK)), x->top) != 0;
}

/* top[row]: the largest of the scores that it sees, in powers of two. */
static void row_maxima(const struct row_softmax *x, float top[UNIT_ROWS])
{
    for (int row = 0; row < UNIT_ROWS; row += VF) {
        vf m[VF];
        for (int i = 0; i < VF; i++) {
            const float *s = x->s + (row + i) * GROUP;
            const uint32_t seen = x->seen ? x->seen[row + i] : ~0u;
            const vf low = v_select(seen & V_ALL, v_mul(v_load(s), x->factor), v_set1(-INFINITY));
            const vf high = v_select(seen >> VF, v_mul(v_load(s + VF), x->factor), v_set1(-INFINITY));
            m[i] = v_max(low, v_max(high, v_set1(-INFINITY)));
        }
        v_transpose(m);
        for (int i = 1; i < VF; i++)
            m[0] = v_max(m[i], m[0]);
        v_store(top + row, v_max(m[0], v_set1(-INFINITY)));
    }
}

/* The reference of a row becomes `step` more. Its sums are multiplied by 2^-step, its row of O (`columns`) too, and its
 * probabilities that are not in O yet: powers of two, so without an error. */
static void raise_reference(struct row_softmax *x, int row, float step, float *o, int columns)
{
    const vf alpha = v_set1(exp2f(-step));
    x->reference[row] += step;
    v_store(x->from + row * VF, v_mul(alpha, v_load(x->from + row * VF)));
    for (int c = 0; c < columns; c += VF)
        v_store(o + row * columns + c, v_mul(alpha, v_load(o + row * columns + c)));
    for (uint16_t *p = x->first + row * GROUP; p < x->p; p += UNIT)
        for (int i = 0; i < GROUP; i += VF)
            v_store_bf16(p + i, v_mul(alpha, v_load_bf16(p + i, VF)), VF);
}

/* Moves the references of a unit's rows where a score exceeds them; hardly ever but for a row's first keys. */
static void move_references(struct row_softmax *x, float *o, int columns)
{
    float top[UNIT_ROWS];
    row_maxima(x, top);
    for (int row = 0; row < UNIT_ROWS; row++) {
        const float old = x->reference[row];
        if (!(top[row] > old + (PAIR_SLACK - 1.0f)))
            continue;
        if (old == -FLT_MAX) /* it has seen no key yet */
            x->reference[row] = top[row];
        else
            raise_reference(x, row, ceilf(top[row] - old), o, columns);
    }
}

/* seen[lane]: which of the group's keys, from `first` on, the lane sees; NULL where all see all. Keys come in runs that
 * the same lanes see. */
static const uint32_t *group_seen(const struct key_block *b, int first, uint64_t everyone, bool unlike,
                                  uint32_t seen[FWD_LANES])
{
    const int n = nbhd_min(GROUP, b->count - first);
    const uint64_t *const bits = b->bits + first;
    bool all = n == GROUP;
    for (int i = 0; i < n && unlike; i++)
        all &= bits[i] == everyone;
    if (all)
        return NULL;
    vi lanes[FWD_LANES / VF] = {v_pair_zero(), v_pair_zero(), v_pair_zero(), v_pair_zero()};
    for (int i = 0, end; i < n; i = end) {
        const uint64_t these = unlike ? bits[i] : everyone;
        for (end = unlike ? i + 1 : n; end < n && bits[end] == these; end++)
            ;
        const vi run = v_iset1((int)(uint32_t)((1ull << end) - (1ull << i)));
#pragma GCC unroll 4
        for (int v = 0; v < FWD_LANES / VF; v++)
            lanes[v] = v_pair_or(lanes[v], run, (unsigned)(these >> v * VF) & V_ALL);
    }
    for (int v = 0; v < FWD_LANES / VF; v++)
        v_pair_store(seen + v * VF, lanes[v]);
    return seen;
}

/* Scores of a unit whose rows are the tile's lanes from `lane` on: s = factor s + log2(e) bias, for the group's keys
 * from `first` on. */
static void unit_bias(const struct key_block *b, int first, const struct tile *t, int lane, float factor, float *s)
{
    for (int i = 0; i < UNIT_ROWS; i += VF)
        for (int j = 0; j < GROUP; j += VF) {
            vf bias[VF];
            const vi index = v_iload(t->bias + lane + i);
            for (int k = 0; k < VF; k++) {
                const int key = first + j + k;
                const bool any = key < b->count && lane + i < t->lanes && b->bias[key];
                const unsigned bits = any ? (unsigned)(b->bits[key] >> (lane + i)) & V_ALL : 0;
                bias[k] = bits ? v_gather(b->bias[key], index, bits) : v_zero();
            }
            v_transpose(bias);
            for (int k = 0; k < VF; k++) {
                float *at = s + (i + k) * GROUP + j;
                v_store(at, v_fma(v_load(at), v_set1(factor), v_mul(bias[k], v_set1(LOG2E))));
            }
        }
}
