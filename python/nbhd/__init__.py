"""Neighborhood attention: each token of a sequence, image or video attends to a window of its nearest neighbours.

    import nbhd
    out = nbhd.attention(q, k, v, window=(13, 13))          # NumPy arrays, or PyTorch tensors (differentiable)

Tensors are [batch, axis0(, axis1(, axis2)), heads, head_dim]. What a token sees is defined in docs/mask.md.
"""

from . import _lib
from ._lib import InvalidError, NbhdError

__all__ = ["attention", "attention_varlen", "InvalidError", "NbhdError", "version"]


def version():
    return _lib.library().nbhd_version()


def attention(q, k, v, window=None, *, stride=1, dilation=1, edge="nearest", scale=None, extra_kv=None, bias=None,
              tf32=False, return_lse=False, kernel=None):
    """o[i] = sum over the neighbours j of i of softmax_j(scale q_i.k_j + bias) v_j.

    q: [batch, axes..., heads, head_dim]; k, v: the same axes (or others: cross attention), heads may be fewer (a divisor).
    window, stride, dilation: an int or one per axis. window None: the whole axis.
    edge: "nearest", "causal" or "truncated", one for all axes or one per axis.
    extra_kv: (k, v) of shape [batch, extra, kv_heads, dim], seen by every query.
    bias: float32 [heads, 2 w0 - 1, ...], added to the scores by relative position.
    tf32: True lets a GPU's tensor cores round the operands of float32 products to TF32, 5 to 10 times as fast; the result then
        has errors of about 1e-3 of its size, as float16 has. Other types, and the CPU, are not affected.
    Returns o, or (o, lse) with lse float32 [batch, axes..., heads], natural logarithm.
    """
    options = dict(window=window, stride=stride, dilation=dilation, edge=edge, scale=scale, tf32=tf32,
                   kernel=kernel)
    if type(q).__module__.startswith("torch"):
        from . import torch as backend
    else:
        from . import numpy as backend
    o, lse = backend.attention(q, k, v, extra_kv, bias, options)
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
    options = dict(window=window, stride=stride, dilation=dilation, edge=edge, scale=scale, tf32=tf32,
                   kernel=kernel)
    if type(q).__module__.startswith("torch"):
        from . import torch as backend
    else:
        from . import numpy as backend
    o, lse = backend.attention(q, k, v, extra_kv, bias, options, sequences)
    return (o, lse) if return_lse else o
