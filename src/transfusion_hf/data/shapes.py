"""
Colored shapes on white, with captions and edits that are exact by construction, and a reader that judges pictures by
their pixels alone. Sizes are (height, width); boxes are PIL's (left, top, right, bottom), in pixels.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, count, islice, permutations
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

KINDS = ("circle", "square", "triangle")
# At least 220 apart from one another and from the white behind them.
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
EDITS = ("recolor", "turn", "remove", "move")


class Box(NamedTuple):
    """Pixels from `left` and `top` to `right` and `bottom`, the latter two exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def center(self) -> tuple[float, float]:
        """As (x, y)."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def with_span(self, axis: int, low: int, high: int) -> "Box":
        """From `low` to `high` along axis 0 (x) or 1 (y), else the same."""
        return self._replace(left=low, right=high) if axis == 0 else self._replace(top=low, bottom=high)


class Shape(NamedTuple):
    """One shape of a picture; `kind` is `None` where it was read and resembles none of `KINDS`."""

    color: str
    kind: str | None
    box: Box


@dataclass(frozen=True)
class ShapeGroup:
    """
    One to three shapes of one look, in words: `str` gives "a red circle" or "two blue squares".

    Raises:
        ValueError: a `count`, `color` or `kind` that is not of `NUMBERS`, `COLORS`, `KINDS`.
    """

    count: int
    color: str
    kind: str

    def __post_init__(self) -> None:
        for name, options in (("count", NUMBERS), ("color", COLORS), ("kind", KINDS)):
            if getattr(self, name) not in options:
                raise ValueError(f"`{name}` must be one of {[*options]}; got {getattr(self, name)!r}.")

    @property
    def noun(self) -> str:
        return self.kind if self.count == 1 else f"{self.kind}s"

    def __str__(self) -> str:
        return f"{NUMBERS[self.count]} {self.color} {self.noun}"


def _holds(relation: str, first: Sequence[Box], second: Sequence[Box], *, gap: int = 0) -> bool:
    """Whether all of `first` stand so to all of `second`, with at least `gap` pixels between."""
    axis, first_is_low = RELATIONS[relation]
    low, high = (first, second) if first_is_low else (second, first)
    return max(box[axis + 2] for box in low) + gap <= min(box[axis] for box in high)


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 32:
        raise ValueError(f"The sides of a picture must be at least 32 pixels; got {(height, width)}. Enlarge it.")


@dataclass(frozen=True)
class Scene:
    """
    What a picture shows, in words and in place. Of the four relations exactly one holds between two groups.

    Args:
        height, width (`int`): Of the picture, at least 32.
        groups (`tuple[ShapeGroup, ...]`): One, or two of different looks.
        relation (`str`, *optional*): Of `RELATIONS`, how the first group stands to the second.
        boxes (`tuple[tuple[Box, ...], ...]`):
            For each group the boxes that its shapes fill: inside the picture, none touching another.

    Raises:
        ValueError: anything else.
    """

    height: int
    width: int
    groups: tuple[ShapeGroup, ...]
    relation: str | None
    boxes: tuple[tuple[Box, ...], ...]

    def __post_init__(self) -> None:
        _check_size(self.height, self.width)
        looks = {(group.color, group.kind) for group in self.groups}
        if not 1 <= len(self.groups) == len(looks) <= 2:
            raise ValueError(
                f"`groups` must be one, or two that differ in color or kind; got {[*map(str, self.groups)]}."
            )
        numbers = [group.count for group in self.groups]
        if [len(boxes) for boxes in self.boxes] != numbers:
            raise ValueError(f"`boxes` must hold {numbers} boxes, one per shape; got {[*map(len, self.boxes)]}.")
        boxes = [box for group in self.boxes for box in group]
        for box in boxes:
            if not (0 <= box.left < box.right <= self.width and 0 <= box.top < box.bottom <= self.height):
                raise ValueError(f"`boxes` must lie within {self.height} × {self.width} pixels; got {box}. Move it.")
        for one, other in combinations(boxes, 2):
            if not any(_holds(relation, [one], [other], gap=1) for relation in RELATIONS):
                raise ValueError(f"`boxes` must be a pixel apart; {one} touches {other}. Move one of them.")
        found = [r for r in RELATIONS if _holds(r, *self.boxes)] if len(self.groups) == 2 else [None]
        if found != [self.relation]:
            raise ValueError(f"`relation` must be the only one that holds; got {self.relation!r}, but {found} hold.")

    @property
    def caption(self) -> str:
        """In words, as in "a red circle" or "a red circle left of two blue squares"."""
        return f" {self.relation} ".join(map(str, self.groups))

    @property
    def shapes(self) -> list[Shape]:
        """From the top to the bottom, as `read_shapes` gives them."""
        pairs = zip(self.groups, self.boxes, strict=True)
        shapes = [Shape(group.color, group.kind, box) for group, boxes in pairs for box in boxes]
        return sorted(shapes, key=lambda shape: (shape.box.top, shape.box.left))


@dataclass(frozen=True)
class Edit:
    """A scene, what to do with it in words, and the scene that results."""

    source: Scene
    instruction: str
    target: Scene


_GROUPS = {str(group): group for group in (ShapeGroup(n, c, k) for n in NUMBERS for c in COLORS for k in KINDS)}


def parse_caption(text: str) -> tuple[tuple[ShapeGroup, ...], str | None]:
    """
    The groups of a caption and the relation of the first to the second, `None` where there is but one.

    Raises:
        ValueError: a text that is not the caption of a scene, letter by letter.
    """
    parts = re.split(f" ({'|'.join(RELATIONS)}) ", text)
    groups = [_GROUPS.get(part) for part in parts[::2]]
    looks = {(group.color, group.kind) for group in groups if group is not None}
    if len(groups) > 2 or len(looks) < len(groups):
        raise ValueError(
            "`text` must be a caption as `Scene.caption` gives it, like 'a red circle' or 'a red circle left of two "
            f"blue squares'; got {text!r}."
        )
    return tuple(group for group in groups if group is not None), parts[1] if len(parts) == 3 else None


def _mask(kind: str, height: int, width: int) -> np.ndarray:
    """The pixels of a shape that fills its box, (height, width). In integers, so that every platform agrees."""
    y, x = np.ogrid[1 - height : height : 2, 1 - width : width : 2]  # twice the distance to the center
    if kind == "circle":
        return (x * height) ** 2 + (y * width) ** 2 <= (height * width) ** 2
    if kind == "triangle":
        return 2 * abs(x) * height <= (y + height + 1) * width
    return np.ones((height, width), dtype=bool)


def draw_scene(scene: Scene) -> Image.Image:
    """The scene as an RGB picture. Without antialiasing: every pixel is white or of one of `COLORS`."""
    pixels = np.full((scene.height, scene.width, 3), 255, dtype=np.uint8)
    for shape in scene.shapes:
        left, top, right, bottom = shape.box
        assert shape.kind is not None
        pixels[top:bottom, left:right][_mask(shape.kind, bottom - top, right - left)] = COLORS[shape.color]
    return Image.fromarray(pixels)


def _scale(height: int, width: int) -> tuple[int, int]:
    """
    Side of the smallest cell that holds a shape, and margin within. Three cells fit side by side into every picture;
    of 32 pixels they have 9, and the smallest shape 7, where the kinds still differ by many pixels.
    """
    return 9 * min(height, width) // 32, min(height, width) // 32


def _cells(rng: np.random.Generator, box: Box, num: int, side: int) -> list[Box]:
    """Cuts the box at random, again and again, into `num` cells of sides of at least `side`."""
    if num == 1:
        return [box]
    axis = _pick(rng, [axis for axis in (0, 1) if box[axis + 2] - box[axis] >= num * side])
    num_low = int(rng.integers(1, num))
    # The parts hold their cells along the same axis at least, so that no choice can fail.
    cut = int(rng.integers(box[axis] + num_low * side, box[axis + 2] - (num - num_low) * side, endpoint=True))
    low, high = box.with_span(axis, box[axis], cut), box.with_span(axis, cut, box[axis + 2])
    return _cells(rng, low, num_low, side) + _cells(rng, high, num - num_low, side)


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def sample_scene(
    rng: np.random.Generator, height: int, width: int, num_groups: int | None = None, movable: bool = False
) -> Scene:
    """
    A random scene of one or two groups, of two in two cases out of three where `num_groups` does not say. Sizes and
    gaps are in proportion to the shorter side. If `movable`, the first of two groups has room on the second's other
    side too.

    Raises:
        ValueError: a side below 32, another number of groups, or `movable` and not two.
    """
    _check_size(height, width)
    if num_groups not in (None, 1, 2) or (movable and num_groups != 2):
        raise ValueError(f"`num_groups` must be 1 or 2, and 2 if `movable`; got {num_groups}.")
    num_groups = num_groups or _pick(rng, (1, 2, 2))
    looks = [divmod(int(look), len(KINDS)) for look in rng.permutation(len(COLORS) * len(KINDS))[:num_groups]]
    groups = tuple(ShapeGroup(_pick(rng, [*NUMBERS]), [*COLORS][color], KINDS[kind]) for color, kind in looks)
    relation = _pick(rng, [*RELATIONS]) if num_groups == 2 else None
    side, margin = _scale(height, width)
    while True:
        regions = [Box(0, 0, width, height)]
        if relation is not None:
            axis, first_is_low = RELATIONS[relation]
            length = (width, height)[axis]
            cut = int(rng.integers(side, (length - side) // 2 if movable else length - side, endpoint=True))
            spans = [(0, cut), (cut, length - cut if movable else length)]
            if not first_is_low:
                spans = [(length - high, length - low) for low, high in spans]
            regions = [regions[0].with_span(axis, low, high) for low, high in spans]
        boxes: list[list[Box]] = []
        for group, region in zip(groups, regions, strict=True):
            boxes.append([])
            for left, top, right, bottom in _cells(rng, region, group.count, side):
                largest = min(right - left, bottom - top, min(height, width) // 2) - 2 * margin
                size = int(rng.integers(side - 2 * margin, largest, endpoint=True))
                x = int(rng.integers(left + margin, right - margin - size, endpoint=True))
                y = int(rng.integers(top + margin, bottom - margin - size, endpoint=True))
                boxes[-1].append(Box(x, y, x + size, y + size))
        # Left of and above at once would have two true captions: draw again.
        if relation is None or [r for r in RELATIONS if _holds(r, *boxes)] == [relation]:
            return Scene(height, width, groups, relation, tuple(map(tuple, boxes)))


def sample_edit(rng: np.random.Generator, height: int, width: int) -> Edit:
    """
    A random scene and one change of it, each of `EDITS` as often: "make the circle blue", "turn the circle into a
    triangle", "remove the squares", "move the circle right of the squares". A kind alone names a group, with its
    color where both are of one kind. A group that moves is mirrored at the middle of the picture, each shape
    upright; all that an edit does not name keeps its pixels.

    Raises:
        ValueError: a side below 32.
    """
    edit = _pick(rng, EDITS)
    scene = sample_scene(rng, height, width, 2 if edit in ("remove", "move") else None, movable=edit == "move")
    groups, boxes = [*scene.groups], [*scene.boxes]
    same_kind = len(groups) == 2 and groups[0].kind == groups[1].kind
    names = [f"the {group.color} {group.noun}" if same_kind else f"the {group.noun}" for group in groups]
    # A look that the other group has already would merge the two.
    looks = {(group.color, group.kind) for group in groups}
    relation = scene.relation
    which = 0 if edit == "move" else int(rng.integers(len(groups)))
    name, group = names[which], groups[which]
    if edit == "recolor":
        color = _pick(rng, [color for color in COLORS if (color, group.kind) not in looks])
        groups[which] = replace(group, color=color)
        instruction = f"make {name} {color}"
    elif edit == "turn":
        kind = _pick(rng, [kind for kind in KINDS if (group.color, kind) not in looks])
        groups[which] = replace(group, kind=kind)
        instruction = f"turn {name} into {'a ' if group.count == 1 else ''}{groups[which].noun}"
    elif edit == "remove":
        del groups[which], boxes[which]
        relation = None
        instruction = f"remove {name}"
    else:
        assert relation is not None
        axis, first_is_low = RELATIONS[relation]
        relation = next(r for r in RELATIONS if RELATIONS[r] == (axis, not first_is_low))
        length = (width, height)[axis]
        boxes[0] = tuple(box.with_span(axis, length - box[axis + 2], length - box[axis]) for box in boxes[0])
        instruction = f"move {name} {relation} {names[1]}"
    return Edit(scene, instruction, Scene(height, width, tuple(groups), relation, tuple(boxes)))


def read_shapes(image: Image.Image) -> list[Shape]:
    """
    The shapes of a picture, from the top to the bottom: connected pixels of one color, or of that with up to as much
    white, at a distance of at most 100 × the share of the color, where channels go from 0 to 255. The kind is the one
    that, drawn into their bounding box, overlaps them most: intersection over union, at least 0.75. What has less than
    half of the pixels of the smallest triangle in a picture of this size is a speck, and ignored.

    Raises:
        ImportError: scipy is missing.
    """
    try:
        from scipy import ndimage  # type: ignore[import-untyped]  # scipy has no annotations
    except ImportError as error:
        raise ImportError("`read_shapes` needs scipy; run `pip install scipy`.") from error
    # Each pixel as a share of a color and the rest white: halfway from red to white, magenta is nearer than red.
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
    return sorted(shapes, key=lambda shape: (shape.box.top, shape.box.left))


@dataclass(frozen=True)
class ShapesCheck:
    """
    What of a picture is right. Its shapes of one look are matched, as groups, with those expected so that most
    agrees. Where there are more groups or fewer, `color` and `kind` tell whether all the colors and kinds expected
    and no others occur, `count` whether there are as many shapes in all, and `position` is `False`.
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
    for shape in shapes:
        found.setdefault((shape.color, shape.kind), []).append(shape.box)
    if len(found) != len(groups):
        return ShapesCheck(
            color={group.color for group in groups} == {color for color, _ in found},
            kind={group.kind for group in groups} == {kind for _, kind in found},
            count=sum(group.count for group in groups) == len(shapes),
            position=False,
        )

    def agreement(order: Sequence[Any]) -> list[list[bool]]:
        pairs = [(group, *look, boxes) for group, (look, boxes) in zip(groups, order, strict=True)]
        return [
            [group.color == color for group, color, _, _ in pairs],
            [group.kind == kind for group, _, kind, _ in pairs],
            [group.count == len(boxes) for group, _, _, boxes in pairs],
            [relation is None or _holds(relation, *(boxes for _, boxes in order))],
        ]

    best = max(map(agreement, permutations(found.items())), key=lambda aspects: sum(map(sum, aspects)))
    return ShapesCheck(*map(all, best))


def check_caption(image: Image.Image, caption: str) -> ShapesCheck:
    """
    Whether a picture shows what a caption says; for a caption that a model wrote and one that it drew alike.

    Raises:
        ValueError: a text that is no caption.
    """
    return _check(read_shapes(image), *parse_caption(caption))


def check_scene(image: Image.Image, scene: Scene) -> ShapesCheck:
    """
    Whether a picture shows a scene, the target of an edit, say: what its caption says, and for `position` also each
    shape's center within an eighth of the shorter side of its place: less than half of what random scenes have between
    two centers.

    Raises:
        ValueError: the picture is not of the scene's size.
    """
    if image.size != (scene.width, scene.height):
        raise ValueError(
            f"`image` must have the scene's size, {scene.height} × {scene.width}; got {image.height} × {image.width}. "
            "Resize it."
        )
    shapes = read_shapes(image)
    check = _check(shapes, scene.groups, scene.relation)
    centers = [shape.box.center for shape in shapes]
    in_place = all(
        any(np.hypot(x - a, y - b) <= min(image.size) / 8 for a, b in centers)
        for x, y in (shape.box.center for shape in scene.shapes)
    )
    return replace(check, position=check.position and in_place)


class ShapesDataset(Dataset):
    r"""
    Samples for `TransfusionDataCollator`, drawn when asked for. Sample i depends on `seed` and i alone. Another seed
    gives other samples: a split to hold out, in which the captions recur, but placed elsewhere.

    - `"caption"`: `{"text": "a red circle", "image": …}`
    - `"edit"`: `{"text": "<image>make the circle blue<image>", "images": [source, target], "image_loss_mask":
      [False, True]}`, the source as clean context.

    Args:
        num_samples (`int`, *optional*): Length; without end if `None`, for `ShapesIterableDataset` or by index.
        sizes (`Sequence[tuple[int, int]]`, defaults to `((32, 32),)`):
            Heights and widths to choose from, each at least 32. The image processor must leave them as they are:
            `do_resize=False, do_center_crop=False`.
        task (`str`, defaults to `"caption"`): Or `"edit"`.
        seed (`int`, defaults to 0): Not negative.
        image_token (`str`, defaults to `"<image>"`): The processor's, for edits.

    Raises:
        ValueError: a value outside of these, or a negative index.

    Example:

    ```python
    >>> train, test = ShapesDataset(50_000), ShapesDataset(500, seed=1)
    >>> check_caption(test[0]["image"], test[0]["text"]).correct
    True
    ```"""

    def __init__(
        self,
        num_samples: int | None = None,
        sizes: Sequence[tuple[int, int]] = ((32, 32),),
        task: str = "caption",
        seed: int = 0,
        image_token: str = "<image>",
    ) -> None:
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1; got {num_samples}. Pass `None` for no end.")
        if not sizes:
            raise ValueError("`sizes` must hold at least one (height, width); got none.")
        for height, width in sizes:
            _check_size(height, width)
        if task not in ("caption", "edit"):
            raise ValueError(f"`task` must be 'caption' or 'edit'; got {task!r}.")
        if seed < 0:
            raise ValueError(f"`seed` must not be negative; got {seed}.")
        self.num_samples = num_samples
        self.sizes = tuple(sizes)
        self.task = task
        self.seed = seed
        self.image_token = image_token

    def __len__(self) -> int:
        if self.num_samples is None:
            raise TypeError("The set has no end and so no length; pass `num_samples`.")
        return self.num_samples

    def _draw(self, index: int) -> Scene | Edit:
        if index < 0:
            raise ValueError(f"`index` must not be negative; got {index}. Count from the start.")
        if self.num_samples is not None and index >= self.num_samples:
            raise IndexError(f"`index` must be below {self.num_samples}; got {index}.")
        rng = np.random.default_rng([self.seed, index])
        height, width = _pick(rng, self.sizes)
        return (sample_scene if self.task == "caption" else sample_edit)(rng, height, width)

    def scene(self, index: int) -> Scene:
        """What a model that is given the text of sample `index` should draw; of an edit, the target."""
        drawn = self._draw(index)
        return drawn if isinstance(drawn, Scene) else drawn.target

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = self._draw(index)
        if isinstance(drawn, Scene):
            return {"text": drawn.caption, "image": draw_scene(drawn)}
        return {
            "text": f"{self.image_token}{drawn.instruction}{self.image_token}",
            "images": [draw_scene(drawn.source), draw_scene(drawn.target)],
            "image_loss_mask": [False, True],
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self[index] for index in islice(count(), start, self.num_samples, step))


class ShapesIterableDataset(ShapesDataset, IterableDataset):
    """
    `ShapesDataset` that a `DataLoader` reads in order and without end. Its workers take turns, so that none repeats a
    sample of another. The `Trainer` needs `max_steps`, and `accelerator_config={"dispatch_batches": False}`: else
    accelerate cuts `pixel_values` to as many images as there are rows of text.
    """


__all__ = [
    "Box",
    "Edit",
    "Scene",
    "Shape",
    "ShapeGroup",
    "ShapesCheck",
    "ShapesDataset",
    "ShapesIterableDataset",
    "check_caption",
    "check_scene",
    "draw_scene",
    "parse_caption",
    "read_shapes",
    "sample_edit",
    "sample_scene",
]
