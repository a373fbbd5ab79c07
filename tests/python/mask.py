"""The dense mask of a problem, read off the library: no mask formula in Python."""

import ctypes as c

import numpy as np

from nbhd import _lib


def mask_of(desc):
    """bool [queries, keys] over flattened tokens."""
    full = np.ones((1, 1), bool)
    for axis in range(desc.rank):
        length, keys = desc.length[axis], desc.kv_length[axis] or desc.length[axis]
        sees = np.zeros((length, keys), bool)
        for query in range(length):
            first, count = c.c_int(), c.c_int()
            _lib.check(_lib.library().nbhd_desc_keys(c.byref(desc), axis, query, c.byref(first), c.byref(count)))
            step = desc.dilation[axis]
            for key in range(first.value, first.value + count.value * step, step):
                group = range(query % step, length, step) # on a periodic axis keys go on at its first token
                sees[query, key if key < keys else group[0] + (key - group[0]) % (len(group) * step)] = True
        full = np.kron(full, sees)
    return full
