"""From a language model to a Transfusion, in memory or shard by shard, and back."""

from .causal_lm import convert_causal_lm
from .export import extract_causal_lm, extract_vae
from .language_model import from_causal_lm
from .new_model import new_transfusion

__all__ = ["convert_causal_lm", "extract_causal_lm", "extract_vae", "from_causal_lm", "new_transfusion"]
