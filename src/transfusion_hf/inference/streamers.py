"""Streams text and images while a model generates them."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from diffusers import SchedulerMixin
from PIL import Image
from transformers import TextIteratorStreamer

from ..diffusion_transfusion import is_flow
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


def predicted_x_0(
    noise_scheduler: SchedulerMixin, x_t: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """What x_t of shape `(num_images, channels, height, width)` leads to, by a prediction at one t of shape `()`."""
    if is_flow(noise_scheduler):
        return x_t - t / noise_scheduler.config.num_train_timesteps * prediction
    # The step also draws noise, which must not come from the generators of the drawing.
    return noise_scheduler.step(prediction, int(t), x_t, generator=torch.Generator()).pred_original_sample


class _AbandonedError(Exception):
    """The consumer has stopped; ends `generate()`."""


class TransfusionStreamer(TextIteratorStreamer):
    """
    For `generate(streamer=...)` of a single row: yields pieces of text (`str`) and [`StreamedImage`]s in their order.

    Args:
        processor (`TransfusionProcessor`)
        preview_interval (`int`, *optional*): Denoising steps between previews, at least 1; no previews if `None`.
        kwargs: For `TextIteratorStreamer`, where `skip_prompt` and `skip_special_tokens` are `True` by default here.
    """

    def __init__(self, processor: TransfusionProcessor, preview_interval: int | None = None, **kwargs: Any):
        super().__init__(processor.tokenizer, **{"skip_prompt": True, "skip_special_tokens": True, **kwargs})
        if preview_interval is not None and preview_interval < 1:
            raise ValueError(f"`preview_interval` must be at least 1, or None; got {preview_interval}.")
        self.processor, self.preview_interval, self._is_abandoned = processor, preview_interval, False

    def put(self, value: torch.Tensor) -> None:
        self._check()
        super().put(value)

    def _check(self) -> None:
        if self._is_abandoned:
            raise _AbandonedError

    def put_step(self, model: Any, step: int, num_inference_steps: int, x_t, prediction, t: torch.Tensor) -> None:
        """`generate()` calls it in each denoising step, with x_t and the prediction of the rows that draw."""
        self._check()
        if self.preview_interval is not None and step % self.preview_interval == 0 and step < num_inference_steps:
            x_0 = predicted_x_0(model.noise_scheduler, x_t[:1], prediction[:1], t)
            self.put_image(model.decode_latents(x_0)[0], step, num_inference_steps)

    def put_image(self, image: torch.Tensor, step: int, num_inference_steps: int) -> None:
        """`generate()` calls it with an image in about [−1, 1] of shape `(channels, height, width)`."""
        self._check()
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :]
        self.token_cache.clear()
        self.print_len: int = 0
        self.on_finalized_text(text)  # held back until the next space
        (picture,) = self.processor.image_processor.postprocess([image])
        self.text_queue.put(StreamedImage(picture, step, num_inference_steps))

    def generate(self, model: Any, **kwargs: Any) -> Iterator[str | StreamedImage]:
        """
        Runs `model.generate(**kwargs)` in a thread and yields its pieces. Exceptions propagate to the consumer;
        closing the iterator stops generation at the next token or denoising step.
        """
        self.end()  # forgets the tokens of a run that failed
        self.text_queue, self._is_abandoned = Queue[Any](), False

        def end_after_error(run: Future) -> None:
            if run.exception():
                self.text_queue.put(self.stop_signal)

        with ThreadPoolExecutor(1, thread_name_prefix="generate") as pool:
            run = pool.submit(model.generate, **kwargs, streamer=self)
            run.add_done_callback(end_after_error)
            try:
                yield from filter(None, self)  # the library also puts empty texts
            finally:
                self._is_abandoned = True
            run.result()
