"""The unfused functions that NATTEN had up to 0.19, on its tensors of then: [batch, heads, axes..., head_dim], whose
queries come scaled. na1d_qk(), na1d_av() and the like are those of 0.17; natten1dqkrpb() and the like of 0.14 and 0.15.
"""

import torch

from .. import av, qk
from .functional import check_kernel_size, check_rank, edges


def _heads_last(tensor):
    return tensor.movedim(1, -2)


def _scores(name, rank, query, key, kernel_size, dilation, additional_keys, is_causal, rpb):
    check_rank(name, query, rank + 3)
    check_rank(name, key, rank + 3)
    check_kernel_size(kernel_size)
    scores = qk(_heads_last(query), _heads_last(key), kernel_size, dilation=dilation, edge=edges(is_causal), bias=rpb,
                scale=1).movedim(-2, 1)
    if additional_keys is None:
        return scores
    more = query.flatten(2, -2) @ additional_keys.transpose(-1, -2)
    return torch.cat((scores, more.unflatten(2, query.shape[2:-1])), -1)


def _sums(name, rank, attn, value, kernel_size, dilation, additional_values, is_causal):
    check_rank(name, attn, rank + 3)
    check_rank(name, value, rank + 3)
    check_kernel_size(kernel_size)
    more = 0 if additional_values is None else additional_values.shape[-2]
    near, far = attn.split((attn.shape[-1] - more, more), -1)
    o = av(_heads_last(near), _heads_last(value), kernel_size, dilation=dilation, edge=edges(is_causal)).movedim(-2, 1)
    return o if not more else o + (far.flatten(2, -2) @ additional_values).unflatten(2, attn.shape[2:-1])


def na1d_qk(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None):
    return _scores("na1d_qk", 1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na2d_qk(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None):
    return _scores("na2d_qk", 2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na3d_qk(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None):
    return _scores("na3d_qk", 3, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na1d_av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False):
    return _sums("na1d_av", 1, attn, value, kernel_size, dilation, additional_values, is_causal)


def na2d_av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False):
    return _sums("na2d_av", 2, attn, value, kernel_size, dilation, additional_values, is_causal)


def na3d_av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False):
    return _sums("na3d_av", 3, attn, value, kernel_size, dilation, additional_values, is_causal)


def natten1dqkrpb(query, key, rpb, kernel_size, dilation):
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(query, key, rpb, kernel_size, dilation):
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten3dqkrpb(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation):
    return na3d_qk(query, key, (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation), rpb=rpb)


def natten3dqk(query, key, kernel_size_d, kernel_size, dilation_d, dilation):
    return natten3dqkrpb(query, key, None, kernel_size_d, kernel_size, dilation_d, dilation)


def natten3dav(attn, value, kernel_size_d, kernel_size, dilation_d, dilation):
    return na3d_av(attn, value, (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation))


natten1dqk, natten1dav, natten2dqk, natten2dav = na1d_qk, na1d_av, na2d_qk, na2d_av
