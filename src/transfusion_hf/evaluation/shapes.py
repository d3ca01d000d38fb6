"""
Shapes: GenEval's six categories (arXiv 2310.11513) and captions on pictures of shapes, with their exact checker. Needs
no data and no weights.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers import PreTrainedModel
from transformers.utils import requires_backends

from ..data.shapes import (
    Scene,
    Shape,
    ShapeGroup,
    ShapesDataset,
    check_caption,
    draw_scene,
    holds,
    parse_caption,
    read_shapes,
    sample_scene,
)
from ..processing_transfusion import TransfusionProcessor
from .run import Run, Score, Task, TaskResult, Verdict, digest, open_picture, require_images

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_DRAWN = "the size to draw (`height` and `width`, by default those of the model or of its generation config)"


def sample_scenes(category: str, num_scenes: int, size: tuple[int, int] = (32, 32), seed: int = 1) -> list[Scene]:
    """
    Scenes whose captions are prompts of a category, of height and width `size`: one shape for `single_object`; one
    group of up to three for `counting` and `colors`; otherwise two groups of different kinds and colors.
    """
    num_groups = 1 if category in ("single_object", "counting", "colors") else 2
    scenes: list[Scene] = []
    for i in range(num_scenes):
        rng = np.random.default_rng([seed, CATEGORIES.index(category), i])
        while True:
            scene = sample_scene(rng, *size, num_groups)
            looks = {group.kind for group in scene.groups}, {group.color for group in scene.groups}
            is_single = category != "single_object" or scene.groups[0].count == 1
            if is_single and all(len(look) == num_groups for look in looks):
                scenes.append(scene)
                break
    return scenes


def assign(shapes: Sequence[Shape], groups: Sequence[ShapeGroup]) -> list[list[Shape]]:
    """
    The shapes of each group: those of its kind or, if there is none, those of no group's kind. So a wrong kind does
    not count as a wrong number, color or position, too.
    """
    kinds = {group.kind for group in groups}
    others = [shape for shape in shapes if shape.kind not in kinds]
    return [[shape for shape in shapes if shape.kind == group.kind] or others for group in groups]


def judge(picture: Image.Image, category: str, prompt: str) -> tuple[bool, str]:
    """
    Whether a picture is right in what its category asks about, and what is to be seen in words.

    - `single_object`, `two_object`: shapes of each kind are there.
    - `counting`: as many shapes of the kind as the prompt says, no more.
    - `colors`, `color_attr`: all shapes of each kind have its color.
    - `position`: the relation holds between all shapes of both kinds.

    Where a kind is missing, the last three judge the shapes of other kinds in its place ([`assign`]).
    """
    groups, relation = parse_caption(prompt)
    shapes = read_shapes(picture)
    found = assign(shapes, groups)
    kinds = [f"{group.kind}s" for group in groups]
    if category in ("single_object", "two_object"):
        is_right = {group.kind for group in groups} <= {shape.kind for shape in shapes}
        expected = " and ".join(kinds)
    elif category == "counting":
        is_right = [*map(len, found)] == [group.count for group in groups]
        expected = " and ".join(str(group.count) for group in groups)
    elif category == "position":
        assert relation is not None
        is_right = all(found) and holds(relation, *([shape.box for shape in own] for own in found))
        expected = f" {relation} ".join(kinds)
    else:
        pairs = zip(groups, found, strict=True)
        is_right = all({shape.color for shape in own} == {group.color} for group, own in pairs)
        expected = " and ".join(f"{group.color} {kind}" for group, kind in zip(groups, kinds, strict=True))
    return is_right, f"saw {describe(shapes)}" + ("" if is_right else f", expected {expected}")


def describe(shapes: Sequence[Shape]) -> str:
    """For example "2 red circles, 1 blue shape of no kind"."""
    counts = Counter((shape.color, shape.kind) for shape in shapes)
    names = [
        f"{num} {color} {kind or 'shape'}{'s' * (num > 1)}{'' if kind else ' of no kind'}"
        for (color, kind), num in counts.items()
    ]
    return ", ".join(names) or "nothing"


def judge_caption(picture: Image.Image, caption: str) -> bool:
    """Whether it is a true and complete caption; "a left of b" and "b right of a" are both."""
    try:
        return check_caption(picture, caption).correct
    except ValueError:
        return False


@dataclass
class ShapesTask(Task):
    """
    Draws prompts of each category and judges the drawings; captions pictures that are held out and judges the
    captions. The prompts are captions as in training ([`ShapesDataset`]).

    Args:
        num_samples (`int`, defaults to 100): Prompts of each category, and pictures to caption.
        sizes (`Sequence[tuple[int, int]]`, *optional*): Heights and widths of the pictures to caption, at least 32.
            Defaults to the size that the model draws.
        seed (`int`, defaults to 1): Of prompts and pictures. With that of the training, the pictures would not be held
            out.
    """

    num_samples: int = 100
    sizes: Sequence[tuple[int, int]] | None = None
    seed: int = 1
    name = "shapes"
    modalities: ClassVar[str] = "text ↔ image"

    def prepare(self, model: PreTrainedModel, processor: TransfusionProcessor) -> None:
        """
        Raises:
            ImportError: scipy is not installed.
            ValueError: a model without image tokens, sizes below 32, an image processor that changes the pictures.
        """
        requires_backends(read_shapes, "scipy")
        require_images(model, self.name)
        _check_size(_drawing_size(model, {}), _DRAWN)
        for size in self._sizes(model):
            _check_size(size, "a size of `sizes`")
            _check_processor(processor, size)
        self._pictures(model)

    def run(self, run: Run) -> TaskResult:
        drawn_size = _drawing_size(run.model, run.drawing)
        _check_size(drawn_size, _DRAWN)
        # Always sampled at 32×32, so the prompts do not depend on the size that the model draws.
        scenes = {name: sample_scenes(name, self.num_samples, seed=self.seed) for name in CATEGORIES}
        # One of each category in turn, so that any part of them is a fair sample.
        prompts = [scene.caption for scenes in zip(*scenes.values(), strict=True) for scene in scenes]
        files = run.draw(self.name, prompts)

        def judge_files(indices: list[int], files: list[Path]) -> list[dict[str, Any]]:
            verdicts = []
            for i, file in zip(indices, files, strict=True):
                category = CATEGORIES[i % len(CATEGORIES)]
                is_right, text = judge(open_picture(file), category, prompts[i])
                verdicts.append({"category": category, "prompt": prompts[i], "is_right": is_right, "text": text})
            return verdicts

        drawings = digest(*(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
        settings = {"prompts": digest(*prompts), "drawings": drawings}
        judged = run.map(f"{self.name}/judged", files, judge_files, settings)
        captions = self._caption(run)
        right = np.array([line["is_right"] for line in judged], dtype=np.float64).reshape(-1, len(CATEGORIES))
        score = replace(Score.of(np.mean, right.mean(axis=-1).tolist()), num_items=right.size)
        by_category = {name: Score.of(np.mean, right[:, i].tolist()) for i, name in enumerate(CATEGORIES)}
        by_category["captions"] = Score.of(np.mean, [bool(verdict.is_right) for verdict in captions])
        drawn = [
            Verdict(file, f"{line['category']}: {line['prompt']}; {line['text']}", line["is_right"])
            for file, line in zip(files, judged, strict=True)
        ]
        rounds = [drawn[i * len(CATEGORIES) : (i + 1) * len(CATEGORIES)] for i in range(self.num_samples)]
        return TaskResult(
            scores={"score": score, **by_category},
            settings={
                "num_samples": self.num_samples,
                "seed": self.seed,
                "drawing_size": [*drawn_size],
                "sizes": [[*size] for size in self._sizes(run.model)],
                "captions": "greedy; true and complete, in either order",
                "judge": "transfusion_hf.data.shapes.read_shapes",
            },
            verdicts=[
                *chain.from_iterable([*drawn, caption] for drawn, caption in zip(rounds, captions, strict=True))
            ],
        )

    def _caption(self, run: Run) -> list[Verdict]:
        data = self._pictures(run.model)
        scenes = [data.scene(i) for i in range(len(data))]
        pictures = [draw_scene(scene) for scene in scenes]
        settings = {"pictures": digest(*map(str, scenes))}
        captions = run.caption(self.name, pictures, settings)
        folder, verdicts = Path(run.output_dir, self.name, "pictures"), []
        for i, (scene, picture, caption) in enumerate(zip(scenes, pictures, captions, strict=True)):
            is_right, file = judge_caption(picture, caption), folder / f"{i:06d}.png"
            if run.state.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(file)
            text = f"captions: {caption!r}" + ("" if is_right else f", expected {scene.caption!r}")
            verdicts.append(Verdict(file, text, is_right))
        return verdicts

    def _sizes(self, model: PreTrainedModel) -> Sequence[tuple[int, int]]:
        return [_drawing_size(model, {})] if self.sizes is None else self.sizes

    def _pictures(self, model: PreTrainedModel) -> ShapesDataset:
        return ShapesDataset(self.num_samples, self._sizes(model), seed=self.seed)


def _drawing_size(model: Any, drawing: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels, as `generate()` decides them."""
    height, width = (
        drawing.get(name) or getattr(model.generation_config, name, None) or side * model.config.vae_scale_factor
        for name, side in zip(("height", "width"), model.config.latent_size, strict=True)
    )
    return height, width


def _check_size(size: tuple[int, int], source: str) -> None:
    if min(size) < 32:
        raise ValueError(
            f"The task `shapes` needs pictures of at least 32×32 pixels; {source} is {size}. "
            "Enlarge it, or drop the task."
        )


def _check_processor(processor: TransfusionProcessor, size: tuple[int, int]) -> None:
    """The model must see the pixels that the checker reads."""
    picture = draw_scene(sample_scene(np.random.default_rng(0), *size))
    pixels = processor(text=[processor.image_token], images=[picture])["pixel_values"][0]
    seen = processor.image_processor.postprocess([pixels])[0]
    if seen != picture:
        raise ValueError(
            f"`processor` turns a picture of {size} pixels in RGB into {seen.size[::-1]} in {seen.mode}, not into "
            "itself, so the model would not see what it is asked about. Pass its own size in `sizes`, or load the "
            "processor with `do_resize=False, do_center_crop=False`."
        )
