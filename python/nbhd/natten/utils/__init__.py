"""Of NATTEN's utilities, those that its documentation tells of."""

from . import varlen  # noqa: F401
