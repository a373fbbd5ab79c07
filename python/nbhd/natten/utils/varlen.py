"""The lengths of packed sequences, as NATTEN's attention() takes them."""

import torch

from ..._lib import InvalidError


def generate_varlen_parameters(query, key, value, seqlens_Q=None, seqlens_KV=None):
    """(cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV); without lengths None, None, 0, 0."""
    if (seqlens_Q is None) != (seqlens_KV is None):
        raise InvalidError("one of seqlens_Q and seqlens_KV is None; both or none must be")
    if seqlens_Q is None:
        return None, None, 0, 0

    def cumulative(lengths):
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return cumulative(seqlens_Q), cumulative(seqlens_KV), int(seqlens_Q.max()), int(seqlens_KV.max())
