/* The oracle's backward against central differences of the oracle's forward: every gradient, every feature, small
 * problems. With this, the oracle may judge kernels' gradients. In double: a step of 1e-5 leaves an error near
 * 1e-10. */
#include <math.h>
#include "oracle.h"
#include "test.h"

#define STEP 1e-5
#define TOLERANCE 1e-8

static unsigned long long state;

static double random_value(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 11) * 0x1p-52 - 1; /* -1 to 1 */
}

struct array {
    double *data;
    long long count;
};

static struct array make_array(long long count, bool random)
{
    struct array a = {calloc((size_t)count + 1, sizeof(double)), count};
    for (long long i = 0; random && i < count; i++)
        a.data[i] = random_value();
    return a;
}

/* sum(o * dout) + sum(lse * dlse): its derivatives are what oracle_backward is to give. */
static double loss(const struct oracle_problem *p, const struct oracle_tensors *t, long long o, long long lse)
{
    double sum = 0;
    CHECK(oracle_forward(p, t), "out of memory");
    for (long long i = 0; i < o; i++)
        sum += t->o[i] * t->dout[i];
    for (long long i = 0; t->dlse && i < lse; i++)
        sum += t->lse[i] * t->dlse[i];
    return sum;
}

struct pair {
    const char *name;
    struct array value, gradient;
};

static void compare(const char *what, const struct oracle_problem *p, const struct oracle_tensors *t,
                    const struct pair *pair, long long o, long long lse)
{
    double worst = 0;
    for (long long i = 0; i < pair->value.count; i++) {
        double *x = &pair->value.data[i];
        const double kept = *x;
        *x = kept + STEP;
        const double up = loss(p, t, o, lse);
        *x = kept - STEP;
        const double down = loss(p, t, o, lse);
        *x = kept;
        worst = fmax(worst, fabs((up - down) / (2 * STEP) - pair->gradient.data[i]));
    }
    CHECK(worst < TOLERANCE, "%s: d%s differs from the finite difference by %.3g", what, pair->name, worst);
}

static void check_problem(const char *what, const struct oracle_problem *p, bool bias, bool dlse)
{
    long long tokens = p->batch, keys = p->batch, table = p->heads;
    for (int i = 0; i < 3; i++) {
        tokens *= p->axis[i].length;
        keys *= p->axis[i].keys;
        table *= 2 * p->axis[i].window - 1;
    }
    const long long q = tokens * p->heads * p->head_dim, k = keys * p->kv_heads * p->head_dim;
    const long long v = keys * p->kv_heads * p->head_dim_v, o = tokens * p->heads * p->head_dim_v,
                    lse = tokens * p->heads;
    const long long ek = (long long)p->batch * p->extra * p->kv_heads * p->head_dim;
    const long long ev = (long long)p->batch * p->extra * p->kv_heads * p->head_dim_v;
    const long long counts[] = {q, k, v, ek, ev, bias ? table : 0};
    static const char *const names[] = {"q", "k", "v", "extra_k", "extra_v", "bias"};
    struct pair pairs[6];
    for (int i = 0; i < 6; i++)
        pairs[i] = (struct pair){names[i], make_array(counts[i], true), make_array(counts[i], false)};
    struct array out = make_array(o, false), sums = make_array(lse, false), dout = make_array(o, true),
                 dsums = make_array(lse, true);
    const struct oracle_tensors t = {
        .q = pairs[0].value.data, .k = pairs[1].value.data, .v = pairs[2].value.data, .extra_k = pairs[3].value.data,
        .extra_v = pairs[4].value.data, .bias = bias ? pairs[5].value.data : NULL, .o = out.data, .lse = sums.data,
        .dout = dout.data, .dlse = dlse ? dsums.data : NULL, .dq = pairs[0].gradient.data, .dk = pairs[1].gradient.data,
        .dv = pairs[2].gradient.data, .dextra_k = pairs[3].gradient.data, .dextra_v = pairs[4].gradient.data,
        .dbias = bias ? pairs[5].gradient.data : NULL};
    CHECK(oracle_forward(p, &t) && oracle_backward(p, &t), "out of memory");
    for (int i = 0; i < 6; i++)
        compare(what, p, &t, &pairs[i], o, lse);
    for (int i = 0; i < 6; i++) {
        free(pairs[i].value.data);
        free(pairs[i].gradient.data);
    }
    free(out.data);
    free(sums.data);
    free(dout.data);
    free(dsums.data);
}

#define UNIT {1, 1, 1, 1, 1, ORACLE_NEAREST}

int main(void)
{
    static const struct {
        const char *what;
        struct oracle_problem problem;
        bool bias, dlse;
    } cases[] = {
        {"1-D", {{UNIT, UNIT, {9, 9, 4, 1, 1, ORACLE_NEAREST}}, 1, 1, 1, 3, 3, 0, 0.5, ORACLE_EXACT}, false, false},
        {"gradient of lse", {{UNIT, UNIT, {9, 9, 3, 1, 1, ORACLE_NEAREST}}, 1, 1, 1, 3, 3, 0, 0.5, ORACLE_EXACT},
         false, true},
        {"stride, dilation",
         {{UNIT, {5, 5, 3, 2, 1, ORACLE_NEAREST}, {7, 7, 2, 2, 3, ORACLE_NEAREST}}, 1, 1, 1, 2, 3, 0, -0.7,
          ORACLE_EXACT},
         false, true},
        {"causal, truncated",
         {{UNIT, {5, 5, 3, 1, 1, ORACLE_CAUSAL}, {6, 6, 3, 2, 1, ORACLE_TRUNCATED}}, 1, 1, 1, 2, 2, 0, 0.6,
          ORACLE_EXACT},
         true, true},
        {"grouped heads, batch, extra keys, bias",
         {{{2, 2, 2, 1, 1, ORACLE_NEAREST}, {3, 3, 2, 1, 1, ORACLE_NEAREST}, {4, 4, 3, 1, 1, ORACLE_NEAREST}},
          2, 4, 2, 2, 3, 2, 0.8, ORACLE_EXACT},
         true, true},
        {"cross attention",
         {{UNIT, {3, 3, 3, 1, 1, ORACLE_NEAREST}, {4, 7, 7, 1, 1, ORACLE_NEAREST}}, 1, 2, 1, 3, 2, 1, 0.5,
          ORACLE_EXACT},
         false, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        state = i + 1;
        check_problem(cases[i].what, &cases[i].problem, cases[i].bias, cases[i].dlse);
    }
    return test_done();
}
