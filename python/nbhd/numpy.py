"""The functions on NumPy arrays: float16, float32 or float64, on the CPU, forward only. Views are read in place where
C can."""

import ctypes as c
import math

import numpy as np

from . import _lib


def _native(name, array):
    """An array of this machine's byte order; a mask would be left out without a word."""
    if isinstance(array, np.ma.MaskedArray):
        raise _lib.InvalidError(f"{name} is a masked array; masks are not looked at, so give {name}.filled(...) or "
                                f"{name}.data")
    return array if array is None or array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _natives(**arrays):
    return [_native(name, array) for name, array in arrays.items()]


def _tensor(array):
    return _lib.tensor(array.ctypes.data, [stride // array.itemsize for stride in array.strides[:-1]])


def _facts(**arrays):
    return {name: (array.shape, str(array.dtype), "cpu") for name, array in arrays.items() if array is not None}


def _plain(array):
    """The array itself, or a copy: where its last extent is no unit stride or its elements are not aligned, and of one
    row seen everywhere, whose strides of 0 would mean contiguous to C."""
    unit = array.strides[-1] == array.itemsize or array.shape[-1] == 1
    whole = array.flags.aligned and not any(stride % array.itemsize for stride in array.strides[:-1])
    spread = array.size == array.shape[-1] or any(array.strides[:-1])
    return array if unit and whole and spread else array.copy()


def _run(desc, kernel, sequences=None, **arrays):
    arrays = {name: None if array is None else _plain(array) for name, array in arrays.items()}
    plan = _lib.plan(desc, kernel=kernel, sequences=sequences)
    args = _lib.Args(size=c.sizeof(_lib.Args))
    for name, array in arrays.items():
        if array is None:
            continue
        if name in ("bias", "lse"):  # contiguous
            getattr(args, name).data = array.ctypes.data
        else:
            setattr(args, name, _tensor(array))
    workspace = np.empty(plan.workspace + 64, np.uint8)
    plan.execute(args, (workspace.ctypes.data + 63) // 64 * 64)


def _table(bias):
    return None if bias is None else np.ascontiguousarray(bias, np.float32)


def attention(q, k, v, extra_k, extra_v, bias, options, sequences=None):
    options = dict(options)
    kernel = options.pop("kernel")
    if sequences:
        options["extra_shape"] = None if extra_k is None else extra_k.shape
    q, k, v, extra_k, extra_v, bias = _natives(q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v, bias=bias)
    bias = _table(bias)
    describe = sequences.describe if sequences else _lib.describe
    desc = describe(q.shape, k.shape, v.shape, str(q.dtype), extra=0 if extra_k is None else extra_k.shape[1],
                    bias=bias is not None, **options)
    _lib.check_tensors(desc, len(sequences) if sequences else q.shape[0],
                       _facts(q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v, bias=bias))
    make = np.empty if not sequences or sequences.covers(q.shape) else np.zeros
    o = make(q.shape[:-1] + v.shape[-1:], q.dtype)
    lse = make(q.shape[:-1], np.float32)
    if q.shape[0]:
        _run(desc, kernel, sequences, q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v, bias=bias, o=o, lse=lse)
    return o, lse


def qk(q, k, bias, options):
    options = dict(options)
    kernel = options.pop("kernel")
    q, k, bias = _natives(q=q, k=k, bias=bias)
    bias = _table(bias)
    desc = _lib.describe(q.shape, k.shape, k.shape, str(q.dtype), pass_=_lib.QK, bias=bias is not None, **options)
    _lib.check_tensors(desc, q.shape[0], _facts(q=q, k=k, bias=bias))
    scores = np.empty((*q.shape[:-1], math.prod(_lib.windows_of(desc))), q.dtype)
    if q.shape[0]:
        _run(desc, kernel, q=q, k=k, bias=bias, scores=scores)
    return scores


def av(weights, v, options):
    options = dict(options)
    kernel = options.pop("kernel")
    weights, v = _natives(weights=weights, v=v)
    desc = _lib.describe_av(weights.shape, v.shape, str(weights.dtype), **options)
    _lib.check_tensors(desc, v.shape[0], _facts(weights=weights, v=v))
    o = np.empty((*weights.shape[:-1], v.shape[-1]), v.dtype)
    if v.shape[0]:
        _run(desc, kernel, scores=weights, v=v, o=o)
    return o


def merge(outputs, lses):
    outputs = [_native(f"outputs[{i}]", o) for i, o in enumerate(outputs)]
    lses = [_native(f"lses[{i}]", lse) for i, lse in enumerate(lses)]
    if not 4 <= outputs[0].ndim <= 6:
        raise _lib.InvalidError(f"outputs have {outputs[0].ndim} extents; they must have 4 to 6: [batch, 1 to 3 axes, "
                                "heads, head_dim]")
    desc = _lib.describe(*[outputs[0].shape] * 3, str(outputs[0].dtype))
    if any(lse.dtype != np.float32 for lse in lses):
        raise _lib.InvalidError("lses are " + ", ".join(str(lse.dtype) for lse in lses) + "; they must be float32")
    outputs, lses = [_plain(o) for o in outputs], [np.ascontiguousarray(lse) for lse in lses]
    o, lse = np.empty(outputs[0].shape, outputs[0].dtype), np.empty(lses[0].shape, np.float32)
    wide = lambda array: _lib.tensor(array.ctypes.data, [stride // array.itemsize for stride in array.strides])
    array = lambda tensors: (_lib.Tensor * len(tensors))(*tensors)
    if o.shape[0]:
        _lib.check(_lib.library().nbhd_merge(c.byref(desc), len(outputs), array(list(map(_tensor, outputs))),
                                             array(list(map(wide, lses))), c.byref(_tensor(o)), c.byref(wide(lse))))
    return o, lse
