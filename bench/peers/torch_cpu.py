#!/usr/bin/env python3
"""PyTorch's CPU attention beside nbhd's CPU forward, on the same problem lines.

    PYTHONPATH=python python bench/peers/torch_cpu.py [--threads 1] [--methods nbhd,dense,mask,flex] [LINE ... | @FILE]

Needs: pip install torch==2.13.0 (its CPU build will do) and a built libnbhd.so. Per line: the time of nbhd's planned
kernel, of scaled_dot_product_attention without a mask (dense: other results, the usual alternative), with the
neighborhood as a boolean mask, and of compiled flex_attention with a block mask. Useful GFLOP/s count visible pairs
only, for every method. The mask is read from the library (nbhd_desc_keys), not computed here. Results are compared.
"""
import argparse
import ctypes
import time

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from nbhd import _lib


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


def fastest(function, seconds):
    function()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def nbhd_method(desc, q, k, v, threads):
    desc.threads = threads
    plan = _lib.Plan(desc, _lib.CPU, 0, None)
    args, out = _lib.Args(), torch.empty_like(q)
    room = torch.empty(plan.workspace + 64, dtype=torch.uint8)
    workspace = (room.data_ptr() + 63) // 64 * 64
    args.size = ctypes.sizeof(args)
    for name, tensor in (("q", q), ("k", k), ("v", v), ("o", out)):
        getattr(args, name).data = tensor.data_ptr()

    def run(keep=room):  # the workspace lives as long as the function
        plan.execute(args, workspace)
        return out
    return run


def methods_of(desc, line, names, threads):
    rank = desc.rank
    extents = list(desc.length[:rank])
    batch, heads = desc.batch or 1, desc.heads or 1
    if desc.extra or desc.kv_heads not in (0, heads) or desc.bias:
        raise SystemExit(f"'{line}': this comparison has no extra keys, grouped heads or bias")
    shape = [batch, *extents, heads, desc.head_dim]
    q, k, v = (torch.randn(shape) for _ in range(3))
    flat = [x.flatten(1, rank).transpose(1, 2) for x in (q, k, v)]  # [batch, heads, tokens, dim], no copy
    masks = [axis_mask(desc, axis) for axis in range(rank)]

    def unflat(x):
        return x.transpose(1, 2).reshape(shape)
    for name in names:
        if name == "nbhd":
            yield name, nbhd_method(desc, q, k, v, threads), lambda x: x
        elif name == "dense":
            yield name, lambda: scaled_dot_product_attention(*flat), None
        elif name == "mask":
            whole = dense_mask(masks)
            yield name, lambda: scaled_dot_product_attention(*flat, attn_mask=whole), unflat
        elif name == "flex":
            tokens = flat[0].shape[2]
            block = create_block_mask(mask_mod(masks, extents), None, None, tokens, tokens, device="cpu")
            compiled = torch.compile(flex_attention)
            yield name, lambda: compiled(*flat, block_mask=block), unflat


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", default=["@bench/shapes/cpu.txt"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", default="nbhd,dense,mask,flex")
    parser.add_argument("--seconds", type=float, default=1.0, help="per method and line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads; ms (useful GFLOP/s)")
    for line in lines_of(args.lines):
        desc = parse(line)
        flops = _lib.library().nbhd_desc_flops(ctypes.byref(desc))
        print(line, flush=True)
        right = None
        for name, run, view in methods_of(desc, line, args.methods.split(","), args.threads):
            try:
                with torch.no_grad():
                    seconds = fastest(run, args.seconds)
                    result = view(run()) if view else None
            except (RuntimeError, NotImplementedError) as error:
                print(f"  {name:6s} does not run: {str(error).splitlines()[0]}", flush=True)
                continue
            differs = ""
            if result is not None:
                right = result.clone() if right is None else right
                differs = f", differs by {(result - right).abs().max():.1e}"
            print(f"  {name:6s} {seconds * 1e3:10.3f} ({flops / seconds * 1e-9:6.1f}){differs}", flush=True)


if __name__ == "__main__":
    main()
