"""NATTEN's settings. Those of its kernels are remembered and have no effect, as the plan chooses."""

from enum import Enum as _Enum

from .. import torch as _torch

_settings = dict(kv_parallelism=True, flex_compile=False, flex_compile_backprop=False)


class MemoryUsagePreference(_Enum):
    Default = 0
    Strict = 1
    Unrestricted = 2


_settings["memory"] = MemoryUsagePreference.Default


def use_deterministic_algorithms(mode=True):
    """Backward passes with the same bits every time, as torch.use_deterministic_algorithms() has it too."""
    _torch.always_deterministic = bool(mode)


def are_deterministic_algorithms_enabled():
    return _torch.always_deterministic


def use_kv_parallelism_in_fused_na(mode=True):
    _settings["kv_parallelism"] = bool(mode)


def is_kv_parallelism_in_fused_na_enabled():
    return _settings["kv_parallelism"]


def set_memory_usage_preference(pref="default"):
    names = {preference.name.lower(): preference for preference in MemoryUsagePreference}
    if pref not in names:
        raise ValueError(f"the memory usage preference is {pref!r}; it must be one of {', '.join(names)}")
    _settings["memory"] = names[pref]


def get_memory_usage_preference():
    return _settings["memory"]


def is_memory_usage_default():
    return _settings["memory"] == MemoryUsagePreference.Default


def is_memory_usage_strict():
    return _settings["memory"] == MemoryUsagePreference.Strict


def is_memory_usage_unrestricted():
    return _settings["memory"] == MemoryUsagePreference.Unrestricted


def allow_flex_compile(mode=True, backprop=False):
    _settings.update(flex_compile=bool(mode), flex_compile_backprop=bool(backprop))


def allow_flex_compile_backprop(mode=True):
    _settings["flex_compile_backprop"] = bool(mode)


def disable_flex_compile():
    allow_flex_compile(False)


def disable_flex_compile_backprop():
    allow_flex_compile_backprop(False)


def is_flex_compile_allowed():
    return _settings["flex_compile"]


def is_flex_compile_backprop_allowed():
    return _settings["flex_compile_backprop"]


# ---- up to 0.19 ----


def _no_effect(*_, **__):
    """A setting of NATTEN's kernels; nbhd has no such choice."""


use_fna = use_fused_na = use_flex_attention = force_flex_attention = use_autotuner = disable_autotuner = _no_effect
use_gemm_na = use_tiled_na = use_tf32_in_gemm_na = _no_effect
enable_gemm_na = enable_tiled_na = enable_tf32 = disable_gemm_na = disable_tiled_na = disable_tf32 = _no_effect


def _there(*_, **__):
    """Whether NATTEN has such kernels here; nbhd has them everywhere."""
    return True


has_half = has_bfloat = has_gemm = has_fp32_gemm = has_fp64_gemm = has_fna = has_fused_na = _there
is_fna_enabled = is_fused_na_enabled = _there
