"""NATTEN's functions."""

from .. import attention as _attention
from .. import attention_varlen as _attention_varlen
from .. import merge as _merge
from .._lib import InvalidError

_CHOICES = {"attention_kwargs", "backend", "q_tile_shape", "kv_tile_shape", "backward_q_tile_shape",
            "backward_kv_tile_shape", "backward_kv_splits", "backward_use_pt_reduction", "q_tile_size", "kv_tile_size",
            "backward_q_tile_size", "backward_kv_tile_size", "run_persistent_kernel", "kernel_schedule",
            "torch_compile", "try_fuse_additional_kv", "use_autograd_fix", "xformers_kwargs"}


def _check_choices(name, choices):
    unknown = sorted(set(choices) - _CHOICES)
    if unknown:
        raise TypeError(f"{name}() got an unexpected keyword argument '{unknown[0]}'")


def edges(is_causal):
    """One edge for all axes, or one per axis; None means False."""
    causal = is_causal.tolist() if hasattr(is_causal, "tolist") else is_causal
    many = isinstance(causal, (tuple, list))
    if any(one not in (True, False, None) for one in (causal if many else [causal])):
        raise InvalidError(f"is_causal is {is_causal!r}; it must be True or False, or one per axis")
    names = ["causal" if one else "nearest" for one in (causal if many else [causal])]
    return names if many else names[0]


def check_kernel_size(kernel_size):
    """None would be the whole axis, which NATTEN has no word for; so it is a mistake."""
    if kernel_size is None:
        raise InvalidError("kernel_size is None; it must be a whole number, or one per axis")


def neighborhood_attention_generic(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None,
                                   additional_keys=None, additional_values=None, *, return_lse=False, rpb=None,
                                   **choices):
    """Of one to three axes, as the tensors have: [batch, axes..., heads, head_dim]. rpb, which NATTEN took up to 0.19,
    is added to the scores by relative position: [heads, 2 kernel_size - 1, ...]."""
    _check_choices("neighborhood_attention_generic", choices)
    check_kernel_size(kernel_size)
    extra = None if additional_keys is None and additional_values is None else (additional_keys, additional_values)
    return _attention(query, key, value, kernel_size, stride=stride, dilation=dilation, edge=edges(is_causal),
                      scale=scale, extra_kv=extra, bias=rpb, return_lse=return_lse)


def check_rank(name, tensor, extents):
    if tensor.ndim != extents:
        raise InvalidError(f"{name} takes tensors of {extents} extents, and got one of {tensor.ndim}, "
                           f"{tuple(tensor.shape)}")


def na1d(query, key, value, kernel_size, *args, **options):
    """[batch, tokens, heads, head_dim]; arguments as neighborhood_attention_generic()."""
    check_rank("na1d", query, 4)
    return neighborhood_attention_generic(query, key, value, kernel_size, *args, **options)


def na2d(query, key, value, kernel_size, *args, **options):
    """[batch, rows, columns, heads, head_dim]; arguments as neighborhood_attention_generic()."""
    check_rank("na2d", query, 5)
    return neighborhood_attention_generic(query, key, value, kernel_size, *args, **options)


def na3d(query, key, value, kernel_size, *args, **options):
    """[batch, frames, rows, columns, heads, head_dim]; arguments as neighborhood_attention_generic()."""
    check_rank("na3d", query, 6)
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
    check_rank("attention", query, 4)
    options = dict(edge=edges(is_causal), scale=scale, return_lse=return_lse)
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


from .unfused import (na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk, natten1dav, natten1dqk,  # noqa: E402, F401
                      natten1dqkrpb, natten2dav, natten2dqk, natten2dqkrpb, natten3dav, natten3dqk, natten3dqkrpb)
