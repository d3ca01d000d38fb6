"""
Pictures of colored shapes on white with exact captions and edits, and a checker that judges pictures by their pixels.
Sizes are (height, width); boxes are (left, top, right, bottom) in pixels, as in PIL.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from math import dist
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from transformers.utils import requires_backends

KINDS = ("circle", "square", "triangle")
# At least 220 apart from each other and from white.
COLORS = {
    "red": (230, 0, 0),
    "yellow": (255, 220, 0),
    "green": (0, 170, 0),
    "cyan": (0, 220, 240),
    "blue": (0, 0, 230),
    "magenta": (230, 0, 230),
}
NUMBERS = {1: "a", 2: "two", 3: "three"}
# The axis of each, and whether the first group is at its low end.
RELATIONS = {"left of": (0, True), "right of": (0, False), "above": (1, True), "below": (1, False)}
EDITS = ("recolor", "remove")


class Box(NamedTuple):
    """Pixels from `left` and `top` up to, but without, `right` and `bottom`."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def center(self) -> tuple[float, float]:
        """As (x, y)."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def split(self, axis: int, cut: int) -> "list[Box]":
        """The parts below and above `cut` along axis 0 (x) or 1 (y)."""
        low, high = (("right", "left"), ("bottom", "top"))[axis]
        return [self._replace(**{low: cut}), self._replace(**{high: cut})]


class Shape(NamedTuple):
    """One shape of a picture. `kind` is `None` if it was read from pixels and resembles none of `KINDS`."""

    color: str
    kind: str | None
    box: Box


@dataclass(frozen=True)
class ShapeGroup:
    """One to three shapes of the same color and kind; `str` gives "a red circle" or "two blue squares"."""

    count: int
    color: str
    kind: str

    @property
    def noun(self) -> str:
        return self.kind if self.count == 1 else f"{self.kind}s"

    def __str__(self) -> str:
        return f"{NUMBERS[self.count]} {self.color} {self.noun}"


def holds(relation: str, first: Sequence[Box], second: Sequence[Box]) -> bool:
    """Whether it holds between any two boxes of `first` and `second`."""
    axis, first_is_low = RELATIONS[relation]
    low, high = (first, second) if first_is_low else (second, first)
    return max(box[axis + 2] for box in low) <= min(box[axis] for box in high)


@dataclass(frozen=True)
class Scene:
    """
    A picture's content: one group of shapes, or two that differ in color or kind, with the only one of `RELATIONS`
    between them, and each group's boxes, which lie inside and do not touch.
    """

    height: int
    width: int
    groups: tuple[ShapeGroup, ...]
    relation: str | None
    boxes: tuple[tuple[Box, ...], ...]

    @property
    def caption(self) -> str:
        """For example "a red circle" or "a red circle left of two blue squares"."""
        return f" {self.relation} ".join(map(str, self.groups))

    @property
    def shapes(self) -> list[Shape]:
        """From top to bottom, like those of `read_shapes`."""
        pairs = zip(self.groups, self.boxes, strict=True)
        return _sorted(Shape(group.color, group.kind, box) for group, boxes in pairs for box in boxes)


class Edit(NamedTuple):
    """A scene, an instruction, and the scene that results."""

    source: Scene
    instruction: str
    target: Scene


_GROUPS = {str(group): group for group in (ShapeGroup(n, c, k) for n in NUMBERS for c in COLORS for k in KINDS)}


def parse_caption(text: str) -> tuple[tuple[ShapeGroup, ...], str | None]:
    """The groups of a caption and the relation of the first to the second, `None` if there is only one."""
    names, relations = (parts := re.split(f" ({'|'.join(RELATIONS)}) ", text))[::2], parts[1::2]
    groups = tuple(_GROUPS[name] for name in names if name in _GROUPS)
    if not len(names) == len({(group.color, group.kind) for group in groups}) <= 2:
        raise ValueError(f"`text` must be a caption like 'a red circle left of two blue squares'; got {text!r}.")
    return groups, relations[0] if relations else None


def _sorted(shapes: Iterable[Shape]) -> list[Shape]:
    return sorted(shapes, key=lambda shape: (shape.box.top, shape.box.left))


def _mask(kind: str | None, height: int, width: int) -> np.ndarray:
    """The pixels of a shape that fills its box, (height, width). Integer arithmetic is equal on all platforms."""
    y, x = np.ogrid[1 - height : height : 2, 1 - width : width : 2]  # twice the distance to the center
    if kind == "circle":
        return (x * height) ** 2 + (y * width) ** 2 <= (height * width) ** 2
    if kind == "triangle":
        return 2 * abs(x) * height <= (y + height + 1) * width
    return np.ones((height, width), dtype=bool)


def draw_scene(scene: Scene) -> Image.Image:
    """The RGB picture, without antialiasing: every pixel is white or of one of `COLORS`."""
    pixels = np.full((scene.height, scene.width, 3), 255, dtype=np.uint8)
    for color, kind, (left, top, right, bottom) in scene.shapes:
        pixels[top:bottom, left:right][_mask(kind, bottom - top, right - left)] = COLORS[color]
    return Image.fromarray(pixels)


def _scale(height: int, width: int) -> tuple[int, int]:
    """Side of the smallest cell that holds a shape, and the margin within. Three cells fit side by side."""
    return 9 * min(height, width) // 32, min(height, width) // 32


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high, endpoint=True))


def _cells(rng: np.random.Generator, box: Box, num: int, side: int) -> list[Box]:
    """Splits the box at random into cells whose sides are at least `side`."""
    if num == 1:
        return [box]
    axis = _pick(rng, [axis for axis in (0, 1) if box[axis + 2] - box[axis] >= num * side])
    num_low = _between(rng, 1, num - 1)
    # Both parts can hold their cells along the same axis, so no choice can fail.
    cut = _between(rng, box[axis] + num_low * side, box[axis + 2] - (num - num_low) * side)
    low, high = box.split(axis, cut)
    return _cells(rng, low, num_low, side) + _cells(rng, high, num - num_low, side)


def _place(rng: np.random.Generator, cell: Box, largest: int, side: int, margin: int) -> Box:
    """A random square box within a cell."""
    left, top, right, bottom = cell
    size = _between(rng, side - 2 * margin, min(right - left, bottom - top, largest) - 2 * margin)
    x = _between(rng, left + margin, right - margin - size)
    y = _between(rng, top + margin, bottom - margin - size)
    return Box(x, y, x + size, y + size)


def sample_scene(rng: np.random.Generator, height: int, width: int, num_groups: int | None = None) -> Scene:
    """A random scene, by default of two groups in two cases out of three; sizes are relative to the shorter side."""
    if min(height, width) < 32:
        raise ValueError(f"The sides of a picture must be at least 32 pixels; got {(height, width)}. Enlarge it.")
    num_groups = num_groups or _pick(rng, (1, 2, 2))
    looks = [divmod(int(look), len(KINDS)) for look in rng.permutation(len(COLORS) * len(KINDS))[:num_groups]]
    groups = tuple(ShapeGroup(_pick(rng, [*NUMBERS]), [*COLORS][color], KINDS[kind]) for color, kind in looks)
    relation = _pick(rng, [*RELATIONS]) if num_groups == 2 else None
    (side, margin), largest = _scale(height, width), min(height, width) // 2
    while True:
        regions = [Box(0, 0, width, height)]
        if relation is not None:
            axis, first_is_low = RELATIONS[relation]
            length = (width, height)[axis]
            cut = _between(rng, side, length - side)
            regions = regions[0].split(axis, cut) if first_is_low else regions[0].split(axis, length - cut)[::-1]
        boxes = tuple(
            tuple(_place(rng, cell, largest, side, margin) for cell in _cells(rng, region, group.count, side))
            for group, region in zip(groups, regions, strict=True)
        )
        # Left of and above at once would have two true captions: draw again.
        if relation is None or [r for r in RELATIONS if holds(r, *boxes)] == [relation]:
            return Scene(height, width, groups, relation, boxes)


def sample_edit(rng: np.random.Generator, height: int, width: int) -> Edit:
    """
    A random scene and one of `EDITS`, equally often: "make the circle blue", "remove the squares". A group's color
    is named only if both groups have the same kind. All other pixels stay the same.
    """
    edit = _pick(rng, EDITS)
    scene = sample_scene(rng, height, width, 2 if edit == "remove" else None)
    which = int(rng.integers(len(scene.groups)))
    group = scene.groups[which]
    same_kind = [other for other in scene.groups if other.kind == group.kind]
    name = f"the {group.color} {group.noun}" if len(same_kind) == 2 else f"the {group.noun}"
    if edit == "remove":
        target = Scene(height, width, (scene.groups[1 - which],), None, (scene.boxes[1 - which],))
        return Edit(scene, f"remove {name}", target)
    color = _pick(rng, [color for color in COLORS if color not in {other.color for other in same_kind}])
    groups = tuple(replace(group, color=color) if other == group else other for other in scene.groups)
    return Edit(scene, f"make {name} {color}", replace(scene, groups=groups))


def read_shapes(image: Image.Image) -> list[Shape]:
    """
    The shapes of a picture, from top to bottom: connected pixels of one of `COLORS`, at least half unmixed with white
    and within 100 (of 255) times that share. The kind is the one whose drawing overlaps them most, with an
    intersection over union of at least 0.75. Specks, below half of the smallest triangle, are ignored. Needs scipy.
    """
    requires_backends(read_shapes, "scipy")
    from scipy import ndimage  # type: ignore[import-untyped]  # scipy has no annotations

    # Each pixel is a share of a color, and white. By color alone, magenta would be nearer to half red than red is.
    ink = 255 - np.asarray(image.convert("RGB"), dtype=np.float32)
    colors = 255 - np.array([*COLORS.values()], dtype=np.float32)
    shares = (ink @ colors.T / (colors**2).sum(axis=-1)).clip(0, 1)  # (height, width, colors)
    distances = np.linalg.norm(ink[:, :, None] - shares[..., None] * colors, axis=-1)
    distances[(shares < 0.5) | (distances > 100 * shares)] = np.inf
    nearest = np.where(distances.min(axis=-1) < np.inf, distances.argmin(axis=-1), -1)
    side, margin = _scale(*nearest.shape)
    speck = int(_mask("triangle", side - 2 * margin, side - 2 * margin).sum()) // 2
    shapes = []
    for index, color in enumerate(COLORS):
        labels, _ = ndimage.label(nearest == index, structure=np.ones((3, 3)))
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            found = labels[rows, columns] == label
            if found.sum() < speck:
                continue
            masks = {kind: _mask(kind, *found.shape) for kind in KINDS}
            overlaps = {kind: (found & mask).sum() / (found | mask).sum() for kind, mask in masks.items()}
            kind = max(KINDS, key=lambda kind: overlaps[kind])
            box = Box(columns.start, rows.start, columns.stop, rows.stop)
            shapes.append(Shape(color, kind if overlaps[kind] >= 0.75 else None, box))
    return _sorted(shapes)


@dataclass(frozen=True)
class ShapesCheck:
    """
    Which aspects of a picture are right, with its groups matched to the expected ones so that most agrees. If their
    numbers differ, `color`, `kind` and `count` compare the pictures as a whole, and `position` is `False`.
    """

    color: bool
    kind: bool
    count: bool
    position: bool

    @property
    def correct(self) -> bool:
        return self.color and self.kind and self.count and self.position


def _check(shapes: list[Shape], groups: Sequence[ShapeGroup], relation: str | None) -> ShapesCheck:
    found: dict[tuple[str, str | None], list[Box]] = {}
    for color, kind, box in shapes:
        found.setdefault((color, kind), []).append(box)
    if len(found) != len(groups):
        return ShapesCheck(
            color={group.color for group in groups} == {color for color, _ in found},
            kind={group.kind for group in groups} == {kind for _, kind in found},
            count=sum(group.count for group in groups) == len(shapes),
            position=False,
        )

    def agreement(order: Sequence[Any]) -> list[list[bool]]:
        pairs = zip(groups, order, strict=True)
        agrees = [(g.color == color, g.kind == kind, g.count == len(boxes)) for g, ((color, kind), boxes) in pairs]
        position = relation is None or holds(relation, *(boxes for _, boxes in order))
        return [*map(list, zip(*agrees, strict=True)), [position]]

    best = max(map(agreement, permutations(found.items())), key=lambda aspects: sum(map(sum, aspects)))
    return ShapesCheck(*map(all, best))


def check_caption(image: Image.Image, caption: str) -> ShapesCheck:
    """Whether a picture shows what a caption says; raises a `ValueError` for a text that is not a caption."""
    return _check(read_shapes(image), *parse_caption(caption))


def check_scene(image: Image.Image, scene: Scene) -> ShapesCheck:
    """
    Whether a picture of the same size shows a scene: its caption must be true, and for `position` each shape's center
    must lie within an eighth of the shorter side of its place (random scenes keep centers twice as far apart).
    """
    if image.size != (size := (scene.width, scene.height)):
        raise ValueError(f"`image` must have the scene's width and height, {size}; got {image.size}. Resize it.")
    shapes = read_shapes(image)
    check = _check(shapes, scene.groups, scene.relation)
    in_place = all(
        any(dist(shape.box.center, expected.box.center) <= min(image.size) / 8 for shape in shapes)
        for expected in scene.shapes
    )
    return replace(check, position=check.position and in_place)


@dataclass(eq=False)
class ShapesDataset(Dataset):
    """
    Samples for `TransfusionDataCollator`, drawn on access. Sample i depends only on `seed` and i. Another seed gives a
    held-out split, with the same captions but other placements.

    Args:
        num_samples (`int`): The length. A large number costs nothing.
        sizes (`Sequence[tuple[int, int]]`): Heights and widths of at least 32 to choose from. If they are not those of
            the image processor, it needs `do_resize=False` and `do_center_crop=False`.
        task (`str`, defaults to `"caption"`): For `{"text", "image"}`, or `"edit"` for
            `{"text": "<image>…<image>", "images": [source, target], "image_loss_mask": [False, True]}`.
        seed (`int`, defaults to 0)
        image_token (`str`, defaults to `"<image>"`): The processor's.
    """

    num_samples: int
    sizes: Sequence[tuple[int, int]] = ((32, 32),)
    task: str = "caption"
    seed: int = 0
    image_token: str = "<image>"

    def __post_init__(self) -> None:
        if self.task not in ("caption", "edit"):
            raise ValueError(f"`task` must be 'caption' or 'edit'; got {self.task!r}.")
        wrong = {"num_samples": self.num_samples < 1, "sizes": not self.sizes, "seed": self.seed < 0}
        if name := next((name for name, is_wrong in wrong.items() if is_wrong), None):
            raise ValueError(f"`{name}` is too small or empty: {getattr(self, name)!r}. Pass a larger one.")

    def __len__(self) -> int:
        return self.num_samples

    def _draw(self, index: int) -> Scene | Edit:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"`index` must be from 0 to {self.num_samples - 1}; got {index}.")
        rng = np.random.default_rng([self.seed, index])
        height, width = _pick(rng, self.sizes)
        return (sample_scene if self.task == "caption" else sample_edit)(rng, height, width)

    def scene(self, index: int) -> Scene:
        """What a model that is given the text of sample `index` should draw; for an edit, the target."""
        drawn = self._draw(index)
        return drawn if isinstance(drawn, Scene) else drawn.target

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = self._draw(index)
        if isinstance(drawn, Scene):
            return {"text": drawn.caption, "image": draw_scene(drawn)}
        text = f"{self.image_token}{drawn.instruction}{self.image_token}"
        images = [draw_scene(drawn.source), draw_scene(drawn.target)]
        return {"text": text, "images": images, "image_loss_mask": [False, True]}
