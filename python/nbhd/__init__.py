"""Neighborhood attention: each token of a sequence, image or video attends to a window of its nearest neighbours.

    import nbhd
    out = nbhd.attention(q, k, v, window=(13, 13))          # NumPy arrays, or PyTorch tensors (differentiable)

Tensors are [batch, axis0(, axis1(, axis2)), heads, head_dim]. What a token sees is defined in docs/mask.md;
docs/python.md has all functions, and how NATTEN's are written with them.
"""

import sys
from typing import Any, Optional, Sequence, Tuple, TypeVar, Union

from . import _lib
from ._lib import InvalidError, NbhdError, UnsupportedError

__all__ = ["attention", "attention_varlen", "qk", "av", "merge", "InvalidError", "NbhdError", "UnsupportedError",
           "version"]

Array = TypeVar("Array")  # numpy.ndarray or torch.Tensor
PerAxis = Union[int, Sequence[int]]
Window = Union[None, int, Sequence[Optional[int]]]
Edge = Union[str, Sequence[str]]
Lengths = Union[Sequence[int], Sequence[Sequence[int]], Any]  # or an array of one or two extents


__version__: str  # by __getattr__


def version() -> int:
    """Of the C library: 10000 major + 100 minor + patch."""
    return _lib.library().nbhd_version()


def __getattr__(name):
    if name == "__version__":  # asked for seldom: the library is loaded by what needs it
        number = version()
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _backend(**tensors):
    """The module for the tensors' kind, which is that of the first of them."""
    torch = sys.modules.get("torch")
    if torch and isinstance(next(iter(tensors.values())), torch.Tensor):
        from . import torch as backend
        kind = torch.Tensor
    else:
        from . import numpy as backend
        kind = backend.np.ndarray
    for name, tensor in tensors.items():
        if tensor is None and name in ("extra_k", "extra_v", "bias"):
            continue
        if not isinstance(tensor, kind):
            raise TypeError(f"{name} is a {type(tensor).__name__}; q, k, v and what goes with them must all be NumPy "
                            "arrays, or all PyTorch tensors")
        if getattr(tensor, "is_nested", False):
            raise InvalidError(f"{name} is a nested tensor; attention_varlen() takes its values() and the lengths")
        if name == "bias" and "complex" in str(tensor.dtype):  # float32 would be half of it
            raise InvalidError(f"bias is {tensor.dtype}; it must be float32")
        if name in ("extra_k", "extra_v") and tensor.ndim != 4:
            raise InvalidError(f"{name} has {tensor.ndim} extents; it must have 4: [batch, extra, kv_heads, head_dim]")
    return backend


def _rank(name, tensor):
    """The number of axes of a tensor [batch, axes..., heads, head_dim]."""
    if not 4 <= tensor.ndim <= 6:
        raise InvalidError(f"{name} has {tensor.ndim} extents; it must have 4 to 6: "
                           "[batch, 1 to 3 axes, heads, head_dim]")
    return tensor.ndim - 3


def _options(rank, window, stride, dilation, edge, scale, tf32, kernel):
    if not isinstance(kernel, (str, type(None))) or "\0" in (kernel or ""):
        raise InvalidError(f"kernel is {kernel!r}; it must be a name, or None")
    return dict(window=_lib.per_axis(window, rank, "window"), stride=_lib.per_axis(stride, rank, "stride"),
                dilation=_lib.per_axis(dilation, rank, "dilation"), edge=_lib.edges_of(edge, rank),
                scale=_lib.scale_of(scale), tf32=bool(tf32), kernel=kernel)


def _attention(q, k, v, extra_kv, bias, return_lse, sequences=None, **options):
    extra = (None, None) if extra_kv is None else tuple(extra_kv)
    if len(extra) != 2 or (extra[0] is None) != (extra[1] is None):
        raise InvalidError(f"extra_kv is of {sum(one is not None for one in extra)} tensors; it must be a pair (k, v), "
                           "or None")
    backend = _backend(q=q, k=k, v=v, extra_k=extra[0], extra_v=extra[1], bias=bias)
    rank = sequences.rank if sequences else _rank("q", q)
    o, lse = backend.attention(q, k, v, *extra, bias, _options(rank, **options), sequences)
    return (o, lse) if return_lse else o


def attention(q: Array, k: Array, v: Array, window: Window = None, *, stride: PerAxis = 1, dilation: PerAxis = 1,
              edge: Edge = "nearest", scale: Optional[float] = None, extra_kv: Optional[Tuple[Array, Array]] = None,
              bias: Optional[Array] = None, tf32: bool = False, return_lse: bool = False,
              kernel: Optional[str] = None) -> Union[Array, Tuple[Array, Array]]:
    """o[i] = sum over the neighbours j of i of softmax_j(scale q_i.k_j + bias) v_j.

    q: [batch, axes..., heads, head_dim]; k, v: the same axes (or others: cross attention), heads may be fewer (a
        divisor); v may have another head_dim. All float16, bfloat16 (PyTorch), float32 or float64, and of one type.
    window, stride, dilation: an int or one per axis. window None, for all or for an axis: the whole axis.
    edge: "nearest", "causal", "truncated" or "periodic", one for all axes or one per axis.
    scale: factor on q.k, default head_dim ** -0.5.
    extra_kv: (k, v) of shape [batch, extra, kv_heads, dim], seen by every query.
    bias: float32 [heads, 2 w0 - 1, ...], added to the scores by relative position; -inf hides keys.
    tf32: True lets a GPU's tensor cores round the operands of float32 products to TF32, 5 to 10 times as fast; the
        result then has errors of about 1e-3 of its size, as float16 has. Other types, and the CPU, are not affected.
    kernel: a name as `nbhd list` prints it, and no other; the gradient is planned by itself.
    Returns o [batch, axes..., heads, head_dim of v] of q's type, or (o, lse) with lse float32 [batch, axes..., heads],
        natural logarithm.
    Raises InvalidError, a ValueError, with the field and its value; UnsupportedError where no kernel takes the problem;
        TypeError where arrays and tensors are mixed.
    """
    return _attention(q, k, v, extra_kv, bias, return_lse, window=window, stride=stride, dilation=dilation, edge=edge,
                      scale=scale, tf32=tf32, kernel=kernel)


def attention_varlen(q: Array, k: Array, v: Array, lengths: Lengths, window: Window = None, *,
                     kv_lengths: Optional[Lengths] = None, offsets: Optional[Sequence[int]] = None,
                     kv_offsets: Optional[Sequence[int]] = None, stride: PerAxis = 1, dilation: PerAxis = 1,
                     edge: Edge = "nearest", scale: Optional[float] = None,
                     extra_kv: Optional[Tuple[Array, Array]] = None, bias: Optional[Array] = None, tf32: bool = False,
                     return_lse: bool = False, kernel: Optional[str] = None) -> Union[Array, Tuple[Array, Array]]:
    """attention() of sequences whose axes differ in length, each by itself: images of different sizes in one call.

    lengths: the axes of each sequence, [(30, 40), (16, 16), (9, 33)], or [120, 7, 56] of one axis; an array or tensor
        will do, but under torch.compile, which must know the numbers.
    q: packed [tokens, heads, head_dim], the sequences one after the other, each a grid in row-major order, or
       padded [sequences, axes..., heads, head_dim], each sequence at the lower end of every axis.
    offsets: packed: the first token of each sequence, where they do not follow each other; kv_offsets: in k and v.
    kv_lengths: cross attention; then window must be None where they differ.
    extra_kv: (k, v) of shape [sequences, extra, kv_heads, dim]. What belongs to no sequence is 0 in the result.
    A window must fit every sequence. All else, and the result, as attention(). docs/ragged.md tells more.
    """
    from ._ragged import Sequences
    sequences = Sequences.of(lengths, kv_lengths, offsets, kv_offsets)
    return _attention(q, k, v, extra_kv, bias, return_lse, sequences, window=window, stride=stride, dilation=dilation,
                      edge=edge, scale=scale, tf32=tf32, kernel=kernel)


def qk(q: Array, k: Array, window: Window, *, stride: PerAxis = 1, dilation: PerAxis = 1, edge: Edge = "nearest",
       scale: Optional[float] = None, bias: Optional[Array] = None, kernel: Optional[str] = None) -> Array:
    """Scores: scale q_i.k_j + bias for each query i and the keys j of its window.

    Returns [batch, axes..., heads, product of windows] of q's type; docs/unfused.md tells the order of the entries.
    Those past the end of a window that holds fewer keys (causal, truncated) are -inf. Arguments and errors as
    attention(); softmax over the last extent, then av(), gives what attention() gives.
    """
    backend = _backend(q=q, k=k, bias=bias)
    return backend.qk(q, k, bias, _options(_rank("q", q), window, stride, dilation, edge, scale, False, kernel))


def av(weights: Array, v: Array, window: Window, *, stride: PerAxis = 1, dilation: PerAxis = 1, edge: Edge = "nearest",
       kernel: Optional[str] = None) -> Array:
    """o[i] = sum over the window of i of weights[i, j] v_j: [batch, axes..., heads, head_dim of v].

    weights: [batch, axes..., heads, product of windows], of qk()'s shape and order. Other arguments and errors as
    attention().
    """
    backend = _backend(weights=weights, v=v)
    rank = _rank("weights", weights)
    return backend.av(weights, v, _options(rank, window, stride, dilation, edge, None, False, kernel))


def merge(outputs: Sequence[Array], lses: Sequence[Array]) -> Tuple[Array, Array]:
    """Results over disjoint sets of keys, as attention(..., return_lse=True) gives them, into (o, lse) over all.

    outputs: [batch, axes..., heads, head_dim] each; lses: float32 [batch, axes..., heads] each; 64 NumPy arrays at
    most. Differentiable on tensors.
    """
    outputs, lses = list(outputs), list(lses)
    if not outputs or len(outputs) != len(lses):
        raise InvalidError(f"merge has {len(outputs)} outputs and {len(lses)} lses; it needs as many of each, and one "
                           "at least")
    backend = _backend(**{f"outputs[{i}]": tensor for i, tensor in enumerate(outputs)},
                       **{f"lses[{i}]": tensor for i, tensor in enumerate(lses)})
    shape, dtype = tuple(outputs[0].shape), outputs[0].dtype
    for i, (o, lse) in enumerate(zip(outputs, lses)):
        if tuple(o.shape) != shape or tuple(lse.shape) != shape[:-1] or o.dtype != dtype:
            raise InvalidError(f"outputs[{i}] and lses[{i}] have the shapes {tuple(o.shape)} and {tuple(lse.shape)}; "
                               f"they must be {shape} and {shape[:-1]}, and all outputs of one type")
    return backend.merge(outputs, lses)
