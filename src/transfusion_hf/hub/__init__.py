"""The Hub: model cards and uploads."""

from .card import make_model_card
from .push import push_to_hub

__all__ = ["make_model_card", "push_to_hub"]
