/* What is right for a case, by the oracle, and how far from it a kernel may be. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "case_run.h"

/* ---- the oracle's side ---- */

static struct oracle_problem oracle_problem_of(const nbhd_desc *d, enum oracle_precision precision)
{
    static const enum oracle_edge edges[] = {ORACLE_NEAREST, ORACLE_CAUSAL, ORACLE_TRUNCATED,
                                            ORACLE_PERIODIC};
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
    return case_of_extra(which) ? all + (long long)sequence * t->shape[3] * t->shape[4] * t->shape[5] : all;
}

/* o and lse as a forward would have stored them: a backward is given these. (In double it computes lse, a float,
 * anew.) */
static void store_forward(struct run *r)
{
    static const int stored[] = {O, LSE};
    for (int i = 0; i < 2 && r->desc.dtype != NBHD_F64; i++) {
        struct tensor *t = &r->tensors[stored[i]];
        for (long long j = 0; j < t->count; j++)
            t->exact[j] = oracle_round(case_precision(t->dtype), t->exact[j]);
    }
}

static bool consult_on(struct run *r, int s, enum oracle_precision precision)
{
    const nbhd_desc d = case_desc(r, s);
    const bool plain = precision != ORACLE_EXACT;
    const struct oracle_problem p = oracle_problem_of(&d, precision);
#define PART(which) part_of(r, which, s, plain)
    const struct oracle_tensors tensors = {
        .q = PART(Q), .k = PART(K), .v = PART(V), .extra_k = PART(EXTRA_K), .extra_v = PART(EXTRA_V),
        .bias = PART(BIAS), .o = PART(O), .lse = PART(LSE), .dout = PART(DOUT), .dlse = PART(DLSE), .dq = PART(DQ),
        .dk = PART(DK), .dv = PART(DV), .dextra_k = PART(DEXTRA_K), .dextra_v = PART(DEXTRA_V), .dbias = PART(DBIAS),
        .scores = PART(SCORES), .dscores = PART(DSCORES)};
    switch (d.pass) {
    case NBHD_QK: return oracle_qk(&p, &tensors);
    case NBHD_AV: return poison_unused(&p, &d, PART(SCORES)) && oracle_av(&p, &tensors);
    case NBHD_QK_BACKWARD: return poison_unused(&p, &d, PART(DSCORES)) && oracle_qk_backward(&p, &tensors);
    case NBHD_AV_BACKWARD: return poison_unused(&p, &d, PART(SCORES)) && oracle_av_backward(&p, &tensors);
    default: break;
    }
#undef PART
    if (d.pass != NBHD_BACKWARD)
        return oracle_forward(&p, &tensors);
    if (!plain && !oracle_forward(&p, &tensors))
        return false;
    store_forward(r);
    return oracle_backward(&p, &tensors);
}

/* One sequence after the other; the gradient of the bias is the sum of theirs. */
static bool consult(struct run *r, enum oracle_precision precision)
{
    const bool plain = precision != ORACLE_EXACT;
    const struct tensor *t = &r->tensors[DBIAS];
    const int n = r->options->sequences ? r->options->sequences : 1;
    double *table = part_of(r, DBIAS, 0, plain), *sum = t->count ? calloc((size_t)t->count, sizeof *sum) : NULL;
    bool ok = !t->count || sum;
    for (int s = 0; ok && s < n; s++) {
        ok = consult_on(r, s, precision);
        for (long long i = 0; ok && i < t->count; i++)
            sum[i] += table[i];
    }
    if (ok && t->count)
        memcpy(table, sum, (size_t)t->count * sizeof *sum);
    free(sum);
    return ok;
}

/* Of two plain results, the one that is further off, value by value. */
static bool consult_worst(struct run *r, enum oracle_precision one, enum oracle_precision other)
{
    double *first[TENSORS] = {NULL};
    bool ok = consult(r, one);
    for (int i = 0; ok && i < TENSORS; i++) {
        const struct tensor *t = &r->tensors[i];
        if (!t->plain)
            continue;
        ok = (first[i] = malloc((size_t)t->count * sizeof(double) + 1));
        if (ok)
            memcpy(first[i], t->plain, (size_t)t->count * sizeof(double));
    }
    ok = ok && consult(r, other);
    for (int i = 0; i < TENSORS; i++) {
        const struct tensor *t = &r->tensors[i];
        for (long long k = 0; ok && first[i] && k < t->count; k++)
            if (fabs(first[i][k] - t->exact[k]) > fabs(t->plain[k] - t->exact[k]))
                t->plain[k] = first[i][k];
        free(first[i]);
    }
    return ok;
}

/* In double the oracle is the plain computation too. */
static bool take_exact_as_plain(struct run *r)
{
    for (int i = 0; i < TENSORS; i++) {
        const struct tensor *t = &r->tensors[i];
        if (t->plain)
            memcpy(t->plain, t->exact, (size_t)t->count * sizeof *t->plain);
    }
    return true;
}

/* TF32: what cuts the scores' operands off makes all scores a little smaller, which a softmax hardly notices; what
 * rounds them to nearest errs less, but each score by itself. Scores of some hundreds in float32: the roundings of the
 * few that decide depend on the order of their sums and their unit. Either is plain. */
bool case_consult(struct run *r, bool plain)
{
    const nbhd_desc *d = &r->desc;
    if (plain && d->dtype == NBHD_F32 && d->tf32)
        return consult_worst(r, ORACLE_TF32, ORACLE_TF32_NEAREST);
    if (plain && d->dtype == NBHD_F32 && r->options->large_values)
        return consult_worst(r, ORACLE_F32, ORACLE_F32_BASE2);
    if (plain && d->dtype == NBHD_F64)
        return take_exact_as_plain(r);
    return consult(r, plain ? case_precision(d->dtype) : ORACLE_EXACT);
}

/* ---- what is allowed ---- */

/* Half a unit in the last place, relative at most. */
static const double half_unit[] = {[NBHD_F32] = 0x1p-24, [NBHD_F16] = 0x1p-11, [NBHD_BF16] = 0x1p-8, [NBHD_F64] = 0};

static double largest_of(const struct tensor *t)
{
    double largest = 0;
    for (long long i = 0; i < t->count; i++)
        if (isfinite(t->exact[i]))
            largest = fmax(largest, fabs(t->exact[i]));
    return largest;
}

/* dS = P (dP - delta) may cancel to 0, as with a window of one key. The plain computation forms dP and delta alike, so
 * its error vanishes too; a kernel's differ by the roundings of a sum of head_dim_v products: of floats, or on tensor
 * cores of terms cut off 2^-20 below the largest, or where all of a gradient is 0 and only the roundings to TF32 are
 * left, of these. */
static double cancelled_error(const struct run *r, bool to_zero)
{
    if (r->desc.pass != NBHD_BACKWARD || r->desc.dtype == NBHD_F64)
        return 0;
    const double sum = largest_of(&r->tensors[DOUT]) * largest_of(&r->tensors[V]) * r->desc.head_dim_v;
    const double largest = fmax(largest_of(&r->tensors[Q]), largest_of(&r->tensors[K]));
    const double factor = fmax(1, fabs((double)r->desc.scale) * largest);
    const double unit = r->desc.dtype != NBHD_F32 ? 0x1p-20 : r->desc.tf32 && to_zero ? 0x1p-11 : 0x1p-23;
    return unit * sum * factor;
}

/* Allowed: twice the plain computation's own largest error, which counts as no less than the rounding of the largest
 * value (it may have been lucky there), and a few float32 roundings. With large values the roundings of a few scores
 * decide, and two equally good orders of summation differ by up to a factor of three; of few queries those
 * few may all have been lucky in the plain one (6 queries: 6.7 times; 56 and TF32: 11 times; two of some 50,000 random
 * problems). Of few values in 16 bits too: of
 * 16 outputs, probabilities rounded as multiples of their sum and of another power of two each err more than twice as
 * much as the other in one of 200 random problems, more than four times in none of 6,000. */
bool case_compare(const struct run *r, const struct tensor *t, const char *got, struct case_result *result)
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
        const double value = case_get(got + (size_t)case_place(t, i) * case_size_of(t->dtype), t->dtype);
        if (case_is_near_poison(r, t, i))
            continue;
        if (isnan(value) != isnan(t->exact[i]) || (isinf(t->exact[i]) && value != t->exact[i])) {
            snprintf(result->why, sizeof result->why, "%s[%lld] is %g where %g is right", t->name, i, value,
                     t->exact[i]);
            result->worst = t->name;
            result->max_abs_error = INFINITY;
            return false;
        }
        if (isfinite(t->exact[i]))
            error = fmax(error, fabs(value - t->exact[i]));
    }
    plain_error = fmax(plain_error, half_unit[t->dtype] * exp2(floor(log2(fmax(largest, 1e-30)))));
    const bool few = t->count < 64 && (t->dtype == NBHD_F16 || t->dtype == NBHD_BF16);
    const bool few_queries = t->count <= 64 * (long long)t->shape[5];
    const double factor = r->options->large_values && few_queries ? 12 : r->options->large_values || few ? 4 : 2;
    const double allowed = factor * plain_error + unit * (1 + largest) + cancelled_error(r, largest < 1e-9);
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
