"""attention() on PyTorch tensors: a custom operator with gradient, on the CPU or the tensors' GPU, on the current
stream.

The operators are nbhd::forward and nbhd::backward, and with _varlen those of ragged batches; torch.compile sees through
them by their fake versions. The workspace is PyTorch's memory. Tensors are passed as they lie: views of a packed
projection are not copied. qk, av and merge: torch_unfused.py."""

import ctypes as c
from contextlib import nullcontext
from functools import lru_cache
from typing import List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _lib
from ._ragged import Sequences

always_deterministic = False  # as torch.use_deterministic_algorithms(True), of these functions alone

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}


def unit(tensor):
    """The tensor itself, or a copy where its last extent is no unit stride, or where it is one row seen everywhere,
    whose strides of 0 would mean contiguous to C."""
    if tensor is None:
        return None
    if tensor.layout is not torch.strided:
        raise _lib.InvalidError(f"a tensor's layout is {tensor.layout}; it must be torch.strided, as to_dense() is")
    if tensor.is_contiguous():
        return tensor
    unit = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if unit and any(tensor.stride()[:-1]) else tensor.contiguous()


def given(**tensors):
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class _Call:
    """A problem planned in this process (fork) for inputs of certain shapes, strides and types on one device: all but
    the addresses of a call."""

    def __init__(self, describe, facts, options, kernel, flags, sequences, fork=0):
        self.device = facts[0][-1]
        if self.device.type not in ("cpu", "cuda"):
            raise _lib.UnsupportedError(f"{facts[0][0]} is on {self.device}; tensors must be on the CPU or a CUDA "
                                        "device")
        tensors = {name: (shape, _NAMES.get(dtype, str(dtype)), str(device)) for name, shape, _, dtype, device in facts}
        self.desc = describe(tensors, *options, sequences)
        batch = len(sequences) if sequences else next(iter(tensors.values()))[0][0]
        _lib.check_tensors(self.desc, batch, tensors)
        self.args = _lib.Args(size=c.sizeof(_lib.Args))
        for name, _, strides, *_ in facts:
            setattr(self.args, name, _lib.tensor(None, strides))
        self.empty = not facts[0][1][0]
        kind = _lib.CUDA if self.device.type == "cuda" else _lib.CPU
        ordinal = self.device.index or 0
        self._plan_with = lambda more: _lib.plan(self.desc, kind, flags | more, kernel, ordinal, sequences)
        with self._on_device():
            self.plan = None if self.empty else self._plan_with(_lib.ALIGNED)

    def _on_device(self):
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def __call__(self, **tensors):
        """tensors: the inputs, and the outputs, which are contiguous."""
        args = _lib.Args.from_buffer_copy(self.args)
        for name, tensor in tensors.items():
            getattr(args, name).data = tensor.data_ptr()
        with self._on_device():
            try:
                self._execute(self.plan, args)
            except _lib.UnsupportedError:  # tensors that are not aligned
                self.plan = self._plan_with(0)
                self._execute(self.plan, args)

    def _execute(self, plan, args):
        workspace = torch.empty(plan.workspace + 64, dtype=torch.uint8, device=self.device)
        stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else None
        plan.execute(args, (workspace.data_ptr() + 63) // 64 * 64, stream)


_cached_call = lru_cache(maxsize=4096)(_Call)


def call_of(describe, inputs, options, kernel=None, sequences=None):
    """The _Call of inputs, {name: tensor}, the first of which tells the batch, and of
    describe({name: (shape, type, device)}, *options, sequences). It is kept: to check and plan a small problem each
    time would take longer than to compute it."""
    facts = tuple([(name, t.shape, () if t.is_contiguous() else t.stride()[:-1], t.dtype, t.device)
                   for name, t in inputs.items()])
    same_bits = always_deterministic or torch.are_deterministic_algorithms_enabled()
    options = tuple([tuple(option) if isinstance(option, list) else option for option in options])
    return _cached_call(describe, facts, options, kernel, _lib.DETERMINISTIC if same_bits else 0, sequences,
                        _lib.forks[0])


def _describe(tensors, pass_, window, stride, dilation, edge, scale, tf32, sequences):
    describe = sequences.describe if sequences else _lib.describe
    extra_shape = tensors["extra_k"][0] if "extra_k" in tensors else None
    more = {"extra_shape": extra_shape} if sequences else {}
    return describe(*[tensors[name][0] for name in "qkv"], tensors["q"][1], pass_=pass_, window=window, stride=stride,
                    dilation=dilation, edge=edge, scale=scale, extra=extra_shape[1] if extra_shape else 0,
                    bias="bias" in tensors, tf32=tf32, **more)


def _attend(q, k, v, extra_k, extra_v, bias, options, kernel, sequences=None):
    q, k, v, extra_k, extra_v = map(unit, (q, k, v, extra_k, extra_v))
    inputs = given(q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v, bias=bias)
    call = call_of(_describe, inputs, (_lib.FORWARD, *options), kernel, sequences)
    make = torch.empty if not sequences or sequences.covers(q.shape) else torch.zeros
    o = make(q.shape[:-1] + v.shape[-1:], dtype=q.dtype, device=q.device)
    lse = make(q.shape[:-1], dtype=torch.float32, device=q.device)
    if not call.empty:
        call(**inputs, o=o, lse=lse)
    return o, lse


def _gradients(q, k, v, extra_k, extra_v, bias, o, lse, dout, dlse, options, sequences=None):
    q, k, v, extra_k, extra_v, o, dout = map(unit, (q, k, v, extra_k, extra_v, o, dout))
    inputs = given(q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v, bias=bias)
    make = torch.empty if not sequences or sequences.covers(q.shape) else torch.zeros
    grads = {f"d{name}": make(t.shape, dtype=t.dtype, device=t.device) for name, t in inputs.items()}
    inputs |= given(o=o, dout=dout, lse=lse.contiguous(), dlse=None if dlse is None else dlse.contiguous())
    call = call_of(_describe, inputs, (_lib.BACKWARD, *options), None, sequences)
    if call.empty:
        return [grad.zero_() for grad in grads.values()]
    call(**inputs, **grads)
    return list(grads.values())


def one_device(*tensors):
    """For fake versions, which PyTorch also calls where one tensor of several is on the meta device."""
    devices = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
    if len(devices) > 1:
        raise _lib.InvalidError(f"the tensors are on {' and '.join(devices)}; they must be on one device")


@torch.library.custom_op("nbhd::forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, extra_k: Optional[Tensor], extra_v: Optional[Tensor],
             bias: Optional[Tensor], window: List[int], stride: List[int], dilation: List[int], edge: List[int],
             scale: float, tf32: bool, kernel: Optional[str]) -> Tuple[Tensor, Tensor]:
    return _attend(q, k, v, extra_k, extra_v, bias, (window, stride, dilation, edge, scale, tf32), kernel)


@_forward.register_fake
def _(q, k, v, extra_k, extra_v, bias, window, stride, dilation, edge, scale, tf32, kernel):
    one_device(q, k, v, extra_k, extra_v, bias)
    return q.new_empty(q.shape[:-1] + v.shape[-1:]), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


@torch.library.custom_op("nbhd::backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, v: Tensor, extra_k: Optional[Tensor], extra_v: Optional[Tensor],
              bias: Optional[Tensor], o: Tensor, lse: Tensor, dout: Tensor, dlse: Optional[Tensor], window: List[int],
              stride: List[int], dilation: List[int], edge: List[int], scale: float, tf32: bool) -> List[Tensor]:
    return _gradients(q, k, v, extra_k, extra_v, bias, o, lse, dout, dlse,
                      (window, stride, dilation, edge, scale, tf32))


@_backward.register_fake
def _(q, k, v, extra_k, extra_v, bias, o, lse, dout, dlse, window, stride, dilation, edge, scale, tf32):
    inputs = given(q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v, bias=bias)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs.values()]


def _setup(ctx, inputs, output):
    *tensors, window, stride, dilation, edge, scale, tf32, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (window, stride, dilation, edge, scale, tf32)


def _differentiate(ctx, dout, dlse):
    *tensors, o, lse = ctx.saved_tensors
    grads = iter(_backward_of(*tensors, o, lse, dout, dlse, *ctx.options))
    return (*[None if tensor is None else next(grads) for tensor in tensors], *[None] * 7)


_forward.register_autograd(_differentiate, setup_context=_setup)


def refuse_second(ctx, *_):
    raise NotImplementedError("nbhd has no second derivative; a gradient cannot be differentiated again")


_backward.register_autograd(refuse_second)


def through_transforms(op, setup, differentiate):
    """op, also inside torch.func's transforms (grad, vmap, jacrev), which do not see through PyTorch's custom
    operators. Elsewhere the operator itself, for torch.compile."""
    class Operator(torch.autograd.Function):
        generate_vmap_rule = True  # by the loop that PyTorch has for operators
        setup_context, backward = staticmethod(setup), staticmethod(differentiate)

        @staticmethod
        def forward(*args):
            result = op(*args)
            return tuple(result) if isinstance(result, list) else result

    def call(*args):
        transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        return Operator.apply(*args) if transformed else op(*args)
    return call


def _map_in_a_loop(definition, op):
    """vmap of an operator that returns a list, for which PyTorch, from 2.5 on, has no loop of its own."""
    def loop(info, in_dims, *args):
        calls = [op(*[one.select(dim, i) if isinstance(dim, int) else one for one, dim in zip(args, in_dims)])
                 for i in range(info.batch_size)]
        return [torch.stack(parts) for parts in zip(*calls)], [0] * len(calls[0])
    if hasattr(definition, "register_vmap"):
        definition.register_vmap(loop)


def keeps_nothing(ctx, inputs, output):
    """For gradients, which cannot be differentiated again."""


_map_in_a_loop(_backward, torch.ops.nbhd.backward)
_backward_of = through_transforms(torch.ops.nbhd.backward, keeps_nothing, refuse_second)
_forward_of = through_transforms(torch.ops.nbhd.forward, _setup, _differentiate)


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
def _(q, k, v, extra_k, extra_v, bias, *_):
    one_device(q, k, v, extra_k, extra_v, bias)
    return q.new_empty(q.shape[:-1] + v.shape[-1:]), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


@torch.library.custom_op("nbhd::backward_varlen", mutates_args=())
def _backward_varlen(q: Tensor, k: Tensor, v: Tensor, extra_k: Optional[Tensor], extra_v: Optional[Tensor],
                     bias: Optional[Tensor], o: Tensor, lse: Tensor, dout: Tensor, dlse: Optional[Tensor],
                     window: List[int], stride: List[int], dilation: List[int], edge: List[int], scale: float,
                     tf32: bool, rank: int, lengths: List[int], kv_lengths: List[int], offsets: List[int],
                     kv_offsets: List[int]) -> List[Tensor]:
    return _gradients(q, k, v, extra_k, extra_v, bias, o, lse, dout, dlse,
                      (window, stride, dilation, edge, scale, tf32),
                      _sequences(rank, lengths, kv_lengths, offsets, kv_offsets))


@_backward_varlen.register_fake
def _(q, k, v, extra_k, extra_v, bias, *_):
    inputs = given(q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v, bias=bias)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs.values()]


def _setup_varlen(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:-1]


def _differentiate_varlen(ctx, dout, dlse):
    *tensors, o, lse = ctx.saved_tensors
    grads = iter(_backward_varlen_of(*tensors, o, lse, dout, dlse, *ctx.options))
    return (*[None if tensor is None else next(grads) for tensor in tensors], *[None] * 12)


_forward_varlen.register_autograd(_differentiate_varlen, setup_context=_setup_varlen)
_backward_varlen.register_autograd(refuse_second)
_map_in_a_loop(_backward_varlen, torch.ops.nbhd.backward_varlen)
_backward_varlen_of = through_transforms(torch.ops.nbhd.backward_varlen, keeps_nothing, refuse_second)
_forward_varlen_of = through_transforms(torch.ops.nbhd.forward_varlen, _setup_varlen, _differentiate_varlen)


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

    def changes(t):
        return t is not None and t.is_floating_point() and t.dtype != torch.float64
    return tuple(t.to(dtype) if changes(t) else t for t in tensors)


def attention(q, k, v, extra_k, extra_v, bias, options, sequences=None):
    q, k, v, extra_k, extra_v = prepare(q, k, v, extra_k, extra_v)
    if bias is not None:
        bias = bias.float().contiguous()
    arguments = (q, k, v, extra_k, extra_v, bias, options["window"], options["stride"], options["dilation"],
                 options["edge"], options["scale"], options["tf32"])
    if not sequences:
        return _forward_of(*arguments, options["kernel"])
    lists = (list(values or ()) for values in (sequences.lengths, sequences.kv_lengths, sequences.offsets,
                                               sequences.kv_offsets))
    return _forward_varlen_of(*arguments, sequences.rank, *lists, options["kernel"])


from .torch_unfused import av, merge, qk  # noqa: E402, F401: the same names as of numpy.py
