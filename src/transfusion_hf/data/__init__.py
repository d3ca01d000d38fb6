"""Training data: samples from `datasets`, batches of them, mixtures, latents computed once, shapes with captions."""

from importlib import import_module
from typing import Any

from .collator import TransfusionDataCollator

# Loaded when asked for: they need `datasets`, which the collator does not.
_LAZY = {"ShapesDataset": "shapes", "TransfusionDataset": "dataset"}
_LAZY |= {"mix_by_tokens": "mixing", "write_latents": "latents"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


__all__ = ["ShapesDataset", "TransfusionDataCollator", "TransfusionDataset", "mix_by_tokens", "write_latents"]
