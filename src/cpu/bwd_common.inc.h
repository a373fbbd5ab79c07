/* What both backward algorithms share: a call, a task, and where the sums lie. Included by bwd.inc.h. */

struct bwd_call {
    const struct nbhd_params *p;
    const struct nbhd_bwd *b;
    int dtype;
    struct nbhd_view dq, dk, dv; /* float32 sums: the caller's tensors, or the workspace's */
    struct nbhd_view delta;      /* a float a query and head: the workspace's, or no data */
    float *extra, *bias;         /* the workspace's, of all slots */
    atomic_uchar *done;          /* bwd_order.h */
    char *scratch;
};

/* A task: a region of queries against its keys, of all heads of one kv head, or of some from kv_head on. */
struct bwd_task {
    const struct bwd_call *call;
    struct nbhd_region region[3];
    int batch, kv_head, slot;
    bool first; /* the first that its queries meet: extra keys are this one's, dq begins here */
};

/* Sums of an extra key's gradients, apart for each slot. */
static float *extra_dk(const struct bwd_call *c, int batch, int kv_head, int slot, int e)
{
    const size_t heads = (size_t)batch * (size_t)c->p->kv_heads + (size_t)kv_head;
    const size_t row = (heads * (size_t)c->b->slots + (size_t)slot) * (size_t)c->p->extra + (size_t)e;
    return c->extra + row * (size_t)(c->p->head_dim + c->p->head_dim_v);
}

static float *extra_dv(const struct bwd_call *c, int batch, int kv_head, int slot, int e)
{
    return extra_dk(c, batch, kv_head, slot, e) + c->p->head_dim;
}

/* A slot's sums for the bias table of all heads. */
static float *bias_sums(const struct bwd_call *c, int batch, int slot)
{
    return c->bias + ((size_t)batch * (size_t)c->b->slots + (size_t)slot) * (size_t)c->p->heads * (size_t)c->b->table;
}

static float dot_rows(const char *a, const char *b, int dtype, int n)
{
    vf sum = v_zero();
    for (int i = 0; i < n; i += VF)
        sum = v_fma(v_load_as(a, dtype, i, nbhd_min(VF, n - i)), v_load_as(b, dtype, i, nbhd_min(VF, n - i)), sum);
    return v_sum(sum);
}

/* Of a query: o.dout - dlse; dlse: where it lies, or NULL. */
V_FN float make_delta(const struct bwd_call *c, const char *o, const char *dout, const char *dlse)
{
    float less = 0;
    if (dlse)
        memcpy(&less, dlse, sizeof less);
    return dot_rows(dout, o, c->dtype, c->p->head_dim_v) - less;
}
