"""Moved into `patching_transfusion`."""

from .patching_transfusion import FrozenLinear, TransfusionVAE

__all__ = ["FrozenLinear", "TransfusionVAE"]
