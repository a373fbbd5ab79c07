"""NATTEN's functions, modules and settings, computed by nbhd: with `import nbhd.natten as natten` most programs for it
run as they are; its modules functional, modules and context are here under these names.

Tensors, windows, strides, dilations, causal axes and the modules' parameters (so checkpoints too) mean the same, and
arguments come in the order of 0.20 and later. What chooses among NATTEN's kernels and tiles (backend, q_tile_shape,
set_memory_usage_preference(), ...) is taken and has no effect, since the plan chooses; an argument that is neither
raises TypeError. docs/python.md has the same in nbhd's own functions.
"""

import sys as _sys

from . import context, functional, modules, utils  # noqa: F401
from .._lib import InvalidError
from .context import *  # noqa: F401, F403: settings, also those of before 0.20
from .functional import attention, merge_attentions, na1d, na2d, na3d, neighborhood_attention_generic
from .modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

__version__ = "0.21.6"  # whose interface this is
HAS_LIBNATTEN = True


def stand_in():
    """From here on `import natten` and `from natten.functional import ...` find this package: for programs that are not
    to be edited."""
    if _sys.modules.get("natten", _sys.modules[__name__]) is not _sys.modules[__name__]:
        raise InvalidError("natten is imported already; stand_in() must come before")
    for name, module in list(_sys.modules.items()):
        if f"{name}.".startswith(f"{__name__}."):
            _sys.modules["natten" + name[len(__name__):]] = module


def __getattr__(name):
    if name.startswith(("get_configs_for_", "get_bwd_configs_for_")):
        raise AttributeError(f"{name} lists tiles of NATTEN's kernels, which nbhd has not; `nbhd plan -x LINE` tells "
                             "what nbhd's plan chose, and the plan needs no hint")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
