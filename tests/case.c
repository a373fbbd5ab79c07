/* See case.h. A tensor here has a double original (for the oracle) and a buffer in the kernel's dtype and layout. */
#define _GNU_SOURCE
#include "case.h"
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "oracle.h"

/* ---- random numbers: splitmix64, so that a seed means the same everywhere ---- */

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static int pick(uint64_t *state, int low, int high) { return low + (int)(next_random(state) % (uint64_t)(high - low + 1)); }

static double normal(uint64_t *state)
{
    const double u = ((double)(next_random(state) >> 11) + 1) * 0x1p-53, v = (double)(next_random(state) >> 11) * 0x1p-53;
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

/* ---- host memory that ends at an inaccessible page ---- */

struct guard {
    size_t mapped;
    char *base;
};

static void *guarded_alloc(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + sizeof(struct guard) + page - 1) / page * page;
    char *base = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    mprotect(base + whole, page, PROT_NONE);
    char *user = base + whole - bytes;
    const struct guard guard = {whole + page, base};
    memcpy(base, &guard, sizeof guard); /* first in the mapping: user - base >= sizeof guard */
    return user;
}

static void guarded_release(void *user)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    struct guard guard;
    /* The header lies at the start of the mapping; walk down to the page that holds it. */
    uintptr_t at = (uintptr_t)user / page * page;
    for (;; at -= page) {
        memcpy(&guard, (void *)at, sizeof guard);
        if (guard.base == (char *)at)
            break;
    }
    munmap(guard.base, guard.mapped);
}

static bool host_copy(void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
    return true;
}

/* ---- tensors ---- */

struct tensor {
    const char *name;
    nbhd_tensor *arg; /* of the nbhd_args under construction */
    double *exact;    /* contiguous, what the oracle reads or writes */
    double *plain;    /* outputs: the plain computation's result */
    char *host;       /* the kernel's buffer, host side: dtype and layout */
    void *device;     /* what the kernel gets */
    int shape[6];     /* batch, axes (3), heads, width */
    long long stride[6], count, elements, offset; /* elements: extent of the buffer */
    const struct place *tokens; /* of a ragged batch, where each lies; else NULL */
    int dtype;
    bool output, owner; /* owner: host and device are this tensor's own */
};

enum { Q, K, V, EXTRA_K, EXTRA_V, BIAS, DOUT, DLSE, O, LSE, DQ, DK, DV, DEXTRA_K, DEXTRA_V, DBIAS, SCORES,
       DSCORES, TENSORS };

/* Tokens of a ragged batch: the oracle has them one sequence after the other, the kernel in slots. */
struct place {
    long long count, slots;
    long long *slot;           /* by token */
    long long *first, *offset; /* by sequence: first token, and first slot */
    int largest[3];            /* grid that holds each */
};

struct run {
    nbhd_desc desc;            /* with defaults filled in; of a ragged batch the first sequence's */
    nbhd_desc given;
    struct place tokens, keys; /* of a ragged batch */
    const struct case_options *options;
    struct case_memory memory;
    struct tensor tensors[TENSORS];
    nbhd_args args;
    uint64_t random;
    int poisoned[3]; /* where the poisoned key is */
};

static size_t size_of(int dtype) { return dtype == NBHD_F64 ? 8 : dtype == NBHD_F32 ? 4 : 2; }

static void put_element(char *to, int dtype, double value)
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
    memcpy(to, dtype == NBHD_F32 ? (const void *)&single : (const void *)&half, size_of(dtype));
}

static double get_element(const char *from, int dtype)
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

static enum oracle_precision precision_of(int dtype)
{
    return dtype == NBHD_F64 ? ORACLE_EXACT : dtype == NBHD_F32 ? ORACLE_F32 : dtype == NBHD_F16 ? ORACLE_F16 : ORACLE_BF16;
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
static long long place(const struct tensor *t, long long index)
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
        t->stride[i] = step;
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
static nbhd_desc desc_of(const struct run *r, int sequence)
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

static bool place_sequences(struct run *r, struct place *p, bool keys)
{
    const int n = r->options->sequences, rank = r->given.rank;
    const enum case_sequences placement = r->options->placement;
    p->first = calloc((size_t)n + 1, sizeof *p->first);
    p->offset = calloc((size_t)n, sizeof *p->offset);
    for (int i = 0; i < 3; i++)
        p->largest[i] = 1;
    for (int s = 0; p->first && s < n; s++) {
        const nbhd_desc d = desc_of(r, s);
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
        const nbhd_desc d = desc_of(r, s);
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

static void release_place(struct place *p)
{
    free(p->first);
    free(p->offset);
    free(p->slot);
}

static bool of_extra(int which) { return which == EXTRA_K || which == EXTRA_V || which == DEXTRA_K || which == DEXTRA_V; }

static bool describe(struct run *r, int which, const char *name, nbhd_tensor *arg, const int shape[6], int dtype, bool output)
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
    if (r->options->sequences && !of_extra(which) && which != BIAS && which != DBIAS)
        t->tokens = which == K || which == V || which == DK || which == DV ? &r->keys : &r->tokens;
    lay_out(r, t);
    t->exact = calloc((size_t)t->count, sizeof(double));
    t->plain = output ? calloc((size_t)t->count, sizeof(double)) : NULL;
    return t->exact && (!output || t->plain);
}

/* q, k and v as views of one projection [batch, tokens, heads + 2 kv_heads, dim], where their token grids agree. */
static void pack(struct run *r)
{
    const nbhd_desc *d = &r->desc;
    struct tensor *q = &r->tensors[Q], *k = &r->tensors[K], *v = &r->tensors[V];
    if (!q->name || !k->name || !v->name || memcmp(q->shape, k->shape, 4 * sizeof(int)) || d->head_dim != d->head_dim_v ||
        (q->tokens && r->options->kv_lengths))
        return;
    const long long width = (long long)(d->heads + 2 * d->kv_heads) * d->head_dim;
    struct tensor *all[] = {q, k, v};
    const long long offsets[] = {0, (long long)d->heads * d->head_dim, (long long)(d->heads + d->kv_heads) * d->head_dim};
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
        t->exact[i] = oracle_round(precision_of(t->dtype), normal(&r->random) * spread);
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
        return describe(r, V, "v", &a->v, v, type, false) && describe(r, SCORES, "scores", &a->scores, scores, type, false) &&
               describe(r, O, "o", &a->o, o, type, true);
    case NBHD_QK_BACKWARD:
        return describe(r, Q, "q", &a->q, q, type, false) && describe(r, K, "k", &a->k, k, type, false) &&
               describe(r, DSCORES, "dscores", &a->dscores, scores, type, false) &&
               describe(r, DQ, "dq", &a->dq, q, type, true) && describe(r, DK, "dk", &a->dk, k, type, true) &&
               (!d->bias || describe(r, DBIAS, "dbias", &a->dbias, bias, NBHD_F32, true));
    default:
        return describe(r, V, "v", &a->v, v, type, false) && describe(r, SCORES, "scores", &a->scores, scores, type, false) &&
               describe(r, DOUT, "dout", &a->dout, o, type, false) &&
               describe(r, DSCORES, "dscores", &a->dscores, scores, type, true) &&
               describe(r, DV, "dv", &a->dv, v, type, true);
    }
}

static bool describe_all(struct run *r)
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
    ok = ok && describe(r, DOUT, "dout", &a->dout, o, d->dtype, false) && describe(r, DQ, "dq", &a->dq, q, d->dtype, true) &&
         describe(r, DK, "dk", &a->dk, k, d->dtype, true) && describe(r, DV, "dv", &a->dv, v, d->dtype, true);
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

static bool is_near_poison(const struct run *r, const struct tensor *t, long long index)
{
    int x[3];
    coordinates_of(t, index, x);
    for (int i = 0; i < 3; i++)
        if (abs(x[i] - r->poisoned[i]) > r->options->poison_reach)
            return false;
    return r->options->poison_reach > 0;
}

static void fill_inputs(struct run *r)
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

/* ---- the oracle's side ---- */

static struct oracle_problem oracle_problem_of(const nbhd_desc *d, enum oracle_precision precision)
{
    static const enum oracle_edge edges[] = {ORACLE_NEAREST, ORACLE_CAUSAL, ORACLE_TRUNCATED};
    struct oracle_problem p = {.batch = d->batch, .heads = d->heads, .kv_heads = d->kv_heads, .head_dim = d->head_dim,
                               .head_dim_v = d->head_dim_v, .extra = d->extra, .scale = (double)d->scale,
                               .precision = precision};
    for (int i = 0; i < 3; i++) {
        const int from = i - (3 - d->rank);
        p.axis[i] = (struct oracle_axis){1, 1, 1, 1, 1, ORACLE_NEAREST};
        if (from >= 0)
            p.axis[i] = (struct oracle_axis){d->length[from], d->kv_length[from], d->window[from],
                                             d->stride[from], d->dilation[from],  edges[d->edge[from]]};
    }
    return p;
}

/* Entries of scores that no key has must not be read: they are NaN. */
static bool poison_unused(const struct oracle_problem *p, const nbhd_desc *d, double *scores)
{
    long long window = 1, tokens = 1;
    for (int i = 0; i < d->rank; i++) {
        window *= d->window[i];
        tokens *= d->length[i];
    }
    bool *used = malloc((size_t)(tokens * window));
    const bool ok = used && oracle_entries(p, used);
    for (long long i = 0; ok && i < d->batch * tokens * d->heads * window; i++)
        if (!used[i / window / d->heads % tokens * window + i % window])
            scores[i] = NAN;
    free(used);
    return ok;
}

/* What the oracle reads or writes of a sequence. */
static double *part_of(const struct run *r, int which, int sequence, bool plain)
{
    const struct tensor *t = &r->tensors[which];
    double *all = plain && t->output ? t->plain : t->exact;
    if (!all)
        return NULL;
    if (t->tokens)
        return all + t->tokens->first[sequence] * t->shape[4] * t->shape[5];
    return of_extra(which) ? all + (long long)sequence * t->shape[3] * t->shape[4] * t->shape[5] : all;
}

static bool consult_on(struct run *r, int s, bool plain)
{
    const nbhd_desc d = desc_of(r, s);
    const enum oracle_precision own = d.dtype == NBHD_F32 && d.tf32 ? ORACLE_TF32 : precision_of(d.dtype);
    const struct oracle_problem p = oracle_problem_of(&d, plain ? own : ORACLE_EXACT);
#define PART(which) part_of(r, which, s, plain)
    const struct oracle_tensors tensors = {
        .q = PART(Q), .k = PART(K), .v = PART(V), .extra_k = PART(EXTRA_K), .extra_v = PART(EXTRA_V), .bias = PART(BIAS),
        .o = PART(O), .lse = PART(LSE), .dout = PART(DOUT), .dlse = PART(DLSE), .dq = PART(DQ), .dk = PART(DK), .dv = PART(DV),
        .dextra_k = PART(DEXTRA_K), .dextra_v = PART(DEXTRA_V), .dbias = PART(DBIAS), .scores = PART(SCORES),
        .dscores = PART(DSCORES)};
    switch (d.pass) {
    case NBHD_QK: return oracle_qk(&p, &tensors);
    case NBHD_AV: return poison_unused(&p, &d, PART(SCORES)) && oracle_av(&p, &tensors);
    case NBHD_QK_BACKWARD: return poison_unused(&p, &d, PART(DSCORES)) && oracle_qk_backward(&p, &tensors);
    case NBHD_AV_BACKWARD: return poison_unused(&p, &d, PART(SCORES)) && oracle_av_backward(&p, &tensors);
    default: break;
    }
#undef PART
    if (d.pass == NBHD_BACKWARD)
        return (plain || oracle_forward(&p, &tensors)) && oracle_backward(&p, &tensors);
    return oracle_forward(&p, &tensors);
}

/* One sequence after the other; the gradient of the bias is the sum of theirs. */
static bool consult_oracle(struct run *r, bool plain)
{
    const struct tensor *t = &r->tensors[DBIAS];
    const int n = r->options->sequences ? r->options->sequences : 1;
    double *table = part_of(r, DBIAS, 0, plain), *sum = t->count ? calloc((size_t)t->count, sizeof *sum) : NULL;
    bool ok = !t->count || sum;
    for (int s = 0; ok && s < n; s++) {
        ok = consult_on(r, s, plain);
        for (long long i = 0; ok && i < t->count; i++)
            sum[i] += table[i];
    }
    if (ok && t->count)
        memcpy(table, sum, (size_t)t->count * sizeof *sum);
    free(sum);
    return ok;
}

/* ---- the kernel's side ---- */

/* Packed: of [token, heads]; padded: of [batch, axes, heads]. */
static void set_ragged_strides(struct tensor *t, int rank, bool padded)
{
    long long *stride = t->arg->stride, step = t->stride[3];
    stride[0] = step;
    stride[1] = t->stride[4];
    for (int i = 0; padded && i <= rank; i++) {
        stride[rank - i] = step;
        step *= t->tokens->largest[i < rank ? 2 - i : 0];
        stride[1 + rank] = t->stride[4];
    }
}

static bool make_buffer(struct run *r, struct tensor *t)
{
    const size_t bytes = (size_t)t->elements * size_of(t->dtype);
    if (t->owner) {
        t->host = malloc(bytes);
        t->device = r->memory.alloc(bytes);
    } else {
        t->host = r->tensors[Q].host;
        t->device = r->tensors[Q].device;
    }
    if (!t->host || !t->device)
        return false;
    for (long long i = 0; t->owner && i < t->elements; i++)
        put_element(t->host + (size_t)i * size_of(t->dtype), t->dtype, (double)NAN);
    for (long long i = 0; !t->output && i < t->count; i++) {
        const double value = t->dtype == NBHD_F64 ? t->exact[i] : oracle_round(precision_of(t->dtype), t->exact[i]);
        put_element(t->host + (size_t)place(t, i) * size_of(t->dtype), t->dtype, value);
    }
    t->arg->data = (char *)t->device + (size_t)t->offset * size_of(t->dtype);
    if (r->options->layout == CASE_CONTIGUOUS)
        return true;
    const int rank = of_extra((int)(t - r->tensors)) ? 1 : r->desc.rank;
    if (t->tokens) {
        set_ragged_strides(t, rank, r->options->placement == CASE_PADDED);
        return true;
    }
    t->arg->stride[0] = t->stride[0];
    for (int i = 0; i <= rank; i++)
        t->arg->stride[1 + i] = t->stride[4 - rank + i];
    return true;
}

static bool upload_all(struct run *r)
{
    for (int i = 0; i < TENSORS; i++) {
        struct tensor *t = &r->tensors[i];
        if (t->name && t->owner &&
            !r->memory.upload(t->device, t->host, (size_t)t->elements * size_of(t->dtype)))
            return false;
    }
    return true;
}

/* Whether the row says that this output may differ in its last bits from run to run. */
static bool in_any_order(const struct run *r, const char *kernel, int tensor)
{
    return tensor == DQ && !strcmp(kernel, "cuda.bwd_sm90") && !(r->options->flags & NBHD_PLAN_DETERMINISTIC);
}

static unsigned long long hash_outputs(const struct run *r, char *const copies[TENSORS], const char *kernel)
{
    unsigned long long hash = 1469598103934665603u; /* FNV-1a */
    for (int i = 0; i < TENSORS; i++)
        if (copies[i] && !in_any_order(r, kernel, i))
            for (size_t at = 0; at < (size_t)r->tensors[i].elements * size_of(r->tensors[i].dtype); at++)
                hash = (hash ^ (unsigned char)copies[i][at]) * 1099511628211u;
    return hash;
}

static bool execute(struct run *r, const nbhd_plan *plan, void *workspace, struct case_result *result)
{
    if (!upload_all(r)) /* outputs and gaps are NaN again */
        return snprintf(result->why, sizeof result->why, "upload failed"), false;
    const nbhd_status status = nbhd_execute(plan, &r->args, workspace, NULL);
    if (status) {
        snprintf(result->why, sizeof result->why, "execute: %s", nbhd_last_error());
        return false;
    }
    return true;
}

/* A fresh host copy of the outputs; the NaN-filled originals stay for the next upload. */
static bool fetch_outputs(struct run *r, char *copies[TENSORS])
{
    bool ok = true;
    for (int i = 0; i < TENSORS; i++) {
        const struct tensor *t = &r->tensors[i];
        copies[i] = NULL;
        if (!t->output || !t->arg->data)
            continue;
        const size_t bytes = (size_t)t->elements * size_of(t->dtype);
        copies[i] = malloc(bytes);
        ok = ok && copies[i] && r->memory.download(copies[i], t->device, bytes);
    }
    return ok;
}

/* Half a unit in the last place, relative at most. */
static const double half_unit[] = {[NBHD_F32] = 0x1p-24, [NBHD_F16] = 0x1p-11, [NBHD_BF16] = 0x1p-8, [NBHD_F64] = 0};

/* A backward is given o and lse already rounded, which moves its result by this much, relative; the plain computation's own
 * roundings may happen to cancel that where a kernel's more exact ones do not. */
static double given_error(const struct run *r)
{
    const struct tensor *lse = &r->tensors[LSE];
    double largest = 0;
    for (long long i = 0; i < lse->count; i++)
        largest = fmax(largest, fabs(lse->exact[i]));
    if (r->desc.pass != NBHD_BACKWARD || r->desc.dtype == NBHD_F64)
        return 0;
    return half_unit[r->desc.dtype] + 0x1p-24 * largest;
}

static double largest_of(const struct tensor *t)
{
    double largest = 0;
    for (long long i = 0; i < t->count; i++)
        if (isfinite(t->exact[i]))
            largest = fmax(largest, fabs(t->exact[i]));
    return largest;
}

/* dS = P (dP - delta) may cancel to 0, as with a window of one key. The plain computation forms dP and delta alike, so its
 * error vanishes too; a kernel's differ by the roundings of a sum of head_dim_v products: of floats, or on tensor cores of
 * terms cut off 2^-20 below the largest, or where all of a gradient is 0 and only the roundings to TF32 are left, of these. */
static double cancelled_error(const struct run *r, bool to_zero)
{
    if (r->desc.pass != NBHD_BACKWARD || r->desc.dtype == NBHD_F64)
        return 0;
    const double sum = largest_of(&r->tensors[DOUT]) * largest_of(&r->tensors[V]) * r->desc.head_dim_v;
    const double factor = fmax(1, fabs((double)r->desc.scale) * fmax(largest_of(&r->tensors[Q]), largest_of(&r->tensors[K])));
    const double unit = r->desc.dtype != NBHD_F32 ? 0x1p-20 : r->desc.tf32 && to_zero ? 0x1p-11 : 0x1p-23;
    return unit * sum * factor;
}

/* Allowed: twice the plain computation's own largest error, which counts as no less than the rounding of the largest value (it
 * may have been lucky there), and a few float32 roundings. With large values the roundings of a few scores decide, and two
 * equally good orders of summation differ by up to a factor of three. A TF32 may be made by other means than rounding to
 * nearest, with errors up to 1.3 times as large, and in small problems chance decides: twice as much again. */
static bool compare(const struct run *r, const struct tensor *t, const char *got, struct case_result *result)
{
    double largest = 0, plain_error = 0, error = 0;
    const bool tf32 = r->desc.dtype == NBHD_F32 && r->desc.tf32;
    const double unit = r->desc.dtype == NBHD_F64 && t->dtype == NBHD_F64 ? 1e-12 : tf32 ? 0x1p-12 : 1e-6;
    for (long long i = 0; i < t->count; i++) {
        if (!isfinite(t->exact[i]))
            continue;
        largest = fmax(largest, fabs(t->exact[i]));
        plain_error = fmax(plain_error, fabs(t->plain[i] - t->exact[i]));
    }
    for (long long i = 0; i < t->count; i++) {
        const double value = get_element(got + (size_t)place(t, i) * size_of(t->dtype), t->dtype);
        if (is_near_poison(r, t, i))
            continue;
        if (isnan(value) != isnan(t->exact[i]) || (isinf(t->exact[i]) && value != t->exact[i])) {
            snprintf(result->why, sizeof result->why, "%s[%lld] is %g where %g is right", t->name, i, value, t->exact[i]);
            result->worst = t->name;
            result->max_abs_error = INFINITY;
            return false;
        }
        if (isfinite(t->exact[i]))
            error = fmax(error, fabs(value - t->exact[i]));
    }
    plain_error = fmax(plain_error, half_unit[t->dtype] * exp2(floor(log2(fmax(largest, 1e-30)))));
    const double factor = (r->options->large_values ? 4 : 2) * (tf32 ? 2 : 1);
    const double allowed = factor * plain_error + unit * (1 + largest) + given_error(r) * largest +
                           cancelled_error(r, largest < 1e-9);
    if (error / allowed >= result->max_abs_error / result->allowed_error) {
        result->max_abs_error = error;
        result->allowed_error = allowed;
        result->worst = t->name;
    }
    if (error <= allowed)
        return true;
    snprintf(result->why, sizeof result->why, "%s is off by %.3g, where %.3g is allowed (largest value %.3g)", t->name,
             error, allowed, largest);
    return false;
}

/* Gaps between elements must still hold the NaN that they were filled with. */
static bool gaps_untouched(const struct tensor *t, const char *got, struct case_result *result)
{
    bool *inside = calloc((size_t)t->elements, sizeof *inside);
    bool ok = inside != NULL;
    for (long long i = 0; ok && i < t->count; i++)
        inside[place(t, i)] = true;
    for (long long i = 0; ok && i < t->elements; i++)
        ok = inside[i] || isnan(get_element(got + (size_t)i * size_of(t->dtype), t->dtype));
    free(inside);
    if (!ok)
        snprintf(result->why, sizeof result->why, "%s was written between its elements", t->name);
    return ok;
}

static bool check_outputs(struct run *r, struct case_result *result)
{
    char *copies[TENSORS];
    bool ok = fetch_outputs(r, copies);
    if (!ok)
        snprintf(result->why, sizeof result->why, "download failed");
    for (int i = 0; ok && i < TENSORS; i++)
        if (copies[i])
            ok = compare(r, &r->tensors[i], copies[i], result) && gaps_untouched(&r->tensors[i], copies[i], result);
    if (ok)
        result->bits = hash_outputs(r, copies, result->kernel);
    for (int i = 0; i < TENSORS; i++)
        free(copies[i]);
    return ok;
}

static bool execute_and_check(struct run *r, const nbhd_plan *plan, void *workspace, struct case_result *result)
{
    if (!execute(r, plan, workspace, result) || !check_outputs(r, result))
        return false;
    const unsigned long long first = result->bits;
    for (int i = 0; i < r->options->repeats; i++) {
        if (!execute(r, plan, workspace, result) || !check_outputs(r, result))
            return false;
        if (result->bits != first) {
            snprintf(result->why, sizeof result->why, "repetition %d gave other bits than the first run", i + 1);
            return false;
        }
    }
    return true;
}

static void release(struct run *r)
{
    for (int i = 0; i < TENSORS; i++) {
        struct tensor *t = &r->tensors[i];
        free(t->exact);
        free(t->plain);
        if (t->owner && t->host)
            free(t->host);
        if (t->owner && t->device)
            r->memory.release(t->device);
    }
    release_place(&r->tokens);
    release_place(&r->keys);
}

static nbhd_status prepare(struct run *r, struct case_result *result)
{
    bool ok = describe_all(r);
    if (ok && r->options->layout == CASE_PACKED)
        pack(r);
    if (ok)
        fill_inputs(r);
    ok = ok && consult_oracle(r, false) && consult_oracle(r, true);
    if (ok && r->desc.pass == NBHD_BACKWARD) /* o as a kernel would have stored it */
        for (long long i = 0; i < r->tensors[O].count; i++)
            r->tensors[O].exact[i] = oracle_round(precision_of(r->desc.dtype), r->tensors[O].exact[i]);
    for (int i = 0; ok && i < TENSORS; i++)
        ok = !r->tensors[i].name || make_buffer(r, &r->tensors[i]);
    if (r->options->no_lse && r->desc.pass == NBHD_FORWARD)
        r->args.lse.data = NULL;
    if (!ok)
        snprintf(result->why, sizeof result->why, "out of memory for the problem's tensors");
    return ok ? NBHD_OK : NBHD_ERROR_MEMORY;
}

static nbhd_status create_plan(struct run *r, nbhd_plan **plan)
{
    const struct case_options *o = r->options;
    if (!o->sequences)
        return nbhd_plan_create_with(plan, &r->given, o->device, o->flags, o->kernel);
    if (!place_sequences(r, &r->tokens, false) || !place_sequences(r, &r->keys, true))
        return NBHD_ERROR_MEMORY;
    nbhd_desc desc = r->given;
    nbhd_ragged ragged = NBHD_RAGGED_INIT;
    ragged.sequences = o->sequences;
    ragged.lengths = o->lengths;
    ragged.kv_lengths = o->kv_lengths;
    desc.batch = 0;
    for (int i = 0; i < 3; i++) {
        const bool set = o->placement == CASE_PADDED && i < desc.rank;
        desc.length[i] = set ? r->tokens.largest[3 - desc.rank + i] : 0;
        desc.kv_length[i] = set ? r->keys.largest[3 - desc.rank + i] : 0;
    }
    if (o->placement == CASE_OFFSETS) {
        ragged.offsets = r->tokens.offset;
        ragged.kv_offsets = o->kv_lengths ? r->keys.offset : NULL;
    }
    return nbhd_plan_create_ragged(plan, &desc, &ragged, o->device, o->flags, o->kernel);
}

nbhd_status case_run(const nbhd_desc *desc, const struct case_options *options, struct case_result *result)
{
    static const struct case_memory host = {guarded_alloc, guarded_release, host_copy, host_copy};
    struct run r = {.given = *desc, .options = options, .memory = options->memory.alloc ? options->memory : host,
                    .args = NBHD_ARGS_INIT, .random = options->seed * 2654435761u + 12345};
    memset(result, 0, sizeof *result);
    result->allowed_error = 1e-300;
    nbhd_plan *plan = NULL;
    r.given.threads = options->threads;
    nbhd_status status = create_plan(&r, &plan);
    if (status) {
        snprintf(result->why, sizeof result->why, "%s", nbhd_last_error());
        release(&r);
        return status;
    }
    snprintf(result->kernel, sizeof result->kernel, "%s", nbhd_plan_kernel(plan));
    r.desc = desc_of(&r, 0);
    const size_t bytes = (nbhd_plan_workspace(plan) + 63) / 64 * 64;
    void *workspace = bytes ? r.memory.alloc(bytes) : NULL;
    if (bytes && !workspace)
        status = NBHD_ERROR_MEMORY;
    if (!status && !(status = prepare(&r, result)))
        result->ok = execute_and_check(&r, plan, workspace, result);
    release(&r);
    if (workspace)
        r.memory.release(workspace);
    nbhd_plan_destroy(&plan);
    return status;
}
