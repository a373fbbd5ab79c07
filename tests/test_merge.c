/* nbhd_merge: against the formula in double on random parts in every dtype and layout; attention to some keys and to
 * the others merges to attention to all; the gradient against finite differences; each bad argument has its
 * sentence. */
#include <math.h>
#include <stdint.h>
#include "cpu/cpu.h"
#include "nbhd.h"
#include "oracle.h"
#include "test.h"

enum { BATCH = 2, ROWS = 3, COLUMNS = 5, HEADS = 3, WIDTH = 7, TOKENS = BATCH * ROWS * COLUMNS, GAP = 2, PARTS = 4 };
enum { O_COUNT = TOKENS * HEADS * WIDTH, L_COUNT = TOKENS * HEADS };

static uint64_t random_state = 1;

static double uniform(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(random_state >> 33) * 0x1p-30 - 1;
}

static double values[PARTS][O_COUNT], lses[PARTS][L_COUNT];

/* By definition: the sum of exp over parts, and the mean of their values weighted by it. */
static double merged(int parts, int row, int d, double *lse)
{
    double sum = 0, o = 0;
    for (int p = 0; p < parts; p++)
        sum += exp(lses[p][row]);
    for (int p = 0; p < parts; p++)
        if (lses[p][row] > -INFINITY)
            o += exp(lses[p][row]) / sum * values[p][row * WIDTH + d];
    *lse = log(sum);
    return o;
}

static const enum oracle_precision precisions[] = {ORACLE_F32, ORACLE_F16, ORACLE_BF16, ORACLE_EXACT};

/* A tensor whose tokens are `gap` elements further apart than they need be; NaN in between. */
struct buffer {
    nbhd_tensor tensor;
    int dtype, width, gap;
};

static size_t size_of(int dtype) { return dtype == NBHD_F64 ? 8 : dtype == NBHD_F32 ? 4 : 2; }

static char *element(const struct buffer *b, int row, int d)
{
    const int token = row / HEADS, head = row % HEADS;
    return (char *)b->tensor.data +
           (size_t)(token * (HEADS * b->width + b->gap) + head * b->width + d) * size_of(b->dtype);
}

static void put(const struct buffer *b, int row, int d, double value)
{
    nbhd_store(element(b, row, d), b->dtype, 0, value);
}

static double get(const struct buffer *b, int row, int d) { return nbhd_load(element(b, row, d), b->dtype, 0); }

static struct buffer make(int dtype, int width, int gap)
{
    struct buffer b = {.dtype = dtype, .width = width, .gap = gap};
    const long long token = HEADS * width + gap;
    const size_t bytes = (size_t)(TOKENS * token) * size_of(dtype);
    b.tensor.data = malloc(bytes);
    memset(b.tensor.data, 0xff, bytes); /* NaN in every dtype */
    if (gap) {
        const long long stride[5] = {ROWS * COLUMNS * token, COLUMNS * token, token, width, 0};
        memcpy(b.tensor.stride, stride, sizeof stride);
    }
    return b;
}

static void set_random(int dtype, int parts)
{
    for (int p = 0; p < parts; p++)
        for (int row = 0; row < L_COUNT; row++) {
            lses[p][row] = (double)(float)(4 * uniform());
            if (row % 7 == p || row == 11)
                lses[p][row] = -INFINITY; /* row 11: in all parts */
            for (int d = 0; d < WIDTH; d++)
                values[p][row * WIDTH + d] =
                    lses[p][row] > -INFINITY ? oracle_round(precisions[dtype], uniform()) : NAN;
        }
}

static void check_values(int dtype, int parts, int gap, bool in_place)
{
    nbhd_desc desc = NBHD_DESC_INIT;
    nbhd_desc_parse(&desc, "b2 h3 d4/7 3x5 w1x1");
    desc.dtype = dtype;
    struct buffer o[PARTS], lse[PARTS], out = make(dtype, WIDTH, gap), out_lse = make(NBHD_F32, 1, gap);
    nbhd_tensor o_parts[PARTS], lse_parts[PARTS];
    set_random(dtype, parts);
    for (int p = 0; p < parts; p++) {
        o[p] = make(dtype, WIDTH, gap);
        lse[p] = make(NBHD_F32, 1, gap);
        for (int row = 0; row < L_COUNT; row++) {
            put(&lse[p], row, 0, lses[p][row]);
            for (int d = 0; d < WIDTH; d++)
                put(&o[p], row, d, values[p][row * WIDTH + d]);
        }
        o_parts[p] = o[p].tensor, lse_parts[p] = lse[p].tensor;
    }
    const struct buffer *to = in_place ? &o[0] : &out, *to_lse = in_place ? &lse[0] : &out_lse;
    CHECK(!nbhd_merge(&desc, parts, o_parts, lse_parts, &to->tensor, &to_lse->tensor), "%s", nbhd_last_error());
    static const double units[] = {0x1p-23, 0x1p-10, 0x1p-7, 1e-14};
    for (int row = 0; row < L_COUNT; row++)
        for (int d = 0; d < WIDTH; d++) {
            double right_lse, right = merged(parts, row, d, &right_lse), value = get(to, row, d),
                              value_lse = get(to_lse, row, 0);
            CHECK(fabs(value - right) <= units[dtype], "dtype %d parts %d row %d: %g, not %g", dtype, parts, row, value,
                  right);
            CHECK(right_lse == value_lse || fabs(value_lse - right_lse) < 1e-6, "row %d: lse %g, not %g", row,
                  value_lse, right_lse);
        }
    for (int p = 0; p < parts; p++)
        free(o[p].tensor.data), free(lse[p].tensor.data);
    free(out.tensor.data), free(out_lse.tensor.data);
}

static void run_forward(const char *line, float *q, float *k, float *v, float *o, float *lse)
{
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    nbhd_args args = NBHD_ARGS_INIT;
    args.q.data = q, args.k.data = k, args.v.data = v, args.o.data = o, args.lse.data = lse;
    nbhd_desc_parse(&desc, line);
    if (!CHECK(!nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CPU, 0), "%s: %s", line, nbhd_last_error()))
        return;
    void *workspace = aligned_alloc(64, (nbhd_plan_workspace(plan) + 127) / 64 * 64);
    CHECK(!nbhd_execute(plan, &args, workspace, NULL), "%s", nbhd_last_error());
    free(workspace);
    nbhd_plan_destroy(&plan);
}

/* 30 queries of 2 heads over 50 keys = over the first 20 merged with over the other 30. */
static void check_attention(void)
{
    enum { Q = 30, K = 50, FIRST = 20, H = 2, D = 8 };
    static float q[Q * H * D], k[K * H * D], v[K * H * D], whole[Q * H * D], part[2][Q * H * D], lse[3][Q * H];
    for (int i = 0; i < Q * H * D; i++)
        q[i] = (float)uniform() * 2;
    for (int i = 0; i < K * H * D; i++)
        k[i] = (float)uniform() * 2, v[i] = (float)uniform();
    run_forward("fwd h2 d8 30 kv=50", q, k, v, whole, lse[2]);
    run_forward("fwd h2 d8 30 kv=20", q, k, v, part[0], lse[0]);
    run_forward("fwd h2 d8 30 w30", q, k + FIRST * H * D, v + FIRST * H * D, part[1], lse[1]);
    const nbhd_tensor o_parts[] = {{part[0], {0}}, {part[1], {0}}}, lse_parts[] = {{lse[0], {0}}, {lse[1], {0}}};
    nbhd_desc desc;
    nbhd_desc_parse(&desc, "fwd h2 d8 30");
    CHECK(!nbhd_merge(&desc, 2, o_parts, lse_parts, &o_parts[0], &lse_parts[0]), "%s", nbhd_last_error());
    for (int i = 0; i < Q * H * D; i++)
        CHECK(fabsf(part[0][i] - whole[i]) < 2e-6f, "element %d: %g, not %g", i, (double)part[0][i], (double)whole[i]);
    for (int i = 0; i < Q * H; i++)
        CHECK(fabsf(lse[0][i] - lse[2][i]) < 2e-6f, "lse %d: %g, not %g", i, (double)lse[0][i], (double)lse[2][i]);
}

/* loss = sum of dout * o + dlse * lse; its central differences in float64, but for lse, which is float32. */
static double loss(const nbhd_desc *desc, const nbhd_tensor *o, const nbhd_tensor *lse, const double *dout,
                   const float *dlse, int n)
{
    double out[64], sum = 0;
    float out_lse[64];
    const nbhd_tensor to = {out, {0}}, to_lse = {out_lse, {0}};
    nbhd_merge(desc, 3, o, lse, &to, &to_lse);
    for (int i = 0; i < n; i++)
        sum += dout[i] * out[i];
    for (int i = 0; i < n / 4; i++)
        sum += (double)dlse[i] * (double)out_lse[i];
    return sum;
}

static void check_gradient(void)
{
    enum { N = 24, L = N / 4 };
    static double o[3][N], dout[N], d_o[3][N];
    static float lse[3][L], dlse[L], d_lse[3][L];
    nbhd_tensor o_parts[3], lse_parts[3], do_parts[3], dlse_parts[3];
    nbhd_desc desc;
    nbhd_desc_parse(&desc, "f64 h2 d4 3 w1");
    for (int p = 0; p < 3; p++) {
        for (int i = 0; i < N; i++)
            o[p][i] = uniform(), dout[i] = uniform();
        for (int i = 0; i < L; i++)
            lse[p][i] = (float)uniform() * 2, dlse[i] = (float)uniform();
        o_parts[p] = (nbhd_tensor){o[p], {0}}, lse_parts[p] = (nbhd_tensor){lse[p], {0}};
        do_parts[p] = (nbhd_tensor){d_o[p], {0}}, dlse_parts[p] = (nbhd_tensor){d_lse[p], {0}};
    }
    lse[1][2] = -INFINITY;
    for (int d = 0; d < 4; d++)
        o[1][2 * 4 + d] = NAN;
    const nbhd_tensor g = {dout, {0}}, g_lse = {dlse, {0}};
    CHECK(!nbhd_merge_backward(&desc, 3, o_parts, lse_parts, &g, &g_lse, do_parts, dlse_parts), "%s",
          nbhd_last_error());
    for (int p = 0; p < 3; p++) {
        for (int i = 0; i < N; i++) {
            const double kept = o[p][i];
            o[p][i] = kept + 1e-3;
            const double up = loss(&desc, o_parts, lse_parts, dout, dlse, N);
            o[p][i] = kept - 1e-3;
            const double slope = (up - loss(&desc, o_parts, lse_parts, dout, dlse, N)) / 2e-3;
            o[p][i] = kept;
            CHECK(fabs(slope - d_o[p][i]) < 1e-9, "do_parts[%d][%d] is %g, differences say %g", p, i, d_o[p][i], slope);
        }
        for (int i = 0; i < L; i++) {
            const float kept = lse[p][i], step = 1.0f / 64;
            lse[p][i] = kept + step;
            const double up = loss(&desc, o_parts, lse_parts, dout, dlse, N), high = (double)lse[p][i];
            lse[p][i] = kept - step;
            const double slope = (up - loss(&desc, o_parts, lse_parts, dout, dlse, N)) / (high - (double)lse[p][i]);
            lse[p][i] = kept;
            if (kept > -INFINITY)
                CHECK(fabs(slope - (double)d_lse[p][i]) < 2e-4, "dlse_parts[%d][%d] is %g, differences say %g", p, i,
                      (double)d_lse[p][i], slope);
            else
                CHECK(d_lse[p][i] == 0, "dlse_parts[%d][%d] is %g where the part saw no key", p, i,
                      (double)d_lse[p][i]);
        }
    }
}

static void check_arguments(void)
{
    static float x[64];
    const nbhd_tensor t = {x, {0}}, none = {NULL, {0}}, flat = {x, {0, 0, 4}}, odd = {(char *)x + 1, {0}};
    nbhd_desc desc;
    nbhd_desc_parse(&desc, "h2 d4 3");
    const nbhd_status bad[] = {
        nbhd_merge(NULL, 1, &t, &t, &t, &t),
        nbhd_merge(&desc, 0, &t, &t, &t, &t),
        nbhd_merge(&desc, 65, &t, &t, &t, &t),
        nbhd_merge(&desc, 1, NULL, &t, &t, &t),
        nbhd_merge(&desc, 1, &t, &none, &t, &t),
        nbhd_merge(&desc, 1, &t, &t, NULL, &t),
        nbhd_merge(&desc, 1, &t, &t, &flat, &t),
        nbhd_merge(&desc, 1, &odd, &t, &t, &t),
        nbhd_merge_backward(&desc, 1, &t, &t, &t, NULL, NULL, &t),
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(bad[i] == NBHD_ERROR_INVALID, "bad call %zu passed", i);
    nbhd_merge(&desc, 65, &t, &t, &t, &t);
    CHECK(strstr(nbhd_last_error(), "parts is 65"), "%s", nbhd_last_error());
    nbhd_merge(&desc, 1, &t, &t, &none, &t);
    CHECK(!strcmp(nbhd_last_error(), "o is NULL"), "%s", nbhd_last_error());
    nbhd_merge(&desc, 2, (nbhd_tensor[]){t, none}, (nbhd_tensor[]){t, t}, &t, &t);
    CHECK(!strcmp(nbhd_last_error(), "o_parts[1] is NULL"), "%s", nbhd_last_error());
}

int main(void)
{
    for (int dtype = NBHD_F32; dtype <= NBHD_F64; dtype++)
        for (int parts = 1; parts <= PARTS; parts++) {
            check_values(dtype, parts, 0, false);
            check_values(dtype, parts, GAP, false);
            check_values(dtype, parts, GAP, true);
        }
    check_attention();
    check_gradient();
    check_arguments();
    return test_done();
}
