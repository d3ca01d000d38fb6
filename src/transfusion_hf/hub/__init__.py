"""The Hub: model cards and pushing."""

from .card import make_model_card

__all__ = ["make_model_card"]
