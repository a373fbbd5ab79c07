"""attention() on NumPy arrays: float16, float32 or float64, on the CPU, forward only. Views with any strides are read in place."""

import ctypes as c

import numpy as np

from . import _lib


def _tensor(array):
    if array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise _lib.InvalidError(1, f"the last extent has a stride of {array.strides[-1]} bytes; it must be unit stride")
    if any(stride % array.itemsize for stride in array.strides[:-1]):
        raise _lib.InvalidError(1, f"the strides {array.strides} are not whole elements of {array.itemsize} bytes")
    return _lib.tensor(array.ctypes.data, [stride // array.itemsize for stride in array.strides[:-1]])


def attention(q, k, v, extra_kv, bias, options, sequences=None):
    options = dict(options)
    kernel = options.pop("kernel")
    extra = extra_kv[0].shape[1] if extra_kv is not None else 0
    if sequences:
        options["extra_shape"] = extra_kv[0].shape if extra else None
    describe = sequences.describe if sequences else _lib.describe
    desc = describe(q.shape, k.shape, v.shape, str(q.dtype), extra=extra, bias=bias is not None, **options)
    plan = _lib.plan(desc, kernel=kernel, sequences=sequences)
    make = np.empty if not sequences or sequences.covers(q.shape) else np.zeros
    o = make(q.shape[:-1] + v.shape[-1:], q.dtype)
    lse = make(q.shape[:-1], np.float32)
    args = _lib.Args(size=c.sizeof(_lib.Args), q=_tensor(q), k=_tensor(k), v=_tensor(v), o=_tensor(o))
    args.lse.data = lse.ctypes.data
    if extra:
        args.extra_k, args.extra_v = _tensor(extra_kv[0]), _tensor(extra_kv[1])
    if bias is not None:
        bias = np.ascontiguousarray(bias, np.float32)
        args.bias.data = bias.ctypes.data
    workspace = np.empty(plan.workspace + 64, np.uint8)
    plan.execute(args, (workspace.ctypes.data + 63) // 64 * 64)
    return o, lse
