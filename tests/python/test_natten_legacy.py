"""What NATTEN had up to 0.19: unfused functions, biases, dropout of weights; and `natten` as the name of all of it."""

import subprocess
import sys

import nbhd
import pytest

torch = pytest.importorskip("torch")
from nbhd import natten  # noqa: E402: it needs PyTorch
from nbhd.natten import functional as F  # noqa: E402


def tensors(*axes, count=3):
    """[batch, heads, axes..., head_dim], as it was then."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 3, *axes, 8, generator=generator).requires_grad_() for _ in range(count)]


def fused(q, k, v, *window, **options):
    extra = options.pop("extra", None)
    last = [t.movedim(1, -2) for t in (q, k, v)]
    return nbhd.attention(*last, *window, scale=1, extra_kv=extra and [t.movedim(1, -2) for t in extra],
                          **options).movedim(-2, 1)


@pytest.mark.parametrize("rank, kernel_size, dilation, is_causal, bias", [
    (1, 5, 2, False, True), (1, (3,), 1, True, False), (2, 3, 1, False, True), (2, (3, 2), (1, 2), (True, False), False),
    (3, (2, 3, 3), 1, False, True)])
def test_unfused(rank, kernel_size, dilation, is_causal, bias):
    q, k, v = tensors(*(11, 8, 6)[:rank])
    sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,) * rank
    rpb = torch.randn(3, *(2 * size - 1 for size in sizes)) if bias else None
    qk, av = (getattr(F, f"na{rank}d_{name}") for name in ("qk", "av"))
    scores = qk(q, k, kernel_size, dilation, is_causal=is_causal, rpb=rpb)
    assert scores.shape == q.shape[:-1] + (torch.Size(sizes).numel(),)
    o = av(scores.softmax(-1), v, kernel_size, dilation, is_causal=is_causal)
    want = fused(q, k, v, kernel_size, dilation=dilation, edge=F.edges(is_causal), bias=rpb)
    torch.testing.assert_close(o, want, atol=1e-5, rtol=1e-4)
    for one, other in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (o, want))):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_unfused_with_additional_keys():
    q, k, v = tensors(8, 7)
    more_k, more_v = tensors(4, count=2)
    scores = F.na2d_qk(q, k, 3, additional_keys=more_k)
    assert scores.shape[-1] == 9 + 4
    o = F.na2d_av(scores.softmax(-1), v, 3, additional_values=more_v)
    torch.testing.assert_close(o, fused(q, k, v, 3, extra=(more_k, more_v)), atol=1e-5, rtol=1e-4)


def test_oldest_names():
    q, k, v = tensors(9, 8)
    rpb = torch.randn(3, 5, 5)
    assert torch.equal(F.natten2dqkrpb(q, k, rpb, 3, 2), F.na2d_qk(q, k, 3, 2, rpb=rpb))
    assert torch.equal(F.natten2dav(F.natten2dqk(q, k, 3, 2), v, 3, 2), F.na2d_av(F.na2d_qk(q, k, 3, 2), v, 3, 2))
    q, k, v = tensors(4, 6, 6)
    scores = F.natten3dqkrpb(q, k, torch.zeros(3, 3, 5, 5), 2, 3, 1, 2)
    assert torch.equal(scores, F.na3d_qk(q, k, (2, 3, 3), (1, 2, 2)))
    assert torch.equal(F.natten3dav(scores, v, 2, 3, 1, 2), F.na3d_av(scores, v, (2, 3, 3), (1, 2, 2)))
    with pytest.raises(nbhd.InvalidError, match="na1d_qk takes tensors of 4 extents"):
        F.natten1dqk(q, k, 3, 1)


def test_bias_and_dropout():
    q, k, v = (t.movedim(1, -2) for t in tensors(9))
    rpb = torch.randn(3, 9)
    assert torch.equal(natten.na1d(q, k, v, 5, rpb=rpb), nbhd.attention(q, k, v, 5, bias=rpb))
    torch.manual_seed(0)
    module = natten.NeighborhoodAttention1D(16, 2, 5, rel_pos_bias=True, attn_drop=0.5)
    x = torch.randn(1, 4096, 16)
    trained, evaluated = module(x), module.eval()(x)
    assert not torch.allclose(trained, evaluated, atol=1e-2)
    torch.testing.assert_close(trained.mean((0, 1)), evaluated.mean((0, 1)), atol=0.02, rtol=0)


def test_settings_are_remembered():
    natten.set_memory_usage_preference("strict")
    assert natten.is_memory_usage_strict() and not natten.is_memory_usage_default()
    assert natten.get_memory_usage_preference() == natten.context.MemoryUsagePreference.Strict
    natten.set_memory_usage_preference()
    assert natten.is_memory_usage_default() and not natten.is_memory_usage_unrestricted()
    natten.use_kv_parallelism_in_fused_na(False)
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    natten.use_kv_parallelism_in_fused_na()
    natten.allow_flex_compile(backprop=True)
    assert natten.is_flex_compile_allowed() and natten.is_flex_compile_backprop_allowed()
    natten.disable_flex_compile()
    assert not natten.is_flex_compile_allowed() and not natten.is_flex_compile_backprop_allowed()
    natten.use_fused_na(True, kv_parallel=True)
    assert natten.has_fused_na() and natten.is_fna_enabled() and natten.HAS_LIBNATTEN
    with pytest.raises(ValueError, match="'lots'; it must be one of default, strict"):
        natten.set_memory_usage_preference("lots")
    with pytest.raises(AttributeError, match="nbhd plan -x"):
        natten.get_configs_for_cutlass_fna


def test_lengths_for_packed_sequences():
    q = torch.randn(1, 20, 2, 8)
    lengths = torch.tensor([12, 8])
    *ends, longest, longest_kv = natten.utils.varlen.generate_varlen_parameters(q, q, q, lengths, lengths)
    assert (ends[0].tolist(), longest, longest_kv) == ([0, 12, 20], 12, 12)
    assert torch.equal(natten.attention(q, q, q, False, None, None, None, *ends, longest, longest_kv),
                       natten.attention(q, q, q, seqlens_Q=lengths, seqlens_KV=lengths))
    assert natten.utils.varlen.generate_varlen_parameters(q, q, q) == (None, None, 0, 0)


def test_as_natten():
    """A program for NATTEN, whole: in a process of its own, as modules are imported once."""
    program = """
import nbhd.natten
nbhd.natten.stand_in()
import natten
from natten import NeighborhoodAttention2D
from natten.context import set_memory_usage_preference
from natten.functional import na2d, natten2dav, natten2dqkrpb
from natten.utils.varlen import generate_varlen_parameters
set_memory_usage_preference("strict")
assert natten.is_memory_usage_strict() and natten is nbhd.natten and na2d is nbhd.natten.na2d
assert tuple(map(int, natten.__version__.split(".")[:2])) >= (0, 20)
nbhd.natten.stand_in()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    late = "import sys, types; sys.modules['natten'] = types.ModuleType('natten')\nimport nbhd.natten as n\nn.stand_in()"
    result = subprocess.run([sys.executable, "-c", late], stderr=subprocess.PIPE, text=True)
    assert "natten is imported already" in result.stderr
