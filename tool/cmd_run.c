/* nbhd run: attention over tensors in files, forward and backward. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "json.h"
#include "run.h"
#include "runner.h"
#include "timing.h"
#include "tool.h"

static int parse(int argc, char **argv, struct run_options *o)
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
        opt_deterministic(&o->deterministic),
        opt_flag("json", 0, &o->json, "print the problem, kernel and times as a line of JSON"),
        opt_end(),
    };
    const struct usage usage = {
        .synopsis = "nbhd run Q K V -o OUT [OPTIONS]",
        .about = "Computes neighborhood attention over tensors in files. A tensor is FILE.npy (float16, 32, 64) or\n"
                 "FILE.safetensors:NAME (bfloat16 too), laid out [batch, axis0(, axis1(, axis2)), heads, head_dim].\n"
                 "NAME may be left out where the file holds one tensor; of an output it is then o.\n"
                 "K and V may have fewer heads than Q, and V another head_dim. Outputs have the inputs' type, and\n"
                 "may share a .safetensors file. Inputs are mapped, not loaded (a .npy in Fortran order or\n"
                 "big-endian is copied); outputs get their names when they are whole.\n"
                 "One number, or letter, given for an option of the axes is for all of them.\n"
                 "With --lengths the tensors are [tokens, heads, head_dim]: grids of those lengths, packed; *N\n"
                 "repeats one. With --grad-out the gradients named by --dq, --dk, --dv ... are computed, beside or\n"
                 "instead of -o.\n\n"
                 "  nbhd run q.npy k.npy v.npy -o o.npy --window 7x7\n"
                 "  nbhd run m.safetensors:q m.safetensors:k m.safetensors:v -o out.safetensors:o \\\n"
                 "      --window 18x24x24 --edge cnn",
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

static bool is_gradient(int slot) { return (slot >= SLOT_DQ && slot <= SLOT_DEXTRA_V) || slot == SLOT_DBIAS; }

/* Which options go together. */
static int check_options(const struct run_options *o)
{
    bool gradients = false, results = o->out[SLOT_O] || o->out[SLOT_LSE];
    for (int slot = 0; slot < SLOT_COUNT; slot++)
        if (o->out[slot] && is_gradient(slot)) {
            gradients = true;
            if (!o->in[SLOT_DOUT])
                return tool_fail(TOOL_USAGE, "%s needs --grad-out, the gradient that it starts from",
                                 run_option_name(slot));
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

static int open_inputs(struct run_work *w)
{
    int status = TOOL_DONE;
    for (int slot = 0; !status && slot < SLOT_COUNT; slot++)
        if (w->options->in[slot])
            status = array_open(&w->in[slot], w->options->in[slot]);
    return status;
}

static int open_outputs(struct run_work *w)
{
    struct output list[SLOT_COUNT];
    int slots[SLOT_COUNT], count = 0;
    for (int slot = 0; slot < SLOT_COUNT; slot++) {
        if (!w->options->out[slot])
            continue;
        slots[count] = slot;
        list[count] = (struct output){.spec = w->options->out[slot], .dtype = slot_dtype(&w->tensors, slot)};
        list[count].rank = run_array_shape(w, slot, list[count].shape);
        count++;
    }
    int status = TOOL_DONE;
    for (int slot = 0; slot < SLOT_COUNT && !status; slot++)
        if (w->options->in[slot])
            status = outputs_spare(w->options->in[slot], list, count);
    if (!status)
        status = outputs_open(&w->files, list, count);
    for (int i = 0; !status && i < count; i++)
        w->out[slots[i]] = list[i];
    return status;
}

/* Points args at files for what pass reads and writes, and at memory of our own for the rest that it must have. */
static int fill_args(struct run_work *w, int pass)
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

static int run_pass(struct run_work *w, int pass)
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

static void report(struct run_work *w)
{
    w->problem.desc.pass = w->options->in[SLOT_DOUT] ? NBHD_BACKWARD : NBHD_FORWARD;
    struct json j = json_begin();
    json_text(&j, "line", problem_write_line(&w->problem) == TOOL_DONE ? w->problem.line : NULL);
    json_text(&j, "kernel", w->kernels);
    json_text(&j, "device", device_choices[w->options->device]);
    json_bool(&j, "deterministic", w->options->deterministic);
    json_real(&j, "ms", w->ms);
    json_real(&j, "plan_ms", w->plan_ms);
    json_end(&j);
}

static int run(int argc, char **argv)
{
    struct run_options o = {.scale = NAN};
    int status = parse(argc, argv, &o);
    if (status != ARGS_GO_ON)
        return status;
    struct run_work w = {.options = &o, .args = NBHD_ARGS_INIT};
    status = check_options(&o);
    if (!status)
        status = open_inputs(&w);
    if (!status)
        status = run_describe(&w);
    if (!status)
        status = run_check_problem(&w);
    if (!status)
        status = run_check_inputs(&w);
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
