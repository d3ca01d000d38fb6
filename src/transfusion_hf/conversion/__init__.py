"""From a language model to a Transfusion, in memory or shard by shard, and back."""

from .causal_lm import convert_causal_lm
from .export import extract_causal_lm, extract_vae
from .language_model import from_causal_lm

__all__ = ["convert_causal_lm", "extract_causal_lm", "extract_vae", "from_causal_lm"]
