"""The command line `transfusion`, the page, and streamers of text and pictures."""

from .streamers import StreamedImage, TransfusionStreamer

__all__ = ["StreamedImage", "TransfusionStreamer"]
