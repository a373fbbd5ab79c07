"""The Python layer: the structs are C's, results are those of a dense softmax under the mask that the library reports."""

import ctypes as c
import math

import numpy as np
import pytest

import nbhd
from nbhd import _lib

torch = pytest.importorskip("torch")


def mask_of(desc):
    """The dense mask [queries, keys], read off nbhd_desc_keys: no mask formula in Python."""
    full = np.ones((1, 1), bool)
    for axis in range(desc.rank):
        length, keys = desc.length[axis], desc.kv_length[axis] or desc.length[axis]
        sees = np.zeros((length, keys), bool)
        for query in range(length):
            first, count = c.c_int(), c.c_int()
            _lib.check(_lib.library().nbhd_desc_keys(c.byref(desc), axis, query, c.byref(first), c.byref(count)))
            step = desc.dilation[axis]
            sees[query, first.value:first.value + count.value * step:step] = True
        full = np.kron(full, sees)
    return torch.from_numpy(full)


def dense(q, k, v, scale, mask, extra_kv=None):
    """Reference in float64 over flattened tokens, differentiable."""
    shape, groups = q.shape, q.shape[-2] // k.shape[-2]
    q, k, v = (t.flatten(1, -3).transpose(1, 2).double() for t in (q, k, v))
    if extra_kv is not None:
        k, v = (torch.cat([t, e.transpose(1, 2).double()], 2) for t, e in zip((k, v), extra_kv))
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], extra_kv[0].shape[1])], 1)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    o, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
    return o.transpose(1, 2).unflatten(1, shape[1:-2]), lse.transpose(1, 2).unflatten(1, shape[1:-2])


CASES = [
    dict(axes=(20,), window=5),
    dict(axes=(9, 12), window=(3, 4), dilation=(1, 3), edge=("nearest", "causal")),
    dict(axes=(4, 6, 8), window=(3, 4, 5), stride=(1, 2, 3), heads=4, kv_heads=2, head_dim_v=7, extra=3),
    dict(axes=(30,), window=None, edge="causal", batch=2),
]


def tensors(axes, batch=1, heads=2, kv_heads=None, head_dim=16, head_dim_v=None, extra=0, dtype=torch.float32, **_):
    kv_heads, head_dim_v = kv_heads or heads, head_dim_v or head_dim
    generator = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    q, k, v = make(batch, *axes, heads, head_dim), make(batch, *axes, kv_heads, head_dim), make(batch, *axes, kv_heads, head_dim_v)
    extra_kv = (make(batch, extra, kv_heads, head_dim), make(batch, extra, kv_heads, head_dim_v)) if extra else None
    return q, k, v, extra_kv


def options_of(case):
    return {name: case[name] for name in ("window", "stride", "dilation", "edge") if name in case}


def reference(case, q, k, v, extra_kv):
    desc = _lib.describe(q.shape, k.shape, v.shape, "float32", **options_of(case))
    return dense(q, k, v, q.shape[-1] ** -0.5, mask_of(desc), extra_kv)


@pytest.mark.parametrize("case", CASES)
def test_forward_torch_and_numpy(case):
    q, k, v, extra_kv = tensors(**case)
    o, lse = nbhd.attention(q, k, v, extra_kv=extra_kv, return_lse=True, **options_of(case))
    want, want_lse = reference(case, q, k, v, extra_kv)
    torch.testing.assert_close(o.double(), want, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-6, rtol=1e-5)
    arrays = [t.detach().numpy() for t in (q, k, v)]
    extra = extra_kv and [t.detach().numpy() for t in extra_kv]
    np.testing.assert_array_equal(nbhd.attention(*arrays, extra_kv=extra, **options_of(case)), o.detach().numpy())


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    q, k, v, extra_kv = tensors(**case)
    inputs = [q, k, v, *(extra_kv or [])]
    o, lse = nbhd.attention(q, k, v, extra_kv=extra_kv, return_lse=True, **options_of(case))
    dout, dlse = torch.randn_like(o), torch.randn_like(lse)
    got = torch.autograd.grad([o, lse], inputs, [dout, dlse])
    want = torch.autograd.grad(reference(case, q, k, v, extra_kv), inputs, [dout.double(), dlse.double()])
    for one, other in zip(got, want):
        torch.testing.assert_close(one.double(), other.double(), atol=1e-5, rtol=1e-4)


def test_views_of_a_packed_projection_are_read_in_place():
    packed = torch.randn(2, 9, 11, 3, 4, 24)
    q, k, v = packed.unbind(3)
    copies = [t.contiguous() for t in (q, k, v)]
    assert torch.equal(nbhd.attention(q, k, v, window=5), nbhd.attention(*copies, window=5))


def test_compile_without_graph_breaks():
    q, k, v, _ = tensors(axes=(8, 9))
    compiled = torch.compile(lambda q, k, v: nbhd.attention(q, k, v, window=3) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), nbhd.attention(q, k, v, window=3) * 2)


@pytest.mark.parametrize("change, says", [
    (dict(window=99), "window[0] is 99"), (dict(window=(3, 3, 3)), "window has 3 numbers"), (dict(edge="round"), "round"),
    (dict(window=3, stride=5), "stride[0] is 5"), (dict(kernel="cpu.none"), "cpu.none")])
def test_the_c_sentence_is_raised(change, says):
    q, k, v, _ = tensors(axes=(8, 9))
    with pytest.raises(nbhd.NbhdError, match=says.replace("[", r"\[")):
        nbhd.attention(q, k, v, **change)


def test_the_structs_are_those_of_c(tmp_path):
    import subprocess
    from pathlib import Path
    fields = {"nbhd_desc": _lib.Desc, "nbhd_args": _lib.Args, "nbhd_tensor": _lib.Tensor}
    lines = [f'printf("%zu\\n", sizeof({name}));' for name in fields]
    want = [c.sizeof(struct) for struct in fields.values()]
    for name, struct in fields.items():
        for field, _ in struct._fields_:
            lines.append(f'printf("%zu\\n", offsetof({name}, {field.rstrip("_")}));')
            want.append(getattr(struct, field).offset)
    source = tmp_path / "offsets.c"
    source.write_text("#include <stdio.h>\n#include <nbhd.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n")
    include = Path(__file__).resolve().parents[2] / "include"
    subprocess.run(["cc", f"-I{include}", source, "-o", tmp_path / "offsets"], check=True)
    assert [int(n) for n in subprocess.check_output([tmp_path / "offsets"]).split()] == want
