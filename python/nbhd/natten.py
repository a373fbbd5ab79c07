"""NATTEN's functions and modules, computed by nbhd: with `import nbhd.natten as natten` most programs for it run as
they are.

Tensors, windows, strides, dilations, causal axes and the modules' parameters (so checkpoints too) mean the same. What
chooses among NATTEN's kernels and tiles (backend, q_tile_shape, set_memory_usage_preference(), ...) is taken and has no
effect, since the plan chooses; an argument that is neither raises TypeError. docs/python.md has the same in nbhd's own
functions, and the unfused ones.
"""

import torch

from . import _lib
from . import attention as _attention
from . import attention_varlen as _attention_varlen
from . import merge as _merge
from . import torch as _torch
from ._lib import InvalidError

__all__ = ["na1d", "na2d", "na3d", "neighborhood_attention_generic", "attention", "merge_attentions",
           "NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D", "HAS_LIBNATTEN",
           "use_deterministic_algorithms", "are_deterministic_algorithms_enabled", "use_kv_parallelism_in_fused_na",
           "set_memory_usage_preference", "allow_flex_compile", "allow_flex_compile_backprop", "disable_flex_compile",
           "disable_flex_compile_backprop"]

HAS_LIBNATTEN = True

_CHOICES = {"attention_kwargs", "backend", "q_tile_shape", "kv_tile_shape", "backward_q_tile_shape",
            "backward_kv_tile_shape", "backward_kv_splits", "backward_use_pt_reduction", "q_tile_size", "kv_tile_size",
            "backward_q_tile_size", "backward_kv_tile_size", "run_persistent_kernel", "kernel_schedule",
            "torch_compile", "try_fuse_additional_kv", "use_autograd_fix"}


def _check_choices(name, choices):
    unknown = sorted(set(choices) - _CHOICES)
    if unknown:
        raise TypeError(f"{name}() got an unexpected keyword argument '{unknown[0]}'")


def _edges(is_causal):
    """One edge for all axes, or one per axis."""
    if isinstance(is_causal, (tuple, list)):
        return ["causal" if causal else "nearest" for causal in is_causal]
    return "causal" if is_causal else "nearest"


def neighborhood_attention_generic(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None,
                                   additional_keys=None, additional_values=None, *, return_lse=False, **choices):
    """Of one to three axes, as the tensors have: [batch, axes..., heads, head_dim]."""
    _check_choices("neighborhood_attention_generic", choices)
    extra = None if additional_keys is None and additional_values is None else (additional_keys, additional_values)
    return _attention(query, key, value, kernel_size, stride=stride, dilation=dilation, edge=_edges(is_causal),
                      scale=scale, extra_kv=extra, return_lse=return_lse)


def _check_rank(name, tensor, extents):
    if tensor.ndim != extents:
        raise InvalidError(f"{name} takes tensors of {extents} extents, and got one of {tensor.ndim}, "
                           f"{tuple(tensor.shape)}")


def na1d(query, key, value, kernel_size, *args, **options):
    """[batch, tokens, heads, head_dim]; arguments as neighborhood_attention_generic()."""
    _check_rank("na1d", query, 4)
    return neighborhood_attention_generic(query, key, value, kernel_size, *args, **options)


def na2d(query, key, value, kernel_size, *args, **options):
    """[batch, rows, columns, heads, head_dim]; arguments as neighborhood_attention_generic()."""
    _check_rank("na2d", query, 5)
    return neighborhood_attention_generic(query, key, value, kernel_size, *args, **options)


def na3d(query, key, value, kernel_size, *args, **options):
    """[batch, frames, rows, columns, heads, head_dim]; arguments as neighborhood_attention_generic()."""
    _check_rank("na3d", query, 6)
    return neighborhood_attention_generic(query, key, value, kernel_size, *args, **options)


def _lengths(seqlens, cumulative):
    """Of the sequences of a packed batch; None where neither is given."""
    if cumulative is None:
        return seqlens
    ends = cumulative.tolist() if hasattr(cumulative, "tolist") else list(cumulative)
    return [end - begin for begin, end in zip(ends, ends[1:])]


def attention(query, key, value, is_causal=False, scale=None, seqlens_Q=None, seqlens_KV=None, cumulative_seqlen_Q=None,
              cumulative_seqlen_KV=None, max_seqlen_Q=None, max_seqlen_KV=None, *, return_lse=False, **choices):
    """Self and cross attention over [batch, tokens, heads, head_dim]; with lengths, sequences packed in a batch of 1.
    """
    _check_choices("attention", choices)
    _check_rank("attention", query, 4)
    options = dict(edge=_edges(is_causal), scale=scale, return_lse=return_lse)
    lengths, kv_lengths = _lengths(seqlens_Q, cumulative_seqlen_Q), _lengths(seqlens_KV, cumulative_seqlen_KV)
    if lengths is None:
        if kv_lengths is not None:
            raise InvalidError("the lengths of the keys are given, and not those of the queries; both or none must be")
        return _attention(query, key, value, **options)
    if len(query) != 1:
        raise InvalidError(f"the batch is {len(query)}; sequences of given lengths are packed in a batch of 1")
    result = _attention_varlen(query[0], key[0], value[0], lengths, kv_lengths=kv_lengths, **options)
    return tuple(one[None] for one in result) if return_lse else result[None]


def merge_attentions(outputs, lse_tensors, **choices):
    """(output, lse) over the union of the keys that the outputs attended to."""
    _check_choices("merge_attentions", choices)
    return _merge(outputs, lse_tensors)


def use_deterministic_algorithms(mode=True):
    """Backward passes with the same bits every time, as torch.use_deterministic_algorithms() has it too."""
    _torch.always_deterministic = bool(mode)


def are_deterministic_algorithms_enabled():
    return _torch.always_deterministic


def _no_effect(*_, **__):
    """A setting of NATTEN's kernels; nbhd has no such choice."""


use_kv_parallelism_in_fused_na = set_memory_usage_preference = _no_effect
allow_flex_compile = allow_flex_compile_backprop = disable_flex_compile = disable_flex_compile_backprop = _no_effect


class _NeighborhoodAttention(torch.nn.Module):
    """Projections around neighborhood attention over [batch, axes..., embed_dim]. rel_pos_bias, which NATTEN had up to
    0.19, adds a learnt bias by relative position, the parameter rpb [heads, 2 kernel_size - 1, ...]."""

    na_dim = None

    def __init__(self, embed_dim, num_heads, kernel_size, stride=1, dilation=1, is_causal=False, qkv_bias=True,
                 qk_scale=None, proj_drop=0.0, *, rel_pos_bias=False):
        super().__init__()
        if embed_dim % num_heads:
            raise InvalidError(f"embed_dim is {embed_dim}; num_heads, {num_heads}, must divide it")
        if kernel_size is None:
            raise InvalidError("kernel_size is None; it must be a whole number, or one per axis")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.scale = qk_scale or self.head_dim ** -0.5
        self.kernel_size = tuple(_lib.per_axis(kernel_size, self.na_dim, "kernel_size"))
        self.stride = tuple(_lib.per_axis(stride, self.na_dim, "stride"))
        self.dilation = tuple(_lib.per_axis(dilation, self.na_dim, "dilation"))
        self.is_causal = tuple(map(bool, _lib.edges_of(_edges(is_causal), self.na_dim)))
        self.qkv = torch.nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        shape = (num_heads, *(2 * width - 1 for width in self.kernel_size))
        self.register_parameter("rpb", torch.nn.Parameter(torch.empty(shape)) if rel_pos_bias else None)
        if rel_pos_bias:
            torch.nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = torch.nn.Linear(embed_dim, embed_dim)
        self.proj_drop = torch.nn.Dropout(proj_drop)

    def forward(self, x):
        _check_rank(type(self).__name__, x, self.na_dim + 2)
        if x.shape[-1] != self.embed_dim:
            raise InvalidError(f"{type(self).__name__} has embed_dim {self.embed_dim}, and got {tuple(x.shape)}")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        o = _attention(q, k, v, self.kernel_size, stride=self.stride, dilation=self.dilation,
                       edge=_edges(self.is_causal), scale=self.scale, bias=self.rpb)
        return self.proj_drop(self.proj(o.flatten(-2)))

    def extra_repr(self):
        return (f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
                f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}")


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Over [batch, tokens, embed_dim]."""
    na_dim = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Over [batch, rows, columns, embed_dim]."""
    na_dim = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Over [batch, frames, rows, columns, embed_dim]."""
    na_dim = 3
