"""Several sources of samples as one, in proportion of their tokens (§4.1, arXiv 2408.11039)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import IterableDataset

from ..processing_transfusion import TransfusionProcessor
from .collator import TransfusionDataCollator, images_of, latents_of, tokenized_text
from .dataset import ResumableDataset, TransfusionDataset


def count_tokens(sample: dict[str, Any], processor: TransfusionProcessor) -> int:
    """
    The number of tokens that a sample of `TransfusionDataCollator` has in a batch: the text with its first and last
    token, and for each image its patches, `<BOI>` and `<EOI>`. A caption that may be dropped counts.
    """
    if sample.get("messages"):
        return TransfusionDataCollator(processor)([sample])["input_ids"].shape[1]
    text, image_processor = tokenized_text(sample, processor), processor.image_processor
    ids = processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    num_tokens = len(ids) + sum(map(len, processor.missing_ends(ids)))
    images, side = images_of(sample), processor.pixels_per_patch
    if latents := latents_of(sample):
        side, sizes = processor.patch_size, [latent.shape[-2:] for latent in latents]
    elif image_processor.do_center_crop:
        sizes = [(image_processor.crop_size["height"], image_processor.crop_size["width"])] * len(images)
    else:
        sizes = [image_processor(image)["pixel_values"][0].shape[-2:] for image in images]
    num_tokens += sum((height // side) * (width // side) + 2 for height, width in sizes)
    return num_tokens - text.count(processor.image_token)  # each marker is one of `ids`


@dataclass(eq=False)
class _TokenMixture(ResumableDataset):
    datasets: Sequence[TransfusionDataset]
    ratios: Sequence[float]
    length_fn: Callable[[dict[str, Any]], int]
    is_endless: bool

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"datasets": [dataset.state_dict() for dataset in self.datasets]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for dataset, state in zip(self.datasets, state_dict["datasets"], strict=True):
            dataset.load_state_dict(state)

    def _first_state(self) -> dict[str, Any]:
        return {"epoch": int(self._epoch), "tokens": [0] * len(self.datasets), "rounds": [0] * len(self.datasets)}

    def _begin(self, i: int) -> Iterator[dict[str, Any]]:
        # Another order in each round.
        self.datasets[i].set_epoch(self._state["epoch"] * 2**16 + self._state["rounds"][i])
        return iter(self.datasets[i])

    def _samples(self) -> Iterator[dict[str, Any]]:
        # The sources begin before the generator runs, so that their states are right from now on.
        return self._mix([self._begin(i) for i in range(len(self.datasets))])

    def _mix(self, sources: list[Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        tokens, rounds = self._state["tokens"], self._state["rounds"]
        is_empty = [count == 0 for count in tokens]  # so far in this round
        while True:
            behind = min(range(len(tokens)), key=lambda i: tokens[i] / self.ratios[i])
            if (sample := next(sources[behind], None)) is not None:
                is_empty[behind] = False
                tokens[behind] += self.length_fn(sample)
                yield sample
            elif is_empty[behind]:
                raise ValueError(
                    f"`datasets[{behind}]` gives no sample: it is empty, all its rows are broken, it can be read only "
                    "once, or it is a stream with fewer shards than there are workers; use fewer workers."
                )
            elif self.is_endless:
                rounds[behind] += 1
                sources[behind] = self._begin(behind)
                is_empty[behind] = True
            else:
                return


def mix_by_tokens(
    datasets: Sequence[TransfusionDataset],
    processor: TransfusionProcessor | None = None,
    ratios: Sequence[float] | None = None,
    length_fn: Callable[[dict[str, Any]], int] | None = None,
    stopping_strategy: str = "first_exhausted",
) -> IterableDataset:
    r"""
    Mixes sources so that their *tokens*, not their rows, are in proportion (§4.1: text and image tokens 1 : 1). Each
    sample comes from the source that is furthest behind, without random numbers. Each worker and process mixes its
    part of the sources. The mixture can be resumed like its sources.

    Args:
        datasets (`list[TransfusionDataset]`): The sources, all different objects.
        processor (`TransfusionProcessor`, *optional*): Count tokens with [`count_tokens`].
        ratios (`list[float]`, *optional*): Proportions of the tokens; equal by default.
        length_fn (`Callable`, *optional*): Count differently: from a sample to a positive `int`.
        stopping_strategy (`str`, defaults to `"first_exhausted"`): End with the first source; `"never"`: repeat each.

    Raises:
        ValueError: wrong arguments, or both or none of `processor` and `length_fn`; when read, an empty source.
    """
    if not datasets or not all(isinstance(dataset, TransfusionDataset) for dataset in datasets):
        names = [type(dataset).__name__ for dataset in datasets]
        raise ValueError(f"`datasets` must be one or more `TransfusionDataset`; got {names}. Make them with `from_…`.")
    if len({id(dataset) for dataset in datasets}) != len(datasets):
        raise ValueError("`datasets` holds a source twice; make two of it, or raise its ratio.")
    ratios = [1.0] * len(datasets) if ratios is None else ratios
    if len(ratios) != len(datasets) or not all(ratio > 0 for ratio in ratios):
        raise ValueError(f"`ratios` must hold a positive number for each of {len(datasets)} sources; got {ratios}.")
    if processor is not None and length_fn is None:
        length_fn = partial(count_tokens, processor=processor)
    elif processor is not None or length_fn is None:
        raise ValueError("Pass one of `processor` and `length_fn`, by which tokens are counted.")
    if stopping_strategy not in ("first_exhausted", "never"):
        raise ValueError(f"`stopping_strategy` must be 'first_exhausted' or 'never'; got {stopping_strategy!r}.")
    return _TokenMixture(datasets, ratios, length_fn, is_endless=stopping_strategy == "never")
