"""The Python layer without PyTorch: the structs are C's, the C sentences are raised, values on NumPy arrays are
right."""

import ctypes as c
import os
import pickle
import subprocess
import sys
from pathlib import Path

import nbhd
import numpy as np
import pytest
from mask import mask_of
from nbhd import _lib


def arrays(axes, batch=1, heads=2, head_dim=12, dtype=np.float32):
    generator = np.random.default_rng(1)
    return [generator.standard_normal((batch, *axes, heads, head_dim)).astype(dtype) for _ in range(3)]


def dense(q, k, v, mask):
    """Reference in float64 over flattened tokens."""
    shape = q.shape
    q, k, v = (np.swapaxes(t.reshape(shape[0], -1, *shape[-2:]).astype(float), 1, 2) for t in (q, k, v))
    scores = np.where(mask, q @ np.swapaxes(k, -1, -2) * 0.25, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    lse = np.log(weights.sum(-1)) + scores.max(-1)
    o = weights / weights.sum(-1, keepdims=True) @ v
    return np.swapaxes(o, 1, 2).reshape(shape), np.swapaxes(lse, 1, 2).reshape(shape[:-1])


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 2e-6), (np.float16, 2e-3)])
@pytest.mark.parametrize("axes, options", [
    ((30,), dict(window=7)), ((8, 11), dict(window=(3, 5), dilation=(1, 2))),
    ((4, 5, 9), dict(window=(3, 4, 5), stride=(1, 2, 3), edge=("nearest", "causal", "truncated"))),
    ((7, 11), dict(window=(4, 3), stride=(2, 1), dilation=(1, 3), edge="periodic")),
    ((4, 5, 9), dict(window=(3, 5, 4), edge=("nearest", "truncated", "periodic")))])
def test_values(axes, options, dtype, tolerance):
    q, k, v = arrays(axes, dtype=dtype)
    o, lse = nbhd.attention(q, k, v, return_lse=True, scale=0.25, **options)
    want, want_lse = dense(q, k, v, mask_of(_lib.describe(q.shape, k.shape, v.shape, "float32", **options)))
    np.testing.assert_allclose(o, want, atol=tolerance)
    np.testing.assert_allclose(lse, want_lse, atol=max(tolerance, 2e-6))


def test_views_are_read_in_place():
    packed = np.random.default_rng(2).standard_normal((2, 9, 11, 3, 4, 24)).astype(np.float32)
    q, k, v = (packed[..., i, :, :] for i in range(3))
    copies = [np.ascontiguousarray(t) for t in (q, k, v)]
    assert np.array_equal(nbhd.attention(q, k, v, window=5), nbhd.attention(*copies, window=5))
    flipped = nbhd.attention(q[:, ::-1], k[:, ::-1], v[:, ::-1], window=5)[:, ::-1]  # an odd window mirrors itself
    np.testing.assert_allclose(flipped, nbhd.attention(*copies, window=5), atol=1e-5)


def test_what_c_cannot_read_is_copied():
    """A last extent that is no unit stride, and elements that are not aligned, as of a file that was mapped."""
    arrays_ = arrays(axes=(8, 9))
    want = nbhd.attention(*(np.ascontiguousarray(t[..., ::2]) for t in arrays_), window=5)
    np.testing.assert_array_equal(nbhd.attention(*(t[..., ::2] for t in arrays_), window=5), want)
    np.testing.assert_array_equal(nbhd.attention(*(np.asfortranarray(t[..., ::2]) for t in arrays_), window=5), want)
    shifted, unaligned = [], []
    for array in arrays_:
        odd = np.frombuffer(b"x" + array.tobytes(), np.float32, array.size, 1).reshape(array.shape)
        assert not odd.flags.aligned
        unaligned.append(odd)
        shifted.append(odd[..., ::2])
    np.testing.assert_array_equal(nbhd.attention(*shifted, window=5), want)
    whole = nbhd.attention(*(np.ascontiguousarray(t) for t in arrays_), window=5)
    np.testing.assert_array_equal(nbhd.attention(*unaligned, window=5), whole)
    row = arrays_[2][:1, :1, :1, :1]  # seen everywhere: strides of 0
    alike = nbhd.attention(*arrays_[:2], np.broadcast_to(row, arrays_[2].shape), window=5)
    np.testing.assert_allclose(alike, np.broadcast_to(row, alike.shape), rtol=1e-5)


def test_the_other_byte_order():
    q, k, v = arrays(axes=(8, 9))
    other = [t.astype(t.dtype.newbyteorder()) for t in (q, k, v)]
    bias = np.random.default_rng(3).standard_normal((2, 5, 5)).astype(np.float32)
    o, lse = nbhd.attention(*other, window=3, bias=bias.astype(bias.dtype.newbyteorder()), return_lse=True)
    want, want_lse = nbhd.attention(q, k, v, window=3, bias=bias, return_lse=True)
    assert o.dtype == np.float32 and o.dtype.isnative
    np.testing.assert_array_equal(o, want)
    np.testing.assert_array_equal(nbhd.attention(other[0], k, other[2], window=3, bias=bias), want)
    scores = nbhd.qk(*other[:2], window=3)
    np.testing.assert_array_equal(scores, nbhd.qk(q, k, window=3))
    np.testing.assert_array_equal(nbhd.av(scores.astype(scores.dtype.newbyteorder()), other[2], window=3),
                                  nbhd.av(scores, v, window=3))
    parts = [t.astype(t.dtype.newbyteorder()) for t in (o, want_lse)]
    np.testing.assert_array_equal(nbhd.merge(parts[:1], parts[1:])[0], nbhd.merge([want], [want_lse])[0])


@pytest.mark.parametrize("change, says", [
    (dict(window=99), "window[0] is 99"), (dict(window=(3, 3, 3)), "window has 3 values"),
    (dict(window="7x7"), "window is '7x7'; it must be a whole number"), (dict(edge="round"), "round"),
    (dict(window=3, stride=5), "stride[0] is 5"), (dict(kernel="cpu.none"), "cpu.none"),
    (dict(window=3, kernel="cpu.fwd_scalar\0"), "kernel is"), (dict(kernel=""), "kernel is ''; there is no kernel"),
    (dict(bias=np.ma.ones((2, 8, 9))), "bias is a masked array"),
    (dict(extra_kv=(np.ones(()),) * 2), "extra_k has 0 extents")])
def test_the_c_sentence_is_raised(change, says):
    q, k, v = arrays(axes=(8, 9))
    with pytest.raises(nbhd.InvalidError, match=says.replace("[", r"\[")):
        nbhd.attention(q, k, v, **change)


def test_the_version_is_the_librarys():
    major, minor, patch = map(int, nbhd.__version__.split("."))
    assert 10000 * major + 100 * minor + patch == nbhd.version()


def test_errors_travel_between_processes():
    q, k, v = arrays(axes=(8, 9))
    with pytest.raises(nbhd.UnsupportedError, match="cpu.bwd_scalar") as caught:
        nbhd.attention(q, k, v, window=3, kernel="cpu.bwd_scalar")
    other = pickle.loads(pickle.dumps(caught.value))
    assert (type(other), other.status, str(other)) == (nbhd.UnsupportedError, 2, str(caught.value))


def test_the_structs_are_those_of_c(tmp_path):
    fields = {"nbhd_desc": _lib.Desc, "nbhd_args": _lib.Args, "nbhd_tensor": _lib.Tensor}
    lines = [f'printf("%zu\\n", sizeof({name}));' for name in fields]
    want = [c.sizeof(struct) for struct in fields.values()]
    for name, struct in fields.items():
        for field, _ in struct._fields_:
            lines.append(f'printf("%zu\\n", offsetof({name}, {field.rstrip("_")}));')
            want.append(getattr(struct, field).offset)
    source = tmp_path / "offsets.c"
    lines = ["#include <stdio.h>", "#include <nbhd.h>", "int main(void) {", *lines, "return 0; }"]
    source.write_text("\n".join(lines) + "\n")
    include = Path(__file__).resolve().parents[2] / "include"
    subprocess.run(["cc", f"-I{include}", source, "-o", tmp_path / "offsets"], check=True)
    assert [int(n) for n in subprocess.check_output([tmp_path / "offsets"]).split()] == want


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_a_forked_process_has_workers_too():
    """Plans are kept, and threads are not: a kept plan would compute on one thread there."""
    program = """
import os, numpy as np, nbhd
q = np.ones((1, 64, 64, 4, 16), np.float32)
nbhd.attention(q, q, q, 5)
child = os.fork()
if not child:
    nbhd.attention(q, q, q, 5)
    os._exit(len(os.listdir("/proc/self/task")))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = dict(os.environ, NBHD_THREADS="3", OPENBLAS_NUM_THREADS="1")
    assert int(subprocess.check_output([sys.executable, "-W", "ignore", "-c", program], env=environment)) == 3


def test_what_an_int_of_c_cannot_hold_is_refused():
    """2^32 + 8 tokens would be 8."""
    shape = (1, 2 ** 32 + 8, 2, 16)
    with pytest.raises(nbhd.InvalidError, match="4294967304.*an extent must be at most"):
        _lib.describe(shape, shape, shape, "float32")
    q = np.ones((8, 2, 16), np.float32)
    for lengths in (dict(lengths=[2 ** 32 + 8]), dict(lengths=[8], kv_lengths=[2 ** 32 + 8])):
        with pytest.raises(nbhd.InvalidError, match="lengths holds 4294967304"):
            nbhd.attention_varlen(q, q, q, **lengths)


def test_tf32_changes_nothing_on_the_cpu():
    q, k, v = (np.random.default_rng(i).standard_normal((1, 9, 11, 2, 16)).astype(np.float32) for i in range(3))
    exact = nbhd.attention(q, k, v, window=(3, 5))
    assert np.array_equal(nbhd.attention(q, k, v, window=(3, 5), tf32=True), exact)


def test_tensors_of_two_devices_are_refused():
    """Without a GPU: what the PyTorch layer says of its tensors."""
    shape = (1, 9, 2, 16)
    desc = _lib.describe(shape, shape, shape, "float32")
    tensors = {"q": (shape, "float32", "cpu"), "k": (shape, "float32", "cuda:0")}
    with pytest.raises(nbhd.InvalidError, match="k is on cuda:0 and q on cpu"):
        _lib.check_tensors(desc, 1, tensors)
