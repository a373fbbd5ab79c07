#!/usr/bin/env python3
"""PyTorch's CPU attention beside nbhd's, forward and backward, on the same problem lines.

    PYTHONPATH=python python bench/peers/torch_cpu.py [--threads 1] [--methods nbhd,dense,gemm,mask,flex]
        [LINE ... | @FILE]

Needs: pip install torch==2.13.0 (its CPU build will do) and a built libnbhd.so. Per line: the time of nbhd's planned
kernel, of scaled_dot_product_attention without a mask (dense: other results, the usual alternative), with the
neighborhood as a boolean mask, of compiled flex_attention with a block mask, and of a square matrix product of as many
FLOPs (gemm). Backward lines: the gradients of q, k and v alone, after a forward that is not timed. Useful GFLOP/s count visible pairs only, for every method of attention. The methods take turns, as clocks
and neighbours change. The mask is read from the library (nbhd_desc_keys), not computed here. Results are compared.
"""
import argparse
import ctypes
import functools
import statistics
import time

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from nbhd import _lib

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def parse(line):
    desc = _lib.Desc()
    desc.size = ctypes.sizeof(desc)
    _lib.check(_lib.library().nbhd_desc_parse(ctypes.byref(desc), line.encode()))
    return desc


def lines_of(operands):
    for operand in operands:
        if not operand.startswith("@"):
            yield operand
            continue
        with open(operand[1:]) as file:
            for line in file:
                if line.split("#")[0].strip():
                    yield line.split("#")[0].strip()


def axis_mask(desc, axis):
    """[length, keys] of one axis: what each query sees."""
    length = desc.length[axis]
    keys = desc.kv_length[axis] or length
    first, count = ctypes.c_int(), ctypes.c_int()
    mask = torch.zeros(length, keys, dtype=torch.bool)
    for query in range(length):
        _lib.check(_lib.library().nbhd_desc_keys(ctypes.byref(desc), axis, query, ctypes.byref(first),
                                                 ctypes.byref(count)))
        step = desc.dilation[axis] or 1
        end = first.value + count.value * step
        mask[query, first.value:end:step] = True
        if end - step >= keys: # a periodic axis goes on at its group's first token
            beyond = (end - 1 - query % step) // step + 1 - len(range(query % step, keys, step))
            mask[query, query % step:query % step + beyond * step:step] = True
    return mask


def dense_mask(masks):
    """[tokens, keys]: a token sees a key if it does on every axis."""
    whole = masks[0]
    for mask in masks[1:]:
        whole = (whole[:, None, :, None] & mask[None, :, None, :]).reshape(whole.shape[0] * mask.shape[0], -1)
    return whole


def mask_mod(masks, extents):
    """The same for flex_attention, by looking each axis up in its own small table."""
    def sees(b, h, query, key):
        result = None
        for axis in reversed(range(len(masks))):
            term = masks[axis][query % extents[axis], key % extents[axis]]
            result = term if result is None else result & term
            query, key = query // extents[axis], key // extents[axis]
        return result
    return sees


def time_of(function, seconds):
    """The fastest call of as many as the seconds allow, two at least."""
    best, begun, calls = float("inf"), time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def planned_call(desc, pass_, threads, **tensors):
    """A call of nbhd's kernel for that pass."""
    own = _lib.Desc.from_buffer_copy(desc)
    own.pass_, own.threads = pass_, threads
    plan = _lib.Plan(own, _lib.CPU, 0, None)
    args = _lib.Args(size=ctypes.sizeof(_lib.Args))
    room = torch.empty(plan.workspace + 64, dtype=torch.uint8)
    workspace = (room.data_ptr() + 63) // 64 * 64
    for name, tensor in tensors.items():
        getattr(args, name).data = tensor.data_ptr()

    def run(keep=(room, tensors)):  # they live as long as the function
        plan.execute(args, workspace)
    return run


def nbhd_method(desc, q, k, v, dout, threads):
    """A call that returns the output, or the gradient of q."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:-1])
    forward = planned_call(desc, _lib.FORWARD, threads, q=q, k=k, v=v, o=out, lse=lse)
    if desc.pass_ == _lib.FORWARD:
        return lambda: (forward(), out)[1]
    forward()
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    backward = planned_call(desc, _lib.BACKWARD, threads, q=q, k=k, v=v, o=out, lse=lse, dout=dout, dq=dq, dk=dk, dv=dv)
    return lambda: (backward(), dq)[1]


def torch_method(desc, attention, q, k, v, dout):
    """The same of PyTorch's."""
    if desc.pass_ == _lib.FORWARD:
        return lambda: attention(q, k, v)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = attention(*inputs)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)[0]


def gemm_method(flops, dtype):
    """A square matrix product of about as many FLOPs: what attention could reach if it were nothing else."""
    n = max(64, round((flops / 2) ** (1 / 3) / 64) * 64)
    left, right = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return lambda: left @ right, 2.0 * n ** 3


def methods_of(desc, line, names, threads, flops):
    """Of each method: its name, a call, its FLOPs, and how its result becomes [batch, axes, heads, dim] (None: it
    computes something else)."""
    rank = desc.rank
    extents = list(desc.length[:rank])
    batch, heads = desc.batch or 1, desc.heads or 1
    if desc.extra or desc.kv_heads not in (0, heads) or desc.bias:
        raise SystemExit(f"'{line}': this comparison has no extra keys, grouped heads or bias")
    shape = [batch, *extents, heads, desc.head_dim]
    dtype = DTYPES[line.split()[1]]
    q, k, v, dout = (torch.randn(shape).to(dtype) for _ in range(4))
    # [batch, heads, tokens, dim], each head's tokens together, as torch has it fastest
    flat = [x.flatten(1, rank).transpose(1, 2).contiguous() for x in (q, k, v, dout)]
    masks = [axis_mask(desc, axis) for axis in range(rank)]

    def unflat(x):
        return x.transpose(1, 2).reshape(shape)
    for name in names:
        if name == "nbhd":
            yield name, nbhd_method(desc, q, k, v, dout, threads), flops, lambda x: x
        elif name == "dense":
            same = all(mask.all() for mask in masks)
            yield name, torch_method(desc, scaled_dot_product_attention, *flat), flops, unflat if same else None
        elif name == "gemm":
            run, own = gemm_method(flops, dtype)
            yield name, run, own, None
        elif name == "mask":
            whole = dense_mask(masks)
            masked = functools.partial(scaled_dot_product_attention, attn_mask=whole)
            yield name, torch_method(desc, masked, *flat), flops, unflat
        elif name == "flex":
            tokens = flat[0].shape[2]
            block = create_block_mask(mask_mod(masks, extents), None, None, tokens, tokens, device="cpu")
            compiled = torch.compile(flex_attention)
            yield name, torch_method(desc, functools.partial(compiled, block_mask=block), *flat), flops, unflat


def compare(line, args):
    desc = parse(line)
    flops = _lib.library().nbhd_desc_flops(ctypes.byref(desc))
    print(line, flush=True)
    methods, differs, right = [], {}, None
    for method in methods_of(desc, line, args.methods.split(","), args.threads, flops):
        name, run, _, view = method
        try:
            result = run()  # to warm up, and to compare
        except (RuntimeError, NotImplementedError) as error:
            print(f"  {name:6s} does not run: {str(error).splitlines()[0]}", flush=True)
            continue
        methods.append(method)
        if view:
            right = view(result).float() if right is None else right
            differs[name] = f", differs by {(view(result) - right).abs().max():.1e}"
    times = {name: [] for name, _, _, _ in methods}
    for _ in range(args.rounds):
        for name, run, _, _ in methods:
            times[name].append(time_of(run, args.seconds))
    for name, _, own, _ in methods:
        best, median = min(times[name]), statistics.median(times[name])
        print(f"  {name:6s} {best * 1e3:10.3f} ms ({own / best * 1e-9:6.1f}), {median * 1e3:10.3f} "
              f"({own / median * 1e-9:6.1f}){differs.get(name, '')}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", default=["@bench/shapes/cpu.txt"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", default="nbhd,dense,mask,flex")
    parser.add_argument("--seconds", type=float, default=0.5, help="per method and round")
    parser.add_argument("--rounds", type=int, default=3, help="in which the methods take turns")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads; the best round's ms (GFLOP/s), the median round's")
    with torch.no_grad():
        for line in lines_of(args.lines):
            compare(line, args)


if __name__ == "__main__":
    main()
