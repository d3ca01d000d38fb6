"""
What a task is, and the run that works for it: on one process or many, resumable, with all results on disk.

Work is a list of items, cut into batches of consecutive ones; processes take turns at the batches. An item's result is
a line of a `.jsonl` file, written as soon as it is there, so that a run that was killed goes on where it stopped and
ends with the same numbers.
"""

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from scipy.stats import bootstrap  # type: ignore[import-untyped]  # scipy has no annotations
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration_transfusion import IMAGE_TOKEN_IDS
from ..image_processing_transfusion import read_picture
from ..pipelines_transfusion import drawing_kwargs
from ..processing_transfusion import TransfusionProcessor

Result = dict[str, Any]

# Whatever a model's generation config says.
GREEDY = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0,
    "min_new_tokens": 0,
}  # fmt: skip


@dataclass
class Score:
    """A number with the 95 % interval of a bootstrap over the items that it is the mean (or the ratio …) of."""

    value: float
    interval: tuple[float, float] | None
    num_items: int

    @classmethod
    def of(cls, statistic: Callable[..., Any], *columns: Sequence[float], paired: bool = True) -> "Score":
        """
        `statistic` takes arrays of an equal number of items in their last axis, and `axis`, such as `np.mean`. The
        interval is the percentile interval of 1,000 seeded resamples; one item has none. Columns that are not `paired`
        are groups of items, each resampled on its own.
        """
        arrays = [np.asarray(column, dtype=np.float64) for column in columns]
        value = float(statistic(*arrays, axis=-1))
        num_items = len(arrays[0]) if paired else sum(map(len, arrays))
        if min(map(len, arrays)) < 2:
            return cls(value, None, num_items)
        options = {"n_resamples": 1000, "batch": 100, "method": "percentile", "paired": paired, "vectorized": True}
        interval = bootstrap(arrays, statistic, rng=np.random.default_rng(0), **options).confidence_interval
        return cls(value, (float(interval.low), float(interval.high)), num_items)


@dataclass
class Verdict:
    """A picture of the report's grid, with what the judge said of it."""

    picture: Path
    text: str
    is_right: bool | None = None


@dataclass
class TaskResult:
    """
    Args:
        scores (`dict[str, Score]`): The first one is the one that counts.
        settings (`dict[str, Any]`): How the numbers were made: data, split, weights, crop, resizer … Plain JSON.
        verdicts (`list[Verdict]`, *optional*): For the report's grid, in the order of the items.
    """

    scores: dict[str, Score]
    settings: Result
    verdicts: list[Verdict] = field(default_factory=list)


class Task(ABC):
    """One line of the table. `name` is also the folder of its files."""

    name: str
    modalities: ClassVar[str]  # "text → image"

    @abstractmethod
    def prepare(self, model: PreTrainedModel, processor: TransfusionProcessor) -> None:
        """
        Reads data and finds weights, before any task begins.

        Raises:
            ValueError, OSError, ImportError: they are not there; the message says what to fetch and where to put it.
        """

    @abstractmethod
    def run(self, run: "Run") -> TaskResult: ...


def mean_of_means(*columns: np.ndarray, axis: int) -> np.ndarray:
    """A statistic for `Score.of` in which each column counts the same, however long it is."""
    return np.mean([column.mean(axis) for column in columns], axis=0)


def digest(*values: Any) -> str:
    """A short fingerprint of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(model: PreTrainedModel) -> str:
    """Hashes the configuration and every weight, because the files under a model's name can change."""

    def without_origin(fields: Result) -> Result:
        return {name: x for name, x in fields.items() if name not in ("_name_or_path", "transformers_version")}

    config = json.loads(model.config.to_json_string(use_diff=False), object_hook=without_origin)
    hashed = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in model.state_dict().items():
        for part in _plain_tensors(weight):
            hashed.update(name.encode())
            hashed.update(part.detach().flatten().cpu().contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor, or those that a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, name))


def tokenizer_digest(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return digest(fast.to_str() if fast else sorted(tokenizer.get_vocab().items()))


@dataclass
class Run:
    """
    Draws, captions and computes for the tasks, and keeps the results in `output_dir`.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`), processor (`TransfusionProcessor`)
        output_dir (`Path`): On a file system that all processes share.
        batch_size (`int`, defaults to 8): Numbers do not depend on it, but for the rounding.
        seed (`int`, defaults to 0): Each picture's generator is seeded with it and the picture's index.
        drawing (`dict[str, Any]`, *optional*): How to draw: `guidance_scale`, `num_inference_steps` and other
            arguments of `generate()`.
    """

    model: PreTrainedModel
    processor: TransfusionProcessor
    output_dir: Path
    batch_size: int = 8
    seed: int = 0
    drawing: Result = field(default_factory=dict)

    @cached_property
    def state(self) -> PartialState:
        return PartialState(cpu=self.model.device.type == "cpu")  # or processes on CPUs would not find each other

    def map(
        self,
        name: str,
        items: Sequence[Any],
        function: Callable[[list[int], list[Any]], list[Result]],
        settings: Result,
        batch_size: int | None = None,
        is_whole: Callable[[Result], bool] = lambda _: True,
    ) -> list[Result]:
        """
        The results of all items, computed in batches where they are not in `<output_dir>/<name>.jsonl` yet.

        Args:
            name (`str`): For example `"geneval/judged"`.
            items (`Sequence`)
            function (`Callable`):
                Takes indices and items of a batch; returns a dictionary of plain JSON for each. It must depend on
                nothing else, and so on no random state.
            settings (`dict[str, Any]`): All that the results depend on; also a `digest` of the items.
            batch_size (`int`, *optional*): By default the run's.
            is_whole (`Callable`, *optional*): Whether what a result on disk names is there, too.

        Raises:
            ValueError: `settings` are not those of the results on disk.
        """
        file = Path(self.output_dir, f"{name}.jsonl")
        self._check_settings(file, {"num_items": len(items), **settings})
        done = {i: result for i, result in _read_lines(file).items() if is_whole(result)}
        size = batch_size or self.batch_size
        batches = [range(start, min(start + size, len(items))) for start in range(0, len(items), size)]
        mine = batches[self.state.process_index :: self.state.num_processes]
        progress = logging.tqdm(desc=name, total=sum(map(len, mine)), unit="", disable=not self.state.is_main_process)
        # A file for each process: not every shared file system appends whole lines.
        own = file.with_suffix(f".{self.state.process_index}.jsonl")
        with open(own, "a", encoding="utf-8") as lines:
            lines.write("\n")  # ends a line that was cut off
            for batch in mine:
                if any(i not in done for i in batch):  # a whole batch again, for the same numbers to the bit
                    results = function([*batch], [items[i] for i in batch])
                    for i, result in zip(batch, results, strict=True):
                        if i not in done:
                            lines.write(json.dumps({"index": i, **result}, ensure_ascii=False) + "\n")
                    lines.flush()
                progress.update(len(batch))
        progress.close()
        self.state.wait_for_everyone()
        done = _read_lines(file)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            _write_lines(file, done)
        self.state.wait_for_everyone()
        return [done[i] for i in range(len(items))]

    def _check_settings(self, file: Path, settings: Result) -> None:
        settings = json.loads(json.dumps(settings))
        kept = file.with_suffix(".settings.json")
        if self.state.is_main_process and not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_file(kept, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        self.state.wait_for_everyone()
        before = json.loads(kept.read_text(encoding="utf-8"))
        for key in sorted({*before, *settings}):
            if before.get(key) != settings.get(key):
                raise ValueError(
                    f"`{key}` is {settings.get(key)!r}, but {file} was made with {before.get(key)!r}; pass another "
                    "`output_dir`, or delete that file and its settings."
                )

    def draw(self, name: str, prompts: Sequence[str], num_images_per_prompt: int = 1) -> list[Path]:
        """
        Draws `<output_dir>/<name>/images/000000.png` …; those of one prompt follow each other. `images.jsonl` beside
        them holds prompts and seeds.
        """
        self._check_prompts(prompts)
        folder = Path(self.output_dir, name, "images")
        folder.mkdir(parents=True, exist_ok=True)
        items = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
        settings = {"prompts": digest(*items), **self.how_to_draw, **self._made_with}
        words = drawing_kwargs(self.model, self.processor, **self._words)

        def draw(indices: list[int], prompts: list[str]) -> list[Result]:
            seeds = [int(np.random.SeedSequence([self.seed, i]).generate_state(1, np.uint32)[0]) for i in indices]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # the CPU's, equal on all devices
            inputs = self.processor(text=prompts).to(self.model.device)
            options = {"generation_mode": "image", "do_sample": True, "generator": generators}
            output = self.model.generate(**inputs, **options, **words, **self._options)
            images: Any = self.processor.post_process_multimodal_output(output, generation_mode="image")
            files = [folder / f"{i:06d}.png" for i in indices]
            for file, image in zip(files, images, strict=True):
                image.save(part := file.with_suffix(f".{self.state.process_index}.part"), format="PNG")
                os.replace(part, file)
            rows = zip(files, prompts, seeds, strict=True)
            return [{"file": file.name, "prompt": prompt, "seed": seed} for file, prompt, seed in rows]

        lines = self.map(
            f"{name}/images", items, draw, settings, is_whole=lambda line: (folder / line["file"]).is_file()
        )
        return [folder / line["file"] for line in lines]

    def drawn_with(self, name: str) -> Result:
        """The settings of the drawings in `name`: for what is computed from them."""
        return json.loads(Path(self.output_dir, name, "images.settings.json").read_text(encoding="utf-8"))

    def caption(
        self, name: str, pictures: Sequence[Any], settings: Result, prompt: str = "", max_new_tokens: int = 64
    ) -> list[str]:
        """
        What the model says behind each picture and `prompt`, greedily, in `<output_dir>/<name>/captions.jsonl`.
        `pictures` may be read when they are indexed; `settings` say which they are.
        """
        settings = {**settings, "prompt": prompt, "max_new_tokens": max_new_tokens, **self._made_with}

        def caption(indices: list[int], pictures: list[Any]) -> list[Result]:
            texts = [self.processor.image_token + prompt] * len(pictures)
            inputs = self.processor(text=texts, images=[read_picture(picture) for picture in pictures])
            inputs = inputs.to(self.model.device)
            options = {"generation_mode": "text", "max_new_tokens": max_new_tokens}
            ids = self.model.generate(**inputs, **options, **GREEDY)[:, inputs["input_ids"].shape[1] :]
            return [{"caption": text.strip()} for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

        return [line["caption"] for line in self.map(f"{name}/captions", pictures, caption, settings)]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    @property
    def _words(self) -> Result:
        """Those of `drawing` that diffusers spells otherwise than `generate()`."""
        words = ("guidance_scale", "negative_prompt", "height", "width")
        return {name: self.drawing[name] for name in words if self.drawing.get(name) is not None}

    @property
    def _options(self) -> Result:
        return {name: x for name, x in self.drawing.items() if name not in self._words and x is not None}

    @property
    def how_to_draw(self) -> Result:
        """Seed, arguments, and what the model's generation config says where they say nothing; plain JSON."""
        config = self.model.generation_config.to_diff_dict()
        return {
            "seed": self.seed,
            "drawing": {name: x if isinstance(x, (int, float, str)) else str(x) for name, x in self.drawing.items()},
            "generation_config": {name: config[name] for name in sorted(config) if name != "transformers_version"},
        }

    @cached_property
    def _made_with(self) -> Result:
        """What decides about drawings and captions besides the arguments."""
        return {
            "model": self.fingerprint,
            "tokenizer": tokenizer_digest(self.processor.tokenizer),
            "image_processor": digest(self.processor.image_processor.to_dict()),
            "generation_config": self.how_to_draw["generation_config"],
        }

    def _check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises a `ValueError` for one that would stop the drawing, perhaps after hours."""
        config = self.model.config
        room = (getattr(config.text_config, "max_position_embeddings", None) or math.inf) - 2
        room -= config.num_patches(*config.latent_size)
        for i, prompt in enumerate(prompts):
            if self.processor.image_token in prompt:
                raise ValueError(
                    f"Prompt {i}, {prompt[:80]!r}, holds {self.processor.image_token}, a place for an image."
                )
            num_tokens = len(self.processor.tokenizer(prompt, verbose=False)["input_ids"])
            if num_tokens > room:
                raise ValueError(
                    f"Prompt {i}, {prompt[:80]!r}, has {num_tokens} tokens, but `max_position_embeddings` leaves "
                    f"room for {room} before an image; shorten it or leave it out."
                )


def require_images(model: PreTrainedModel, task: str) -> None:
    """Raises a `ValueError` if the model cannot read or draw images."""
    if any(getattr(model.config, name, None) is None for name in IMAGE_TOKEN_IDS):
        raise ValueError(
            f"The task `{task}` needs images, and the model's configuration names no {', '.join(IMAGE_TOKEN_IDS)}; "
            "drop the task, or turn the model into a Transfusion by `conversion/convert_causal_lm.py`."
        )


def open_picture(picture: Any, name: Any = None) -> Image.Image:
    """What [`read_picture`] takes. Raises a `ValueError` with `name`, by default the file's, if it cannot be read."""
    try:
        return read_picture(picture)
    except (OSError, ValueError) as error:
        what = f"The picture {name or picture} cannot be read ({error}); replace or remove it."
        raise ValueError(what) from error


def write_file(file: Path, text: str) -> None:
    """The whole file or nothing."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _read_lines(file: Path) -> dict[int, Result]:
    """The results so far, of every process. A line that was cut off counts for nothing."""
    done: dict[int, Result] = {}
    for part in [file, *sorted(file.parent.glob(f"{file.stem}.*.jsonl"))]:
        with suppress(FileNotFoundError):
            for line in part.read_bytes().split(b"\n"):
                with suppress(ValueError):
                    result = json.loads(line)
                    done.setdefault(result.pop("index"), result)
    return done


def _write_lines(file: Path, done: dict[int, Result]) -> None:
    """One file, in order, in place of the processes'."""
    lines = [json.dumps({"index": i, **done[i]}, ensure_ascii=False) + "\n" for i in sorted(done)]
    write_file(file, "".join(lines))
    for part in file.parent.glob(f"{file.stem}.*.jsonl"):
        part.unlink()
