/* The tensors of a case: elements of every dtype, shapes by pass, layouts, ragged batches, random and poisoned
 * values. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "case_run.h"

/* ---- random numbers: splitmix64, so that a seed means the same everywhere ---- */

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static int pick(uint64_t *state, int low, int high)
{
    return low + (int)(next_random(state) % (uint64_t)(high - low + 1));
}

static double normal(uint64_t *state)
{
    const double u = ((double)(next_random(state) >> 11) + 1) * 0x1p-53;
    const double v = (double)(next_random(state) >> 11) * 0x1p-53;
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

/* ---- elements ---- */

size_t case_size_of(int dtype) { return dtype == NBHD_F64 ? 8 : dtype == NBHD_F32 ? 4 : 2; }

void case_put(char *to, int dtype, double value)
{
    if (dtype == NBHD_F64) {
        memcpy(to, &value, 8);
        return;
    }
    const float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, 4);
    uint16_t half = (uint16_t)(bits >> 16); /* bf16: value was rounded already */
    if (dtype == NBHD_F16) {
        int exponent;
        const double fraction = frexp(fabs(value), &exponent);
        half = (uint16_t)(bits >> 16 & 0x8000);
        if (isnan(value))
            half = 0x7e00;
        else if (isinf(value))
            half |= 0x7c00;
        else if (value != 0 && exponent < -13)
            half |= (uint16_t)(fabs(value) * 0x1p24);
        else if (value != 0)
            half |= (uint16_t)((exponent + 14) << 10 | ((int)(fraction * 2048) & 0x3ff));
    }
    memcpy(to, dtype == NBHD_F32 ? (const void *)&single : (const void *)&half, case_size_of(dtype));
}

double case_get(const char *from, int dtype)
{
    double value;
    float single;
    uint16_t half;
    if (dtype == NBHD_F64)
        return memcpy(&value, from, 8), value;
    if (dtype == NBHD_F32)
        return memcpy(&single, from, 4), (double)single;
    memcpy(&half, from, 2);
    if (dtype == NBHD_BF16) {
        const uint32_t bits = (uint32_t)half << 16;
        return memcpy(&single, &bits, 4), (double)single;
    }
    const int exponent = half >> 10 & 31, fraction = half & 0x3ff;
    value = exponent == 31 ? (fraction ? NAN : INFINITY)
                           : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return half & 0x8000 ? -value : value;
}

enum oracle_precision case_precision(int dtype)
{
    static const enum oracle_precision of[] = {
        [NBHD_F64] = ORACLE_EXACT, [NBHD_F32] = ORACLE_F32, [NBHD_F16] = ORACLE_F16, [NBHD_BF16] = ORACLE_BF16};
    return of[dtype];
}

/* desc is legal here (it was planned); the tensors are laid out from its defaults. */
static void fill_defaults(nbhd_desc *desc)
{
    nbhd_desc d = *desc;
    d.batch = d.batch ? d.batch : 1;
    d.heads = d.heads ? d.heads : 1;
    d.kv_heads = d.kv_heads ? d.kv_heads : d.heads;
    d.head_dim_v = d.head_dim_v ? d.head_dim_v : d.head_dim;
    d.scale = d.scale != 0 ? d.scale : (float)(1 / sqrt(d.head_dim));
    for (int i = 0; i < d.rank; i++) {
        d.stride[i] = d.stride[i] ? d.stride[i] : 1;
        d.dilation[i] = d.dilation[i] ? d.dilation[i] : 1;
        d.kv_length[i] = d.kv_length[i] ? d.kv_length[i] : d.length[i];
        if (!d.window[i])
            d.window[i] = d.kv_length[i] != d.length[i] ? d.kv_length[i] : d.length[i] / d.dilation[i];
    }
    *desc = d;
}

/* Where in the buffer the element of a contiguous index lies. */
long long case_place(const struct tensor *t, long long index)
{
    long long offset = t->offset;
    for (int i = 5; i >= 0; i--) {
        const long long at = index % t->shape[i];
        offset += (i == 3 && t->tokens ? t->tokens->slot[at] : at) * t->stride[i];
        index /= t->shape[i];
    }
    return offset;
}

static void lay_out(struct run *r, struct tensor *t)
{
    const int grain = r->options->granularity > 0 ? r->options->granularity : 1;
    const bool gaps = r->options->layout == CASE_STRIDED && t->arg != &r->args.bias && t->arg != &r->args.dbias;
    long long step = 1;
    for (int i = 5; i >= 0; i--) {
        const bool unused = gaps && t->shape[i] == 1 && i < 5 && !t->tokens; /* then any stride is right */
        t->stride[i] = unused ? -1 - pick(&r->random, 0, 9) : step;
        step *= t->shape[i];
        if (gaps && i > 0)
            step = (step + grain - 1) / grain * grain + grain * (long long)pick(&r->random, 0, 2);
    }
    t->offset = gaps ? grain * (long long)pick(&r->random, 0, 3) : 0;
    t->elements = t->offset + 1;
    for (int i = 0; i < 6; i++)
        t->elements += ((i == 3 && t->tokens ? t->tokens->slots : t->shape[i]) - 1) * t->stride[i];
}

/* ---- a ragged batch ---- */

/* The problem of one sequence; of a batch that is not ragged there is one, the whole. */
nbhd_desc case_desc(const struct run *r, int sequence)
{
    const struct case_options *o = r->options;
    nbhd_desc d = r->given;
    for (int i = 0; o->sequences && i < d.rank; i++) {
        d.batch = 1;
        d.length[i] = o->lengths[sequence * d.rank + i];
        d.kv_length[i] = o->kv_lengths ? o->kv_lengths[sequence * d.rank + i] : 0;
    }
    fill_defaults(&d);
    return d;
}

bool case_place_sequences(struct run *r, struct place *p, bool keys)
{
    const int n = r->options->sequences, rank = r->given.rank;
    const enum case_sequences placement = r->options->placement;
    p->first = calloc((size_t)n + 1, sizeof *p->first);
    p->offset = calloc((size_t)n, sizeof *p->offset);
    for (int i = 0; i < 3; i++)
        p->largest[i] = 1;
    for (int s = 0; p->first && s < n; s++) {
        const nbhd_desc d = case_desc(r, s);
        long long tokens = 1;
        for (int i = 0; i < rank; i++) {
            const int length = keys ? d.kv_length[i] : d.length[i], at = 3 - rank + i;
            tokens *= length;
            p->largest[at] = length > p->largest[at] ? length : p->largest[at];
        }
        p->first[s + 1] = p->first[s] + tokens;
    }
    p->count = p->first ? p->first[n] : 0;
    p->slot = calloc((size_t)p->count + 1, sizeof *p->slot);
    if (!p->first || !p->offset || !p->slot)
        return false;
    const long long volume = (long long)p->largest[0] * p->largest[1] * p->largest[2];
    for (int i = 0; i < n; i++) {
        const int s = placement == CASE_OFFSETS ? n - 1 - i : i;
        const nbhd_desc d = case_desc(r, s);
        p->offset[s] = placement == CASE_PADDED ? s * volume : p->slots + (placement == CASE_OFFSETS ? 1 + i % 3 : 0);
        for (long long t = 0; t < p->first[s + 1] - p->first[s]; t++) {
            long long rest = t, at = 0, step = 1;
            for (int a = rank - 1; a >= 0; a--) {
                const int length = keys ? d.kv_length[a] : d.length[a];
                at += rest % length * step;
                rest /= length;
                step *= placement == CASE_PADDED ? p->largest[3 - rank + a] : length;
            }
            p->slot[p->first[s] + t] = p->offset[s] + at;
            p->slots = p->offset[s] + at + 1 > p->slots ? p->offset[s] + at + 1 : p->slots;
        }
    }
    if (placement == CASE_PADDED)
        p->slots = n * volume;
    return true;
}

void case_release_place(struct place *p)
{
    free(p->first);
    free(p->offset);
    free(p->slot);
}

bool case_of_extra(int which) { return which == EXTRA_K || which == EXTRA_V || which == DEXTRA_K || which == DEXTRA_V; }

static bool describe(struct run *r, int which, const char *name, nbhd_tensor *arg, const int shape[6], int dtype,
                     bool output)
{
    struct tensor *t = &r->tensors[which];
    t->name = name;
    t->arg = arg;
    t->dtype = dtype;
    t->output = output;
    t->owner = true;
    t->count = 1;
    for (int i = 0; i < 6; i++)
        t->count *= t->shape[i] = shape[i];
    if (r->options->sequences && !case_of_extra(which) && which != BIAS && which != DBIAS)
        t->tokens = which == K || which == V || which == DK || which == DV ? &r->keys : &r->tokens;
    lay_out(r, t);
    t->exact = calloc((size_t)t->count, sizeof(double));
    t->plain = output ? calloc((size_t)t->count, sizeof(double)) : NULL;
    return t->exact && (!output || t->plain);
}

/* q, k and v as views of one projection [batch, tokens, heads + 2 kv_heads, dim], where their token grids agree. */
void case_pack(struct run *r)
{
    const nbhd_desc *d = &r->desc;
    struct tensor *q = &r->tensors[Q], *k = &r->tensors[K], *v = &r->tensors[V];
    if (!q->name || !k->name || !v->name || memcmp(q->shape, k->shape, 4 * sizeof(int)) ||
        d->head_dim != d->head_dim_v || (q->tokens && r->options->kv_lengths))
        return;
    const long long keys = (long long)d->heads * d->head_dim, values = keys + (long long)d->kv_heads * d->head_dim;
    const long long width = values + (long long)d->kv_heads * d->head_dim;
    struct tensor *all[] = {q, k, v};
    const long long offsets[] = {0, keys, values};
    for (int i = 0; i < 3; i++) {
        long long step = width;
        for (int j = 3; j >= 0; j--) {
            all[i]->stride[j] = step;
            step *= all[i]->shape[j];
        }
        all[i]->offset = offsets[i];
        all[i]->elements = q->tokens ? width * q->tokens->slots : step;
        all[i]->owner = i == 0;
    }
}

static void fill_random(struct run *r, struct tensor *t, double spread)
{
    for (long long i = 0; i < t->count; i++)
        t->exact[i] = oracle_round(case_precision(t->dtype), normal(&r->random) * spread);
}

/* The tensors of an unfused pass. */
static bool describe_unfused(struct run *r, const int q[6], const int k[6], const int v[6], const int o[6],
                             const int bias[6], const int scores[6])
{
    const nbhd_desc *d = &r->desc;
    nbhd_args *a = &r->args;
    const int type = d->dtype;
    switch (d->pass) {
    case NBHD_QK:
        return describe(r, Q, "q", &a->q, q, type, false) && describe(r, K, "k", &a->k, k, type, false) &&
               (!d->bias || describe(r, BIAS, "bias", &a->bias, bias, NBHD_F32, false)) &&
               describe(r, SCORES, "scores", &a->scores, scores, type, true);
    case NBHD_AV:
        return describe(r, V, "v", &a->v, v, type, false) &&
               describe(r, SCORES, "scores", &a->scores, scores, type, false) &&
               describe(r, O, "o", &a->o, o, type, true);
    case NBHD_QK_BACKWARD:
        return describe(r, Q, "q", &a->q, q, type, false) && describe(r, K, "k", &a->k, k, type, false) &&
               describe(r, DSCORES, "dscores", &a->dscores, scores, type, false) &&
               describe(r, DQ, "dq", &a->dq, q, type, true) && describe(r, DK, "dk", &a->dk, k, type, true) &&
               (!d->bias || describe(r, DBIAS, "dbias", &a->dbias, bias, NBHD_F32, true));
    default:
        return describe(r, V, "v", &a->v, v, type, false) &&
               describe(r, SCORES, "scores", &a->scores, scores, type, false) &&
               describe(r, DOUT, "dout", &a->dout, o, type, false) &&
               describe(r, DSCORES, "dscores", &a->dscores, scores, type, true) &&
               describe(r, DV, "dv", &a->dv, v, type, true);
    }
}

bool case_describe(struct run *r)
{
    const nbhd_desc *d = &r->desc;
    const int sequences = r->options->sequences, extras = sequences ? sequences : d->batch;
    int q[6] = {d->batch, 1, 1, 1, d->heads, d->head_dim}, k[6] = {d->batch, 1, 1, 1, d->kv_heads, d->head_dim};
    int v[6] = {d->batch, 1, 1, 1, d->kv_heads, d->head_dim_v}, o[6] = {d->batch, 1, 1, 1, d->heads, d->head_dim_v};
    int lse[6] = {d->batch, 1, 1, 1, d->heads, 1}, bias[6] = {1, d->heads, 1, 1, 1, 1};
    int scores[6] = {d->batch, 1, 1, 1, d->heads, 1};
    const int ek[6] = {extras, 1, 1, d->extra, d->kv_heads, d->head_dim};
    const int ev[6] = {extras, 1, 1, d->extra, d->kv_heads, d->head_dim_v};
    for (int i = 0; i < d->rank; i++) {
        const int at = 4 - d->rank + i;
        q[at] = o[at] = lse[at] = scores[at] = d->length[i];
        scores[5] *= d->window[i];
        k[at] = v[at] = d->kv_length[i];
        bias[at + 1] = 2 * d->window[i] - 1;
    }
    for (int i = 1; sequences && i < 4; i++) {
        q[i] = o[i] = lse[i] = scores[i] = i == 3 ? (int)r->tokens.count : 1;
        k[i] = v[i] = i == 3 ? (int)r->keys.count : 1;
    }
    if (d->pass > NBHD_BACKWARD)
        return describe_unfused(r, q, k, v, o, bias, scores);
    nbhd_args *a = &r->args;
    const bool backward = d->pass == NBHD_BACKWARD;
    bool ok = describe(r, Q, "q", &a->q, q, d->dtype, false) && describe(r, K, "k", &a->k, k, d->dtype, false) &&
              describe(r, V, "v", &a->v, v, d->dtype, false) && describe(r, O, "o", &a->o, o, d->dtype, !backward) &&
              describe(r, LSE, "lse", &a->lse, lse, NBHD_F32, !backward);
    if (d->extra)
        ok = ok && describe(r, EXTRA_K, "extra_k", &a->extra_k, ek, d->dtype, false) &&
             describe(r, EXTRA_V, "extra_v", &a->extra_v, ev, d->dtype, false);
    if (d->bias)
        ok = ok && describe(r, BIAS, "bias", &a->bias, bias, NBHD_F32, false);
    if (!backward)
        return ok;
    ok = ok && describe(r, DOUT, "dout", &a->dout, o, d->dtype, false) &&
         describe(r, DQ, "dq", &a->dq, q, d->dtype, true) && describe(r, DK, "dk", &a->dk, k, d->dtype, true) &&
         describe(r, DV, "dv", &a->dv, v, d->dtype, true);
    if (r->options->dlse)
        ok = ok && describe(r, DLSE, "dlse", &a->dlse, lse, NBHD_F32, false);
    if (d->extra)
        ok = ok && describe(r, DEXTRA_K, "dextra_k", &a->dextra_k, ek, d->dtype, true) &&
             describe(r, DEXTRA_V, "dextra_v", &a->dextra_v, ev, d->dtype, true);
    if (d->bias)
        ok = ok && describe(r, DBIAS, "dbias", &a->dbias, bias, NBHD_F32, true);
    return ok;
}

/* Of an element of a tensor [batch, axes, heads, width]. */
static void coordinates_of(const struct tensor *t, long long index, int x[3])
{
    index /= (long long)t->shape[4] * t->shape[5];
    for (int i = 2; i >= 0; i--) {
        x[i] = (int)(index % t->shape[1 + i]);
        index /= t->shape[1 + i];
    }
}

static void poison_row(struct run *r, struct tensor *t)
{
    const int width = t->shape[5];
    const long long row = (long long)(next_random(&r->random) % (uint64_t)(t->count / width));
    for (int i = 0; i < width; i++)
        t->exact[row * width + i] = NAN;
    coordinates_of(t, row * width, r->poisoned);
}

bool case_is_near_poison(const struct run *r, const struct tensor *t, long long index)
{
    int x[3];
    coordinates_of(t, index, x);
    for (int i = 0; i < 3; i++)
        if (abs(x[i] - r->poisoned[i]) > r->options->poison_reach)
            return false;
    return r->options->poison_reach > 0;
}

void case_fill(struct run *r)
{
    static const int inputs[] = {Q, K, V, EXTRA_K, EXTRA_V, BIAS, DOUT, DLSE, SCORES, DSCORES};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        if (r->tensors[inputs[i]].name && !r->tensors[inputs[i]].output)
            fill_random(r, &r->tensors[inputs[i]], inputs[i] == Q && r->options->large_values ? 100 : 1);
    if (!r->options->poison_key)
        return;
    struct tensor *k = &r->tensors[K], *v = &r->tensors[V];
    if (r->desc.pass > NBHD_BACKWARD) { /* any row of an input: who does not see it must not notice */
        static const int rows[] = {Q, K, V, DOUT};
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
            if (r->tensors[rows[i]].name)
                poison_row(r, &r->tensors[rows[i]]);
        return;
    }
    const uint64_t same_row = r->random;
    poison_row(r, k);
    r->random = same_row;
    poison_row(r, v);
}
