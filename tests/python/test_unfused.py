"""qk, av and merge: with a softmax between them they are attention(); gradients against finite differences."""

import nbhd
import numpy as np
import pytest

CASES = [
    ((20,), dict(window=5)),
    ((9, 12), dict(window=(3, 4), dilation=(1, 3), edge=("nearest", "causal"))),
    ((4, 6, 8), dict(window=(3, 4, 5), stride=(1, 2, 3), edge=("nearest", "truncated", "nearest"))),
    ((7, 11), dict(window=(4, 3), stride=(2, 1), dilation=(1, 3), edge=("truncated", "periodic"))),
]


def arrays(axes, heads=4, kv_heads=2, head_dim=8, batch=2):
    generator = np.random.default_rng(3)
    make = lambda h: generator.standard_normal((batch, *axes, h, head_dim)).astype(np.float32)
    return make(heads), make(kv_heads), make(kv_heads)


def windows(axes, window):
    return [window] * len(axes) if isinstance(window, int) else window


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("axes, options", CASES)
def test_softmax_between_them_is_attention(axes, options):
    q, k, v = arrays(axes)
    shape = (4, *(2 * w - 1 for w in windows(axes, options["window"])))
    bias = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    weights = softmax(nbhd.qk(q, k, bias=bias, scale=0.5, **options))
    assert weights.shape == (*q.shape[:-1], np.prod(windows(axes, options["window"])))
    want = nbhd.attention(q, k, v, bias=bias, scale=0.5, **options)
    np.testing.assert_allclose(nbhd.av(weights, v, **options), want, atol=2e-6)


def test_merge_of_halves_is_the_whole():
    q, k, v = arrays((6, 7))
    flat = lambda t: t.reshape(t.shape[0], -1, *t.shape[-2:])
    whole, lse = nbhd.attention(q, k, v, return_lse=True)
    halves = [nbhd.attention(flat(q), flat(k)[:, part], flat(v)[:, part], return_lse=True)
              for part in (slice(0, 15), slice(15, 42))]
    o, merged = nbhd.merge(*zip(*halves))
    np.testing.assert_allclose(o, flat(whole), atol=2e-6)
    np.testing.assert_allclose(merged, lse.reshape(merged.shape), atol=2e-6)


@pytest.mark.parametrize("call, says", [
    (lambda q, k, v: nbhd.av(nbhd.qk(q, k, 3)[..., :8], v, 3), "weights has 8 entries .* 3x3 have 9"),
    (lambda q, k, v: nbhd.qk(q, k.astype(np.float16), 3), "k is float16; it must be float32"),
    (lambda q, k, v: nbhd.qk(q, k, 3, bias=np.zeros((4, 3, 3))),
     r"bias has the shape \(4, 3, 3\); it must be \(4, 5, 5\)"),
    (lambda q, k, v: nbhd.merge([q, k], [q[..., 0], k[..., 0]]), r"outputs\[1\] and lses\[1\]"),
    (lambda q, k, v: nbhd.merge([], []), "0 outputs")])
def test_mistakes(call, says):
    with pytest.raises(nbhd.InvalidError, match=says):
        call(*arrays((5, 6)))


@pytest.mark.parametrize("axes, options", CASES)
def test_tensors(axes, options):
    torch = pytest.importorskip("torch")
    q, k, v = arrays(axes, head_dim=3, batch=1)
    tensors = [torch.from_numpy(t).double().requires_grad_() for t in (q, k, v)]
    bias = torch.randn(4, *(2 * w - 1 for w in windows(axes, options["window"]))).requires_grad_()
    both = lambda q, k, v: nbhd.av(nbhd.qk(q, k, scale=0.5, **options).softmax(-1), v, **options)
    torch.testing.assert_close(both(*tensors), nbhd.attention(*tensors, scale=0.5, **options))
    assert torch.autograd.gradcheck(both, tensors, fast_mode=True, atol=1e-6)
    q, k, v = (t.detach().float().requires_grad_() for t in tensors)
    unfused = nbhd.av(nbhd.qk(q, k, bias=bias, **options).softmax(-1), v, **options)
    fused = nbhd.attention(q, k, v, bias=bias, **options)
    dout = torch.randn_like(fused)
    inputs = (q, k, v, bias)
    for one, other in zip(torch.autograd.grad(unfused, inputs, dout), torch.autograd.grad(fused, inputs, dout)):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    torch.library.opcheck(torch.ops.nbhd.qk, (q, k, bias, *lists(axes, options), 0.5, None))
    torch.library.opcheck(torch.ops.nbhd.av, (unfused_weights(q, k, options), v, *lists(axes, options), None))


def lists(axes, options):
    from nbhd import _lib
    rank = len(axes)
    per_axis = [_lib.per_axis(options.get(name, 1), rank, name) for name in ("window", "stride", "dilation")]
    return *per_axis, _lib.edges_of(options.get("edge", "nearest"), rank)


def unfused_weights(q, k, options):
    return nbhd.qk(q, k, **options).softmax(-1).detach().requires_grad_()


def test_merge_of_tensors():
    torch = pytest.importorskip("torch")
    make = lambda *shape: torch.randn(*shape, dtype=torch.float32)
    outputs, lses = [make(1, 5, 2, 3) for _ in range(3)], [make(1, 5, 2) for _ in range(3)]
    lses[1][0, 2] = -torch.inf  # these saw no key
    outputs[1][0, 2] = torch.nan
    o, lse = nbhd.merge(outputs, lses)
    want, want_lse = nbhd.merge([t.numpy() for t in outputs], [t.numpy() for t in lses])
    np.testing.assert_allclose(o.numpy(), want, atol=1e-6)
    np.testing.assert_allclose(lse.numpy(), want_lse, atol=1e-6)
    for tensor in (*outputs, *lses):
        tensor.requires_grad_()
    o, lse = nbhd.merge(outputs, lses)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum() + lse.sum(), (*outputs, *lses)))
    none = nbhd.merge([make(1, 2, 1, 3)], [torch.full((1, 2, 1), -torch.inf)])
    assert none[0].eq(0).all() and none[1].eq(-torch.inf).all()
