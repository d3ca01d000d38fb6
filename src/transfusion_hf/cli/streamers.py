"""Text as it is written and images as they are drawn, in order."""

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
    """
    Args:
        image (`PIL.Image.Image`): The drawn image, or what it looks to become: the predicted x_0.
        step (`int`): Denoising steps done.
        num_inference_steps (`int`): Denoising steps in all.
    """

    image: Image.Image
    step: int
    num_inference_steps: int

    @property
    def is_final(self) -> bool:
        return self.step == self.num_inference_steps


class _AbandonedError(Exception):
    """Nobody listens any more."""


class TransfusionStreamer(TextIteratorStreamer):
    r"""
    A streamer for `generate(streamer=...)` that yields pieces of text (`str`) and [`StreamedImage`]s, in the order in
    which they come about. For one row.

    Args:
        processor (`TransfusionProcessor`)
        preview_interval (`int`, *optional*): Yield a preview every so many denoising steps; none where `None`.
        skip_prompt (`bool`, defaults to `True`): Whether to leave out the prompt.
        timeout (`float`, *optional*): Seconds to wait for the next piece; without end where `None`.
        decode_kwargs: For `tokenizer.decode`; `skip_special_tokens=True` by default.

    Raises:
        ValueError: `preview_interval` below 1; in use, more than one row.

    Example:

    ```python
    >>> for piece in TransfusionStreamer(processor, preview_interval=10).generate(model, **inputs):
    ...     print(piece if isinstance(piece, str) else f"{piece.step} of {piece.num_inference_steps}")
    ```"""

    # Of the library's class, whose types are not seen.
    text_queue: Queue
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
        decode_kwargs.setdefault("skip_special_tokens", True)
        super().__init__(processor.tokenizer, skip_prompt=skip_prompt, timeout=timeout, **decode_kwargs)
        if preview_interval is not None and preview_interval < 1:
            raise ValueError(f"`preview_interval` must be at least 1, or None; got {preview_interval}.")
        self.processor = processor
        self.preview_interval = preview_interval
        self._is_abandoned = False

    def put(self, value: torch.Tensor) -> None:
        self.check()
        super().put(value)

    def check(self) -> None:
        """Called by `generate()` at each denoising step, too: ends it where nobody listens any more."""
        if self._is_abandoned:
            raise _AbandonedError

    def put_image(self, image: torch.Tensor, step: int, num_inference_steps: int) -> None:
        """
        Called by `generate()`.

        Args:
            image (`torch.FloatTensor` of shape `(channels, height, width)`): In about [−1, 1].
            step (`int`): Denoising steps done.
            num_inference_steps (`int`): Denoising steps in all.
        """
        self.check()
        if self.token_cache:  # what was held back for the next space
            text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :]
            self.token_cache, self.print_len = [], 0
            self.on_finalized_text(text)
        (picture,) = self.processor.image_processor.postprocess([image])
        self.text_queue.put(StreamedImage(picture, step, num_inference_steps), timeout=self.timeout)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.text_queue.put(text, timeout=self.timeout)
        if stream_end:
            self.text_queue.put(self.stop_signal, timeout=self.timeout)

    def generate(self, model: Any, **kwargs: Any) -> Iterator[str | StreamedImage]:
        """
        Runs `model.generate(**kwargs)` in a thread and yields what comes. An error of it is raised here; whoever stops
        listening ends it with the next token or denoising step.
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


__all__ = ["StreamedImage", "TransfusionStreamer"]
