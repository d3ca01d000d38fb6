"""Streams text and images while a model generates them."""

from collections.abc import Iterator
from dataclasses import dataclass
from queue import Queue
from threading import Thread
from typing import Any

import torch
from PIL import Image
from transformers import TextIteratorStreamer

from ..processing_transfusion import TransfusionProcessor


@dataclass(frozen=True)
class StreamedImage:
    """A drawn image, or its preview (the predicted x_0) after `step` of `num_inference_steps` denoising steps."""

    image: Image.Image
    step: int
    num_inference_steps: int

    @property
    def is_final(self) -> bool:
        return self.step == self.num_inference_steps


class _AbandonedError(Exception):
    """The consumer has stopped; ends `generate()`."""


class TransfusionStreamer(TextIteratorStreamer):
    """
    For `generate(streamer=...)` of a single row: yields pieces of text (`str`) and [`StreamedImage`]s in their order.

    Args:
        processor (`TransfusionProcessor`)
        preview_interval (`int`, *optional*): Denoising steps between previews, at least 1; no previews if `None`.
        skip_prompt (`bool`, defaults to `True`): Whether to leave out the prompt.
        timeout (`float`, *optional*): Seconds to wait for the next piece; no limit if `None`.
        decode_kwargs: For `tokenizer.decode`; `skip_special_tokens=True` by default.
    """

    text_queue: Queue  # like the next two, of the library's class, which is not annotated
    token_cache: list[int]
    print_len: int

    def __init__(
        self,
        processor: TransfusionProcessor,
        preview_interval: int | None = None,
        skip_prompt: bool = True,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ):
        super().__init__(processor.tokenizer, skip_prompt, timeout, **{"skip_special_tokens": True, **decode_kwargs})
        if preview_interval is not None and preview_interval < 1:
            raise ValueError(f"`preview_interval` must be at least 1, or None; got {preview_interval}.")
        self.processor, self.preview_interval, self._is_abandoned = processor, preview_interval, False

    def put(self, value: torch.Tensor) -> None:
        self.check()
        super().put(value)

    def check(self) -> None:
        """`generate()` also calls it in each denoising step."""
        if self._is_abandoned:
            raise _AbandonedError

    def put_image(self, image: torch.Tensor, step: int, num_inference_steps: int) -> None:
        """`generate()` calls it with an image in about [−1, 1] of shape `(channels, height, width)`."""
        self.check()
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :]
        self.token_cache, self.print_len = [], 0
        self.on_finalized_text(text)  # held back until the next space
        (picture,) = self.processor.image_processor.postprocess([image])
        self.text_queue.put(StreamedImage(picture, step, num_inference_steps), timeout=self.timeout)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.text_queue.put(text, timeout=self.timeout)
        if stream_end:
            self.text_queue.put(self.stop_signal, timeout=self.timeout)

    def generate(self, model: Any, **kwargs: Any) -> Iterator[str | StreamedImage]:
        """
        Runs `model.generate(**kwargs)` in a thread and yields its pieces. Exceptions propagate to the consumer;
        closing the iterator stops generation at the next token or denoising step.
        """
        self.text_queue, self.token_cache, self.print_len = Queue(), [], 0
        self.next_tokens_are_prompt, self._is_abandoned = True, False
        errors: list[BaseException] = []

        def run() -> None:
            try:
                model.generate(**kwargs, streamer=self)
            except BaseException as error:
                errors.append(error)
                self.text_queue.put(self.stop_signal)

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from self
        finally:
            self._is_abandoned = True
            thread.join()
        if errors:
            raise errors[0]
