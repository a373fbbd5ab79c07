"""NATTEN's modules: projections around neighborhood attention, whose parameters have its names and shapes."""

import torch

from .. import _lib, attention, av, qk
from .._lib import InvalidError
from .functional import check_kernel_size, check_rank, edges


class _NeighborhoodAttention(torch.nn.Module):
    """Projections around neighborhood attention over [batch, axes..., embed_dim]. Of what NATTEN had up to
    0.19, rel_pos_bias adds a learnt bias by relative position, the parameter rpb [heads, 2 kernel_size - 1, ...], and
    attn_drop drops weights out in training, which writes them to memory."""

    na_dim = None

    def __init__(self, embed_dim, num_heads, kernel_size, stride=1, dilation=1, is_causal=False, qkv_bias=True,
                 qk_scale=None, proj_drop=0.0, *, rel_pos_bias=False, attn_drop=0.0):
        super().__init__()
        if embed_dim % num_heads:
            raise InvalidError(f"embed_dim is {embed_dim}; num_heads, {num_heads}, must divide it")
        check_kernel_size(kernel_size)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.scale = qk_scale or self.head_dim ** -0.5
        self.kernel_size = tuple(_lib.per_axis(kernel_size, self.na_dim, "kernel_size"))
        self.stride = tuple(_lib.per_axis(1 if stride is None else stride, self.na_dim, "stride"))
        self.dilation = tuple(_lib.per_axis(1 if dilation is None else dilation, self.na_dim, "dilation"))
        self.is_causal = tuple(map(bool, _lib.edges_of(edges(is_causal), self.na_dim)))
        self.qkv = torch.nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        shape = (num_heads, *(2 * width - 1 for width in self.kernel_size))
        self.register_parameter("rpb", torch.nn.Parameter(torch.empty(shape)) if rel_pos_bias else None)
        if rel_pos_bias:
            torch.nn.init.trunc_normal_(self.rpb, std=0.02)
        self.attn_drop = torch.nn.Dropout(attn_drop)
        self.proj = torch.nn.Linear(embed_dim, embed_dim)
        self.proj_drop = torch.nn.Dropout(proj_drop)

    def forward(self, x):
        check_rank(type(self).__name__, x, self.na_dim + 2)
        if x.shape[-1] != self.embed_dim:
            raise InvalidError(f"{type(self).__name__} has embed_dim {self.embed_dim}, and got {tuple(x.shape)}")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        window = dict(window=self.kernel_size, stride=self.stride, dilation=self.dilation, edge=edges(self.is_causal))
        if self.training and self.attn_drop.p:
            weights = qk(q, k, **window, scale=self.scale, bias=self.rpb).softmax(-1)
            o = av(self.attn_drop(weights), v, **window)
        else:
            o = attention(q, k, v, **window, scale=self.scale, bias=self.rpb)
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
