"""The C interface by ctypes: the structs of include/nbhd.h, and its functions. Validates only what C cannot see, the
tensors' shapes, types and devices; for all else the C sentence is raised."""

import ctypes as c
import os
from functools import lru_cache
from math import prod
from operator import index
from pathlib import Path

FORWARD, BACKWARD, QK, AV, QK_BACKWARD, AV_BACKWARD = range(6)
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3}
EDGES = {"nearest": 0, "causal": 1, "truncated": 2, "periodic": 3}
CPU, CUDA = 0, 1
DETERMINISTIC, ALIGNED = 4, 8


class Desc(c.Structure):
    _fields_ = [("size", c.c_size_t)] + [(name, c.c_int) for name in (
        "pass_", "dtype", "rank", "batch", "heads", "kv_heads", "head_dim", "head_dim_v")] + [
        (name, c.c_int * 3) for name in ("length", "window", "stride", "dilation", "edge", "kv_length")] + [
        ("extra", c.c_int), ("scale", c.c_float), ("bias", c.c_int), ("threads", c.c_int),
        ("tf32", c.c_int)]


class Tensor(c.Structure):
    _fields_ = [("data", c.c_void_p), ("stride", c.c_longlong * 5)]


class Args(c.Structure):
    _fields_ = [("size", c.c_size_t)] + [(name, Tensor) for name in (
        "q", "k", "v", "o", "lse", "extra_k", "extra_v", "dout", "dlse", "dq", "dk", "dv", "dextra_k", "dextra_v",
        "bias", "dbias", "scores", "dscores")]


class Ragged(c.Structure):
    _fields_ = [("size", c.c_size_t), ("sequences", c.c_int), ("lengths", c.POINTER(c.c_int)),
                ("kv_lengths", c.POINTER(c.c_int)), ("offsets", c.POINTER(c.c_longlong)),
                ("kv_offsets", c.POINTER(c.c_longlong))]


class NbhdError(RuntimeError):
    """A status of the C library, nbhd_status; the message is its sentence."""
    status = None


class InvalidError(NbhdError, ValueError):
    """NBHD_ERROR_INVALID: a field or an argument is out of its range."""
    status = 1


class UnsupportedError(NbhdError):
    """NBHD_ERROR_UNSUPPORTED: legal, but no kernel of this build and machine takes it."""
    status = 2


def _find():
    named = os.environ.get("NBHD_LIBRARY")
    here = Path(__file__).resolve().parent
    built = here.parents[1] / "build" / "libnbhd.so"
    places = [named] if named else [*here.glob("**/libnbhd.so*"), built, "libnbhd.so"]
    for place in places:
        try:
            return c.CDLL(str(place))
        except OSError as error:
            last = error
    raise ImportError(f"libnbhd.so was not found (set NBHD_LIBRARY to it): {last}")


@lru_cache(maxsize=None)
def library():
    lib = _find()
    signatures = {
        "nbhd_version": (c.c_int, []),
        "nbhd_last_error": (c.c_char_p, []),
        "nbhd_desc_parse": (c.c_int, [c.POINTER(Desc), c.c_char_p]),
        "nbhd_desc_keys": (c.c_int, [c.POINTER(Desc), c.c_int, c.c_int, c.POINTER(c.c_int), c.POINTER(c.c_int)]),
        "nbhd_desc_flops": (c.c_double, [c.POINTER(Desc)]),
        "nbhd_plan_create_with": (c.c_int, [c.POINTER(c.c_void_p), c.POINTER(Desc), c.c_int, c.c_uint, c.c_char_p]),
        "nbhd_plan_create_ragged": (c.c_int, [c.POINTER(c.c_void_p), c.POINTER(Desc), c.POINTER(Ragged), c.c_int,
                                              c.c_uint, c.c_char_p]),
        "nbhd_plan_workspace": (c.c_size_t, [c.c_void_p]),
        "nbhd_plan_kernel": (c.c_char_p, [c.c_void_p]),
        "nbhd_plan_destroy": (None, [c.POINTER(c.c_void_p)]),
        "nbhd_merge": (c.c_int, [c.POINTER(Desc), c.c_int] + [c.POINTER(Tensor)] * 4),
        "nbhd_execute": (c.c_int, [c.c_void_p, c.POINTER(Args), c.c_void_p, c.c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def check(status):
    if status:
        kinds = {kind.status: kind for kind in (InvalidError, UnsupportedError)}
        error = kinds.get(status, NbhdError)(library().nbhd_last_error().decode(errors="replace"))
        error.status = status
        raise error


class Plan:
    """A planned problem. Plans are kept per (problem, sequences, device, flags, kernel): `plan()`."""

    def __init__(self, desc, device, flags, kernel, sequences=None):
        lib = library()
        self.handle = c.c_void_p()
        made, problem = c.byref(self.handle), c.byref(desc)
        if sequences:
            check(lib.nbhd_plan_create_ragged(made, problem, c.byref(sequences.struct()), device, flags, kernel))
        else:
            check(lib.nbhd_plan_create_with(made, problem, device, flags, kernel))
        self.workspace = lib.nbhd_plan_workspace(self.handle)
        self.kernel = lib.nbhd_plan_kernel(self.handle).decode()

    def execute(self, args, workspace=None, stream=None):
        check(library().nbhd_execute(self.handle, c.byref(args), workspace, stream))

    def __del__(self):
        if getattr(self, "handle", None):
            library().nbhd_plan_destroy(c.byref(self.handle))


forks = [0]  # between the first process and this one: plans of before have no worker threads here, so none is kept


def _count_fork():
    forks[0] += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


@lru_cache(maxsize=4096)
def _cached_plan(desc_bytes, device, flags, kernel, context, fork):
    return Plan(Desc.from_buffer_copy(desc_bytes), device, flags, kernel)


@lru_cache(maxsize=256)  # they are larger, and batches seldom repeat
def _cached_ragged_plan(desc_bytes, device, flags, kernel, context, fork, sequences):
    return Plan(Desc.from_buffer_copy(desc_bytes), device, flags, kernel, sequences)


def plan(desc, device=CPU, flags=0, kernel=None, context=0, sequences=None):
    """context: what else the plan is bound to, the CUDA device's ordinal. sequences: _ragged.Sequences."""
    key = bytes(desc), device, flags, None if kernel is None else kernel.encode(), context, forks[0]
    return _cached_ragged_plan(*key, sequences) if sequences else _cached_plan(*key)


def edges_of(edge, rank):
    """nbhd_edge values per axis, of one name for all or a name per axis; values themselves will do."""
    names = _triple([edge] * rank if isinstance(edge, str) else edge, rank, "edge")
    unknown = [name for name in names if name not in (*EDGES, *EDGES.values())]
    if unknown:
        raise InvalidError(f"edge is {unknown[0]!r}; it must be one of {', '.join(EDGES)}")
    return [EDGES.get(name, name) for name in names]


def _triple(value, rank, name):
    """One value per axis, from one for all or a sequence."""
    alone = isinstance(value, (int, str, bytes))  # first: torch.compile asks no symbol for attributes
    many = not alone and hasattr(value, "__iter__") and getattr(value, "ndim", 1)
    values = list(value) if many else [value] * rank
    if len(values) != rank:
        raise InvalidError(f"{name} has {len(values)} value{'' if len(values) == 1 else 's'} for {rank} "
                           + ("axis" if rank == 1 else "axes"))
    return values


def per_axis(value, rank, name):
    """A whole number per axis, from what a caller gives: a number, or a sequence; None is the default, 0 in C."""
    numbers = []
    for one in _triple(value, rank, name):
        try:
            numbers.append(0 if one is None else index(one))
        except TypeError:
            raise InvalidError(f"{name} is {value!r}; it must be a whole number, or one per axis") from None
        if one is not None and not 1 <= numbers[-1] < 2 ** 31:  # more would wrap around in C
            raise InvalidError(f"{name} is {value!r}; each number must be 1 to 2147483647")
    return numbers


def scale_of(scale):
    """The factor on q.k as a float; None is the default, 0 in C, where it is a float32."""
    plain = isinstance(scale, (int, float))  # as in _triple
    if not plain and getattr(scale, "requires_grad", False):
        raise InvalidError("scale needs a gradient, which is not taken; multiply q by it, with scale=1")
    try:
        factor = 0.0 if scale is None else float(scale)
    except (TypeError, ValueError):
        raise InvalidError(f"scale is {scale!r}; it must be a number, or None") from None
    if scale is not None and abs(factor) <= 2.0 ** -150:
        raise InvalidError(f"scale is {scale}, which would make all keys weigh the same; it must be another number, or "
                           "None")
    return factor


def windows_of(desc):
    return [desc.window[i] or desc.length[i] // (desc.dilation[i] or 1) for i in range(desc.rank)]


def check_tensors(desc, batch, tensors):
    """tensors: name to (shape, dtype, device). All are of the first one's type and device, but biases and logsumexps,
    which are float32; those whose shape follows from desc have it. batch: of the extra keys."""
    biases = (desc.heads, *(2 * window - 1 for window in windows_of(desc)))
    shapes = {"bias": biases, "extra_k": (batch, desc.extra, desc.kv_heads, desc.head_dim),
              "extra_v": (batch, desc.extra, desc.kv_heads, desc.head_dim_v)}
    first, (_, dtype, device) = next(iter(tensors.items()))
    for name, (shape, its_dtype, its_device) in tensors.items():
        alike = name not in ("bias", "lse", "dlse")
        if its_dtype != (dtype if alike else "float32"):
            raise InvalidError(f"{name} is {its_dtype}; it must be "
                               + (f"{dtype}, as {first} is" if alike else "float32"))
        if its_device != device:
            raise InvalidError(f"{name} is on {its_device} and {first} on {device}; they must be on one device")
        if name in shapes and tuple(shape) != shapes[name]:
            raise InvalidError(f"{name} has the shape {tuple(shape)}; it must be {shapes[name]}")


def describe(q_shape, k_shape, v_shape, dtype, *, pass_=FORWARD, window=None, stride=1, dilation=1, edge="nearest",
             scale=None, extra=0, bias=False, threads=0, tf32=False):
    """The Desc of tensors [batch, axes..., heads, head_dim]. window None: the whole axis."""
    rank = len(q_shape) - 3
    shapes = f"q, k and v have the shapes {tuple(q_shape)}, {tuple(k_shape)}, {tuple(v_shape)}"
    if not 1 <= rank <= 3 or len(k_shape) != len(q_shape) or len(v_shape) != len(q_shape):
        raise InvalidError(f"{shapes}; they must be [batch, 1 to 3 axes, heads, head_dim]")
    if 0 in (*q_shape[-2:], *k_shape[-2:], *v_shape[-2:]):  # C's default
        raise InvalidError(f"{shapes}; heads and head_dim must be at least 1")
    if max(*q_shape, *k_shape, *v_shape) >= 2 ** 31:  # it would wrap around in C
        raise InvalidError(f"{shapes}; an extent must be at most 2147483647")
    if tuple(k_shape[:-1]) != tuple(v_shape[:-1]) or q_shape[0] != k_shape[0] or q_shape[-1] != k_shape[-1]:
        raise InvalidError(f"{shapes}, which do not fit")
    if dtype not in DTYPES:
        raise InvalidError(f"dtype is {dtype}; it must be one of {', '.join(DTYPES)}")
    desc = Desc(size=c.sizeof(Desc), pass_=pass_, dtype=DTYPES[dtype], rank=rank, batch=q_shape[0], heads=q_shape[-2],
                kv_heads=k_shape[-2], head_dim=q_shape[-1], head_dim_v=v_shape[-1], extra=extra,
                scale=scale or 0.0, bias=int(bias), threads=threads, tf32=int(tf32))
    desc.length[:rank] = q_shape[1:-2]
    desc.kv_length[:rank] = k_shape[1:-2]
    desc.window[:rank] = [0] * rank if window is None else _triple(window, rank, "window")
    desc.stride[:rank] = _triple(stride, rank, "stride")
    desc.dilation[:rank] = _triple(dilation, rank, "dilation")
    desc.edge[:rank] = edges_of(edge, rank)
    return desc


def describe_av(weights_shape, v_shape, dtype, *, pass_=AV, **options):
    """The Desc of av: weights [batch, axes..., heads, product of windows], whose head_dim is that of v."""
    if len(weights_shape) != len(v_shape):
        raise InvalidError(f"weights and v have {len(weights_shape)} and {len(v_shape)} extents; they must have as "
                           "many")
    desc = describe((*weights_shape[:-1], v_shape[-1]), v_shape, v_shape, dtype, pass_=pass_, **options)
    if weights_shape[-1] != prod(windows_of(desc)):
        raise InvalidError(f"weights has {weights_shape[-1]} entries for each query; windows of "
                           f"{'x'.join(map(str, windows_of(desc)))} have {prod(windows_of(desc))}")
    return desc


def tensor(pointer, strides):
    """strides: in elements, of [batch, axes..., heads] (the last extent is unit stride)."""
    return Tensor(pointer, (c.c_longlong * 5)(*strides))
