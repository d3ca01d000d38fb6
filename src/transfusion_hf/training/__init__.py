"""Training: the exact `Trainer`, whole checkpoints, callbacks, what is trained, and the doctor."""

from .callbacks import TransfusionEMACallback, TransfusionSamplesCallback
from .plans import TRAINING_PLANS, set_trainable
from .trainer import TransfusionTrainer, shard_float32_parts

__all__ = [
    "TRAINING_PLANS",
    "TransfusionEMACallback",
    "TransfusionSamplesCallback",
    "TransfusionTrainer",
    "set_trainable",
    "shard_float32_parts",
]
