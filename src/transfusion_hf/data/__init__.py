"""Training data: samples from `datasets`, batches of them, mixtures, latents computed once, shapes with captions."""

from importlib import import_module
from typing import Any

from .collator import TransfusionDataCollator
from .shapes import ShapesDataset

# Loaded when asked for: they need `datasets`, which the others do not.
_LAZY = {
    "TransfusionDataset": "dataset",
    "load_rows": "dataset",
    "mix_by_tokens": "mixing",
    "write_latents": "latents",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ShapesDataset",
    "TransfusionDataCollator",
    "TransfusionDataset",
    "load_rows",
    "mix_by_tokens",
    "write_latents",
]
