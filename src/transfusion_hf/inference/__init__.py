"""Around `generate()`: the pipeline of diffusers, and streamers of text and pictures."""

from .pipeline import TransfusionPipeline
from .streamers import StreamedImage, TransfusionStreamer

__all__ = ["StreamedImage", "TransfusionPipeline", "TransfusionStreamer"]
