"""The sequences of a ragged batch, hashable, and the C struct of them. Checks what the C library cannot: the tensors'
extents."""

import ctypes as c
from dataclasses import dataclass
from math import prod
from operator import index
from typing import Optional, Tuple

from . import _lib


def _flat(values, name):
    """(numbers, how many per row) of a list of ints or of tuples, an array or a tensor."""
    values = values.tolist() if hasattr(values, "tolist") else values
    try:
        rows = [tuple(row) if not isinstance(row, int) and hasattr(row, "__len__") else (row,) for row in values]
        flat = tuple(index(number) for row in rows for number in row)
    except TypeError:
        rows = []
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise _lib.InvalidError(f"{name} must be a list of as many whole numbers for each sequence, of one sequence at "
                                "least")
    huge = [number for number in flat if abs(number) >= 2 ** 62]
    if huge:
        raise _lib.InvalidError(f"{name} holds {huge[0]}, and no tensor is that large")
    return flat, len(rows[0])


def _grids(flat, rank):
    return [flat[i:i + rank] for i in range(0, len(flat), rank)]


@dataclass(frozen=True)
class Sequences:
    rank: int
    lengths: Tuple[int, ...]
    kv_lengths: Optional[Tuple[int, ...]] = None
    offsets: Optional[Tuple[int, ...]] = None
    kv_offsets: Optional[Tuple[int, ...]] = None

    @classmethod
    def of(cls, lengths, kv_lengths=None, offsets=None, kv_offsets=None):
        flat, rank = _flat(lengths, "lengths")
        if not 1 <= rank <= 3:
            raise _lib.InvalidError(f"lengths has {rank} numbers for each sequence; it must have 1 to 3, one per axis")
        count = len(flat) // rank
        others = [values if values is None else _flat(values, name) for name, values in (
            ("kv_lengths", kv_lengths), ("offsets", offsets), ("kv_offsets", kv_offsets))]
        for name, numbers in (("lengths", flat), ("kv_lengths", others[0][0] if others[0] else ())):
            huge = [number for number in numbers if abs(number) >= 2 ** 31]  # it would wrap around in C
            if huge:
                raise _lib.InvalidError(f"{name} holds {huge[0]}; each must be at most 2147483647")
        for name, other, width in zip(("kv_lengths", "offsets", "kv_offsets"), others, (rank, 1, 1)):
            if other and (other[1] != width or len(other[0]) != count * width):
                raise _lib.InvalidError(f"{name} has {len(other[0])} numbers; {count} sequences need {count * width}")
        return cls(rank, flat, *[other and other[0] for other in others])

    def __len__(self):
        return len(self.lengths) // self.rank

    def struct(self):
        def array(values, kind):
            return None if values is None else (kind * len(values))(*values)
        return _lib.Ragged(c.sizeof(_lib.Ragged), len(self), array(self.lengths, c.c_int),
                           array(self.kv_lengths, c.c_int), array(self.offsets, c.c_longlong),
                           array(self.kv_offsets, c.c_longlong))

    def padded(self, q_shape):
        return len(q_shape) == self.rank + 3

    def covers(self, q_shape):
        """Whether every token of q belongs to a sequence."""
        return self.offsets is None and not self.padded(q_shape)

    def _check_tokens(self, name, shape, lengths, offsets):
        sizes = [prod(grid) for grid in _grids(lengths, self.rank)]
        end = max(map(sum, zip(offsets, sizes))) if offsets else sum(sizes)
        if end > shape[0] or (end < shape[0] and not offsets):
            raise _lib.InvalidError(f"{name} has {shape[0]} tokens; the sequences' are {end}")

    def describe(self, q_shape, k_shape, v_shape, dtype, extra_shape=None, **options):
        """The Desc of packed tensors [tokens, heads, head_dim], or of padded ones [sequences, axes..., heads,
        head_dim]."""
        if extra_shape is not None and extra_shape[0] != len(self):
            raise _lib.InvalidError(f"extra_kv is of {extra_shape[0]} sequences where lengths has {len(self)}")
        if self.padded(q_shape):
            if q_shape[0] != len(self):
                raise _lib.InvalidError(f"q is of {q_shape[0]} sequences where lengths has {len(self)}")
            return _lib.describe(q_shape, k_shape, v_shape, dtype, **options)
        if len(q_shape) != 3 or len(k_shape) != 3 or len(v_shape) != 3 or k_shape[0] != v_shape[0]:
            raise _lib.InvalidError(f"q, k and v have the shapes {tuple(q_shape)}, {tuple(k_shape)}, {tuple(v_shape)}; "
                                    f"with lengths of {self.rank} axes they must be [tokens, heads, head_dim], or "
                                    f"padded [sequences, {self.rank} axes, heads, head_dim]")
        kv_offsets = self.kv_offsets if self.kv_offsets or self.kv_lengths else self.offsets
        self._check_tokens("q", q_shape, self.lengths, self.offsets)
        self._check_tokens("k", k_shape, self.kv_lengths or self.lengths, kv_offsets)
        shapes = [[0] * (self.rank + 1) + list(shape[1:]) for shape in (q_shape, k_shape, v_shape)]
        return _lib.describe(*shapes, dtype, **options)
