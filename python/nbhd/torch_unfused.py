"""qk(), av() and merge() on PyTorch tensors. The operators are nbhd::qk and nbhd::av, whose gradients are operators too."""

import math
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from . import _lib
from .torch import _check, _name, _run, _unit, prepare


def _qk_desc(pass_, q, k, bias, window, stride, dilation, edge, scale):
    desc = _lib.describe(q.shape, k.shape, k.shape, _name(q.dtype), pass_=pass_, window=window, stride=stride, dilation=dilation,
                         edge=edge, scale=scale, bias=bias is not None)
    _check(desc, q.shape[0], q=q, k=k, bias=bias)
    return desc


def _av_desc(pass_, weights, v, window, stride, dilation, edge):
    desc = _lib.describe_av(weights.shape, v.shape, _name(weights.dtype), pass_=pass_, window=window, stride=stride, dilation=dilation,
                            edge=edge)
    _check(desc, v.shape[0], weights=weights, v=v)
    return desc


def _entries(q, k, window, dilation):
    """Keys of a window, without asking the library: also where shapes are symbols."""
    lengths = zip(window, dilation, q.shape[1:-2], k.shape[1:-2])
    return math.prod(w or (own // (r or 1) if own == keys else keys) for w, r, own, keys in lengths)


@torch.library.custom_op("nbhd::qk", mutates_args=())
def _qk(q: Tensor, k: Tensor, bias: Optional[Tensor], window: List[int], stride: List[int], dilation: List[int],
        edge: List[int], scale: float, kernel: Optional[str]) -> Tensor:
    q, k = _unit(q), _unit(k)
    desc = _qk_desc(_lib.QK, q, k, bias, window, stride, dilation, edge, scale)
    scores = q.new_empty(*q.shape[:-1], _entries(q, k, window, dilation))
    if q.shape[0]:
        _run(desc, kernel, q=q, k=k, bias=bias, scores=scores)
    return scores


@_qk.register_fake
def _(q, k, bias, window, stride, dilation, edge, scale, kernel):
    return q.new_empty(*q.shape[:-1], _entries(q, k, window, dilation))


@torch.library.custom_op("nbhd::qk_backward", mutates_args=())
def _qk_backward(q: Tensor, k: Tensor, bias: Optional[Tensor], dscores: Tensor, window: List[int], stride: List[int],
                 dilation: List[int], edge: List[int], scale: float) -> Tuple[Tensor, Tensor, Tensor]:
    q, k, dscores = _unit(q), _unit(k), _unit(dscores)
    desc = _qk_desc(_lib.QK_BACKWARD, q, k, bias, window, stride, dilation, edge, scale)
    dq, dk = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    dbias = q.new_zeros(0) if bias is None else torch.zeros_like(bias)
    if q.shape[0]:
        _run(desc, None, q=q, k=k, dscores=dscores, dq=dq, dk=dk, dbias=None if bias is None else dbias)
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
    dq, dk, dbias = torch.ops.nbhd.qk_backward(q, k, bias, dscores, *ctx.options)
    return dq, dk, None if bias is None else dbias, *[None] * 6


_qk.register_autograd(_differentiate_qk, setup_context=_setup_qk)


@torch.library.custom_op("nbhd::av", mutates_args=())
def _av(weights: Tensor, v: Tensor, window: List[int], stride: List[int], dilation: List[int], edge: List[int],
        kernel: Optional[str]) -> Tensor:
    weights, v = _unit(weights), _unit(v)
    desc = _av_desc(_lib.AV, weights, v, window, stride, dilation, edge)
    o = v.new_empty(*weights.shape[:-1], v.shape[-1])
    if v.shape[0]:
        _run(desc, kernel, scores=weights, v=v, o=o)
    return o


@_av.register_fake
def _(weights, v, window, stride, dilation, edge, kernel):
    return v.new_empty(*weights.shape[:-1], v.shape[-1])


@torch.library.custom_op("nbhd::av_backward", mutates_args=())
def _av_backward(weights: Tensor, v: Tensor, dout: Tensor, window: List[int], stride: List[int], dilation: List[int],
                 edge: List[int]) -> Tuple[Tensor, Tensor]:
    weights, v, dout = _unit(weights), _unit(v), _unit(dout)
    desc = _av_desc(_lib.AV_BACKWARD, weights, v, window, stride, dilation, edge)
    dweights, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (weights, v))
    if v.shape[0]:
        _run(desc, None, scores=weights, v=v, dout=dout, dscores=dweights, dv=dv)
    return dweights, dv


@_av_backward.register_fake
def _(weights, v, dout, window, stride, dilation, edge):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (weights, v))


def _setup_av(ctx, inputs, output):
    weights, v, *ctx.options, _ = inputs
    ctx.save_for_backward(weights, v)


def _differentiate_av(ctx, dout):
    weights, v = ctx.saved_tensors
    return *torch.ops.nbhd.av_backward(weights, v, dout, *ctx.options), *[None] * 5


_av.register_autograd(_differentiate_av, setup_context=_setup_av)


def qk(q, k, bias, options):
    q, k = prepare(q, k)
    bias = None if bias is None else bias.float().contiguous()
    return torch.ops.nbhd.qk(q, k, bias, *[options[name] for name in ("window", "stride", "dilation", "edge", "scale", "kernel")])


def av(weights, v, options):
    weights, v = prepare(weights, v)
    return torch.ops.nbhd.av(weights, v, *[options[name] for name in ("window", "stride", "dilation", "edge", "kernel")])


def merge(outputs, lses):
    """In PyTorch's own operators: on any device, and differentiable as often as wanted."""
    parts = torch.stack([lse.float() for lse in lses])
    none = parts == -math.inf  # a part that saw no key; its output is not looked at
    lse = parts.logsumexp(0)
    weights = torch.where(none, 0, parts - torch.where(lse == -math.inf, 0, lse)).exp().masked_fill(none, 0)
    o = sum(torch.where(zero.unsqueeze(-1), 0, part.float()) * weight.unsqueeze(-1) for part, weight, zero in zip(outputs, weights, none))
    return o.to(outputs[0].dtype), lse
