"""
Text to image: GenEval (Ghosh et al., arXiv 2310.11513), whether the objects of a prompt are in its pictures.

Boxes are corners (x1, y1, x2, y2) in pixels; y grows downwards, and x2 and y2 lie behind the last pixel.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.ops import masks_to_boxes
from transformers import (
    AutoImageProcessor,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
)

from ..processing_transfusion import TransfusionProcessor
from .judges import CLIP, load_clip, load_judge
from .run import (
    Run,
    Score,
    Task,
    TaskResult,
    Verdict,
    digest,
    fingerprint,
    mean_of_means,
    open_picture,
    require_images,
)

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# Those of COCO, in its order, as GenEval's metadata spell them.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
# COCO's own names, and those of the label map that many checkpoints on the Hub share.
CLASS_OF_LABEL = {name: name for name in CLASSES} | {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
    "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv",
}  # fmt: skip
MAX_OBJECTS = 16
DETECTOR = "facebook/mask2former-swin-small-coco-instance"

Box = tuple[float, float, float, float]


@dataclass(eq=False)
class Detection:
    """
    Args:
        label (`str`): One of `CLASSES`.
        box (`tuple[float, float, float, float]`)
        score (`float`): 0 to 1.
        mask (`np.ndarray` of shape `(height, width)` of the picture, bool, *optional*)
    """

    label: str
    box: Box
    score: float
    mask: np.ndarray | None = None


def keep(detections: Sequence[Detection], threshold: float, max_overlap: float = 1.0) -> list[Detection]:
    """
    The detections that count: of each class the best `MAX_OBJECTS` of those that score more than `threshold`, best
    first. A `max_overlap` below 1 drops those whose intersection over union with a better one reaches it.
    """
    kept: list[Detection] = []
    for label in sorted({detection.label for detection in detections}):
        found = [d for d in detections if d.label == label and d.score > threshold]
        own: list[Detection] = []
        for d in sorted(found, key=lambda d: d.score, reverse=True)[:MAX_OBJECTS]:
            if max_overlap == 1 or all(_iou(d.box, better.box) < max_overlap for better in own):
                own.append(d)
        kept += own
    return kept


def _iou(a: Box, b: Box) -> float:
    """With both corners' pixels counted, as published."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def relations(a: Box, b: Box) -> set[str]:
    """Where the box `a` lies as seen from `b`: none, one or two of `RELATIONS`."""
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    slack = [0.1 * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    revised = [math.copysign(max(abs(o) - s, 0.0), o) for o, s in zip(offset, slack, strict=True)]
    if max(map(abs, revised)) < 1e-3:
        return set()
    dx, dy = (r / math.hypot(*offset) for r in revised)  # by the norm of the offset before the revision
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {name for name, is_so in zip(RELATIONS, holds, strict=True) if is_so}


def decide(
    metadata: dict[str, Any], kept: Sequence[Detection], colors_of: Callable[[list[Detection]], list[str]]
) -> list[str]:
    """
    Why a picture is wrong, a sentence for each clause that fails; empty where it is correct.

    Args:
        metadata (`dict[str, Any]`): `include` and, optionally, `exclude`.
        kept (`Sequence[Detection]`): What `keep` returns.
        colors_of (`Callable`): Names the colours of detections of one class; called where a clause asks for them.
    """
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        found = [d for d in kept if d.label == clause["class"]][: clause["count"]]
        reason = _failure(clause, found, metadata["include"], matched, colors_of)
        reasons += [reason] if reason else []
        matched.append(None if reason else found)
    for clause in metadata.get("exclude", []):
        num_found = sum(d.label == clause["class"] for d in kept)
        if num_found >= clause["count"]:
            reasons.append(f"expected fewer than {_number_of(clause['count'], clause['class'])}, found {num_found}")
    return reasons


def _failure(
    clause: dict[str, Any],
    found: list[Detection],
    include: list[dict[str, Any]],
    matched: list[list[Detection] | None],
    colors_of: Callable[[list[Detection]], list[str]],
) -> str | None:
    label, count, color = clause["class"], clause["count"], clause.get("color")
    if len(found) < count:
        return f"expected {_number_of(count, label)}, found {len(found)}"
    if color is not None and (colors := colors_of(found)).count(color) < count:
        return f"expected {_number_of(count, label, color)}, found {' and '.join(colors)}"
    if "position" not in clause:
        return None
    relation, target = clause["position"]
    expected = f"expected the {label} {relation} the {include[target]['class']}"
    others = matched[target]
    if others is None:
        return f"{expected}, whose own clause fails"
    for there in (relations(d.box, other.box) for d in found for other in others):
        if relation not in there:
            return f"{expected}, found it {' and '.join(sorted(there)) or 'on no side'}"
    return None


def _number_of(count: int, label: str, color: str | None = None) -> str:
    return f"{count} × {label if color is None else f'{color} {label}'}"


def crop(picture: Image.Image, detection: Detection) -> Image.Image:
    """What the judge of colours sees: the box, in #999 grey outside of the mask."""
    if detection.mask is not None:
        grey = Image.new("RGB", picture.size, "#999")
        picture = Image.composite(picture, grey, Image.fromarray(detection.mask))
    return picture.crop(detection.box)


class Mask2FormerDetector:
    """
    Instances by transformers' Mask2Former, scored as mmdet's head does.

    NOTE: not `post_process_instance_segmentation`, which cuts masks at 384 × 384 pixels and enlarges them by nearest
    neighbours: here logits become masks at the picture's size, so boxes and mask scores are those of that size.

    Args:
        name (`str`): A folder or a repository of the Hub.
        shortest_edge (`int`, defaults to 800): Pixels that the picture is resized to, with at most 5/3 of it for the
            longer edge (mmdet's 800 and 1333). The checkpoint's own processor may say less.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: they are of another model or of other classes than COCO's.
    """

    def __init__(self, name: str | os.PathLike, shortest_edge: int = 800) -> None:
        models = (Mask2FormerForUniversalSegmentation, AutoImageProcessor)
        self.model, self.processor = load_judge("detector", name, DETECTOR, *models)
        self.size = {"shortest_edge": shortest_edge, "longest_edge": shortest_edge * 5 // 3}
        labels: dict[int, str] = self.model.config.id2label
        self.labels = {i: CLASS_OF_LABEL.get(label, label) for i, label in labels.items()}
        if differing := sorted({*CLASSES} ^ {*self.labels.values()}):
            raise ValueError(
                f"`detector` {str(name)!r} has other classes than COCO's 80: they differ in "
                f"{', '.join(differing[:5])}; pass weights for COCO instances, such as {DETECTOR!r}."
            )

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> list[Detection]:
        """The best 100 pairs of query and class, without those whose mask is empty."""
        inputs = self.processor(images=picture, size=self.size, do_resize=True, pad_size=None, return_tensors="pt").to(
            self.model.device
        )
        output = self.model(**inputs)
        probabilities = output.class_queries_logits[0].softmax(-1)[:, :-1]  # (queries, classes), without "no object"
        num_classes = probabilities.shape[1]
        scores, pairs = probabilities.flatten().topk(min(100, probabilities.numel()))
        logits = output.masks_queries_logits[:, pairs // num_classes]
        for size in (inputs["pixel_values"].shape[-2:], picture.size[::-1]):
            logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
        masks = logits[0] > 0  # (pairs, height, width)
        inside = (logits[0].sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1], device=masks.device)
        columns = (pairs % num_classes, boxes, scores * inside, masks.any(2).any(1))
        rows = zip(*(column.tolist() for column in columns), masks.cpu().numpy(), strict=True)
        return [Detection(self.labels[i], tuple(box), score, mask) for i, box, score, is_any, mask in rows if is_any]


class ClipColors:
    """
    Names the colours of crops by CLIP, zero-shot.

    Args:
        name (`str`): A folder or a repository of the Hub.

    Raises:
        FileNotFoundError, ValueError: there are no weights, or they are of another model.
    """

    def __init__(self, name: str | os.PathLike) -> None:
        self.model, self.processor = load_clip(name)
        self._features: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def __call__(self, crops: Sequence[Image.Image], label: str) -> list[str]:
        if label not in self._features:
            self._features[label] = self._features_of(label)
        inputs = self.processor(images=list(crops), return_tensors="pt").to(self.model.device)
        features = F.normalize(self.model.get_image_features(**inputs).pooler_output, dim=-1)
        return [COLORS[i] for i in (features @ self._features[label].T).argmax(-1).tolist()]

    def _features_of(self, label: str) -> torch.Tensor:
        """(colours, features)"""
        templates = ("a photo of a {} " + label, "a photo of a {}-colored " + label, "a photo of a {} object")
        texts = [template.format(color) for color in COLORS for template in templates]
        inputs = self.processor(text=texts, padding=True, return_tensors="pt").to(self.model.device)
        features = F.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)
        return F.normalize(features.view(len(COLORS), len(templates), -1).mean(1), dim=-1)


def read_metadata(data: str | Path | Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """
    The prompts, checked.

    Args:
        data: The file of the metadata, one JSON object a line, or such objects.

    Raises:
        FileNotFoundError, ValueError: the file is absent, or a line is not as it should be; the message names it.
    """
    if data is None or (isinstance(data, str | Path) and not Path(data).is_file()):
        raise FileNotFoundError(
            f"`data`: no GenEval metadata{'' if data is None else f' at {str(data)!r}'}. Fetch "
            "`prompts/evaluation_metadata.jsonl` of https://github.com/djghosh13/geneval and pass it: "
            "`--data geneval=PATH`."
        )
    rows, places = [], []
    if isinstance(data, str | Path):
        for number, line in enumerate(Path(data).read_bytes().splitlines(), start=1):
            try:
                if line.strip():
                    rows.append(json.loads(line.decode("utf-8-sig")))
                    places.append(f"Line {number} of {data}")
            except ValueError as error:
                raise ValueError(f"Line {number} of {data} is not JSON ({error}): {line[:80]!r}.") from error
    else:
        rows, places = list(data), [f"Row {i}" for i in range(len(data))]
    for row, where in zip(rows, places, strict=True):
        _check(row, where)
    if not rows:
        raise ValueError(
            f"`data` ({'rows' if not isinstance(data, str | Path) else data}) is empty; pass prompts' metadata."
        )
    return rows


def _check(row: Any, where: str) -> None:
    def expect(is_so: bool, name: str, value: Any, expected: str) -> None:
        if not is_so:
            raise ValueError(f"{where}: {name} must be {expected}; got {value!r}.")

    expect(isinstance(row, dict), "the metadata", row, "a JSON object")
    expect(row.get("tag") in TAGS, "`tag`", row.get("tag"), f"one of {', '.join(TAGS)}")
    expect(isinstance(row.get("prompt"), str) and bool(row["prompt"]), "`prompt`", row.get("prompt"), "a text")
    for name, allowed in (("include", {"class", "count", "color", "position"}), ("exclude", {"class", "count"})):
        clauses = row.get(name, [])
        is_enough = isinstance(clauses, list) and (bool(clauses) or name == "exclude")
        expect(is_enough, f"`{name}`", clauses, "a list of clauses")
        for i, clause in enumerate(clauses):
            expect(isinstance(clause, dict) and {*clause} <= allowed, f"a clause of `{name}`", clause,
                   f"an object with {', '.join(sorted(allowed))} only")  # fmt: skip
            label, count = clause.get("class"), clause.get("count")
            expect(label in CLASSES, "`class`", label, "one of GenEval's 80 classes")
            expect(type(count) is int and count > 0, "`count`", count, "a whole number of at least 1")
            expect(clause.get("color", COLORS[0]) in COLORS, "`color`", clause.get("color"),
                   f"one of {', '.join(COLORS)}")  # fmt: skip
            position = clause.get("position", [RELATIONS[0], 0])
            is_pair = isinstance(position, list | tuple) and len(position) == 2 and type(position[1]) is int
            is_earlier = "position" not in clause or (is_pair and 0 <= position[1] < i)
            expect(is_pair and position[0] in RELATIONS and is_earlier, "`position`", position,
                   f"one of {', '.join(RELATIONS)} and the index of an earlier clause")  # fmt: skip


@dataclass
class GenEvalTask(Task):
    """
    Draws each prompt of GenEval and judges the pictures. A task's score is the share of its correct pictures, the
    overall score the mean of the six tasks. Intervals resample prompts, not pictures: the pictures of a prompt are
    right or wrong together, and would make the interval too narrow. That of the overall score resamples within each
    task.

    Args:
        data (`str` or `Sequence[dict]`): The published `evaluation_metadata.jsonl`, or its rows.
        detector (`str` or `Callable`, defaults to `"facebook/mask2former-swin-small-coco-instance"`):
            Weights, or a function from a picture to its `Detection`s.
        clip (`str` or `Callable`, defaults to `"openai/clip-vit-large-patch14"`):
            Weights, or a function from crops and a class to the crops' `COLORS`.
        num_samples (`int`, *optional*): Prompts, the first ones of each task in equal numbers.
        num_images_per_prompt (`int`, defaults to 4)
        detector_size (`int`, defaults to 800): See `Mask2FormerDetector`.
        max_overlap (`float`, defaults to 1.0): See `keep`; 1 drops none, as published.
    """

    data: str | Path | Sequence[dict[str, Any]] | None = None
    detector: str | os.PathLike | Callable[[Image.Image], list[Detection]] = DETECTOR
    clip: str | os.PathLike | Callable[[Sequence[Image.Image], str], list[str]] = CLIP
    num_samples: int | None = None
    num_images_per_prompt: int = 4
    detector_size: int = 800
    max_overlap: float = 1.0

    name = "geneval"
    modalities = "text → image"

    def prepare(self, model: PreTrainedModel, processor: TransfusionProcessor) -> None:
        require_images(model, self.name)
        for name in ("num_samples", "num_images_per_prompt", "detector_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1; got {value}.")
        rows = read_metadata(self.data)
        seen: Counter[str] = Counter()
        order = []
        for i, row in enumerate(rows):
            order.append((seen[row["tag"]], i))
            seen[row["tag"]] += 1
        self._rows = [rows[i] for i in sorted(i for _, i in sorted(order)[: self.num_samples])]
        detector, clip = self.detector, self.clip
        self._detect = detector if callable(detector) else Mask2FormerDetector(detector, self.detector_size)
        self._name_colors = clip if callable(clip) else ClipColors(clip)

    def run(self, run: Run) -> TaskResult:
        files = run.draw(self.name, [row["prompt"] for row in self._rows], self.num_images_per_prompt)
        rows = [row for row in self._rows for _ in range(self.num_images_per_prompt)]
        for judge in (self._detect, self._name_colors):
            if isinstance(judge, Mask2FormerDetector | ClipColors):
                judge.model.to(run.model.device)
        settings = self._settings()
        pictures = digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
        items = list(zip(files, rows, strict=True))
        judged = run.map(f"{self.name}/judged", items, self._judge, {**settings, "pictures": pictures})
        shares: dict[str, list[float]] = {}
        for i, row in enumerate(self._rows):
            own = judged[i * self.num_images_per_prompt : (i + 1) * self.num_images_per_prompt]
            shares.setdefault(row["tag"], []).append(sum(line["correct"] for line in own) / len(own))
        for judge in (self._detect, self._name_colors):
            if isinstance(judge, Mask2FormerDetector | ClipColors):
                judge.model.cpu()
        columns = {tag: shares[tag] for tag in TAGS if tag in shares}
        headline = "score" if len(columns) == len(TAGS) else f"mean of {', '.join(columns)}"
        scores = {headline: Score.of(mean_of_means, *columns.values(), paired=False)}
        scores |= {tag: Score.of(np.mean, column) for tag, column in columns.items()}
        verdicts = [
            Verdict(file, f"{row['prompt']}: {'; '.join(line['reasons']) or 'correct'}", line["correct"])
            for file, row, line in zip(files, rows, judged, strict=True)
        ]
        return TaskResult(scores, settings, verdicts)

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "data": str(self.data) if isinstance(self.data, str | Path) else "rows",
            "metadata": digest(*self._rows),
            "num_prompts": dict(Counter(row["tag"] for row in self._rows)),
            "num_images_per_prompt": self.num_images_per_prompt,
            "threshold": 0.3,
            "threshold_counting": 0.9,
            "max_objects": MAX_OBJECTS,
            "max_overlap": self.max_overlap,
        }
        for name, judge in (("detector", self._detect), ("clip", self._name_colors)):
            if isinstance(judge, Mask2FormerDetector | ClipColors):
                settings |= {name: str(getattr(self, name)), f"{name}_weights": fingerprint(judge.model)}
            else:
                settings[name] = getattr(judge, "__qualname__", type(judge).__qualname__)
        if isinstance(self._detect, Mask2FormerDetector):
            settings["detector_size"] = self._detect.size
        return settings

    def _judge(self, indices: list[int], items: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
        return [self._judge_picture(open_picture(file).convert("RGB"), row) for file, row in items]

    def _judge_picture(self, picture: Image.Image, row: dict[str, Any]) -> dict[str, Any]:
        kept = keep(self._detect(picture), 0.9 if row["tag"] == "counting" else 0.3, self.max_overlap)
        colors: dict[Detection, str] = {}

        def colors_of(found: list[Detection]) -> list[str]:
            names = self._name_colors([crop(picture, detection) for detection in found], found[0].label)
            colors.update(zip(found, names, strict=True))
            return names

        reasons = decide(row, kept, colors_of)
        detections = [
            {"label": d.label, "score": float(d.score), "box": [*map(float, d.box)]}
            | ({"color": colors[d]} if d in colors else {})
            for d in kept
        ]
        return {"correct": not reasons, "reasons": reasons, "detections": detections}
