"""GenEval: the published decisions, the judges, and the way from pictures to a score."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make_tiny_transfusion import byte_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from transfusion_hf import TransfusionForCausalLMAndDiffusion, TransfusionProcessor
from transfusion_hf.evaluation import geneval
from transfusion_hf.evaluation.geneval import (
    CLASS_OF_LABEL,
    CLASSES,
    COLORS,
    TAGS,
    ClipColors,
    Detection,
    GenEvalTask,
    Mask2FormerDetector,
    crop,
    decide,
    keep,
    read_metadata,
    relations,
)
from transfusion_hf.evaluation.judges import load_clip
from transfusion_hf.evaluation.run import Run

FIXTURES = Path(__file__).parent / "fixtures"
# COCO's 80 names in the order of its label ids.
COCO = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,
handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,
surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,
broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,
mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,
teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")
ROWS = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}], "prompt": "both"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}],
     "prompt": "two dogs"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"},
    {"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1,
     "position": ["left of", 0]}], "prompt": "a dog left of a cat"},
    {"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "red"},
     {"class": "cat", "count": 1, "color": "blue"}], "prompt": "a red dog and a blue cat"},
]  # fmt: skip


@pytest.fixture(scope="module")
def cases():
    with gzip.open(FIXTURES / "geneval_cases.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def model():
    return TransfusionForCausalLMAndDiffusion.from_pretrained(FIXTURES / "tiny-transfusion").eval()


@pytest.fixture(scope="module")
def processor():
    return TransfusionProcessor.from_pretrained(FIXTURES / "tiny-transfusion")


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    torch.manual_seed(0)
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=10, init_std=0.5,
        id2label=dict(enumerate(COCO)), label2id={name: i for i, name in enumerate(COCO)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("detector")
    detector = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():  # far from uniform, so that some detections score more than the threshold
        detector.class_predictor.weight.mul_(8)
    detector.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 259}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip")
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    with torch.no_grad():  # so that pictures differ in their colours
        for name, weight in clip.named_parameters():
            if weight.ndim > 1 and "position" not in name:
                weight.normal_(std=0.5)
    clip.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    ends = TemplateProcessing(single="<s> $A <end>", special_tokens=[("<s>", 1), ("<end>", 259)])
    tokenizer.backend_tokenizer.post_processor = ends
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def dogs(*scores: float) -> list[Detection]:
    return [Detection("dog", (i * 50.0, 0.0, i * 50.0 + 20, 20.0), score) for i, score in enumerate(scores)]


def reds(found: list[Detection]) -> list[str]:
    return ["red"] * len(found)


def test_the_thousand_scripted_cases_are_decided_as_published(cases):
    assert len(cases) == 1000
    for case in cases:
        metadata = case["metadata"]
        read_metadata([metadata])
        colors = {Detection(d["label"], tuple(d["box"]), d["score"]): d["color"] for d in case["detections"]}
        kept = keep([*colors], 0.9 if metadata["tag"] == "counting" else 0.3)
        reasons = decide(metadata, kept, lambda found, colors=colors: [colors[d] for d in found])
        assert (not reasons) == case["correct"], (metadata, reasons)


def test_labels_of_coco_and_of_the_hub_map_to_all_classes_of_the_metadata(cases):
    assert [CLASS_OF_LABEL[name] for name in COCO] == list(CLASSES)
    seen = {clause["class"] for case in cases for clause in case["metadata"]["include"]}
    seen |= {d["label"] for case in cases for d in case["detections"]}
    assert seen == {*CLASSES} and len(CLASSES) == 80
    assert {CLASS_OF_LABEL[name] for name in ("mouse", "remote", "keyboard")} == {
        "computer mouse", "tv remote", "computer keyboard",
    }  # fmt: skip
    others = "motorbike aeroplane sofa pottedplant diningtable tvmonitor".split()
    assert [CLASS_OF_LABEL[name] for name in others] == [
        "motorcycle", "airplane", "couch", "potted plant", "dining table", "tv",
    ]  # fmt: skip


def test_detections_count_strictly_above_the_threshold_and_best_first():
    found = dogs(0.3, 0.31, 0.9)
    assert keep(found, 0.3) == [found[2], found[1]]


def test_at_most_sixteen_detections_of_a_class_count():
    found = [*dogs(*(0.5 + i / 100 for i in range(20))), Detection("cat", (0, 0, 9, 9), 0.4)]
    kept = keep(found, 0.3)
    assert [d.label for d in kept] == ["cat"] + ["dog"] * 16
    assert min(d.score for d in kept if d.label == "dog") == pytest.approx(0.54)


def test_overlaps_are_kept_unless_asked_and_count_both_corners_pixels():
    # 10 × 10 and 10 × 10 pixels, shifted by 5: 5 · 10 shared of 150.
    a, b = Detection("dog", (0, 0, 9, 9), 0.9), Detection("dog", (5, 0, 14, 9), 0.8)
    same, cat = Detection("dog", (0, 0, 9, 9), 0.7), Detection("cat", (0, 0, 9, 9), 0.6)
    assert keep([a, b, same], 0.3) == [a, b, same]
    assert keep([a, b, same], 0.3, max_overlap=0.34) == [a, b]
    assert keep([a, b], 0.3, max_overlap=50 / 150) == [a]  # without the + 1 it would be 36 / 126
    assert keep([a, b], 0.3, max_overlap=0.33) == [a]
    assert keep([cat, a], 0.3, max_overlap=0.1) == [cat, a]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (100, 0, 110, 10), {"left of"}),
        ((100, 0, 110, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 100, 10, 110), {"above"}),
        ((0, 100, 10, 110), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (100, 100, 110, 110), {"left of", "above"}),
        ((0, 0, 100, 100), (20, 20, 120, 120), set()),  # the offset is 0.1 times the sizes
        ((0, 0, 100, 100), (30, 0, 130, 100), set()),  # 10 of 30 remain, and not of 10
        ((0, 0, 100, 100), (41, 0, 141, 100), {"left of"}),  # 21 of 41
        ((0, 0, 100, 100), (40, 0, 140, 100), set()),  # exactly half
        ((5, 5, 9, 9), (5, 5, 9, 9), set()),
        ((5, 5, 5, 5), (5.0009, 5, 5.0009, 5), set()),  # less than a thousandth of a pixel
        ((5, 5, 5, 5), (5.002, 5, 5.002, 5), {"left of"}),
    ],
)
def test_relations_leave_a_tenth_of_the_sizes_and_need_more_than_half_of_the_offset(a, b, expected):
    assert relations(a, b) == expected


def test_reasons_say_what_was_expected_and_what_was_found():
    cat = Detection("cat", (0, 100, 20, 120), 0.8)
    one = {"class": "dog", "count": 1}

    def reasons(found, include, exclude=(), colors_of=reds):
        return decide({"include": include, "exclude": list(exclude)}, keep(found, 0.3), colors_of)

    assert reasons(dogs(0.9), [one]) == []
    assert reasons(dogs(0.9), [{"class": "dog", "count": 2}]) == ["expected 2 × dog, found 1"]
    assert reasons([], [{"class": "bench", "count": 2}, {"class": "knife", "count": 3}]) == [
        "expected 2 × bench, found 0", "expected 3 × knife, found 0",
    ]  # fmt: skip
    assert reasons(dogs(0.9, 0.8), [one], [{"class": "dog", "count": 2}]) == [
        "expected fewer than 2 × dog, found 2",
    ]  # fmt: skip
    assert reasons(dogs(0.9, 0.8), [one], [{"class": "dog", "count": 3}]) == []
    two_blue = {"class": "dog", "count": 2, "color": "blue"}
    assert reasons(dogs(0.9, 0.8), [two_blue], colors_of=lambda found: ["blue", "red"]) == [
        "expected 2 × blue dog, found blue and red",
    ]  # fmt: skip
    left = {**one, "position": ["left of", 0]}
    target = {"class": "cat", "count": 1}
    assert reasons([*dogs(0.9), cat], [target, left]) == ["expected the dog left of the cat, found it above"]
    assert reasons(dogs(0.9), [target, left])[1] == "expected the dog left of the cat, whose own clause fails"
    assert reasons([*dogs(0.9), cat], [target, {**one, "position": ["above", 0]}]) == []


@pytest.mark.parametrize(("dogs_at", "cats_at"), [((0, 90), (50, 60)), ((0, 10), (50, 5))])
def test_a_position_must_hold_for_every_pair(dogs_at, cats_at):
    boxes = [("dog", x) for x in dogs_at] + [("cat", x) for x in cats_at]
    found = [Detection(label, (x, 0, x + 4, 4), 0.9 - i / 100) for i, (label, x) in enumerate(boxes)]

    def is_correct(num_cats: int, num_dogs: int) -> bool:
        dogs = {"class": "dog", "count": num_dogs, "position": ["left of", 0]}
        return not decide({"include": [{"class": "cat", "count": num_cats}, dogs]}, keep(found, 0.3), reds)

    assert is_correct(1, 1) and not is_correct(2, 2)


def test_only_the_best_detections_are_asked_for_their_color():
    asked = []

    def colors_of(found):
        asked.append(found)
        return reds(found)

    found = dogs(0.7, 0.9, 0.8)
    metadata = {"include": [{"class": "dog", "count": 2, "color": "red"}]}
    assert decide(metadata, keep(found, 0.3), colors_of) == [] and asked == [[found[1], found[2]]]


def test_crops_are_grey_outside_of_the_mask():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    mask = np.zeros((12, 16), dtype=bool)
    mask[3:7, 4:9] = True
    mask[4, 5] = False
    got = np.asarray(crop(Image.fromarray(pixels), Detection("dog", (4, 2, 10, 7), 1.0, mask)))
    assert got.shape == (5, 6, 3)
    for y in range(5):
        for x in range(6):
            expected = pixels[y + 2, x + 4] if mask[y + 2, x + 4] else [0x99] * 3
            assert got[y, x].tolist() == list(expected), (x, y)
    plain = np.asarray(crop(Image.fromarray(pixels), Detection("dog", (4, 2, 10, 7), 1.0)))
    assert (plain == pixels[2:7, 4:10]).all()


def test_the_detector_scores_pairs_of_query_and_class_as_mmdets_head(detector_folder):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    detector = Mask2FormerDetector(detector_folder, shortest_edge=64)

    def empty_some_masks(module, args, output):
        output.masks_queries_logits[:, ::3] -= 1e4
        return output

    detector.model.register_forward_hook(empty_some_masks)
    got = detector(picture)
    inputs = detector.processor(images=picture, size=detector.size, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 96)  # 64 × 80, the next multiple of 32
    with torch.no_grad():
        output = detector.model(**inputs)
    logits = F.interpolate(output.masks_queries_logits, (64, 96), mode="bilinear")
    logits = F.interpolate(logits, (40, 50), mode="bilinear")[0].numpy()
    expected = []
    for query, row in enumerate(output.class_queries_logits[0].softmax(-1).numpy()):
        mask = logits[query] > 0
        for label, probability in zip(COCO, row[:-1], strict=True):
            expected.append((probability, CLASS_OF_LABEL[label], mask, logits[query]))
    expected = sorted(expected, key=lambda pair: -pair[0])[:100]
    assert not all(pair[2].any() for pair in expected)
    expected = [pair for pair in expected if pair[2].any()]
    assert len(got) == len(expected) > 10
    for detection, (probability, label, mask, values) in zip(got, expected, strict=True):
        ys, xs = np.nonzero(mask)
        assert detection.label == label and (detection.mask == mask).all()
        assert detection.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert detection.score == pytest.approx(probability * (1 / (1 + np.exp(-values[mask]))).mean(), rel=1e-4)


def test_colors_are_clips_zero_shot_over_three_templates(clip_folder):
    rng = np.random.default_rng(0)
    shapes = [(20, 30, 3), (40, 24, 3), (64, 64, 3)] * 8
    crops = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    clip, expected = ClipColors(clip_folder), []
    features = []
    for color in COLORS:
        texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        each = []
        for text in texts:
            inputs = clip.processor(text=[text], return_tensors="pt")
            with torch.no_grad():
                own = clip.model.get_text_features(**inputs).pooler_output[0].double()
            each.append(own / own.norm())
        mean = sum(each) / 3
        features.append(mean / mean.norm())
    for picture in crops:
        with torch.no_grad():
            own = clip.model.get_image_features(**clip.processor(images=picture, return_tensors="pt")).pooler_output
        expected.append(COLORS[int(torch.stack([feature @ own[0].double() for feature in features]).argmax())])
    torch.testing.assert_close(clip._features_of("dog"), torch.stack(features).float(), rtol=1e-4, atol=1e-5)
    assert clip(crops, "dog") == expected and len({*expected}) > 1


class FakeDetector:
    """Finds a dog at the left edge, doubtfully another one, and a cat at the right where the first pixel is bright."""

    def __call__(self, picture: Image.Image) -> list[Detection]:
        width, height = picture.size
        mask = np.zeros((height, width), dtype=bool)
        mask[:, : width // 4] = True
        found = [Detection("dog", (0, 0, width // 4, height), score, mask) for score in (0.8, 0.95)]
        if picture.getpixel((0, 0))[0] > 127:
            found.append(Detection("cat", (width - 2, 0, width, height), 0.5))
        return found


class FakeClip:
    def __call__(self, crops, label: str) -> list[str]:
        return ["red" if np.asarray(crop)[..., 0].mean() > 127 else "blue" for crop in crops]


def expected_of(file: Path, row: dict) -> bool:
    pixels = np.asarray(Image.open(file).convert("RGB"))
    has_cat, is_red = pixels[0, 0, 0] > 127, pixels[:, : pixels.shape[1] // 4, 0].mean() > 127
    is_cat_blue = pixels[:, -2:, 0].mean() <= 127
    return {
        "single_object": True, "two_object": has_cat, "counting": False, "colors": is_red, "position": has_cat,
        "color_attr": has_cat and is_red and is_cat_blue,
    }[row["tag"]]  # fmt: skip


def fake_task(**kwargs) -> GenEvalTask:
    rows = [{**row, "prompt": f"{row['prompt']} {i}"} for row in ROWS for i in range(3)]
    return GenEvalTask(**{"data": rows, "detector": FakeDetector(), "clip": FakeClip(), **kwargs})


def start(task, model, processor, folder, **kwargs):
    task.prepare(model, processor)
    return task.run(Run(model, processor, folder, drawing={"num_inference_steps": 2}, **kwargs))


def test_pictures_become_scores_of_the_six_tasks_and_their_mean(model, processor, tmp_path):
    result = start(fake_task(), model, processor, tmp_path)
    lines = [json.loads(line) for line in Path(tmp_path, "geneval", "judged.jsonl").read_text().splitlines()]
    files = sorted(Path(tmp_path, "geneval", "images").glob("*.png"))
    assert len(lines) == len(files) == len(result.verdicts) == 6 * 3 * 4
    rows = [row for row in ROWS for _ in range(12)]
    expected = [expected_of(file, row) for file, row in zip(files, rows, strict=True)]
    assert [line["correct"] for line in lines] == expected
    assert 0 < sum(expected[12:24]) < 12 and 0 < sum(expected[36:48]) < 12  # the pictures differ
    shares = {row["tag"]: np.mean(expected[12 * i : 12 * i + 12]) for i, row in enumerate(ROWS)}
    assert list(result.scores) == ["score", *TAGS]
    assert {tag: result.scores[tag].value for tag in TAGS} == pytest.approx(shares)
    assert result.scores["score"].value == pytest.approx(np.mean([*shares.values()]))
    assert result.scores["two_object"].num_items == 3 and result.scores["score"].num_items == 18
    assert result.settings["detector"] == "FakeDetector"
    assert [verdict.is_right for verdict in result.verdicts] == expected
    assert result.verdicts[24].text == "two dogs 0: expected 2 × dog, found 1"
    assert lines[0]["detections"][-2] == {"label": "dog", "score": 0.95, "box": [0, 0, 2, 8]}
    best, second = [d for d in lines[36]["detections"] if d["label"] == "dog"]
    assert best["color"] in ("red", "blue") and "color" not in second


def test_a_killed_judgement_goes_on_and_other_pictures_are_refused(model, processor, tmp_path):
    first = start(fake_task(num_samples=6), model, processor, tmp_path, batch_size=4)
    judged = Path(tmp_path, "geneval", "judged.jsonl")
    whole = judged.read_text()
    judged.write_text("".join(whole.splitlines(keepends=True)[:7]) + '{"index": 7, "corr')
    second = start(fake_task(num_samples=6), model, processor, tmp_path, batch_size=4)
    assert judged.read_text() == whole
    assert second.scores == first.scores and second.settings == first.settings
    with pytest.raises(ValueError, match=r"`max_overlap` is 0\.5"):
        start(fake_task(num_samples=6, max_overlap=0.5), model, processor, tmp_path, batch_size=4)
    Image.new("RGB", (8, 8)).save(Path(tmp_path, "geneval", "images", "000000.png"))
    with pytest.raises(ValueError, match="`pictures`"):
        start(fake_task(num_samples=6), model, processor, tmp_path, batch_size=4)


def test_the_intervals_resample_prompts_within_their_tasks():
    # All four pictures of a prompt agree: 2 prompts of 4 are right, not 8 pictures of 16.
    columns = [[0.0, 0.0, 1.0, 1.0]] + [[1.0, 1.0]] * 5
    score = geneval.Score.of(geneval.mean_of_means, *columns, paired=False)
    assert score.value == pytest.approx(5.5 / 6) and score.num_items == 14
    # A task alone spans 0 to 1; as one of six, a sixth of that; the others cannot change places with it.
    assert score.interval == pytest.approx((5 / 6, 1.0))
    assert geneval.Score.of(geneval.mean_of_means, [1.0], [0.0, 1.0], paired=False).interval is None


def test_num_samples_takes_the_first_prompts_of_each_task_alike(model, processor):
    task = fake_task(num_samples=8)
    task.prepare(model, processor)
    prompts = [row["prompt"] for row in task._rows]
    assert prompts[:3] == ["a photo of a dog 0", "a photo of a dog 1", "both 0"] and len(prompts) == 8
    assert {row["tag"] for row in task._rows} == {*TAGS}
    task = fake_task(num_samples=0)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1; got 0"):
        task.prepare(model, processor)


def test_without_all_six_tasks_the_mean_is_not_called_the_score(model, processor, tmp_path):
    result = start(fake_task(data=ROWS[2:4]), model, processor, tmp_path)
    assert list(result.scores) == ["mean of counting, colors", "counting", "colors"]


@pytest.mark.parametrize(("max_overlap", "num_dogs"), [(1.0, 2), (0.5, 1)])
def test_the_task_can_suppress_overlaps(max_overlap, num_dogs, model, processor, tmp_path):
    start(fake_task(data=ROWS[:1], max_overlap=max_overlap), model, processor, tmp_path)
    lines = [json.loads(line) for line in Path(tmp_path, "geneval", "judged.jsonl").read_text().splitlines()]
    assert {sum(d["label"] == "dog" for d in line["detections"]) for line in lines} == {num_dogs}


def test_random_judges_of_transformers_run_once(model, processor, detector_folder, clip_folder, tmp_path):
    data = tmp_path / "evaluation_metadata.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    weights = {"detector": detector_folder, "clip": clip_folder}
    task = GenEvalTask(data=str(data), num_images_per_prompt=2, detector_size=64, **weights)
    result = start(task, model, processor, tmp_path)
    lines = [json.loads(line) for line in Path(tmp_path, "geneval", "judged.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and list(result.scores) == ["score", *TAGS]
    assert result.settings["detector"] == detector_folder and len(result.settings["detector_weights"]) == 16
    assert result.settings["detector_size"] == {"shortest_edge": 64, "longest_edge": 106}
    colors = {d["color"] for line in lines for d in line["detections"] if "color" in d}
    assert colors and colors <= {*COLORS}  # these random weights see a dog, so that CLIP was asked


def test_what_is_absent_is_named_before_anything_is_drawn(model, processor, detector_folder, clip_folder, tmp_path):
    def prepare(**kwargs):
        GenEvalTask(**{"data": ROWS, "detector": detector_folder, "clip": FakeClip(), **kwargs}).prepare(
            model, processor
        )

    with pytest.raises(FileNotFoundError, match=r"evaluation_metadata\.jsonl.*--data geneval=PATH"):
        prepare(data=None)
    with pytest.raises(FileNotFoundError, match=r"no GenEval metadata at '/nowhere\.jsonl'"):
        prepare(data="/nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"hf download facebook/mask2former.*--weights detector=PATH"):
        prepare(detector=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"hf download openai/clip-vit-large-patch14.*--weights clip=PATH"):
        prepare(clip=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"`clip` .* holds a model of type 'mask2former'; pass a CLIPModel"):
        prepare(clip=detector_folder)
    other = shutil.copytree(detector_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["id2label"]["16"] = "wolf"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other classes than COCO's 80: they differ in dog, wolf"):
        prepare(detector=str(other))
    with pytest.raises(ValueError, match=r"`data` .* is empty"):
        prepare(data=[])
    for name in ("num_samples", "num_images_per_prompt", "detector_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1; got 0"):
            prepare(**{name: 0})


def test_half_a_judge_is_refused_and_not_filled_with_random_numbers(
    model, processor, detector_folder, clip_folder, tmp_path
):
    def cut(source, name, *gone):
        folder = shutil.copytree(source, tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        kept = {key: x for key, x in weights.items() if not key.startswith(gone)}
        assert len(kept) < len(weights)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        return folder

    with pytest.raises(
        ValueError, match=r"`detector` .* lacks 2 of the model's weights, such as class_predictor\.bias"
    ):
        GenEvalTask(ROWS, cut(detector_folder, "detector", "class_predictor"), FakeClip()).prepare(model, processor)
    with pytest.raises(ValueError, match=r"`clip` .* lacks \d+ of the model's weights, such as text_model"):
        load_clip(cut(clip_folder, "clip", "text_model"))
    broken = shutil.copytree(clip_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match=r"`clip`: CLIPModel .* cannot be loaded from"):
        load_clip(broken)
    unread = shutil.copytree(clip_folder, tmp_path / "unread")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (unread / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_clip(unread)


def test_a_gray_picture_is_judged_in_colors(model, processor, tmp_path):
    seen = []
    task = GenEvalTask(ROWS[:1], lambda picture: seen.append(picture.mode) or [], FakeClip())
    task.prepare(model, processor)
    Image.new("L", (16, 16)).save(file := tmp_path / "gray.png")
    task._judge([0], [(file, ROWS[0])])
    assert seen == ["RGB"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"tag": ', "Line 2 of .*is not JSON"),
        ("[1]", r"Line 2 of .*a JSON object; got \[1\]"),
        (json.dumps({**ROWS[0], "tag": "colour"}), "Line 2 of .*`tag` must be .*'colour'"),
        (json.dumps({**ROWS[0], "prompt": ""}), "Line 2 of .*`prompt`.*got ''"),
        (json.dumps({**ROWS[0], "include": []}), r"Line 2 of .*`include`.*got \[\]"),
        (json.dumps({**ROWS[0], "include": [{"class": "wolf", "count": 1}]}), "Line 2 of .*`class`.*'wolf'"),
        (json.dumps({**ROWS[0], "include": [{"class": "dog", "count": 0}]}), "Line 2 of .*`count`.*got 0"),
        (json.dumps({**ROWS[0], "include": [{"class": "dog"}]}), "Line 2 of .*`count`.*got None"),
        (json.dumps({**ROWS[0], "include": [{"class": "dog", "count": 1, "colour": "red"}]}), "Line 2 of .*colour"),
        (json.dumps({**ROWS[3], "include": [{"class": "dog", "count": 1, "color": "grey"}]}), "`color`.*'grey'"),
        (json.dumps({**ROWS[0], "exclude": [{"class": "dog", "count": 1, "color": "red"}]}), "`exclude`"),
        (json.dumps({**ROWS[0], "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}), "earlier"),
        (
            json.dumps(
                {
                    **ROWS[4],
                    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["on", 0]}],
                }
            ),
            r"`position`.*\['on', 0\]",
        ),
        (
            json.dumps(
                {
                    **ROWS[4],
                    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": "above"}],
                }
            ),
            "`position`.*'above'",
        ),
    ],
)
def test_a_malformed_line_of_the_metadata_is_named(line, message, tmp_path):
    data = tmp_path / "metadata.jsonl"
    data.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_metadata(data)


@pytest.mark.parametrize("position", [["above"], 3, ["above", "0"], ["above", -1], ["above", 1]])
def test_a_position_is_a_relation_and_an_earlier_clause(position):
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": position}]
    with pytest.raises(ValueError, match="Row 0: `position` must be"):
        read_metadata([{**ROWS[4], "include": include}])


def test_good_metadata_is_read_as_it_is(tmp_path):
    data = tmp_path / "metadata.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_metadata(data) == read_metadata(ROWS) == ROWS
    data.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_metadata(data)
