"""The operator on PyTorch tensors: values and gradients are those of a dense softmax under the mask that the library
reports."""

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
    q, k = make(batch, *axes, heads, head_dim), make(batch, *axes, kv_heads, head_dim)
    v = make(batch, *axes, kv_heads, head_dim_v)
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
    compiled = torch.compile(lambda q, k, v: nbhd.attention(q, k, v, window=3, scale=0.5) * 2, fullgraph=True,
                             backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), nbhd.attention(q, k, v, window=3, scale=0.5) * 2)


MISTAKES = [
    (lambda q, k, v: nbhd.attention(q, k.half(), v, 3), "k is float16; it must be float32"),
    (lambda q, k, v: nbhd.attention(q, k, v.double(), 3), "v is float64; it must be float32"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, bias=torch.zeros(2, 3, 3)),
     r"bias has the shape \(2, 3, 3\); it must be \(2, 5, 5\)"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, bias=torch.zeros(2, 5, 5, dtype=torch.complex64)),
     "bias is torch.complex64; it must be float32"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, extra_kv=(k[:, 0, :5], v[:, 0, :3])), "extra_v has the shape"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, extra_kv=(k[:, 0, :5].half(), v[:, 0, :5].half())),
     "extra_k is float16"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, extra_kv=(k[0, 0, :5], v[0, 0, :5])), "extra_k has 3 extents"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, extra_kv=(torch.ones(()),) * 2), "extra_k has 0 extents"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, scale="half"), "scale is 'half'"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, edge=[["causal"], "nearest"]), r"edge is \['causal'\]"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, kernel=5), "kernel is 5"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, scale=0), "scale is 0"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, scale=1e-46), "scale is 1e-46"),  # 0 as a float32
    (lambda q, k, v: nbhd.attention(q, k, v, 3, scale=torch.tensor(0.5, requires_grad=True)), "scale needs a gradient"),
    (lambda q, k, v: nbhd.attention(q, k, v, 2 ** 32 + 3), "window is 4294967299"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, stride=2 ** 32 + 1), "stride is 4294967297"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, extra_kv=(k[:, 0, :5], None)), "extra_kv is of 1 tensors"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3, extra_kv=(k[:, 0, :5],) * 3), "extra_kv is of 3 tensors"),
    (lambda q, k, v: nbhd.attention(q, k.to("meta"), v, 3), "on cpu and meta"),
    (lambda q, k, v: nbhd.qk(q[0, 0, 0], k[0, 0, 0], 3), "q has 2 extents"),
    (lambda q, k, v: nbhd.av(q[0, 0], v[0, 0], 3), "weights has 3 extents"),
    (lambda q, k, v: nbhd.attention(q, k, v, 0), "window is 0"),
    (lambda q, k, v: nbhd.attention(q, k.to_sparse(), v, 3), "layout is torch.sparse_coo"),
    (lambda q, k, v: nbhd.attention(q, k, v, 3.5), "window is 3.5"),
    (lambda q, k, v: nbhd.attention(q[0], k[0], v[0, 0], 3), r"\(9, 2, 16\); they must be \[batch"),
    (lambda q, k, v: nbhd.attention(q[..., :0], k[..., :0], v, 3), "at least 1")]


@pytest.mark.parametrize("call, says", MISTAKES)
def test_what_c_cannot_see_is_refused(call, says):
    with pytest.raises(nbhd.InvalidError, match=says):
        call(*tensors(axes=(8, 9))[:3])


def recorded_flags(monkeypatch):
    """The flags of every plan from here on."""
    make, flags = _lib.plan, []

    def plan(desc, kind, bits, *rest):
        flags.append(bits)
        return make(desc, kind, bits, *rest)

    monkeypatch.setattr(_lib, "plan", plan)
    return flags


def test_unaligned_tensors_are_planned_again(monkeypatch):
    execute, flags = _lib.Plan.execute, recorded_flags(monkeypatch)

    def picky(plan, *rest):
        if len(flags) == 1:
            raise _lib.UnsupportedError("q.data is not aligned")
        execute(plan, *rest)

    monkeypatch.setattr(_lib.Plan, "execute", picky)
    q, k, v, _ = tensors(axes=(7, 11))
    o = nbhd.attention(q, k, v, (3, 5))
    assert flags == [_lib.ALIGNED, 0]
    monkeypatch.undo()
    torch.testing.assert_close(o, nbhd.attention(q, k, v, (3, 5)))


def test_deterministic_algorithms_are_planned(monkeypatch):
    flags = recorded_flags(monkeypatch)
    q, k, v, _ = tensors(axes=(5, 13))
    torch.use_deterministic_algorithms(True)
    try:
        nbhd.attention(q, k, v, 3).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert flags == [_lib.ALIGNED | _lib.DETERMINISTIC] * 2  # forward and backward
    nbhd.attention(q, k, v, 3)
    assert flags[2:] == [_lib.ALIGNED]


def test_kinds_of_arrays_do_not_mix():
    q, k, v, _ = tensors(axes=(8, 9))
    with pytest.raises(TypeError, match="k is a ndarray"):
        nbhd.attention(q, k.detach().numpy(), v, 3)
    for call in (lambda: nbhd.attention([1.0], k, v, 3), lambda: nbhd.qk([1.0], k, 3)):
        with pytest.raises(TypeError, match="q is a list"):
            call()
    with pytest.raises(TypeError, match="k is a NoneType"):
        nbhd.attention(q, None, v, 3)


def test_devices_that_no_kernel_reads():
    """A tensor of another kind of GPU has an address too, which the CPU must not read."""
    from nbhd import torch as backend
    facts = [(name, (1, 8, 9, 2, 16), (), torch.float32, torch.device("xpu")) for name in "qkv"]
    with pytest.raises(nbhd.UnsupportedError, match="q is on xpu"):
        backend._Call(backend._describe, facts, (), None, 0, None)


def test_compile_with_numbers_that_change():
    """From the second value on PyTorch traces windows, scales and lengths as symbols."""
    q, k, v, _ = tensors(axes=(8, 9))
    call = torch.compile(lambda window, scale: nbhd.attention(q, k, v, window, scale=scale), fullgraph=True,
                         backend="aot_eager")
    for window, scale in ((3, 0.1), (4, 0.2), (5, 0.3)):
        torch.testing.assert_close(call(window, scale), nbhd.attention(q, k, v, window, scale=scale))
    packed = [t[0].flatten(0, 1) for t in (q, k, v)]
    call = torch.compile(lambda length: nbhd.attention_varlen(*packed, [length, 72 - length], 3), fullgraph=True,
                         backend="aot_eager")
    for length in (10, 20, 30):
        torch.testing.assert_close(call(length), nbhd.attention_varlen(*packed, [length, 72 - length], 3))


def test_nested_tensors_are_told_of_lengths():
    rows = [torch.randn(9, 2, 16), torch.randn(5, 2, 16)]
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(rows, layout=layout)
        with pytest.raises(nbhd.InvalidError, match="q is a nested tensor; attention_varlen"):
            nbhd.attention(nested, nested, nested, 3)


def test_one_row_seen_everywhere_and_gradients_of_a_sum():
    """Strides of 0 in all extents but the last mean contiguous to C."""
    row = torch.randn(16)
    q, k, v, _ = tensors(axes=(8, 9), head_dim_v=1)
    for name in ("q", "k"):
        expanded = {"q": q, "k": k, name: row.expand(1, 8, 9, 2, 16)}
        plain = {one: t.contiguous() for one, t in expanded.items()}
        assert torch.equal(nbhd.attention(**expanded, v=v, window=3), nbhd.attention(**plain, v=v, window=3))
    got = torch.autograd.grad(nbhd.attention(q, k, v, 3).sum(), (q, k, v))  # its gradient is one number, expanded
    want = torch.autograd.grad((nbhd.attention(q, k, v, 3) * torch.ones(1, 8, 9, 2, 1)).sum(), (q, k, v))
    assert all(torch.equal(one, other) for one, other in zip(got, want))


def test_extra_keys_of_any_strides():
    q, k, v, extra_kv = tensors(axes=(20,), extra=3)
    turned = tuple(t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in extra_kv)
    assert turned[0].stride(-1) != 1
    assert torch.equal(nbhd.attention(q, k, v, 5, extra_kv=turned), nbhd.attention(q, k, v, 5, extra_kv=extra_kv))


@pytest.mark.parametrize("dtype, kernel", [(torch.float32, None), (torch.float32, "cpu.fwd_scalar"),
                                           (torch.float64, None)])
def test_a_bias_of_minus_infinity_hides_keys(dtype, kernel):
    q, k, v = (t.requires_grad_() for t in tensors(axes=(9, 9), dtype=dtype)[:3])
    bias = torch.randn(2, 9, 9)
    bias[:, :, :4] = -math.inf  # keys to the left, so the first ones of a row
    o = nbhd.attention(q, k, v, 5, bias=bias, kernel=kernel)
    want = nbhd.av(nbhd.qk(q, k, 5, bias=bias).softmax(-1), v, 5)
    torch.testing.assert_close(o, want)
    direction = torch.randn_like(o)
    torch.testing.assert_close(torch.autograd.grad(o, (q, k, v), direction),
                               torch.autograd.grad(want, (q, k, v), direction))


def test_autocast():
    q, k, v, _ = tensors(axes=(8, 9))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = nbhd.attention(q.bfloat16(), k, v, 3)
        double = nbhd.attention(q.double(), k.double(), v.double(), 3)
    assert mixed.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert torch.equal(mixed, nbhd.attention(*(t.bfloat16() for t in (q, k, v)), 3))


def test_an_empty_batch_has_an_empty_result():
    q, k, v, _ = tensors(axes=(8, 9))
    o = nbhd.attention(q[:0], k[:0], v[:0], 3)
    assert o.shape == (0, 8, 9, 2, 16)
    assert all(g.shape == t.shape for g, t in zip(torch.autograd.grad(o.sum(), (q, k, v)), (q, k, v)))
    bias = torch.randn(2, 5, 5, requires_grad=True)
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    try:
        grad, = torch.autograd.grad(nbhd.attention(q[:0], k[:0], v[:0], 3, bias=bias).sum(), bias)
    finally:
        torch.use_deterministic_algorithms(False)
    assert grad.shape == bias.shape and not grad.any()


def test_forward_mode_is_refused_and_not_zero():
    q, k, v, _ = tensors(axes=(8, 9))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda t: nbhd.attention(t, k, v, 3), (q,), (q,))


def test_second_derivatives_are_refused():
    q, k, v, _ = tensors(axes=(8, 9))
    packed = [t[0].flatten(0, 1) for t in (q, k, v)]
    for o in (nbhd.attention(q, k, v, 3), nbhd.attention_varlen(*packed, [(8, 9)], 3), nbhd.qk(q, k, 3),
              nbhd.av(nbhd.qk(q, k, 3), v, 3)):
        first, = torch.autograd.grad(o.square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(first.sum(), q)


def _calls_for_transforms():
    q, k, v, _ = tensors(axes=(8, 9))
    k, v = k.detach(), v.detach()
    packed = [t[0].flatten(0, 1) for t in (k, v)]
    weights = nbhd.qk(q, k, 3).softmax(-1).detach()
    return q, {"attention": lambda t: nbhd.attention(t, k, v, 3),
               "lse": lambda t: nbhd.attention(t, k, v, 3, return_lse=True)[1],
               "varlen": lambda t: nbhd.attention_varlen(t[0].flatten(0, 1), *packed, [(8, 9)], 3),
               "qk": lambda t: nbhd.qk(t, k, 3), "av": lambda t: nbhd.av(weights * t.sum(-1, keepdim=True), v, 3)}


@pytest.mark.parametrize("name", _calls_for_transforms()[1])
def test_function_transforms(name):
    """torch.func's, which compute a gradient while they look for the next one's."""
    q, calls = _calls_for_transforms()

    def loss(t):
        return calls[name](t).square().sum()
    want, = torch.autograd.grad(loss(q), q)
    q = q.detach()
    torch.testing.assert_close(torch.func.grad(loss)(q), want)
    several = torch.stack((q, 2 * q, q))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(several)[::2], torch.stack((want, want)))
    values, pull = torch.func.vjp(calls[name], q)
    torch.testing.assert_close(pull(2 * values)[0], want)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda t: torch.func.grad(loss)(t).sum())(q)


def test_some_inputs_need_no_gradient():
    q, k, v, _ = tensors(axes=(8, 9))
    nbhd.attention(q.detach(), k, v.detach(), 3).sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None
