/* The problem of `nbhd run`, from its options and the shapes of its tensors. See run.h. */
#include <math.h>
#include <string.h>

#include "run.h"
#include "tool.h"

const char *run_option_name(int slot)
{
    static const char *const names[SLOT_COUNT] = {
        [SLOT_Q] = "Q", [SLOT_K] = "K", [SLOT_V] = "V", [SLOT_O] = "--out", [SLOT_LSE] = "--lse",
        [SLOT_EXTRA_K] = "--extra-k", [SLOT_EXTRA_V] = "--extra-v", [SLOT_DOUT] = "--grad-out",
        [SLOT_DLSE] = "--grad-lse", [SLOT_DQ] = "--dq", [SLOT_DK] = "--dk", [SLOT_DV] = "--dv",
        [SLOT_DEXTRA_K] = "--dextra-k", [SLOT_DEXTRA_V] = "--dextra-v", [SLOT_BIAS] = "--bias",
        [SLOT_DBIAS] = "--dbias"};
    return names[slot];
}

static int extent(const struct run_options *o, int slot, long long n, int *value)
{
    if (n < 1 || n > 0x7fffffff)
        return tool_fail(TOOL_USAGE, "%s (%s): an extent of %lld is not between 1 and %d", run_option_name(slot),
                         o->in[slot], n, 0x7fffffff);
    *value = (int)n;
    return TOOL_DONE;
}

/* "--window 7x7" into the axes of the problem; one number is for all of them. */
static int per_axis(const char *name, const struct extents *e, int rank, int values[3])
{
    if (e->count > 1 && e->count != rank)
        return tool_fail(TOOL_USAGE, "--%s: %d numbers were given and the tensors have %d %s", name, e->count, rank,
                         rank == 1 ? "axis" : "axes");
    for (int i = 0; e->count && i < rank; i++)
        values[i] = e->at[e->count > 1 ? i : 0];
    return TOOL_DONE;
}

static int edges(const char *text, int rank, int values[3])
{
    static const char letters[] = {
        [NBHD_NEAREST] = 'n', [NBHD_CAUSAL] = 'c', [NBHD_TRUNCATED] = 't', [NBHD_PERIODIC] = 'p', [4] = 0};
    const size_t count = strlen(text);
    if (count != 1 && count != (size_t)rank)
        return tool_fail(TOOL_USAGE, "--edge: '%s' has %zu letters and the tensors have %d %s", text, count, rank,
                         rank == 1 ? "axis" : "axes");
    for (int i = 0; i < rank; i++) {
        const char letter = text[count > 1 ? i : 0], *found = strchr(letters, letter);
        if (!found)
            return tool_fail(TOOL_USAGE, "--edge: '%c' is none of n, c, t, p", letter);
        values[i] = (int)(found - letters);
    }
    return TOOL_DONE;
}

/* The axes of Q and K. */
static int describe_axes(struct run_work *w)
{
    const struct run_options *o = w->options;
    const struct array_info *q = &w->in[SLOT_Q].info, *k = &w->in[SLOT_K].info;
    nbhd_desc *d = &w->problem.desc;
    d->rank = q->rank - 3;
    int status = extent(o, SLOT_Q, q->shape[0], &d->batch);
    for (int i = 0; !status && i < d->rank; i++) {
        status = extent(o, SLOT_Q, q->shape[1 + i], &d->length[i]);
        if (!status && k->shape[1 + i] != q->shape[1 + i])
            status = extent(o, SLOT_K, k->shape[1 + i], &d->kv_length[i]);
    }
    return status;
}

/* The grids of a ragged batch, which must fill Q and K. */
static int describe_sequences(struct run_work *w)
{
    const struct run_options *o = w->options;
    const struct array_info *q = &w->in[SLOT_Q].info, *k = &w->in[SLOT_K].info;
    struct problem *p = &w->problem;
    int kv_sequences = 0;
    int status = problem_grids("--lengths", o->lengths, &p->desc.rank, &p->sequences, &p->lengths);
    if (!status && o->kv_lengths)
        status = problem_grids("--kv-lengths", o->kv_lengths, &p->desc.rank, &kv_sequences, &p->kv_lengths);
    if (status)
        return status;
    if (p->kv_lengths && kv_sequences != p->sequences)
        return tool_fail(TOOL_USAGE, "--lengths lists %d grids and --kv-lengths %d", p->sequences, kv_sequences);
    long long tokens = 0, keys = 0;
    problem_tokens(p, &tokens, &keys);
    if (tokens != q->shape[0] || keys != k->shape[0])
        return tool_fail(TOOL_USAGE, "the grids of %s have %lld tokens, and %s has %lld",
                         tokens != q->shape[0] || !p->kv_lengths ? "--lengths" : "--kv-lengths",
                         tokens != q->shape[0] ? tokens : keys, tokens != q->shape[0] ? "Q" : "K",
                         tokens != q->shape[0] ? q->shape[0] : k->shape[0]);
    p->desc = problem_part(p, 0);
    return TOOL_DONE;
}

static int check_ranks(const struct run_options *o, int q, int k, int v)
{
    if (!o->lengths && (q < 4 || q > 6))
        return tool_fail(TOOL_USAGE,
                         "Q (%s) has %d extents; it must have 4 to 6: batch, one to three axes, heads, head_dim",
                         o->in[SLOT_Q], q);
    if (o->lengths && q != 3)
        return tool_fail(TOOL_USAGE, "Q (%s) has %d extents; with --lengths it must have 3: tokens, heads, head_dim",
                         o->in[SLOT_Q], q);
    if (k != q || v != q)
        return tool_fail(TOOL_USAGE, "Q has %d extents, K has %d and V has %d; they must agree", q, k, v);
    return TOOL_DONE;
}

/* The last two extents of Q, K and V, and how many keys are extra. */
static int describe_heads(struct run_work *w)
{
    const struct run_options *o = w->options;
    const struct array_info *q = &w->in[SLOT_Q].info, *extra = &w->in[SLOT_EXTRA_K].info;
    const int rank = q->rank;
    nbhd_desc *d = &w->problem.desc;
    int status = extent(o, SLOT_Q, q->shape[rank - 2], &d->heads);
    if (!status)
        status = extent(o, SLOT_K, w->in[SLOT_K].info.shape[rank - 2], &d->kv_heads);
    if (!status)
        status = extent(o, SLOT_Q, q->shape[rank - 1], &d->head_dim);
    if (!status)
        status = extent(o, SLOT_V, w->in[SLOT_V].info.shape[rank - 1], &d->head_dim_v);
    if (status || !o->in[SLOT_EXTRA_K])
        return status;
    if (extra->rank != 4)
        return tool_fail(TOOL_USAGE, "--extra-k (%s) has %d extents; it must have 4: batch, tokens, heads, head_dim",
                         o->in[SLOT_EXTRA_K], extra->rank);
    return extent(o, SLOT_EXTRA_K, extra->shape[1], &d->extra);
}

/* What options say of it. */
static int describe_window(const struct run_options *o, nbhd_desc *d)
{
    d->threads = o->threads;
    d->tf32 = o->tf32;
    d->bias = o->in[SLOT_BIAS] != NULL;
    if ((float)o->scale == 0)
        return tool_fail(TOOL_USAGE, "--scale: %g would make all keys weigh the same; it must be another number",
                         o->scale);
    d->scale = isnan(o->scale) ? 0 : (float)o->scale;
    int status = per_axis("window", &o->window, d->rank, d->window);
    if (!status)
        status = per_axis("stride", &o->stride, d->rank, d->stride);
    if (!status)
        status = per_axis("dilation", &o->dilation, d->rank, d->dilation);
    return status || !o->edge ? status : edges(o->edge, d->rank, d->edge);
}

int run_describe(struct run_work *w)
{
    const struct run_options *o = w->options;
    const struct array *in = w->in;
    nbhd_desc *d = &w->problem.desc;
    int status = check_ranks(o, in[SLOT_Q].info.rank, in[SLOT_K].info.rank, in[SLOT_V].info.rank);
    *d = (nbhd_desc)NBHD_DESC_INIT;
    d->dtype = in[SLOT_Q].info.dtype;
    w->problem.deterministic = o->deterministic;
    if (!status)
        status = o->lengths ? describe_sequences(w) : describe_axes(w);
    if (!status)
        status = describe_heads(w);
    return status ? status : describe_window(o, d);
}

int run_check_problem(struct run_work *w)
{
    for (int s = 0; s < problem_parts(&w->problem); s++) {
        const nbhd_desc part = problem_part(&w->problem, s);
        if (nbhd_desc_pairs(&part) > 0)
            continue;
        return w->problem.sequences ? tool_fail(TOOL_USAGE, "sequence %d: %s", s, nbhd_last_error())
                                    : tool_fail_library(NBHD_ERROR_INVALID);
    }
    w->tensors = problem_tensors(&w->problem);
    return TOOL_DONE;
}

int run_array_shape(const struct run_work *w, int slot, long long shape[6])
{
    int rank = slot_shape(&w->tensors, slot, shape);
    if (!w->problem.sequences || slot == SLOT_BIAS || slot == SLOT_DBIAS)
        return rank;
    if (slot_is_extra(slot)) {
        shape[0] = w->problem.sequences;
        shape[1] /= w->problem.sequences;
        return rank;
    }
    rank -= w->tensors.rank;
    memmove(shape, shape + w->tensors.rank, (size_t)rank * sizeof *shape);
    return rank;
}

int run_check_inputs(const struct run_work *w)
{
    char have[ARRAY_RANK * 21], want[ARRAY_RANK * 21];
    for (int slot = 0; slot < SLOT_COUNT; slot++) {
        if (!w->options->in[slot])
            continue;
        long long shape[6];
        const struct array_info *info = &w->in[slot].info;
        int rank = run_array_shape(w, slot, shape), dtype = slot_dtype(&w->tensors, slot);
        if (info->rank != rank || memcmp(info->shape, shape, (size_t)rank * sizeof *shape))
            return tool_fail(TOOL_USAGE, "%s (%s) is %s; with Q, K and V as they are it must be %s",
                             run_option_name(slot), w->options->in[slot], shape_text(info->shape, info->rank, have),
                             shape_text(shape, rank, want));
        if (info->dtype != dtype)
            return tool_fail(TOOL_USAGE, "%s (%s) is %s; it must be %s%s", run_option_name(slot), w->options->in[slot],
                             dtype_name(info->dtype), dtype_name(dtype),
                             slot == SLOT_DLSE || slot == SLOT_BIAS ? "" : ", as Q is");
    }
    return TOOL_DONE;
}
