"""`transfusion_hf.evaluation.shapes`: real scenes, planted mistakes, and the path from a model to its scores."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, LlamaForCausalLM
from transformers.utils.import_utils import BACKENDS_MAPPING, SCIPY_IMPORT_ERROR

from transfusion_hf import TransfusionForCausalLMAndDiffusion, new_transfusion
from transfusion_hf.data.shapes import COLORS, KINDS, Box, Scene, ShapeGroup, ShapesDataset, draw_scene, sample_scene
from transfusion_hf.evaluation.run import Run
from transfusion_hf.evaluation.shapes import CATEGORIES, ShapesTask, judge, judge_caption, sample_scenes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_shapes

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
ONE_GROUP, TWO_GROUPS = ("single_object", "counting", "colors"), ("two_object", "position", "color_attr")


def with_groups(scene: Scene, *groups: ShapeGroup) -> Scene:
    return replace(scene, groups=groups)


def with_wrong_kind(scene: Scene) -> Scene:
    (kind, *_) = set(KINDS) - {group.kind for group in scene.groups}
    return with_groups(scene, *scene.groups[:-1], replace(scene.groups[-1], kind=kind))


def with_wrong_color(scene: Scene) -> Scene:
    color = next(color for color in COLORS if color not in {group.color for group in scene.groups})
    return with_groups(scene, *scene.groups[:-1], replace(scene.groups[-1], color=color))


def with_swapped_colors(scene: Scene) -> Scene:
    first, second = scene.groups
    return with_groups(scene, replace(first, color=second.color), replace(second, color=first.color))


def with_swapped_kinds(scene: Scene) -> Scene:
    """Each kind stands where the other stood, in the other's color."""
    first, second = scene.groups
    return with_groups(scene, replace(first, kind=second.kind), replace(second, kind=first.kind))


def with_wrong_count(scene: Scene) -> Scene:
    """Other places for one shape more in a group, or two less."""
    groups = (*scene.groups[:-1], replace(scene.groups[-1], count=scene.groups[-1].count % 3 + 1))
    rng = np.random.default_rng(0)
    while True:
        other = sample_scene(rng, scene.height, scene.width, len(groups))
        if other.relation == scene.relation and all(
            a.count == b.count for a, b in zip(groups, other.groups, strict=True)
        ):
            return with_groups(other, *groups)


def moved(scene: Scene, move: Callable[[Box], Box]) -> Scene:
    return replace(scene, boxes=tuple(tuple(map(move, boxes)) for boxes in scene.boxes))


def mirrored(scene: Scene) -> Scene:
    """Left and right, above and below change places; triangles stay upright."""
    return moved(
        scene,
        lambda b: Box(scene.width - b.right, scene.height - b.bottom, scene.width - b.left, scene.height - b.top),
    )


def turned(scene: Scene) -> Scene:
    """What was beside is above or below."""
    return moved(scene, lambda b: Box(b.top, b.left, b.bottom, b.right))


# A mistake, the categories in whose scenes it can be planted, and the one that asks about it.
MISTAKES = [
    (with_wrong_kind, ONE_GROUP, "single_object"),
    (with_wrong_kind, TWO_GROUPS, "two_object"),
    (with_wrong_count, CATEGORIES, "counting"),
    (with_wrong_color, ONE_GROUP, "colors"),
    (with_wrong_color, TWO_GROUPS, "color_attr"),
    (with_swapped_colors, TWO_GROUPS, "color_attr"),
    (mirrored, TWO_GROUPS, "position"),
    (turned, TWO_GROUPS, "position"),
]


def scores(change: Callable[[Scene], Scene], categories, size=(32, 32), num: int = 12) -> dict[str, float]:
    """By category, the share of pictures of changed scenes that are right for the captions of the real ones."""
    found = {}
    for category in categories:
        real = sample_scenes(category, num, size)
        found[category] = np.mean([judge(draw_scene(change(scene)), category, scene.caption)[0] for scene in real])
    return found


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (64, 64)])
def test_real_scenes_are_right_in_all_categories(size):
    assert scores(lambda scene: scene, CATEGORIES, size, num=40) == dict.fromkeys(CATEGORIES, 1.0)


@pytest.mark.parametrize(("plant", "categories", "wrong"), MISTAKES, ids=lambda x: getattr(x, "__name__", None))
def test_a_planted_mistake_is_wrong_in_all_pictures_of_the_one_category_that_asks_about_it(plant, categories, wrong):
    assert scores(plant, categories) == {name: float(name != wrong) for name in categories}


def test_prompts_ask_for_what_their_category_needs():
    for category in CATEGORIES:
        scenes = sample_scenes(category, 60)
        assert scenes[:5] == sample_scenes(category, 5) != sample_scenes(category, 5, seed=2)
        num_groups = 1 if category in ONE_GROUP else 2
        for scene in scenes:
            assert len({group.kind for group in scene.groups}) == len({group.color for group in scene.groups})
            assert len({group.kind for group in scene.groups}) == num_groups
        counts = {group.count for scene in scenes for group in scene.groups}
        assert counts == ({1} if category == "single_object" else {1, 2, 3})
    assert len({str(sample_scenes(category, 5)) for category in CATEGORIES}) == len(CATEGORIES)


def test_a_judge_says_what_it_saw_and_what_it_expected():
    red, blue = ShapeGroup(1, "red", "circle"), ShapeGroup(2, "blue", "square")
    boxes = (Box(2, 10, 12, 20),), (Box(20, 4, 28, 12), Box(20, 16, 28, 24))
    picture = draw_scene(Scene(32, 32, (red, blue), "left of", boxes))
    saw = "saw 2 blue squares, 1 red circle"
    for category, prompt, is_right, expected in [
        ("single_object", "a yellow circle", True, ""),
        ("single_object", "a red triangle", False, ", expected triangles"),
        ("two_object", "a red square above a blue triangle", False, ", expected squares and triangles"),
        ("counting", "two red squares", True, ""),
        ("counting", "three red circles", False, ", expected 3"),
        ("colors", "three red circles", True, ""),
        ("colors", "a red square", False, ", expected red squares"),
        ("position", "a red square right of a blue circle", True, ""),
        ("position", "a red square below a blue circle", False, ", expected squares below circles"),
        ("color_attr", "two red circles above a blue square", True, ""),
        ("color_attr", "a blue circle above a red square", False, ", expected blue circles and red squares"),
        # Right kinds come first: the square is not blue, whatever stands in for the triangle.
        ("color_attr", "a blue triangle left of a red square", False, ", expected blue triangles and red squares"),
    ]:
        assert judge(picture, category, prompt) == (is_right, saw + expected)
    for category in CATEGORIES:
        prompt = sample_scenes(category, 1)[0].caption
        is_right, text = judge(Image.new("RGB", (32, 32), "white"), category, prompt)
        assert not is_right and text.startswith("saw nothing, expected ")
    pixels = np.full((32, 32, 3), 255, dtype=np.uint8)
    pixels[4:20, 4:8] = pixels[16:20, 4:24] = COLORS["red"]  # an L
    blob = Image.fromarray(pixels)
    assert judge(blob, "single_object", "a red square") == (False, "saw 1 red shape of no kind, expected squares")
    assert judge(blob, "colors", "a red square")[0] and judge(blob, "counting", "a red square")[0]


def test_a_caption_is_right_in_either_order_and_if_it_is_complete():
    red, blue = ShapeGroup(1, "red", "circle"), ShapeGroup(2, "blue", "square")
    boxes = (Box(2, 10, 12, 20),), (Box(20, 4, 28, 12), Box(20, 16, 28, 24))
    picture = draw_scene(Scene(32, 32, (red, blue), "left of", boxes))
    for text in ("a red circle left of two blue squares", "two blue squares right of a red circle"):
        assert judge_caption(picture, text)
    for text in (
        "", "a red circle", "two blue squares", "a red circle left of a blue square", "circle",
        "two blue squares left of a red circle", "a blue circle left of two red squares",
        "a red circle left of two blue squares left of a red circle",
    ):  # fmt: skip
        assert not judge_caption(picture, text)
    data = ShapesDataset(40, ((32, 48),), seed=1)
    assert all(judge_caption(data[i]["image"], data[i]["text"]) for i in range(40))


@pytest.fixture(scope="module")
def model_and_processor() -> tuple:
    sizes = {"sample_size": 32, "patch_size": 8, "timestep_embedding_dim": 16}
    model, processor = new_transfusion(AutoTokenizer.from_pretrained(TINY), tiny.text_config(), **sizes)
    return model.eval(), processor


def make_run(model_and_processor: tuple, folder: Path) -> Run:
    return Run(*model_and_processor, folder, batch_size=8, drawing={"num_inference_steps": 1})


def put(folder: Path, pictures: list[Image.Image]) -> None:
    """In place of the drawings, which are judged again."""
    for file, picture in zip(sorted((folder / "shapes" / "images").iterdir()), pictures, strict=True):
        picture.save(file)
    for file in (folder / "shapes").glob("judged*"):
        file.unlink()


def test_pictures_in_place_of_the_drawings_get_the_scores_that_they_deserve(model_and_processor, tmp_path):
    task, folder = ShapesTask(2), tmp_path
    task.run(make_run(model_and_processor, folder))
    scenes = [scene for row in zip(*(sample_scenes(name, 2) for name in CATEGORIES), strict=True) for scene in row]
    lines = [json.loads(line) for line in (folder / "shapes" / "images.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [scene.caption for scene in scenes]
    put(folder, [draw_scene(scene) for scene in scenes])
    result = task.run(make_run(model_and_processor, folder))
    assert [*result.scores] == ["score", *CATEGORIES, "captions"]
    assert {name: score.value for name, score in result.scores.items()} == {
        **dict.fromkeys(["score", *CATEGORIES], 1.0), "captions": 0.0,
    }  # fmt: skip
    assert [score.num_items for score in result.scores.values()] == [12, *[2] * 7]
    assert [verdict.is_right for verdict in result.verdicts] == [*[True] * 6, False] * 2
    assert result.verdicts[0].text == f"single_object: {scenes[0].caption}; saw 1 {scenes[0].caption[2:]}"
    assert Image.open(result.verdicts[6].picture).copy() == ShapesDataset(2, seed=1)[0]["image"]
    assert result.settings == json.loads(json.dumps(result.settings)) and result.settings["drawing_size"] == [32, 32]

    changed = [with_wrong_color(scene) if i % 6 == 3 and i < 6 else scene for i, scene in enumerate(scenes)]
    put(folder, [draw_scene(scene) for scene in changed])
    result = task.run(make_run(model_and_processor, folder))
    assert (result.scores["score"].value, result.scores["colors"].value) == (pytest.approx(11 / 12), 0.5)
    assert sum(result.scores[name].value for name in CATEGORIES) == 5.5
    Image.new("RGB", (32, 32)).save(folder / "shapes" / "images" / "000000.png")
    with pytest.raises(ValueError, match=r"`drawings` is .* but .*judged.jsonl was made with"):
        task.run(make_run(model_and_processor, folder))


def test_a_run_that_was_cut_off_ends_with_the_same_result(model_and_processor, tmp_path):
    task, results = ShapesTask(2), []
    for _ in range(2):
        results.append(task.run(make_run(model_and_processor, tmp_path)))
        for name in ("images", "judged", "captions"):
            file = tmp_path / "shapes" / f"{name}.jsonl"
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(lines[:1]) + lines[1][:9])
        (tmp_path / "shapes" / "images" / "000005.png").unlink()
    assert results[0] == results[1]


def test_what_cannot_be_judged_is_refused_before_anything_is_drawn(model_and_processor, tmp_path):
    model, processor = model_and_processor
    ShapesTask().prepare(model, processor)
    small = TransfusionForCausalLMAndDiffusion.from_pretrained(TINY)
    small_processor = AutoProcessor.from_pretrained(TINY)
    with pytest.raises(ValueError, match=r"at least 32×32 pixels; the size to draw .* is \(8, 8\)"):
        ShapesTask(sizes=[(32, 32)]).prepare(small, small_processor)
    with pytest.raises(ValueError, match=r"the size to draw .* is \(24, 32\)"):
        ShapesTask(1).run(Run(model, processor, tmp_path, drawing={"height": 24}))
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match=r"32×32 pixels; a size of `sizes` is \(16, 64\)"):
        ShapesTask(sizes=[(32, 32), (16, 64)]).prepare(model, processor)
    with pytest.raises(ValueError, match=r"turns a picture of \(32, 48\) pixels in RGB into \(32, 32\) in RGB"):
        ShapesTask(sizes=[(32, 48)]).prepare(model, processor)
    for change in ({"do_normalize": False}, {"do_convert_rgb": True, "image_mean": [0.5], "image_std": [0.5]}):
        other = AutoProcessor.from_pretrained(TINY, do_resize=False, do_center_crop=False, **change)
        with pytest.raises(ValueError, match=r"turns a picture of \(32, 32\) pixels in RGB into"):
            ShapesTask().prepare(model, other)
    with pytest.raises(ValueError, match="`num_samples` is too small or empty: 0"):
        ShapesTask(0).prepare(model, processor)
    with pytest.raises(ValueError, match="The task `shapes` needs images"):
        ShapesTask().prepare(LlamaForCausalLM(tiny.text_config()), processor)


def test_scipy_is_asked_for_before_anything_is_drawn(model_and_processor, monkeypatch):
    monkeypatch.setitem(BACKENDS_MAPPING, "scipy", (lambda: False, SCIPY_IMPORT_ERROR))
    with pytest.raises(ImportError, match="requires the scipy library"):
        ShapesTask().prepare(*model_and_processor)


def test_a_training_on_shapes_makes_a_model_that_can_be_judged(tmp_path):
    arguments = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "true"]
    train_shapes.main([*arguments, "--output_dir", str(tmp_path / "model")])
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "model").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    text = "two magenta triangles right of three cyan circles"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    task = ShapesTask(1)
    task.prepare(model, processor)
    result = task.run(Run(model, processor, tmp_path / "evaluation", drawing={"num_inference_steps": 1}))
    assert len(result.verdicts) == 7
