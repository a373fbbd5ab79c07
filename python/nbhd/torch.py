"""attention() on PyTorch tensors: a custom operator with gradient, on the CPU or the tensors' GPU, on the current stream.

The operators are nbhd::forward and nbhd::backward, and with _varlen those of ragged batches; torch.compile sees through them by
their fake versions. The workspace is PyTorch's memory. Tensors are passed as they lie: views of a packed projection are not
copied. qk, av and merge: torch_unfused.py."""

import ctypes as c
from contextlib import nullcontext
from typing import List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _lib
from ._ragged import Sequences

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}

def _unit(tensor):
    """The tensor itself, or a copy where its last extent is no unit stride, or where it is one row seen everywhere, whose
    strides of 0 would mean contiguous to C."""
    if tensor is None or tensor.is_contiguous():
        return tensor
    unit = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if unit and any(tensor.stride()[:-1]) else tensor.contiguous()


def _name(dtype):
    return _NAMES.get(dtype, str(dtype))


def _check(desc, batch, **tensors):
    _lib.check_tensors(desc, batch, {name: (t.shape, _name(t.dtype), str(t.device)) for name, t in tensors.items() if t is not None})


def _set(args, **tensors):
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        strides = list(tensor.stride())
        strides = [] if tensor.is_contiguous() else strides if name in ("lse", "dlse") else strides[:-1]
        setattr(args, name, _lib.tensor(tensor.data_ptr(), strides))


def _run(desc, kernel, sequences=None, **tensors):
    device = next(iter(tensors.values())).device
    cuda = device.type == "cuda"
    flags = _lib.DETERMINISTIC if torch.are_deterministic_algorithms_enabled() else 0
    with torch.cuda.device(device) if cuda else nullcontext():
        plan = _lib.plan(desc, _lib.CUDA if cuda else _lib.CPU, flags, kernel, device.index or 0, sequences)
        workspace = torch.empty(plan.workspace + 64, dtype=torch.uint8, device=device)
        args = _lib.Args(size=c.sizeof(_lib.Args))
        _set(args, **tensors)
        stream = torch.cuda.current_stream(device).cuda_stream if cuda else None
        plan.execute(args, (workspace.data_ptr() + 63) // 64 * 64, stream)


def _desc(pass_, q, k, v, extra_k, extra_v, bias, window, stride, dilation, edge, scale, tf32, sequences=None):
    describe = sequences.describe if sequences else _lib.describe
    extra_shape = {} if extra_k is None or not sequences else {"extra_shape": extra_k.shape}
    desc = describe(q.shape, k.shape, v.shape, _name(q.dtype), pass_=pass_, window=window, stride=stride, dilation=dilation,
                    edge=edge, scale=scale, extra=0 if extra_k is None else extra_k.shape[1], bias=bias is not None, tf32=tf32,
                    **extra_shape)
    _check(desc, len(sequences) if sequences else q.shape[0], q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v, bias=bias)
    return desc


def _attend(q, k, v, extra_k, extra_v, bias, options, kernel, sequences=None):
    q, k, v, extra_k, extra_v = map(_unit, (q, k, v, extra_k, extra_v))
    desc = _desc(_lib.FORWARD, q, k, v, extra_k, extra_v, bias, *options, sequences)
    make = torch.empty if not sequences or sequences.covers(q.shape) else torch.zeros
    o = make(q.shape[:-1] + v.shape[-1:], dtype=q.dtype, device=q.device)
    lse = make(q.shape[:-1], dtype=torch.float32, device=q.device)
    if q.shape[0]:
        _run(desc, kernel, sequences, q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v, bias=bias, o=o, lse=lse)
    return o, lse


def _gradients(q, k, v, extra_k, extra_v, bias, o, lse, dout, dlse, options, sequences=None):
    q, k, v, extra_k, extra_v, dout = map(_unit, (q, k, v, extra_k, extra_v, dout))
    desc = _desc(_lib.BACKWARD, q, k, v, extra_k, extra_v, bias, *options, sequences)
    inputs = dict(q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v, bias=bias)
    make = torch.empty if not sequences or sequences.covers(q.shape) else torch.zeros
    grads = {f"d{name}": make(tensor.shape, dtype=tensor.dtype, device=tensor.device)
             for name, tensor in inputs.items() if tensor is not None}
    if not q.shape[0]:
        return [grad.zero_() for grad in grads.values()]
    _run(desc, None, sequences, **inputs, o=o, lse=lse, dout=dout, dlse=dlse, **grads)
    return list(grads.values())


@torch.library.custom_op("nbhd::forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, extra_k: Optional[Tensor], extra_v: Optional[Tensor], bias: Optional[Tensor],
             window: List[int], stride: List[int], dilation: List[int], edge: List[int], scale: float,
             tf32: bool, kernel: Optional[str]) -> Tuple[Tensor, Tensor]:
    return _attend(q, k, v, extra_k, extra_v, bias, (window, stride, dilation, edge, scale, tf32), kernel)


@_forward.register_fake
def _(q, k, v, extra_k, extra_v, bias, window, stride, dilation, edge, scale, tf32, kernel):
    return q.new_empty(q.shape[:-1] + v.shape[-1:]), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


@torch.library.custom_op("nbhd::backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, v: Tensor, extra_k: Optional[Tensor], extra_v: Optional[Tensor],
              bias: Optional[Tensor], o: Tensor, lse: Tensor, dout: Tensor, dlse: Optional[Tensor], window: List[int],
              stride: List[int], dilation: List[int], edge: List[int], scale: float, tf32: bool) -> List[Tensor]:
    return _gradients(q, k, v, extra_k, extra_v, bias, o, lse, dout, dlse, (window, stride, dilation, edge, scale, tf32))


@_backward.register_fake
def _(q, k, v, extra_k, extra_v, bias, o, lse, dout, dlse, window, stride, dilation, edge, scale, tf32):
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v, extra_k, extra_v, bias) if t is not None]


def _setup(ctx, inputs, output):
    *tensors, window, stride, dilation, edge, scale, tf32, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (window, stride, dilation, edge, scale, tf32)


def _differentiate(ctx, dout, dlse):
    *tensors, o, lse = ctx.saved_tensors
    dlse = None if dlse is None else dlse.contiguous()
    grads = iter(torch.ops.nbhd.backward(*tensors, o, lse, dout, dlse, *ctx.options))
    return (*[None if tensor is None else next(grads) for tensor in tensors], *[None] * 7)


_forward.register_autograd(_differentiate, setup_context=_setup)


# ---- ragged batches. The sequences are lists of integers: rank, then what _ragged.Sequences has, empty for None ----


def _sequences(rank, lengths, *others):
    return Sequences(rank, tuple(lengths), *[tuple(values) or None for values in others])


@torch.library.custom_op("nbhd::forward_varlen", mutates_args=())
def _forward_varlen(q: Tensor, k: Tensor, v: Tensor, extra_k: Optional[Tensor], extra_v: Optional[Tensor],
                    bias: Optional[Tensor], window: List[int], stride: List[int], dilation: List[int], edge: List[int],
                    scale: float, tf32: bool, rank: int, lengths: List[int], kv_lengths: List[int], offsets: List[int],
                    kv_offsets: List[int], kernel: Optional[str]) -> Tuple[Tensor, Tensor]:
    return _attend(q, k, v, extra_k, extra_v, bias, (window, stride, dilation, edge, scale, tf32), kernel,
                   _sequences(rank, lengths, kv_lengths, offsets, kv_offsets))


@_forward_varlen.register_fake
def _(q, k, v, *_):
    return q.new_empty(q.shape[:-1] + v.shape[-1:]), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


@torch.library.custom_op("nbhd::backward_varlen", mutates_args=())
def _backward_varlen(q: Tensor, k: Tensor, v: Tensor, extra_k: Optional[Tensor], extra_v: Optional[Tensor],
                     bias: Optional[Tensor], o: Tensor, lse: Tensor, dout: Tensor, dlse: Optional[Tensor],
                     window: List[int], stride: List[int], dilation: List[int], edge: List[int], scale: float, tf32: bool,
                     rank: int, lengths: List[int], kv_lengths: List[int], offsets: List[int],
                     kv_offsets: List[int]) -> List[Tensor]:
    return _gradients(q, k, v, extra_k, extra_v, bias, o, lse, dout, dlse, (window, stride, dilation, edge, scale, tf32),
                      _sequences(rank, lengths, kv_lengths, offsets, kv_offsets))


@_backward_varlen.register_fake
def _(q, k, v, extra_k, extra_v, bias, *_):
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v, extra_k, extra_v, bias) if t is not None]


def _setup_varlen(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:-1]


def _differentiate_varlen(ctx, dout, dlse):
    *tensors, o, lse = ctx.saved_tensors
    dlse = None if dlse is None else dlse.contiguous()
    grads = iter(torch.ops.nbhd.backward_varlen(*tensors, o, lse, dout, dlse, *ctx.options))
    return (*[None if tensor is None else next(grads) for tensor in tensors], *[None] * 12)


_forward_varlen.register_autograd(_differentiate_varlen, setup_context=_setup_varlen)


def _refuse_tangents(tensors):
    """PyTorch would take a custom operator's forward-mode derivative for zero, in silence."""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError("nbhd has no forward-mode derivative (jvp); reverse mode, once, is there")


def prepare(*tensors):
    """Where autocast is on, float tensors become its type, as for PyTorch's own attention; double stays."""
    _refuse_tangents(tensors)
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def attention(q, k, v, extra_k, extra_v, bias, options, sequences=None):
    q, k, v, extra_k, extra_v = prepare(q, k, v, extra_k, extra_v)
    if bias is not None:
        bias = bias.float().contiguous()
    arguments = (q, k, v, extra_k, extra_v, bias, options["window"], options["stride"], options["dilation"], options["edge"],
                 options["scale"], options["tf32"])
    if not sequences:
        return torch.ops.nbhd.forward(*arguments, options["kernel"])
    lists = (list(values or ()) for values in (sequences.lengths, sequences.kv_lengths, sequences.offsets,
                                               sequences.kv_offsets))
    return torch.ops.nbhd.forward_varlen(*arguments, sequences.rank, *lists, options["kernel"])


from .torch_unfused import av, merge, qk  # noqa: E402, F401: the same names as of numpy.py
