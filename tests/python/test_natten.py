"""NATTEN's names: each gives what nbhd's own function gives for the same problem; the modules learn, are saved and
compiled."""

import copy
import io

import nbhd
import pytest

torch = pytest.importorskip("torch")
from nbhd import natten  # noqa: E402: it needs PyTorch


def tensors(*axes, count=3, heads=2, head_dim=8, batch=1):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, *axes, heads, head_dim, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("name, axes, ours, theirs", [
    ("na1d", (20,), dict(window=5, stride=2), dict(kernel_size=5, stride=2, backend="cutlass-fna", q_tile_shape=(64,))),
    ("na1d", (20,), dict(window=5, edge="causal"), dict(kernel_size=(5,), is_causal=True)),
    ("na2d", (8, 9), dict(window=(3, 4), dilation=2, edge=("causal", "nearest"), scale=0.5),
     dict(kernel_size=(3, 4), dilation=2, is_causal=(True, False), scale=0.5)),
    ("na3d", (4, 5, 6), dict(window=3, stride=(1, 2, 3)), dict(kernel_size=3, stride=(1, 2, 3))),
    ("neighborhood_attention_generic", (8, 9), dict(window=3), dict(kernel_size=3))])
def test_functions(name, axes, ours, theirs):
    q, k, v = tensors(*axes)
    o, lse = getattr(natten, name)(q, k, v, **theirs, return_lse=True)
    want, want_lse = nbhd.attention(q, k, v, **ours, return_lse=True)
    assert torch.equal(o, want) and torch.equal(lse, want_lse)
    assert torch.equal(getattr(natten, name)(q, k, v, **theirs), want)


def test_additional_keys_and_merging():
    q, k, v = tensors(8, 9)
    more_k, more_v = tensors(5, count=2)
    o, lse = natten.na2d(q, k, v, 3, additional_keys=more_k, additional_values=more_v, return_lse=True)
    near = natten.na2d(q, k, v, 3, return_lse=True)
    far = [t.unflatten(1, (8, 9)) for t in natten.attention(q.flatten(1, 2), more_k, more_v, return_lse=True)]
    merged, merged_lse = natten.merge_attentions([near[0], far[0]], [near[1], far[1]], torch_compile=False)
    torch.testing.assert_close(merged, o, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(merged_lse, lse, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [dict(seqlens_Q=[12, 8], seqlens_KV=[12, 8]),
                                     dict(cumulative_seqlen_Q=torch.tensor([0, 12, 20]), max_seqlen_Q=12)])
def test_packed_sequences(lengths):
    q, k, v = tensors(20)
    o, lse = natten.attention(q, k, v, is_causal=True, return_lse=True, **lengths)
    assert o.shape == q.shape and lse.shape == q.shape[:-1]
    for part in (slice(0, 12), slice(12, 20)):
        torch.testing.assert_close(o[:, part], nbhd.attention(q[:, part], k[:, part], v[:, part], edge="causal"))


@pytest.mark.parametrize("kind, axes, options", [
    (natten.NeighborhoodAttention1D, (12,), dict(kernel_size=5, is_causal=True, qkv_bias=False)),
    (natten.NeighborhoodAttention2D, (8, 9), dict(kernel_size=3, dilation=2, rel_pos_bias=True, qk_scale=0.3)),
    (natten.NeighborhoodAttention3D, (3, 4, 5),
     dict(kernel_size=(2, 3, 3), stride=(1, 2, 1), is_causal=(True, False, False)))])
def test_modules(kind, axes, options):
    module = kind(embed_dim=16, num_heads=2, **options)
    x = torch.randn(2, *axes, 16)
    q, k, v = (part.unflatten(-1, (2, 8)) for part in module.qkv(x).chunk(3, -1))
    causal = options.get("is_causal", False)
    causal = causal if isinstance(causal, tuple) else (causal,) * len(axes)
    o = nbhd.attention(q, k, v, options["kernel_size"], stride=options.get("stride", 1),
                       dilation=options.get("dilation", 1), edge=["causal" if one else "nearest" for one in causal],
                       scale=options.get("qk_scale"), bias=module.rpb)
    y = module(x)
    torch.testing.assert_close(y, module.proj(o.flatten(-2)))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (torch.load(saved, weights_only=False), copy.deepcopy(module),
                  torch.compile(module, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(other(x), y)


def test_modules_as_natten_has_them():
    """The order of arguments and the attributes of NATTEN 0.20 and later."""
    module = natten.NeighborhoodAttention2D(16, 2, 5, 2, (1, 2), (True, False), False, 0.3, 0.1)
    assert module.qkv.bias is None and module.proj_drop.p == 0.1 and module.rpb is None
    assert (module.na_dim, module.embed_dim, module.num_heads, module.head_dim) == (2, 16, 2, 8)
    assert (module.kernel_size, module.stride, module.dilation) == ((5, 5), (2, 2), (1, 2))
    assert (module.is_causal, module.scale) == ((True, False), 0.3)
    assert natten.NeighborhoodAttention1D(16, 2, 5).scale == 8 ** -0.5
    plain = natten.NeighborhoodAttention2D(16, 2, 5, None, None, None)  # None is NATTEN's word for the default
    assert (plain.stride, plain.dilation, plain.is_causal) == ((1, 1), (1, 1), (False, False))
    q, = tensors(8, 9, count=1)
    one_axis = natten.na2d(q, q, q, 3, None, None, torch.tensor([True, False]))
    assert torch.equal(one_axis, natten.na2d(q, q, q, 3, is_causal=(True, False)))


def test_settings():
    q, k, v = tensors(8, 9)
    natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference("unrestricted")
    natten.use_deterministic_algorithms()
    assert natten.are_deterministic_algorithms_enabled() and not torch.are_deterministic_algorithms_enabled()
    same = natten.na2d(q, k, v, 3)
    natten.use_deterministic_algorithms(False)
    assert not natten.are_deterministic_algorithms_enabled() and torch.equal(natten.na2d(q, k, v, 3), same)


@pytest.mark.parametrize("error, says, call", [
    (nbhd.InvalidError, "na2d takes tensors of 5 extents", lambda q: natten.na2d(q, q, q, 3)),
    (TypeError, "unexpected keyword argument 'kernel'", lambda q: natten.na1d(q, q, q, 3, kernel="x")),
    (nbhd.InvalidError, "extra_kv is of 1 tensors", lambda q: natten.na1d(q, q, q, 3, additional_keys=q)),
    (nbhd.InvalidError, "batch is 2", lambda q: natten.attention(*[q.expand(2, -1, -1, -1)] * 3, seqlens_Q=[9])),
    (nbhd.InvalidError, "not those of the queries", lambda q: natten.attention(q, q, q, seqlens_KV=[4, 5])),
    (nbhd.InvalidError, "num_heads, 3, must divide", lambda q: natten.NeighborhoodAttention1D(16, 3, 5)),
    (nbhd.InvalidError, "kernel_size has 3 values", lambda q: natten.NeighborhoodAttention2D(16, 2, (3, 3, 3))),
    (nbhd.InvalidError, "kernel_size is None", lambda q: natten.NeighborhoodAttention2D(16, 2, None)),
    (nbhd.InvalidError, "kernel_size is None", lambda q: natten.na1d(q, q, q, None)),
    (nbhd.InvalidError, "kernel_size is None", lambda q: natten.functional.na1d_qk(q, q, None)),
    (nbhd.InvalidError, "is_causal is 'no'", lambda q: natten.na1d(q, q, q, 3, is_causal="no")),
    (nbhd.InvalidError, "edge has 2 values for 1 axis", lambda q: natten.na1d(q, q, q, 3, is_causal=(True, False))),
    (nbhd.InvalidError, "embed_dim 32, and got", lambda q: natten.NeighborhoodAttention2D(32, 2, 3)(q)),
    (nbhd.InvalidError, "NeighborhoodAttention2D takes tensors of 4 extents",
     lambda q: natten.NeighborhoodAttention2D(16, 2, 3)(q[0]))])
def test_mistakes(error, says, call):
    q, = tensors(9, count=1)
    with pytest.raises(error, match=says):
        call(q)
