"""attention_varlen: each sequence is as attention() of it alone, in every placement, on NumPy arrays and PyTorch
tensors."""

import ctypes as c
import subprocess
from math import prod
from pathlib import Path

import nbhd
import numpy as np
import pytest
from nbhd import _lib

GRIDS = [(9, 12), (5, 5), (16, 7), (5, 5)]
STARTS = np.cumsum([0] + [prod(grid) for grid in GRIDS])


def packed(heads=2, head_dim=12, tokens=STARTS[-1], count=3):
    generator = np.random.default_rng(1)
    return [generator.standard_normal((tokens, heads, head_dim)).astype(np.float32) for _ in range(count)]


def alone(arrays, sequence, **options):
    """attention() of one sequence, flattened again."""
    part = slice(STARTS[sequence], STARTS[sequence + 1])
    grids = [t[part].reshape(1, *GRIDS[sequence], *t.shape[1:]) for t in arrays]
    o, lse = nbhd.attention(*grids, return_lse=True, **options)
    return o.reshape(-1, *o.shape[-2:]), lse.reshape(-1, lse.shape[-1])


def test_packed():
    arrays = packed()
    o, lse = nbhd.attention_varlen(*arrays, np.array(GRIDS), window=(5, 3), dilation=(1, 1), return_lse=True)
    for i in range(len(GRIDS)):
        want, want_lse = alone(arrays, i, window=(5, 3))
        np.testing.assert_array_equal(o[STARTS[i]:STARTS[i + 1]], want)
        np.testing.assert_array_equal(lse[STARTS[i]:STARTS[i + 1]], want_lse)


def test_views_of_one_projection_at_offsets():
    projection = np.random.default_rng(2).standard_normal((2 * STARTS[-1], 3, 2, 12)).astype(np.float32)
    offsets = [int(2 * start + 1) for start in STARTS[:-1]]
    o = nbhd.attention_varlen(*[projection[:, i] for i in range(3)], GRIDS, window=3, offsets=offsets)
    inside = np.zeros(len(o), bool)
    for offset, grid in zip(offsets, GRIDS):
        part = projection[offset:offset + prod(grid)].reshape(1, *grid, 3, 2, 12)
        want = nbhd.attention(*[part[..., i, :, :] for i in range(3)], window=3)
        np.testing.assert_array_equal(o[offset:offset + prod(grid)], want.reshape(-1, 2, 12))
        inside[offset:offset + prod(grid)] = True
    assert not o[~inside].any()


def test_padded(monkeypatch):
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, 77, dtype))  # fresh memory may be 0 by chance
    q, k, v = (np.random.default_rng(3).standard_normal((4, 16, 12, 2, 12)).astype(np.float32) for _ in range(3))
    o = nbhd.attention_varlen(q, k, v, GRIDS, window=3)
    for i, (rows, columns) in enumerate(GRIDS):
        want = nbhd.attention(*[t[i:i + 1, :rows, :columns] for t in (q, k, v)], window=3)
        np.testing.assert_array_equal(o[i, :rows, :columns], want[0])
        assert not o[i, rows:].any() and not o[i, :, columns:].any()


def test_one_axis_and_other_keys():
    q, = packed(tokens=10, count=1)
    k, v = packed(tokens=21, count=2)
    o = nbhd.attention_varlen(q, k, v, [3, 7], kv_lengths=[20, 1])
    np.testing.assert_array_equal(o[:3], nbhd.attention(q[None, :3], k[None, :20], v[None, :20])[0])
    np.testing.assert_allclose(o[3:], np.broadcast_to(v[20], (7, 2, 12)), rtol=1e-6)


@pytest.mark.parametrize("change, says", [
    (dict(window=6), "sequence 1, of 5x5 tokens: window[0] is 6"),
    (dict(lengths=GRIDS[:3]), "q has 270 tokens; the sequences' are 245"),
    (dict(lengths=[(9, 12), (5,)]), "lengths must be a list"), (dict(lengths=[]), "lengths must be a list"),
    (dict(lengths=[269.5, 1.5]), "whole numbers"), (dict(lengths=270), "whole numbers"),
    (dict(lengths=[()]), "lengths has 0 numbers"), (dict(lengths=[(1, 1, 5, 54)]), "lengths has 4 numbers"),
    (dict(offsets=[0, 108, 133, 2 ** 70]), "offsets holds 1180591620717411303424"),
    (dict(lengths=[270, 1]), "the sequences' are 271"), (dict(offsets=[0, 108, 133]), "offsets has 3 numbers"),
    (dict(offsets=[0, 108, 133, 260]), "the sequences' are 285"),
    (dict(lengths=[(3, 3, 30)], window=3, kernel="x"), "kernel is .x.; there is no kernel"),
    (dict(extra_kv=(np.zeros((1, 2, 2, 12), np.float32),) * 2), "extra_kv is of 1 sequences")])
def test_mistakes(change, says):
    arguments = dict(lengths=GRIDS, window=3)
    arguments.update(change)
    with pytest.raises(nbhd.InvalidError, match=says.replace("[", r"\[")):
        nbhd.attention_varlen(*packed(), **arguments)


def test_the_struct_is_that_of_c(tmp_path):
    fields = [name for name, _ in _lib.Ragged._fields_]
    source = tmp_path / "offsets.c"
    source.write_text("#include <stdio.h>\n#include <nbhd.h>\nint main(void) {\n" + "\n".join(
        f'printf("%zu\\n", offsetof(nbhd_ragged, {name}));' for name in fields) +
        'printf("%zu\\n", sizeof(nbhd_ragged)); return 0; }\n')
    include = Path(__file__).resolve().parents[2] / "include"
    subprocess.run(["cc", f"-I{include}", source, "-o", tmp_path / "offsets"], check=True)
    want = [getattr(_lib.Ragged, name).offset for name in fields] + [c.sizeof(_lib.Ragged)]
    assert [int(n) for n in subprocess.check_output([tmp_path / "offsets"]).split()] == want


# ---- PyTorch ----


def torch_inputs(torch, extra=0):
    generator = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_()
    q, k, v = make(STARTS[-1], 4, 16), make(STARTS[-1], 2, 16), make(STARTS[-1], 2, 8)
    return q, k, v, (make(4, extra, 2, 16), make(4, extra, 2, 8)) if extra else None


@pytest.mark.parametrize("extra, bias", [(0, False), (3, True)])
def test_gradients_are_those_of_each_alone(extra, bias):
    torch = pytest.importorskip("torch")
    q, k, v, extra_kv = torch_inputs(torch, extra)
    table = torch.randn(4, 5, 9).requires_grad_() if bias else None
    inputs = [q, k, v, *(extra_kv or []), *([table] if bias else [])]
    o, lse = nbhd.attention_varlen(q, k, v, GRIDS, window=(3, 5), extra_kv=extra_kv, bias=table, return_lse=True)
    outputs = []
    for i, grid in enumerate(GRIDS):
        part = [t[STARTS[i]:STARTS[i + 1]].unflatten(0, grid)[None] for t in (q, k, v)]
        one = nbhd.attention(*part, window=(3, 5), extra_kv=extra_kv and [t[i:i + 1] for t in extra_kv], bias=table,
                             return_lse=True)
        outputs.append([t[0].flatten(0, 1) for t in one])
    want, want_lse = (torch.cat(parts) for parts in zip(*outputs))
    torch.testing.assert_close(o, want, atol=0, rtol=0)
    dout, dlse = torch.randn_like(o), torch.randn_like(lse)
    got = torch.autograd.grad([o, lse], inputs, [dout, dlse])
    expected = torch.autograd.grad([want, want_lse], inputs, [dout, dlse])
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_padded_results_and_gradients_are_zero_outside():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(4, 16, 12, 2, 8).requires_grad_() for _ in range(3))
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    try:
        o = nbhd.attention_varlen(q, k, v, torch.tensor(GRIDS), window=3)
        results = o, *torch.autograd.grad(o.sum(), (q, k, v))
    finally:
        torch.use_deterministic_algorithms(False)
    for result in results:
        for i, (rows, columns) in enumerate(GRIDS):
            assert not result[i, rows:].any() and not result[i, :, columns:].any() and result.isfinite().all()


def test_compile_without_graph_breaks():
    torch = pytest.importorskip("torch")
    q, k, v, _ = torch_inputs(torch)
    compiled = torch.compile(lambda q, k, v: nbhd.attention_varlen(q, k, v, GRIDS, window=3) * 2, fullgraph=True,
                             backend="aot_eager")
    got = compiled(q, k, v)
    torch.testing.assert_close(got, nbhd.attention_varlen(q, k, v, GRIDS, window=3) * 2)
    got.sum().backward()
    assert q.grad.isfinite().all() and q.grad.any()


def test_operators_are_well_formed():
    torch = pytest.importorskip("torch")
    q, k, v, _ = torch_inputs(torch)
    torch.library.opcheck(torch.ops.nbhd.forward_varlen, (
        q, k, v, None, None, None, [3, 3], [1, 1], [1, 1], [0, 0], 0.0, False, 2,
        [n for grid in GRIDS for n in grid], [], [], [], None))
