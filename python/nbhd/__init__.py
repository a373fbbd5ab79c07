"""Neighborhood attention: each token of a sequence, image or video attends to a window of its nearest neighbours.

    import nbhd
    out = nbhd.attention(q, k, v, window=(13, 13))          # NumPy arrays, or PyTorch tensors (differentiable)

Tensors are [batch, axis0(, axis1(, axis2)), heads, head_dim]. What a token sees is defined in docs/mask.md; docs/python.md has
all functions, and how NATTEN's are written with them.
"""

import sys

from . import _lib
from ._lib import InvalidError, NbhdError, UnsupportedError

__all__ = ["attention", "attention_varlen", "qk", "av", "merge", "InvalidError", "NbhdError", "UnsupportedError", "version"]


def version():
    """Of the C library: 10000 major + 100 minor + patch."""
    return _lib.library().nbhd_version()


def _backend(q, **others):
    """The module for q's kind of tensor, which all others must be of."""
    torch = sys.modules.get("torch")
    kind = torch.Tensor if torch and isinstance(q, torch.Tensor) else None
    if not kind:
        import numpy
        kind = numpy.ndarray
    for name, tensor in {"q": q, **others}.items():
        if tensor is not None and not isinstance(tensor, kind):
            raise TypeError(f"{name} is a {type(tensor).__name__}; q, k, v and what goes with them must all be NumPy arrays, or all "
                            "PyTorch tensors")
    if torch and kind is torch.Tensor:
        from . import torch as backend
    else:
        from . import numpy as backend
    return backend


def _rank(name, tensor):
    """The number of axes of a tensor [batch, axes..., heads, head_dim]."""
    if not 4 <= tensor.ndim <= 6:
        raise InvalidError(1, f"{name} has {tensor.ndim} extents; it must have 4 to 6: [batch, 1 to 3 axes, heads, head_dim]")
    return tensor.ndim - 3


def _options(rank, window, stride, dilation, edge, scale, tf32, kernel):
    return dict(window=_lib.per_axis(window, rank, "window"), stride=_lib.per_axis(stride, rank, "stride"),
                dilation=_lib.per_axis(dilation, rank, "dilation"), edge=_lib.edges_of(edge, rank), scale=_lib.scale_of(scale),
                tf32=bool(tf32), kernel=kernel)


def _attention(q, k, v, extra_kv, bias, options, sequences=None):
    extra = (None, None) if extra_kv is None else tuple(extra_kv)
    if len(extra) != 2 or (extra[0] is None) != (extra[1] is None):
        raise InvalidError(1, f"extra_kv is of {sum(one is not None for one in extra)} tensors; it must be a pair (k, v), or None")
    backend = _backend(q, k=k, v=v, extra_k=extra[0], extra_v=extra[1], bias=bias)
    rank = sequences.rank if sequences else _rank("q", q)
    return backend.attention(q, k, v, *extra, bias, _options(rank, **options), sequences)


def attention(q, k, v, window=None, *, stride=1, dilation=1, edge="nearest", scale=None, extra_kv=None, bias=None,
              tf32=False, return_lse=False, kernel=None):
    """o[i] = sum over the neighbours j of i of softmax_j(scale q_i.k_j + bias) v_j.

    q: [batch, axes..., heads, head_dim]; k, v: the same axes (or others: cross attention), heads may be fewer (a divisor).
    window, stride, dilation: an int or one per axis. window None, for all or for an axis: the whole axis.
    edge: "nearest", "causal" or "truncated", one for all axes or one per axis.
    scale: factor on q.k, default head_dim ** -0.5.
    extra_kv: (k, v) of shape [batch, extra, kv_heads, dim], seen by every query.
    bias: float32 [heads, 2 w0 - 1, ...], added to the scores by relative position.
    tf32: True lets a GPU's tensor cores round the operands of float32 products to TF32, 5 to 10 times as fast; the result then
        has errors of about 1e-3 of its size, as float16 has. Other types, and the CPU, are not affected.
    kernel: a name as `nbhd list` prints it, and no other; the gradient is planned by itself.
    Returns o, or (o, lse) with lse float32 [batch, axes..., heads], natural logarithm.
    """
    o, lse = _attention(q, k, v, extra_kv, bias, dict(window=window, stride=stride, dilation=dilation, edge=edge, scale=scale,
                                                      tf32=tf32, kernel=kernel))
    return (o, lse) if return_lse else o


def attention_varlen(q, k, v, lengths, window=None, *, kv_lengths=None, offsets=None, kv_offsets=None, stride=1, dilation=1,
                     edge="nearest", scale=None, extra_kv=None, bias=None, tf32=False, return_lse=False, kernel=None):
    """attention() of sequences whose axes differ in length, each by itself: images of different sizes in one call.

    lengths: the axes of each sequence, [(30, 40), (16, 16), (9, 33)], or [120, 7, 56] of one axis; an array or tensor will do.
    q: packed [tokens, heads, head_dim], the sequences one after the other, each a grid in row-major order, or
       padded [sequences, axes..., heads, head_dim], each sequence at the lower end of every axis.
    offsets: packed: the first token of each sequence, where they do not follow each other; kv_offsets: in k and v.
    kv_lengths: cross attention; then window must be None where they differ.
    extra_kv: (k, v) of shape [sequences, extra, kv_heads, dim]. What belongs to no sequence is 0 in the result.
    A window must fit every sequence. All else, and the result, as attention(). docs/ragged.md tells more.
    """
    from ._ragged import Sequences
    sequences = Sequences.of(lengths, kv_lengths, offsets, kv_offsets)
    o, lse = _attention(q, k, v, extra_kv, bias, dict(window=window, stride=stride, dilation=dilation, edge=edge, scale=scale,
                                                      tf32=tf32, kernel=kernel), sequences)
    return (o, lse) if return_lse else o


def qk(q, k, window, *, stride=1, dilation=1, edge="nearest", scale=None, bias=None, kernel=None):
    """Scores: scale q_i.k_j + bias for each query i and the keys j of its window, [batch, axes..., heads, product of windows].

    Entries of a window that holds fewer keys (causal, truncated) are -inf. docs/unfused.md tells their order. Arguments as
    attention(); softmax over the last extent, then av(), gives what attention() gives.
    """
    backend = _backend(q, k=k, bias=bias)
    return backend.qk(q, k, bias, _options(_rank("q", q), window, stride, dilation, edge, scale, False, kernel))


def av(weights, v, window, *, stride=1, dilation=1, edge="nearest", kernel=None):
    """o[i] = sum over the window of i of weights[i, j] v_j, [batch, axes..., heads, head_dim of v]. weights: of qk()'s shape."""
    backend = _backend(weights, v=v)
    return backend.av(weights, v, _options(_rank("weights", weights), window, stride, dilation, edge, None, False, kernel))


def merge(outputs, lses):
    """Results over disjoint sets of keys, as attention(..., return_lse=True) gives them, into (o, lse) over all of them.

    outputs: [batch, axes..., heads, head_dim] each; lses: float32 [batch, axes..., heads] each. Differentiable on tensors.
    """
    outputs, lses = list(outputs), list(lses)
    if not outputs or len(outputs) != len(lses):
        raise InvalidError(1, f"merge has {len(outputs)} outputs and {len(lses)} lses; it needs as many of each, and one at least")
    parts = {f"outputs[{i}]": tensor for i, tensor in enumerate(outputs)} | {f"lses[{i}]": tensor for i, tensor in enumerate(lses)}
    for i, (o, lse) in enumerate(zip(outputs, lses)):
        if o.shape != outputs[0].shape or tuple(lse.shape) != tuple(o.shape[:-1]) or o.dtype != outputs[0].dtype:
            raise InvalidError(1, f"outputs[{i}] and lses[{i}] have the shapes {tuple(o.shape)} and {tuple(lse.shape)}; they must be "
                                  f"{tuple(outputs[0].shape)} and {tuple(outputs[0].shape[:-1])}, and all outputs of one type")
    return _backend(outputs[0], **parts).merge(outputs, lses)
