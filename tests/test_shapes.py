from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from transformers import AutoProcessor, Trainer, TrainingArguments
from transformers.utils.import_utils import BACKENDS_MAPPING, SCIPY_IMPORT_ERROR

from transfusion_hf import TransfusionDataCollator, TransfusionForCausalLMAndDiffusion
from transfusion_hf.data.shapes import (
    COLORS,
    EDITS,
    KINDS,
    RELATIONS,
    Box,
    Edit,
    Scene,
    Shape,
    ShapeGroup,
    ShapesCheck,
    ShapesDataset,
    check_caption,
    check_scene,
    draw_scene,
    parse_caption,
    read_shapes,
    sample_edit,
    sample_scene,
)

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
SIZES = [(32, 32), (32, 48), (72, 64)]
ASPECTS = ("color", "kind", "count", "position")


def scenes(size: tuple[int, int] = (32, 32), num: int = 25) -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng, *size) for _ in range(num)]


def edits(size: tuple[int, int] = (32, 32), num: int = 25) -> list[Edit]:
    rng = np.random.default_rng(0)
    return [sample_edit(rng, *size) for _ in range(num)]


def noisy(image: Image.Image, std: float, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, std, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).round().astype(np.uint8))


def caption_of(groups: list[ShapeGroup], relation: str | None) -> str:
    return f" {relation} ".join(map(str, groups))


def wrong_aspects(check: ShapesCheck) -> list[str]:
    assert check.correct == all(getattr(check, aspect) for aspect in ASPECTS)
    return [aspect for aspect in ASPECTS if not getattr(check, aspect)]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY, do_resize=False, do_center_crop=False)


RED_CIRCLE_AND_BLUE_SQUARES = Scene(
    height=32,
    width=48,
    groups=(ShapeGroup(1, "red", "circle"), ShapeGroup(2, "blue", "square")),
    relation="left of",
    boxes=((Box(2, 10, 12, 20),), (Box(20, 4, 28, 12), Box(24, 15, 36, 27))),
)


def test_a_scene_is_drawn_captioned_and_read_as_written():
    scene = RED_CIRCLE_AND_BLUE_SQUARES
    image = draw_scene(scene)
    assert (image.mode, image.height, image.width) == ("RGB", 32, 48)
    assert scene.caption == "a red circle left of two blue squares"
    assert image.getpixel((7, 15)) == COLORS["red"] and image.getpixel((2, 10)) == (255, 255, 255)
    assert image.getpixel((24, 15)) == image.getpixel((35, 26)) == COLORS["blue"]
    assert image.getpixel((36, 26)) == image.getpixel((35, 27)) == (255, 255, 255)
    assert read_shapes(image) == [
        Shape("blue", "square", Box(20, 4, 28, 12)),
        Shape("red", "circle", Box(2, 10, 12, 20)),
        Shape("blue", "square", Box(24, 15, 36, 27)),
    ]
    for caption in (scene.caption, "two blue squares right of a red circle"):
        assert check_caption(image, caption).correct
    wrong = {
        "a red circle left of three blue squares": ["count"],
        "a red circle right of two blue squares": ["position"],
        "a red circle above two blue squares": ["position"],
        "a red triangle left of two blue squares": ["kind"],
        "a blue circle left of two red squares": ["color"],
        "a red square left of two blue circles": ["kind"],
        "two red circles left of a blue square": ["count"],
        "two blue squares": ["color", "kind", "count", "position"],
        "three red circles": ["color", "kind", "position"],
    }
    assert {caption: wrong_aspects(check_caption(image, caption)) for caption in wrong} == wrong


def test_kinds_fill_of_their_box_what_circle_square_and_triangle_do():
    areas = {}
    for kind in KINDS:
        pixels = np.asarray(draw_scene(Scene(32, 32, (ShapeGroup(1, "red", kind),), None, ((Box(1, 1, 31, 31),),))))
        filled = (pixels != 255).any(axis=-1)
        assert (filled == filled[:, ::-1]).all() and filled[30, 15] and filled[1, 15]
        assert kind != "triangle" or (np.diff(filled[1:31].sum(axis=1)) >= 0).all()  # upright
        areas[kind] = filled.sum() / 30**2
    assert areas == {
        "circle": pytest.approx(np.pi / 4, abs=0.02),
        "square": 1,
        "triangle": pytest.approx(0.5, abs=0.04),
    }


@pytest.mark.parametrize("size", SIZES)
def test_captions_parse_back(size):
    found = scenes(size, 60)
    for scene in found:
        assert parse_caption(scene.caption) == (scene.groups, scene.relation)
    assert {group.kind for scene in found for group in scene.groups} == {*KINDS}
    assert {group.color for scene in found for group in scene.groups} == {*COLORS}
    assert {group.count for scene in found for group in scene.groups} == {1, 2, 3}
    assert {scene.relation for scene in found} == {None, *RELATIONS}


@pytest.mark.parametrize("size", [*SIZES, (32, 200)])
def test_random_scenes_use_all_of_the_canvas_and_keep_their_distance(size):
    boxes = [[box for group in scene.boxes for box in group] for scene in scenes(size, 120)]
    margin, shorter = min(size) // 32, min(size)
    lows, highs = (np.array([f(b) for b in boxes]) for f in (lambda b: np.min(b, 0), lambda b: np.max(b, 0)))
    assert lows[:, 0].min() == lows[:, 1].min() == margin
    assert highs[:, 2].max() == size[1] - margin and highs[:, 3].max() == size[0] - margin
    for group in boxes:
        for box in group:
            assert box.right - box.left == box.bottom - box.top and 0.2 <= (box.right - box.left) / shorter <= 0.5
        for i, one in enumerate(group):
            for other in group[:i]:
                gaps = [max(one[a], other[a]) - min(one[a + 2], other[a + 2]) for a in (0, 1)]
                assert max(gaps) >= 2 * margin
                assert np.hypot(*np.subtract(one.center, other.center)) > shorter / 4  # what `check_scene` relies on


@pytest.mark.parametrize("size", [*SIZES, (32, 200)])
def test_scenes_and_edits_hold_what_a_scene_promises(size):
    made = [*scenes(size, 100), *(scene for edit in edits(size, 100) for scene in (edit.source, edit.target))]
    for scene in made:
        assert len({(group.color, group.kind) for group in scene.groups}) == len(scene.groups) in (1, 2)
        assert [*map(len, scene.boxes)] == [group.count for group in scene.groups]
        boxes = [box for group in scene.boxes for box in group]
        for box in boxes:
            assert 0 <= box.left < box.right <= scene.width and 0 <= box.top < box.bottom <= scene.height
        for one, other in combinations(boxes, 2):
            assert max(max(one[a], other[a]) - min(one[a + 2], other[a + 2]) for a in (0, 1)) >= 1
        if len(scene.boxes) == 2:
            first, second = scene.boxes
            true = {
                "left of": max(box.right for box in first) <= min(box.left for box in second),
                "right of": max(box.right for box in second) <= min(box.left for box in first),
                "above": max(box.bottom for box in first) <= min(box.top for box in second),
                "below": max(box.bottom for box in second) <= min(box.top for box in first),
            }
            assert [relation for relation, holds in true.items() if holds] == [scene.relation]
        else:
            assert scene.relation is None


@pytest.mark.parametrize("size", SIZES)
def test_every_drawn_scene_is_read_to_the_pixel_and_judged_correct(size):
    for scene in scenes(size):
        image = draw_scene(scene)
        assert read_shapes(image) == scene.shapes
        assert check_caption(image, scene.caption).correct and check_scene(image, scene).correct


@pytest.mark.parametrize("size", SIZES)
def test_noise_specks_and_a_mild_blur_do_not_mislead_the_reader(size):
    rng = np.random.default_rng(0)
    for i, scene in enumerate(scenes(size, 20)):
        image = draw_scene(scene)
        for _ in range(3):
            x, y = int(rng.integers(size[1] - 1)), int(rng.integers(size[0] - 1))
            if (np.asarray(image.crop((x - 1, y - 1, x + 3, y + 3)).convert("L")) % 255 == 0).all():  # 0 outside
                image.paste(COLORS["green"], (x, y, x + 2, y + 2))
        image = noisy(image, 12, seed=i)
        assert check_caption(image, scene.caption).correct and check_scene(image, scene).correct
        blurred = noisy(draw_scene(scene).filter(ImageFilter.GaussianBlur(0.5)), 12, seed=i)
        assert check_caption(blurred, scene.caption).correct and check_scene(blurred, scene).correct


@pytest.mark.parametrize("size", SIZES)
def test_a_changed_caption_is_wrong_in_the_aspect_that_changed(size):
    rng = np.random.default_rng(1)
    for scene in scenes(size, 8):
        image = draw_scene(scene)
        which = int(rng.integers(len(scene.groups)))
        group = scene.groups[which]
        looks = [(other.color, other.kind) for other in scene.groups]
        changed = {
            "color": [replace(group, color=c) for c in COLORS if (c, group.kind) not in looks],
            "kind": [replace(group, kind=k) for k in KINDS if (group.color, k) not in looks],
            "count": [replace(group, count=n) for n in (1, 2, 3) if n != group.count],
        }
        for aspect, options in changed.items():
            for option in options:
                groups = [option if i == which else other for i, other in enumerate(scene.groups)]
                assert wrong_aspects(check_caption(image, caption_of(groups, scene.relation))) == [aspect]
        for relation in set(RELATIONS) - {scene.relation} if scene.relation else ():
            assert wrong_aspects(check_caption(image, caption_of(scene.groups, relation))) == ["position"]


def test_a_scene_elsewhere_has_the_wrong_position_only():
    scene = RED_CIRCLE_AND_BLUE_SQUARES
    image = draw_scene(scene)
    for shift, wrong in ((3, []), (5, ["position"])):
        moved = replace(scene, boxes=((Box(2, 10 + shift, 12, 20 + shift),), scene.boxes[1]))
        assert wrong_aspects(check_scene(draw_scene(moved), scene)) == wrong
        assert check_caption(draw_scene(moved), scene.caption).correct
    assert wrong_aspects(check_scene(image, scene)) == []


@pytest.mark.parametrize("size", SIZES)
def test_pictures_of_nothing_are_not_correct(size):
    for color in ("white", "black", "gray"):
        for mode in ("RGB", "L", "RGBA"):
            image = Image.new(mode, size[::-1], color)
            assert read_shapes(image) == []
            for scene in scenes(size, 2):
                assert wrong_aspects(check_caption(image, scene.caption)) == [*ASPECTS]
                assert not check_scene(image, scene).correct


@pytest.mark.parametrize("size", SIZES)
def test_noise_alone_is_not_correct(size):
    rng = np.random.default_rng(0)
    for scene in scenes(size, 10):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        assert not any(shape.kind for shape in read_shapes(image))
        assert not check_caption(image, scene.caption).correct and not check_scene(image, scene).correct


def test_a_shape_of_no_kind_is_read_as_none():
    pixels = np.full((32, 32, 3), 255, dtype=np.uint8)
    pixels[4:20, 4:8] = pixels[16:20, 4:24] = COLORS["red"]  # an L
    (shape,) = read_shapes(Image.fromarray(pixels))
    assert shape == Shape("red", None, Box(4, 4, 24, 20))
    assert wrong_aspects(check_caption(Image.fromarray(pixels), "a red square")) == ["kind"]


def test_shapes_that_touch_are_beside_each_other():
    pixels = np.full((32, 32, 3), 255, dtype=np.uint8)
    pixels[10:20, 6:16], pixels[10:20, 16:26] = COLORS["red"], COLORS["blue"]
    image = Image.fromarray(pixels)
    assert check_caption(image, "a red square left of a blue square").correct
    assert not check_caption(image, "a red square right of a blue square").position


def test_groups_that_merge_or_split_are_not_correct():
    square = [Box(x, 4, x + 8, 12) for x in (2, 14, 26)]
    three = draw_scene(Scene(32, 40, (ShapeGroup(3, "red", "square"),), None, (tuple(square),)))
    assert wrong_aspects(check_caption(three, "a red square left of two blue squares")) == ["color", "position"]
    groups = ShapeGroup(1, "red", "square"), ShapeGroup(2, "blue", "square")
    split = draw_scene(Scene(32, 40, groups, "left of", (tuple(square[:1]), tuple(square[1:]))))
    assert wrong_aspects(check_caption(split, "three red squares")) == ["color", "position"]


@pytest.mark.parametrize("size", SIZES)
def test_edits_have_exact_targets_and_leave_the_rest_as_it_is(size):
    for edit in edits(size, 20):
        source, target = draw_scene(edit.source), draw_scene(edit.target)
        assert check_scene(target, edit.target).correct and check_caption(target, edit.target.caption).correct
        assert not check_scene(source, edit.target).correct and not check_scene(target, edit.source).correct
        before, after = np.asarray(source), np.asarray(target)
        touched = np.zeros(size, dtype=bool)
        for shape in set(edit.source.shapes) ^ set(edit.target.shapes):
            touched[shape.box.top : shape.box.bottom, shape.box.left : shape.box.right] = True
        assert (before == after)[~touched].all() and not (before == after).all()
        kept = set(edit.source.shapes) & set(edit.target.shapes)
        assert len(kept) == (
            0 if len(edit.source.groups) == 1 else len(edit.source.shapes) - changed_group(edit).count
        )


def changed_group(edit: Edit) -> ShapeGroup:
    """The one group that the instruction names first; fails where it names none or several."""
    name = edit.instruction.split(" ", 1)[1]
    named = []
    for group in edit.source.groups:
        for reference in (f"the {group.noun}", f"the {group.color} {group.noun}"):
            if name == reference or name.startswith(f"{reference} "):
                named.append(group)
    (group,) = named
    return group


def test_an_instruction_names_one_group_and_says_what_becomes_of_it():
    found = Counter()
    for edit in edits(num=200):
        group, source, target = changed_group(edit), edit.source, edit.target
        verb = edit.instruction.split()[0]
        found[verb] += 1
        rest = [other for other in source.groups if other != group]
        named = f"the {group.noun}" if all(o.kind != group.kind for o in rest) else f"the {group.color} {group.noun}"
        if verb == "remove":
            assert edit.instruction == f"remove {named}" and target.groups == (rest[0],)
        else:
            (new,) = [g for g in target.groups if g not in rest]
            assert edit.instruction == f"make {named} {new.color}" and new == replace(group, color=new.color)
            assert target.relation == source.relation and new.color != group.color
    assert len(found) == len(EDITS) and min(found.values()) > 70


@pytest.mark.parametrize("task", ["caption", "edit"])
def test_a_sample_depends_on_seed_and_index_alone(task):
    sizes = [(32, 32), (32, 48)]
    one = ShapesDataset(20, sizes, task, seed=3)
    other = ShapesDataset(10**9, sizes, task, seed=3)
    assert [other[i] for i in reversed(range(20))] == [one[i] for i in reversed(range(20))] == [*one][::-1]
    assert len(one) == len([*one]) == 20
    heights = {(image.height, image.width) for sample in one for image in sample.get("images", [sample.get("image")])}
    assert heights == set(sizes)
    seeds = [str(ShapesDataset(20, sizes, task, seed=seed).scene(i)) for seed in range(5) for i in range(20)]
    assert len(set(seeds)) == 100


def test_the_scene_of_a_sample_is_what_its_last_picture_shows():
    captions, edited = ShapesDataset(20, seed=1), ShapesDataset(20, task="edit", seed=1, image_token="<img>")
    for i in range(20):
        assert captions[i] == {"text": captions.scene(i).caption, "image": draw_scene(captions.scene(i))}
        assert captions[i]["image"].size == (32, 32)
        sample = edited[i]
        assert sample["images"][1] == draw_scene(edited.scene(i)) != sample["images"][0]
        assert sample["image_loss_mask"] == [False, True]
        assert sample["text"].startswith("<img>") and sample["text"].endswith("<img>")


def test_samples_of_several_sizes_go_through_the_collator(processor):
    sizes = [(32, 32), (32, 48)]
    for task in ("caption", "edit"):
        samples = [ShapesDataset(8, sizes, task)[i] for i in range(8)]
        batch = TransfusionDataCollator(processor)(samples)
        images = [image for sample in samples for image in sample.get("images", [sample.get("image")])]
        assert [tuple(pixels.shape) for pixels in batch["pixel_values"]] == [(3, i.height, i.width) for i in images]
        assert batch["image_loss_mask"].tolist() == ([True] * 8 if task == "caption" else [False, True] * 8)
        restored = processor.image_processor.postprocess(batch["pixel_values"])
        assert restored == images  # no pixel is lost on the way to the model


def test_the_trainer_trains_on_the_set(processor, tmp_path):
    args = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, report_to="none", use_cpu=True, max_steps=1,
        per_device_train_batch_size=2, save_strategy="no",
    )  # fmt: skip
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(TINY)
    collator = TransfusionDataCollator(processor)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=ShapesDataset(100_000, task="edit"))
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red circle",
        "a red circles",
        "two red circle",
        "four red circles",
        "a black circle",
        "A red circle",
        "a red circle ",
        "a red circle beside a blue square",
        "a red circle left of a red circle",
        "a red circle left of two red circles",
        "a red circle left of",
        "a red circle left of a blue square above a cyan square",
    ],
)
def test_a_text_that_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match="`text` must be a caption like 'a red circle left of two blue squares'; got"):
        parse_caption(text)


def test_bad_input_is_named():
    for make, error in {
        lambda: sample_scene(np.random.default_rng(0), 31, 64): r"at least 32 pixels; got \(31, 64\). Enlarge it",
        lambda: ShapesDataset(1, [(64, 16)])[0]: r"at least 32 pixels; got \(64, 16\)",
        lambda: check_scene(
            Image.new("RGB", (32, 48)), RED_CIRCLE_AND_BLUE_SQUARES
        ): r"\(48, 32\); got \(32, 48\). Resi",
        lambda: ShapesDataset(0): "`num_samples` is too small or empty: 0",
        lambda: ShapesDataset(1, sizes=()): r"`sizes` is too small or empty: \(\)",
        lambda: ShapesDataset(1, seed=-1): "`seed` is too small or empty: -1",
        lambda: ShapesDataset(1, task="video"): "`task` must be 'caption' or 'edit'; got 'video'",
    }.items():
        with pytest.raises(ValueError, match=error):
            make()
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"`index` must be from 0 to 2; got {index}"):
            ShapesDataset(3)[index]


def test_the_reader_says_how_to_get_scipy(monkeypatch):
    monkeypatch.setitem(BACKENDS_MAPPING, "scipy", (lambda: False, SCIPY_IMPORT_ERROR))
    with pytest.raises(ImportError, match=r"(?s)read_shapes requires the scipy library.*`pip install scipy`"):
        read_shapes(Image.new("RGB", (32, 32)))
