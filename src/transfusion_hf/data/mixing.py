"""Several sources of samples as one, in proportion of their tokens (§4.1, arXiv 2408.11039)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..processing_transfusion import TransfusionProcessor
from .dataset import NUM_SLOTS, ResumableDataset, TransfusionDataset, images_of

STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement", "never")


def count_tokens(sample: dict[str, Any], processor: TransfusionProcessor) -> int:
    """
    The tokens that a sample becomes in a batch: text with its first and last token, and for each image its patches,
    `<BOI>` and `<EOI>`. A caption that the collator drops is counted.

    Args:
        sample (`dict`): As `TransfusionDataCollator` takes it.
        processor (`TransfusionProcessor`)
    """
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    ids = tokenizer(sample["text"], verbose=False)["input_ids"]
    images, side, sizes = images_of(sample), processor.pixels_per_patch, []
    if sample.get("latents"):
        side, sizes = processor.patch_size, [latent.shape[-2:] for latent in sample["latents"]]
    elif images and image_processor.do_center_crop:
        crop = image_processor.crop_size
        sizes = [(crop["height"], crop["width"])] * len(images)
    elif images:
        sizes = [pixels.shape[-2:] for pixels in image_processor(images)["pixel_values"]]
    num_tokens = len(ids) + sum((height // side) * (width // side) + 2 for height, width in sizes)
    num_tokens += tokenizer.eos_token is not None and ids[-1:] != [tokenizer.eos_token_id]
    return num_tokens - sample["text"].count(processor.image_token)  # each a token of `ids`


class _TokenMixture(ResumableDataset):
    """See [`mix_by_tokens`]."""

    def __init__(
        self,
        datasets: Sequence[TransfusionDataset],
        ratios: Sequence[float],
        length_fn: Callable[[dict[str, Any]], int],
        stopping_strategy: str,
    ) -> None:
        super().__init__()
        self.datasets = list(datasets)
        self.ratios = list(ratios)
        self.length_fn = length_fn
        self.stopping_strategy = stopping_strategy
        self._tokens = torch.zeros(NUM_SLOTS, len(self.datasets), dtype=torch.long).share_memory_()

    @property
    def num_tokens(self) -> list[int]:
        """Drawn from each source in this pass, workers of a data loader included, which draw ahead."""
        return self._tokens.sum(0).tolist()

    @property
    def num_skipped(self) -> int:
        """Broken rows left out so far, in all sources."""
        return sum(dataset.num_skipped for dataset in self.datasets)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"datasets": [dataset.state_dict() for dataset in self.datasets]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for dataset, state in zip(self.datasets, state_dict["datasets"], strict=True):
            dataset.load_state_dict(state)

    def _first_state(self) -> dict[str, Any]:
        zeros = [0] * len(self.datasets)
        return {"epoch": int(self._epoch), "tokens": zeros, "rounds": zeros, "ended": zeros}

    def _begin(self, i: int, epoch: int, round: int) -> Iterator[dict[str, Any]]:
        # A source that begins anew within an epoch has an order of its own there.
        self.datasets[i].set_epoch(epoch * 2**16 + round)
        return iter(self.datasets[i])

    def _samples(self) -> Iterator[dict[str, Any]]:
        assert self._state is not None
        epoch = self._state["epoch"]
        # Begun here, that their states be right from now on.
        return self._mix(epoch, [self._begin(i, epoch, round) for i, round in enumerate(self._state["rounds"])])

    def _mix(self, epoch: int, iterators: list[Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        assert self._state is not None
        tokens, rounds, ended = ([*self._state[name]] for name in ("tokens", "rounds", "ended"))
        worker = get_worker_info()
        slot = 0 if worker is None else worker.id % NUM_SLOTS
        self._tokens[slot] = torch.tensor(tokens)
        has_given = [count > 0 for count in tokens]  # since its beginning
        while True:
            is_finite = self.stopping_strategy == "all_exhausted_without_replacement"
            open_sources = [i for i in range(len(tokens)) if not (is_finite and ended[i])]
            behind = min(open_sources, key=lambda i: tokens[i] / self.ratios[i])
            sample = next(iterators[behind], None)
            if sample is None:
                if not has_given[behind]:
                    raise ValueError(
                        f"`datasets[{behind}]` gives no sample{'' if worker is None else f' to worker {worker.id}'}: "
                        "it is empty, all its rows are broken, it can be read but once, or it is a stream of fewer "
                        "shards than there are workers; then use fewer, or split it into more files."
                    )
                ended[behind] = 1
                if self.stopping_strategy == "first_exhausted" or (self.stopping_strategy != "never" and all(ended)):
                    return
                if not is_finite:
                    rounds[behind] += 1
                    iterators[behind] = self._begin(behind, epoch, rounds[behind])
                    has_given[behind] = False
                continue
            length = self.length_fn(sample)
            if length < 1:
                raise ValueError(f"`length_fn` must give at least 1; got {length} for a sample of source {behind}.")
            has_given[behind] = True
            tokens[behind] += length
            self._tokens[slot, behind] = tokens[behind]
            self._state = {"epoch": epoch, "tokens": [*tokens], "rounds": [*rounds], "ended": [*ended]}
            yield sample


def mix_by_tokens(
    datasets: Sequence[TransfusionDataset],
    processor: TransfusionProcessor | None = None,
    ratios: Sequence[float] | None = None,
    length_fn: Callable[[dict[str, Any]], int] | None = None,
    stopping_strategy: str = "first_exhausted",
) -> IterableDataset:
    r"""
    Mixes sources so that their *tokens* are in proportion, not their rows (§4.1: text and image tokens 1 : 1). Each
    sample is drawn from the source that is furthest behind, so that no source is ever further off than by its longest
    sample. What a source gives counts for it as a whole: of captioned images patches *and* captions.

    The mixture draws no random numbers; its order follows from those of the sources. Each worker and process mixes its
    own part of them. It has `state_dict`, `load_state_dict`, `set_epoch`, `num_skipped` as its sources have, and
    `num_tokens`, a list.

    Args:
        datasets (`list[TransfusionDataset]`): The sources, each once.
        processor (`TransfusionProcessor`, *optional*): Count by [`count_tokens`].
        ratios (`list[float]`, *optional*): Of the tokens; default equal ones.
        length_fn (`Callable`, *optional*): Count otherwise: from a sample to an `int` of at least 1.
        stopping_strategy (`str`, defaults to `"first_exhausted"`):
            As in `datasets.interleave_datasets`: the pass ends with the first source that does; or, with
            `"all_exhausted"`, when each has ended once, the shorter ones being repeated; or, with
            `"all_exhausted_without_replacement"`, when all have, each sample given once and the ratio kept only as
            long as none has ended. `"never"` repeats each source without end, for a training that counts steps.

    Returns:
        A `torch.utils.data.IterableDataset` of samples.

    Raises:
        ValueError: other sources, ratios that are not one positive number for each, both or none of `processor` and
            `length_fn`, another strategy; when read, a source that gives a worker nothing.

    Example:

    ```python
    >>> mixed = mix_by_tokens([text, captions, edits], processor, ratios=[2, 1, 1])
    ```"""
    if not datasets or not all(isinstance(dataset, TransfusionDataset) for dataset in datasets):
        names = [type(dataset).__name__ for dataset in datasets]
        raise ValueError(f"`datasets` must be one or more `TransfusionDataset`; got {names}. Make them by `from_…`.")
    if len({id(dataset) for dataset in datasets}) != len(datasets):
        raise ValueError("`datasets` holds a source twice; make two of it, or raise its ratio.")
    ratios = [1.0] * len(datasets) if ratios is None else ratios
    if len(ratios) != len(datasets) or not all(ratio > 0 for ratio in ratios):
        raise ValueError(f"`ratios` must hold a positive number for each of {len(datasets)} sources; got {ratios}.")
    if processor is not None and length_fn is None:
        length_fn = partial(count_tokens, processor=processor)
    elif processor is not None or length_fn is None:
        raise ValueError("Pass one of `processor` and `length_fn`, by which tokens are counted.")
    if stopping_strategy not in STOPPING_STRATEGIES:
        raise ValueError(f"`stopping_strategy` must be one of {STOPPING_STRATEGIES}; got {stopping_strategy!r}.")
    return _TokenMixture(datasets, ratios, length_fn, stopping_strategy)


__all__ = ["count_tokens", "mix_by_tokens"]
