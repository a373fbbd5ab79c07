/* nbhd run: attention over tensors in files, forward and backward. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "args.h"
#include "array.h"
#include "device.h"
#include "json.h"
#include "runner.h"
#include "timing.h"
#include "tool.h"

struct options {
    const char *in[SLOT_COUNT], *out[SLOT_COUNT]; /* file by slot; NULL: not given */
    struct extents window, stride, dilation;
    const char *edge, *kernel, *lengths, *kv_lengths;
    double scale;
    int device, threads;
    bool tf32, json;
};

/* One pass of the work: its tensors are files, or memory of our own where only the backward needs them. */
struct work {
    const struct options *options;
    struct problem problem; /* of the forward */
    nbhd_desc tensors;      /* whose tensors they are (problem_tensors) */
    struct array in[SLOT_COUNT];
    struct output out[SLOT_COUNT];
    struct outputs *files;
    void *own[SLOT_COUNT];
    nbhd_args args;
    double ms, plan_ms;
    char kernels[160];
};

static int parse(int argc, char **argv, struct options *o)
{
    const struct option table[] = {
        opt_text("out", 'o', &o->out[SLOT_O], "FILE", "the output, [batch, axes, heads, head_dim of V]"),
        opt_text("lse", 0, &o->out[SLOT_LSE], "FILE", "the logsumexp, float32 [batch, axes, heads]"),
        opt_extents("window", 'w', &o->window, "7x7", "keys that a query sees per axis, or 7 for all axes (all)"),
        opt_extents("stride", 's', &o->stride, "1x1", "neighbouring queries that share a window (1)"),
        opt_extents("dilation", 'r', &o->dilation, "1x1", "step between keys (1)"),
        opt_text("edge", 'e', &o->edge, "nn", "a letter per axis: n nearest, c causal, t truncated, p periodic (n)"),
        opt_text("lengths", 'l', &o->lengths, "30x40,16x16",
                 "ragged: the grids that lie one after the other in Q, K and V"),
        opt_text("kv-lengths", 0, &o->kv_lengths, "8x8,9x5", "ragged: those in K and V, where they are others"),
        opt_real("scale", 0, &o->scale, -FLT_MAX, FLT_MAX, "X", "factor on q.k (head_dim^-1/2)"),
        opt_flag("tf32", 0, &o->tf32, "float32 may be multiplied as TF32, on a GPU's tensor cores"),
        opt_text("extra-k", 0, &o->in[SLOT_EXTRA_K], "FILE",
                 "keys that every query sees, [batch, N, kv heads, head_dim]"),
        opt_text("extra-v", 0, &o->in[SLOT_EXTRA_V], "FILE", "their values"),
        opt_text("bias", 0, &o->in[SLOT_BIAS], "FILE", "float32 [heads, 2 w0 - 1, ...], added by relative position"),
        opt_text("grad-out", 0, &o->in[SLOT_DOUT], "FILE", "gradient of the output: asks for the backward"),
        opt_text("grad-lse", 0, &o->in[SLOT_DLSE], "FILE", "gradient of the logsumexp (none)"),
        opt_text("dq", 0, &o->out[SLOT_DQ], "FILE", "gradient of Q"),
        opt_text("dk", 0, &o->out[SLOT_DK], "FILE", "gradient of K"),
        opt_text("dv", 0, &o->out[SLOT_DV], "FILE", "gradient of V"),
        opt_text("dextra-k", 0, &o->out[SLOT_DEXTRA_K], "FILE", "gradient of the extra keys"),
        opt_text("dextra-v", 0, &o->out[SLOT_DEXTRA_V], "FILE", "gradient of the extra values"),
        opt_text("dbias", 0, &o->out[SLOT_DBIAS], "FILE", "gradient of the biases"),
        opt_choice("device", 'd', &o->device, device_choices, "NAME", "cpu or cuda (cpu)"),
        opt_text("kernel", 'k', &o->kernel, "NAME", "this kernel, as `nbhd list` names it, and no other"),
        opt_int("threads", 't', &o->threads, 1, 4096, "N", "CPU threads (all)"),
        opt_flag("json", 0, &o->json, "print the problem, kernel and times as a line of JSON"),
        opt_end(),
    };
    const struct usage usage = {
        .synopsis = "nbhd run Q K V -o OUT [OPTIONS]",
        .about = "Computes neighborhood attention over tensors in files. A tensor is FILE.npy (float16, 32, 64) or\n"
                 "FILE.safetensors:NAME (bfloat16 too), laid out [batch, axis0(, axis1(, axis2)), heads, head_dim]. K and V\n"
                 "may have fewer heads than Q, and V another head_dim. Outputs have the inputs' type, and may share a\n"
                 ".safetensors file. Inputs are mapped, not loaded (a .npy in Fortran order or big-endian is copied);\n"
                 "outputs get their names when they are whole.\n"
                 "One number, or letter, given for an option of the axes is for all of them.\n"
                 "With --lengths the tensors are [tokens, heads, head_dim]: grids of those lengths, packed; *N repeats one.\n"
                 "With --grad-out the gradients named by --dq, --dk, --dv ... are computed, beside or instead of -o.\n\n"
                 "  nbhd run q.npy k.npy v.npy -o o.npy --window 7x7\n"
                 "  nbhd run m.safetensors:q m.safetensors:k m.safetensors:v -o out.safetensors:o --window 18x24x24 --edge cnn",
        .options = table,
        .operands_min = 3,
        .operands_max = 3,
        .operands_name = "three tensors, Q K V",
    };
    int count;
    int status = args_parse(&usage, argc, argv, &count);
    for (int i = 0; status == ARGS_GO_ON && i < 3; i++)
        o->in[SLOT_Q + i] = argv[i];
    return status;
}

static const char *option_name(int slot)
{
    static const char *const names[SLOT_COUNT] = {
        [SLOT_Q] = "Q", [SLOT_K] = "K", [SLOT_V] = "V", [SLOT_O] = "--out", [SLOT_LSE] = "--lse",
        [SLOT_EXTRA_K] = "--extra-k", [SLOT_EXTRA_V] = "--extra-v", [SLOT_DOUT] = "--grad-out",
        [SLOT_DLSE] = "--grad-lse", [SLOT_DQ] = "--dq", [SLOT_DK] = "--dk", [SLOT_DV] = "--dv",
        [SLOT_DEXTRA_K] = "--dextra-k", [SLOT_DEXTRA_V] = "--dextra-v", [SLOT_BIAS] = "--bias", [SLOT_DBIAS] = "--dbias"};
    return names[slot];
}

static bool is_gradient(int slot) { return (slot >= SLOT_DQ && slot <= SLOT_DEXTRA_V) || slot == SLOT_DBIAS; }

/* Which options go together. */
static int check_options(const struct options *o)
{
    bool gradients = false, results = o->out[SLOT_O] || o->out[SLOT_LSE];
    for (int slot = 0; slot < SLOT_COUNT; slot++)
        if (o->out[slot] && is_gradient(slot)) {
            gradients = true;
            if (!o->in[SLOT_DOUT])
                return tool_fail(TOOL_USAGE, "%s needs --grad-out, the gradient that it starts from",
                                 option_name(slot));
        }
    if (!o->in[SLOT_EXTRA_K] != !o->in[SLOT_EXTRA_V])
        return tool_fail(TOOL_USAGE, "--extra-k and --extra-v go together, and only one was given");
    if ((o->out[SLOT_DEXTRA_K] || o->out[SLOT_DEXTRA_V]) && !o->in[SLOT_EXTRA_K])
        return tool_fail(TOOL_USAGE, "gradients of extra keys need --extra-k and --extra-v");
    if (o->out[SLOT_DBIAS] && !o->in[SLOT_BIAS])
        return tool_fail(TOOL_USAGE, "--dbias needs --bias");
    if (o->in[SLOT_DLSE] && !o->in[SLOT_DOUT])
        return tool_fail(TOOL_USAGE, "--grad-lse needs --grad-out");
    if (o->in[SLOT_DOUT] && !gradients)
        return tool_fail(TOOL_USAGE, "--grad-out is given, but none of --dq, --dk, --dv says where a gradient goes");
    if (o->kv_lengths && !o->lengths)
        return tool_fail(TOOL_USAGE, "--kv-lengths needs --lengths, those of the queries");
    if (!results && !gradients)
        return tool_fail(TOOL_USAGE, "where should the result go? -o FILE.npy or -o FILE.safetensors:NAME");
    return TOOL_DONE;
}

static int open_inputs(struct work *w)
{
    int status = TOOL_DONE;
    for (int slot = 0; !status && slot < SLOT_COUNT; slot++)
        if (w->options->in[slot])
            status = array_open(&w->in[slot], w->options->in[slot]);
    return status;
}

static int extent(const struct options *o, int slot, long long n, int *value)
{
    if (n < 1 || n > 0x7fffffff)
        return tool_fail(TOOL_USAGE, "%s (%s): an extent of %lld is not between 1 and %d", option_name(slot),
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
            return tool_fail(TOOL_USAGE, "--edge: '%c' is none of n, c, t", letter);
        values[i] = (int)(found - letters);
    }
    return TOOL_DONE;
}

/* The axes of Q and K. */
static int describe_axes(struct work *w)
{
    const struct options *o = w->options;
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
static int describe_sequences(struct work *w)
{
    const struct options *o = w->options;
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

/* The problem, from the shapes of Q, K and V. Other tensors are compared with it afterwards. */
static int describe(struct work *w)
{
    const struct options *o = w->options;
    const struct array_info *q = &w->in[SLOT_Q].info, *k = &w->in[SLOT_K].info, *v = &w->in[SLOT_V].info;
    nbhd_desc *d = &w->problem.desc;
    *d = (nbhd_desc)NBHD_DESC_INIT;
    if (!o->lengths && (q->rank < 4 || q->rank > 6))
        return tool_fail(TOOL_USAGE,
                         "Q (%s) has %d axes; it must have 4 to 6: batch, one to three axes, heads, head_dim",
                         o->in[SLOT_Q], q->rank);
    if (o->lengths && q->rank != 3)
        return tool_fail(TOOL_USAGE, "Q (%s) has %d axes; with --lengths it must have 3: tokens, heads, head_dim", o->in[SLOT_Q],
                         q->rank);
    if (k->rank != q->rank || v->rank != q->rank)
        return tool_fail(TOOL_USAGE, "Q has %d axes, K has %d and V has %d; they must agree", q->rank, k->rank,
                         v->rank);
    d->dtype = q->dtype;
    d->threads = o->threads;
    if ((float)o->scale == 0)
        return tool_fail(TOOL_USAGE, "--scale: %g would make all keys weigh the same; it must be another number",
                         o->scale);
    d->scale = isnan(o->scale) ? 0 : (float)o->scale;
    d->tf32 = o->tf32;
    d->bias = o->in[SLOT_BIAS] != NULL;
    int status = o->lengths ? describe_sequences(w) : describe_axes(w);
    const int rank = d->rank;
    if (!status)
        status = extent(o, SLOT_Q, q->shape[q->rank - 2], &d->heads);
    if (!status)
        status = extent(o, SLOT_K, k->shape[q->rank - 2], &d->kv_heads);
    if (!status)
        status = extent(o, SLOT_Q, q->shape[q->rank - 1], &d->head_dim);
    if (!status)
        status = extent(o, SLOT_V, v->shape[q->rank - 1], &d->head_dim_v);
    const struct array_info *extra = &w->in[SLOT_EXTRA_K].info;
    if (!status && o->in[SLOT_EXTRA_K])
        status = extra->rank == 4 ? extent(o, SLOT_EXTRA_K, extra->shape[1], &d->extra)
                                  : tool_fail(TOOL_USAGE,
                                              "--extra-k (%s) has %d axes; it must have 4: batch, tokens, heads, "
                                              "head_dim",
                                              o->in[SLOT_EXTRA_K], extra->rank);
    if (!status)
        status = per_axis("window", &o->window, rank, d->window);
    if (!status)
        status = per_axis("stride", &o->stride, rank, d->stride);
    if (!status)
        status = per_axis("dilation", &o->dilation, rank, d->dilation);
    return status || !o->edge ? status : edges(o->edge, rank, d->edge);
}

/* The legality of every sequence's problem, and then of which tensors they are. */
static int check_problem(struct work *w)
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

/* A file's array: of a ragged batch [tokens, heads, head_dim], and [sequences, extra, ...]. */
static int array_shape(const struct work *w, int slot, long long shape[6])
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

/* Every input has the shape and type that the problem gives it. */
static int check_inputs(const struct work *w)
{
    char have[ARRAY_RANK * 21], want[ARRAY_RANK * 21];
    for (int slot = 0; slot < SLOT_COUNT; slot++) {
        if (!w->options->in[slot])
            continue;
        long long shape[6];
        const struct array_info *info = &w->in[slot].info;
        int rank = array_shape(w, slot, shape), dtype = slot_dtype(&w->tensors, slot);
        if (info->rank != rank || memcmp(info->shape, shape, (size_t)rank * sizeof *shape))
            return tool_fail(TOOL_USAGE, "%s (%s) is %s; with Q, K and V as they are it must be %s", option_name(slot),
                             w->options->in[slot], shape_text(info->shape, info->rank, have),
                             shape_text(shape, rank, want));
        if (info->dtype != dtype)
            return tool_fail(TOOL_USAGE, "%s (%s) is %s; it must be %s%s", option_name(slot), w->options->in[slot],
                             dtype_name(info->dtype), dtype_name(dtype),
                             slot == SLOT_DLSE || slot == SLOT_BIAS ? "" : ", as Q is");
    }
    return TOOL_DONE;
}

static int open_outputs(struct work *w)
{
    struct output list[SLOT_COUNT];
    int slots[SLOT_COUNT], count = 0;
    for (int slot = 0; slot < SLOT_COUNT; slot++) {
        if (!w->options->out[slot])
            continue;
        slots[count] = slot;
        list[count] = (struct output){.spec = w->options->out[slot], .dtype = slot_dtype(&w->tensors, slot)};
        list[count].rank = array_shape(w, slot, list[count].shape);
        count++;
    }
    int status = outputs_open(&w->files, list, count);
    for (int i = 0; !status && i < count; i++)
        w->out[slots[i]] = list[i];
    return status;
}

/* Points args at files for what pass reads and writes, and at memory of our own for the rest that it must have. */
static int fill_args(struct work *w, int pass)
{
    nbhd_desc desc = w->tensors;
    desc.pass = pass;
    int status = TOOL_DONE;
    for (int slot = 0; !status && slot < SLOT_COUNT; slot++) {
        bool needed = slot_use(&desc, slot) != SLOT_UNUSED && slot != SLOT_DLSE && slot != SLOT_DBIAS;
        if (slot == SLOT_LSE && !w->options->in[SLOT_DOUT])
            needed = false;
        void *data = w->in[slot].data ? w->in[slot].data : w->out[slot].data;
        if (!data && needed && !w->own[slot])
            status = device_alloc(NBHD_DEVICE_CPU, slot_bytes(&desc, slot), &w->own[slot]);
        slot_tensor(&w->args, slot)->data = data ? data : w->own[slot];
    }
    return status;
}

/* A kernel's name begins with its device and pass, so --kernel says which of the two passes it is for. */
static const char *kernel_for(const char *kernel, int pass, bool both)
{
    bool forward = kernel && strstr(kernel, ".fwd") != NULL;
    return !both || forward == (pass == NBHD_FORWARD) ? kernel : NULL;
}

static int run_pass(struct work *w, int pass)
{
    struct runner runner;
    int status = fill_args(w, pass);
    if (status)
        return status;
    const char *kernel = kernel_for(w->options->kernel, pass, w->options->in[SLOT_DOUT] != NULL);
    status = runner_open_problem(&runner, &w->problem, pass, (nbhd_device)w->options->device, kernel);
    if (status)
        return status;
    double begun = now_ms();
    status = runner_run(&runner, &w->args);
    w->ms += now_ms() - begun;
    w->plan_ms += runner.plan_ms;
    size_t n = strlen(w->kernels);
    snprintf(w->kernels + n, sizeof w->kernels - n, "%s%s", n ? " " : "", nbhd_plan_kernel(runner.plan));
    runner_close(&runner);
    return status;
}

static void report(struct work *w)
{
    w->problem.desc.pass = w->options->in[SLOT_DOUT] ? NBHD_BACKWARD : NBHD_FORWARD;
    struct json j = json_begin();
    json_text(&j, "line", problem_write_line(&w->problem) == TOOL_DONE ? w->problem.line : NULL);
    json_text(&j, "kernel", w->kernels);
    json_text(&j, "device", device_choices[w->options->device]);
    json_real(&j, "ms", w->ms);
    json_real(&j, "plan_ms", w->plan_ms);
    json_end(&j);
}

static int run(int argc, char **argv)
{
    struct options o = {.scale = NAN};
    int status = parse(argc, argv, &o);
    if (status != ARGS_GO_ON)
        return status;
    struct work w = {.options = &o, .args = NBHD_ARGS_INIT};
    status = check_options(&o);
    if (!status)
        status = open_inputs(&w);
    if (!status)
        status = describe(&w);
    if (!status)
        status = check_problem(&w);
    if (!status)
        status = check_inputs(&w);
    if (!status)
        status = open_outputs(&w);
    if (!status)
        status = run_pass(&w, NBHD_FORWARD);
    if (!status && o.in[SLOT_DOUT])
        status = run_pass(&w, NBHD_BACKWARD);
    if (!status && (status = outputs_commit(&w.files)) == TOOL_DONE && o.json)
        report(&w);
    outputs_abandon(&w.files);
    problem_release(&w.problem);
    for (int slot = 0; slot < SLOT_COUNT; slot++) {
        array_close(&w.in[slot]);
        device_free(NBHD_DEVICE_CPU, w.own[slot]);
    }
    return status;
}

const struct command cmd_run = {"run", "attention over tensors in .npy and .safetensors files", run};
