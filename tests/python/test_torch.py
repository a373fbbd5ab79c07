"""The operator on PyTorch tensors: values and gradients are those of a dense softmax under the mask that the library reports."""

import math

import numpy as np
import pytest

import nbhd
from mask import mask_of
from nbhd import _lib

torch = pytest.importorskip("torch")


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
    return dense(q, k, v, q.shape[-1] ** -0.5, torch.from_numpy(mask_of(desc)), extra_kv)


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
