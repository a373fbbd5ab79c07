"""qk(), av() and merge() on PyTorch tensors. The operators are nbhd::qk and nbhd::av, whose gradients are operators
too."""

import math
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from . import _lib
from .torch import call_of, given, keeps_nothing, one_device, prepare, refuse_second, through_transforms, unit


def _describe_qk(tensors, pass_, window, stride, dilation, edge, scale, _):
    (q, dtype, _), (k, *_) = tensors["q"], tensors["k"]
    return _lib.describe(q, k, k, dtype, pass_=pass_, window=window, stride=stride, dilation=dilation, edge=edge,
                         scale=scale, bias="bias" in tensors)


def _describe_av(tensors, pass_, window, stride, dilation, edge, _):
    (weights, dtype, _), (v, *_) = tensors["scores"], tensors["v"]
    return _lib.describe_av(weights, v, dtype, pass_=pass_, window=window, stride=stride, dilation=dilation, edge=edge)


def _entries(q, k, window, dilation):
    """Keys of a window, without asking the library: also where shapes are symbols."""
    lengths = zip(window, dilation, q.shape[1:-2], k.shape[1:-2])
    return math.prod(w or (own // (r or 1) if own == keys else keys) for w, r, own, keys in lengths)


@torch.library.custom_op("nbhd::qk", mutates_args=())
def _qk(q: Tensor, k: Tensor, bias: Optional[Tensor], window: List[int], stride: List[int], dilation: List[int],
        edge: List[int], scale: float, kernel: Optional[str]) -> Tensor:
    inputs = given(q=unit(q), k=unit(k), bias=bias)
    call = call_of(_describe_qk, inputs, (_lib.QK, window, stride, dilation, edge, scale), kernel)
    scores = q.new_empty(*q.shape[:-1], _entries(q, k, window, dilation))
    if not call.empty:
        call(**inputs, scores=scores)
    return scores


@_qk.register_fake
def _(q, k, bias, window, stride, dilation, edge, scale, kernel):
    one_device(q, k, bias)
    return q.new_empty(*q.shape[:-1], _entries(q, k, window, dilation))


@torch.library.custom_op("nbhd::qk_backward", mutates_args=())
def _qk_backward(q: Tensor, k: Tensor, bias: Optional[Tensor], dscores: Tensor, window: List[int], stride: List[int],
                 dilation: List[int], edge: List[int], scale: float) -> Tuple[Tensor, Tensor, Tensor]:
    inputs = given(q=unit(q), k=unit(k), bias=bias, dscores=unit(dscores))
    call = call_of(_describe_qk, inputs, (_lib.QK_BACKWARD, window, stride, dilation, edge, scale))
    dq, dk = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    dbias = q.new_zeros(0) if bias is None else torch.zeros_like(bias)
    if not call.empty:
        call(**inputs, dq=dq, dk=dk, **({} if bias is None else {"dbias": dbias}))
    return dq, dk, dbias


@_qk_backward.register_fake
def _(q, k, bias, dscores, window, stride, dilation, edge, scale):
    dq, dk = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    return dq, dk, q.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_qk(ctx, inputs, output):
    q, k, bias, *ctx.options, _ = inputs
    ctx.save_for_backward(q, k, bias)


def _differentiate_qk(ctx, dscores):
    q, k, bias = ctx.saved_tensors
    dq, dk, dbias = _qk_backward_of(q, k, bias, dscores, *ctx.options)
    return dq, dk, None if bias is None else dbias, *[None] * 6


_qk.register_autograd(_differentiate_qk, setup_context=_setup_qk)
_qk_backward.register_autograd(refuse_second)
_qk_backward_of = through_transforms(torch.ops.nbhd.qk_backward, keeps_nothing, refuse_second)
_qk_of = through_transforms(torch.ops.nbhd.qk, _setup_qk, _differentiate_qk)


@torch.library.custom_op("nbhd::av", mutates_args=())
def _av(weights: Tensor, v: Tensor, window: List[int], stride: List[int], dilation: List[int], edge: List[int],
        kernel: Optional[str]) -> Tensor:
    inputs = given(scores=unit(weights), v=unit(v))
    call = call_of(_describe_av, inputs, (_lib.AV, window, stride, dilation, edge), kernel)
    o = v.new_empty(*weights.shape[:-1], v.shape[-1])
    if not call.empty:
        call(**inputs, o=o)
    return o


@_av.register_fake
def _(weights, v, window, stride, dilation, edge, kernel):
    one_device(weights, v)
    return v.new_empty(*weights.shape[:-1], v.shape[-1])


@torch.library.custom_op("nbhd::av_backward", mutates_args=())
def _av_backward(weights: Tensor, v: Tensor, dout: Tensor, window: List[int], stride: List[int], dilation: List[int],
                 edge: List[int]) -> Tuple[Tensor, Tensor]:
    inputs = given(scores=unit(weights), v=unit(v), dout=unit(dout))
    call = call_of(_describe_av, inputs, (_lib.AV_BACKWARD, window, stride, dilation, edge))
    dweights, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (weights, v))
    if not call.empty:
        call(**inputs, dscores=dweights, dv=dv)
    return dweights, dv


@_av_backward.register_fake
def _(weights, v, dout, window, stride, dilation, edge):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (weights, v))


def _setup_av(ctx, inputs, output):
    weights, v, *ctx.options, _ = inputs
    ctx.save_for_backward(weights, v)


def _differentiate_av(ctx, dout):
    weights, v = ctx.saved_tensors
    return *_av_backward_of(weights, v, dout, *ctx.options), *[None] * 5


_av.register_autograd(_differentiate_av, setup_context=_setup_av)
_av_backward.register_autograd(refuse_second)
_av_backward_of = through_transforms(torch.ops.nbhd.av_backward, keeps_nothing, refuse_second)
_av_of = through_transforms(torch.ops.nbhd.av, _setup_av, _differentiate_av)


def qk(q, k, bias, options):
    q, k = prepare(q, k)
    bias = None if bias is None else bias.float().contiguous()
    names = ("window", "stride", "dilation", "edge", "scale", "kernel")
    return _qk_of(q, k, bias, *[options[name] for name in names])


def av(weights, v, options):
    weights, v = prepare(weights, v)
    names = ("window", "stride", "dilation", "edge", "kernel")
    return _av_of(weights, v, *[options[name] for name in names])


def merge(outputs, lses):
    """In PyTorch's own operators: on any device, and differentiable as often as wanted."""
    parts = torch.stack([lse.float() for lse in lses])
    none = parts == -math.inf  # a part that saw no key; its output is not looked at
    lse = parts.logsumexp(0)
    weights = torch.where(none, 0, parts - torch.where(lse == -math.inf, 0, lse)).exp().masked_fill(none, 0)
    o = sum(torch.where(zero.unsqueeze(-1), 0, part.float()) * weight.unsqueeze(-1)
            for part, weight, zero in zip(outputs, weights, none))
    return o.to(outputs[0].dtype), lse
