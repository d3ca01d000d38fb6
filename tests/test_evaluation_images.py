"""CIDEr, FID and CLIP score against their libraries called by hand."""

import json
import random
import shutil
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as HFImage
from PIL import Image
from scipy.linalg import sqrtm
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from transfusion_hf.evaluation import fid
from transfusion_hf.evaluation.captioned import KARPATHY, read_captioned
from transfusion_hf.evaluation.cider import CaptionTask, cider, tokenize
from transfusion_hf.evaluation.clip_score import CLIPScoreTask
from transfusion_hf.evaluation.fid import (
    FIDTask,
    frechet_distance,
    jackknife_interval,
    moments,
    read_statistics,
)
from transfusion_hf.evaluation.run import Run

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="PTBTokenizer needs Java")
# Their COCO names, splits and captions; the first is no part of val2014.
ROWS = [
    ("COCO_train2014_000000000001.jpg", "train", ["A dog."]),
    ("COCO_val2014_000000000002.png", "test", ["A red square.", "There's a red field; nothing else."]),
    ("COCO_val2014_000000000003.png", "test", ["A green square on a table.", "Something green"]),
    ("COCO_val2014_000000000004.png", "val", ["Blue."]),
    ("COCO_val2014_000000000005.png", "restval", ["A man's well-known grey hat."]),
]


@pytest.fixture(scope="module")
def model():
    return AutoModelForMultimodalLM.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A COCO folder of four pictures of several sizes in val2014."""
    folder = tmp_path_factory.mktemp("coco")
    folder.joinpath("val2014").mkdir()
    images = []
    for i, (name, split, captions) in enumerate(ROWS):
        images.append(
            {
                "filename": name, "filepath": name.split("_")[1], "split": split,
                "sentences": [{"raw": text, "tokens": []} for text in captions],
            }
        )  # fmt: skip
        if "val" in name:
            pixels = np.random.default_rng(i).integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "val2014" / name)
    folder.joinpath("dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return folder


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """A file of random weights in the format of torch-fidelity's."""

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            """Keeps the initial ones."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "none.pth")
    torch.manual_seed(0)
    extractor = Untrained("random", ["2048"], str(folder / "none.pth"))
    for weight in extractor.parameters():
        if weight.ndim == 4:  # as torch initialises them, features of the last layer would hardly differ
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
    torch.save(extractor.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A random CLIP with a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("clip")
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.joinpath("vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    folder.joinpath("merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": 514, "max_position_embeddings": 77},
        vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, processor, tmp_path) -> Run:
    return Run(model, processor, tmp_path / "evaluation", batch_size=2, drawing={"num_inference_steps": 2})


def by_scipy(mu1, sigma1, mu2, sigma2) -> float:
    covariance = sqrtm(sigma1 @ sigma2)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * covariance.real))


def by_torch_fidelity(mu1, sigma1, mu2, sigma2) -> float:
    one, other = {"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def statistics_of(features):
    return features.mean(0), np.cov(features, rowvar=False)


def of_the_features(x, y) -> float:
    """Without covariances: Tr (Σ₁ Σ₂)^½ is the nuclear norm of the product of the centred features."""
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * overlap


def spread(rng, num_items: int, num_features: int) -> np.ndarray:
    """Features whose standard deviations differ by 100 times."""
    mixing = rng.standard_normal((num_features, num_features)) * np.logspace(0, -2, num_features)
    return rng.standard_normal((num_items, num_features)) @ mixing + rng.standard_normal(num_features)


# Captioned pictures


def test_coco_a_folder_and_rows_hold_the_same_pictures_and_captions(coco, tmp_path):
    expected = [row for row in ROWS if row[1] == "test"]
    images = [Image.open(coco / "val2014" / name) for name, _, _ in expected]
    lines = []
    for (name, _, captions), image in zip(expected, images, strict=True):
        image.save(tmp_path / name)
        lines.append(json.dumps({"file_name": name, "captions": captions}))
    tmp_path.joinpath("metadata.jsonl").write_text("\n".join(lines))
    rows = [{"image": x, "captions": captions} for x, (_, _, captions) in zip(images, expected, strict=True)]
    files = [{"image": x.filename, "captions": row["captions"]} for x, row in zip(images, rows, strict=True)]
    for data in (coco, str(tmp_path), rows, files):
        found = read_captioned(data, "coco-captions")
        assert found.captions == [captions for _, _, captions in expected]
        assert [np.array(image).tolist() for image in found] == [np.array(image).tolist() for image in images]
        assert found.settings["num_pictures"] == 2 and found.settings["digest"] == found.digest
    assert [len(read_captioned(coco, "", split)) for split in ("test", "val", "val2014")] == [2, 1, 4]


def test_a_single_caption_of_each_row_may_be_a_string(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    tmp_path.joinpath("a.txt").write_text("a black square")
    assert read_captioned(str(tmp_path), "").captions == [["a black square"]]
    row = {"image": tmp_path / "a.png", "captions": "a black square"}
    assert read_captioned([row], "").captions == [["a black square"]]


def test_a_sample_keeps_pictures_with_their_captions_and_is_the_same_each_time():
    rows = [{"image": Image.new("L", (1, 1), i), "captions": [f"{i}", f"again {i}"]} for i in range(50)]
    found = read_captioned(rows, "").sample(20)
    assert len(found) == 20 and found.captions == read_captioned(rows, "").sample(20).captions
    numbers = [image.getpixel((0, 0)) for image in found]
    assert numbers == sorted({*numbers}) and numbers != list(range(20))
    assert found.captions == [[f"{i}", f"again {i}"] for i in numbers]
    prompts = found.prompts()
    assert prompts == found.prompts() and all(p in row for p, row in zip(prompts, found.captions, strict=True))
    assert len({prompt.startswith("again") for prompt in prompts}) == 2
    assert found.settings["choice"] == "20 of 50 pictures, seed 0"
    assert read_captioned(rows, "").sample(50).captions == [row["captions"] for row in rows]


def test_a_change_of_pictures_or_captions_changes_the_digest(coco, tmp_path):
    shutil.copytree(coco, tmp_path, dirs_exist_ok=True)
    before = read_captioned(tmp_path, "").digest
    assert before == read_captioned(coco, "").digest
    Image.new("RGB", (5, 5)).save(tmp_path / "val2014" / ROWS[1][0])
    assert read_captioned(tmp_path, "").digest != before
    row = {"image": Image.new("L", (2, 2)), "captions": ["x"]}
    other = {"image": Image.new("L", (2, 2), 1), "captions": ["x"]}
    assert read_captioned([row], "").digest != read_captioned([other], "").digest


def test_data_that_are_absent_or_no_use_are_named(coco, tmp_path):
    with pytest.raises(ValueError, match=r"The task `coco-fid` needs `data`: a folder with Karpathy's `dataset_coco"):
        read_captioned(None, "coco-fid")
    with pytest.raises(ValueError, match=r"`coco-fid` cannot read `data` '.*nothing'"):
        read_captioned(str(tmp_path / "nothing"), "coco-fid")
    shutil.copytree(coco, tmp_path, dirs_exist_ok=True)
    tmp_path.joinpath("val2014", ROWS[4][0]).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 4 pictures are not in .* or empty, the first is COCO_val2014_000000000005"
    ):
        read_captioned(tmp_path, "coco-fid", "val2014")
    with pytest.raises(ValueError, match=r"split 'text'\) of the task `coco-captions` holds no pictures"):
        read_captioned(tmp_path, "coco-captions", "text")
    tmp_path.joinpath("dataset_coco.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset_coco.json is not there; unpack Karpathy's `caption_dat"):
        read_captioned(tmp_path, "coco-fid")
    tmp_path.joinpath("val2014", "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "title": "x"}) for name, _, _ in ROWS[1:4])
    )
    with pytest.raises(
        ValueError, match=r"needs the columns `image` and one of text, caption, captions; it has image, t"
    ):
        read_captioned(str(tmp_path / "val2014"), "coco-fid")
    with pytest.raises(ValueError, match=r"Row 0 of `data` must be .*; got \['picture'\]"):
        read_captioned([{"picture": 1}], "")
    for captions in ([], [" "], None):
        with pytest.raises(ValueError, match=r"Picture 0 of `data` .* has an empty caption or none"):
            read_captioned([{"image": "a.png", "captions": captions}], "")


def test_a_broken_picture_is_named_when_it_is_read(coco, tmp_path):
    shutil.copytree(coco, tmp_path, dirs_exist_ok=True)
    broken = tmp_path / "val2014" / ROWS[2][0]
    broken.write_bytes(broken.read_bytes()[:60])
    pictures = read_captioned(tmp_path, "")
    assert pictures[0].size == (12, 10)
    with pytest.raises(ValueError, match=f"The picture {broken} cannot be read"):
        pictures[1]
    with pytest.raises(ValueError, match="The picture with the caption 'x' cannot be read"):
        read_captioned([{"image": b"none", "captions": "x"}] * 2, "")[1]


# CIDEr


def sentences(rng: random.Random, count: int) -> list[str]:
    words = [
        "a",
        "the",
        "cat",
        "man's",
        "well-known",
        "sits",
        "on",
        "red",
        "mat,",
        "and",
        "(big)",
        "isn't",
        '"ok"',
        "…",
    ]
    return [" ".join(rng.choices(words, k=rng.randrange(1, 12))).capitalize() + "." for _ in range(count)]


@needs_java
def test_cider_is_that_of_pycocoevalcap_for_500_caption_sets():
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    rng = random.Random(0)
    references = [sentences(rng, rng.randrange(1, 6)) for _ in range(500)]
    captions = [rng.choice(row) if rng.random() < 0.3 else sentences(rng, 1)[0] for row in references]
    expected = {i: [{"caption": text} for text in row] for i, row in enumerate(references)}
    found = {i: [{"caption": text}] for i, text in enumerate(captions)}
    mean, values = Cider().compute_score(PTBTokenizer().tokenize(expected), PTBTokenizer().tokenize(found))
    ours = cider([row[0] for row in tokenize([[text] for text in captions])], tokenize(references))
    assert ours.tolist() == values.tolist() and ours.mean() == mean and 1 < mean < 9


@needs_java
def test_captions_with_ends_of_lines_or_nothing_keep_their_places():
    odd = ["", "a\nb", "c\u2028d", "e\r\rf", "g\x0bh\x0ci", "j\x85k", "  ", "l", ""]
    assert tokenize([odd, ["last"]]) == [["", "a b", "c d", "e f", "g h i", "j k", "", "l", ""], ["last"]]


def test_words_are_a_tokenizer_without_java():
    texts = ["A man's “well-known” hat, isn't it?", "UPPER_case  3.5\n", "…", "Ümläut’s"]
    expected = ["a man's well known hat isn't it", "upper case 3 5", "", "ümläut’s"]
    assert tokenize([texts], "words") == [expected]


@pytest.mark.parametrize("tokenizer", [pytest.param("ptb", marks=needs_java), "words"])
def test_captions_are_scored_and_shown(coco, model, processor, run, tokenizer):
    task = CaptionTask(data=coco, tokenizer=tokenizer, split="val2014", max_new_tokens=4)
    task.prepare(model, processor)
    result = task.run(run)
    lines = [json.loads(line) for line in run.output_dir.joinpath("coco-captions", "captions.jsonl").open()]
    captions, references = [line["caption"] for line in lines], [row[2] for row in ROWS[1:]]
    assert len(captions) == 4
    expected = 100 * cider(
        [row[0] for row in tokenize([[text] for text in captions], tokenizer)], tokenize(references, tokenizer)
    )
    name = {"ptb": "CIDEr", "words": "CIDEr (words)"}[tokenizer]
    assert list(result.scores) == [name, "equal to a reference"]
    assert result.scores[name].value == pytest.approx(expected.mean()) and result.scores[name].num_items == 4
    assert result.settings["tokenizer"] and result.settings["split"] == "val2014"
    assert result.settings["num_references"] == sum(map(len, references))
    json.dumps(result.settings)
    for verdict, caption in zip(result.verdicts, captions, strict=True):
        assert Image.open(verdict.picture).size == (8, 8) and verdict.text.startswith(caption)
        assert verdict.picture.is_relative_to(run.output_dir)


def test_captions_that_repeat_the_references_score_best(model, processor, run, coco):
    task = CaptionTask(data=coco, tokenizer="words", split="val2014")
    task.prepare(model, processor)
    lines = [{"index": i, "caption": row[2][-1]} for i, row in enumerate(ROWS[1:])]
    task.run(run)  # writes settings
    file = run.output_dir / "coco-captions" / "captions.jsonl"
    file.with_suffix(".0.jsonl").unlink(missing_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = task.run(run).scores
    assert scores["equal to a reference"].value == 1.0
    assert scores["CIDEr (words)"].value > 500  # 1,000 where no picture had another reference


def test_what_prevents_cider_is_found_before_anything_is_captioned(coco, model, processor, monkeypatch):
    with pytest.raises(ValueError, match=r"`tokenizer` must be one of ptb, words; got 'blank'"):
        CaptionTask(data=coco, tokenizer="blank").prepare(model, processor)
    with pytest.raises(ValueError, match=r"so `data` needs two or more"):
        CaptionTask(data=coco, tokenizer="words", num_samples=1).prepare(model, processor)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"no `java` on the path; install it .*default-jre-headless"):
        CaptionTask(data=coco).prepare(model, processor)


# FID


@pytest.mark.parametrize(("num_items", "num_features"), [(200, 32), (20, 64), (33, 32)])
def test_frechet_distance_is_that_of_the_libraries(num_items, num_features):
    rng = np.random.default_rng(0)
    x, y = spread(rng, num_items, num_features), spread(rng, num_items + 5, num_features)
    ours = frechet_distance(*statistics_of(x), *statistics_of(y))
    for other in (by_torch_fidelity, by_scipy):
        assert ours == pytest.approx(other(*statistics_of(x), *statistics_of(y)), rel=1e-6)
    assert ours == pytest.approx(of_the_features(x, y), rel=1e-12)
    for features in (x, y):
        mean, factor = moments(features.astype(np.float32))
        assert mean == pytest.approx(features.mean(0), abs=1e-5) and factor.dtype == np.float64
        assert factor.T @ factor == pytest.approx(np.cov(features, rowvar=False), abs=1e-4)
        assert len(factor) <= min(features.shape)


def test_frechet_distance_holds_where_covariances_are_far_from_full_rank():
    rng = np.random.default_rng(0)
    x, y = spread(rng, 20, 256), spread(rng, 9, 256)
    assert frechet_distance(*statistics_of(x), *statistics_of(y)) == pytest.approx(of_the_features(x, y), rel=1e-12)
    size = np.trace(statistics_of(x)[1])
    assert frechet_distance(*statistics_of(x), *statistics_of(x)) <= 1e-12 * size
    assert frechet_distance(*statistics_of(x), *statistics_of(x + 1)) == pytest.approx(256, rel=1e-9)
    zeros = np.zeros((2, 2))
    assert frechet_distance(np.zeros(2), zeros, np.ones(2), zeros) == 2


def test_the_jackknife_covers_what_is_known():
    """Drawings N(0, 1), references N(0.5, 2²) in each of 3 features: the distance is 3 (0.5² + (2 - 1)²) = 3.75."""
    rng, num_covered = np.random.default_rng(0), 0
    for _ in range(200):
        drawn, real = rng.normal(0, 1, (400, 3)), rng.normal(0.5, 2, (400, 3))
        kept = [np.arange(400) % 10 != group for group in (-1, *range(10))]
        value, *others = (frechet_distance(*statistics_of(drawn[k]), *statistics_of(real[k])) for k in kept)
        low, high = jackknife_interval(value, others)
        num_covered += low <= 3.75 <= high
    assert 180 <= num_covered < 200  # 95 % are 190 ± 6
    assert jackknife_interval(1.0, []) is None


def extract(inception, files, layer: str = "2048") -> np.ndarray:
    extractor = FeatureExtractorInceptionV3("by hand", [layer], str(inception))
    pixels = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for file in files]
    return torch.cat([extractor(image[None])[0] for image in pixels]).double().numpy()


def drawings_of(run) -> list[Path]:
    return sorted(run.output_dir.glob("drawings-*/images/*.png"))


@pytest.mark.filterwarnings("ignore:FID of 4 pictures")
def test_fid_is_that_of_torch_fidelity_by_hand(coco, model, processor, run, inception, clip, tmp_path):
    task = FIDTask(data=coco, inception=inception)
    task.prepare(model, processor)
    result = task.run(run)
    drawn = extract(inception, drawings_of(run))
    for i, (name, _, _) in enumerate(ROWS[1:]):  # resized to 8 along the short side, cropped to 8 × 8
        pixels = processor.image_processor(images=[Image.open(coco / "val2014" / name)])["pixel_values"]
        processor.image_processor.postprocess(pixels)[0].save(tmp_path / f"{i}.png")
    real = extract(inception, sorted(tmp_path.glob("*.png")))
    expected = of_the_features(drawn, real)
    assert result.scores["FID"].value == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert result.scores["FID"].num_items == 4 and result.scores["FID"].interval is None
    assert [verdict.picture for verdict in result.verdicts] == drawings_of(run)
    assert result.settings["inception"]["published"] is False and json.dumps(result.settings)

    # With the same prompts, CLIP score takes the same drawings.
    before = {file: file.stat().st_mtime_ns for file in drawings_of(run)}
    shared = CLIPScoreTask(data=coco, clip=str(clip))
    shared.prepare(model, processor)
    assert [verdict.picture for verdict in shared.run(run).verdicts] == list(before)
    assert {file: file.stat().st_mtime_ns for file in drawings_of(run)} == before


@pytest.mark.filterwarnings("ignore:FID of 23 pictures")
@pytest.mark.slow  # eleven distances of 2,048 features
def test_fid_has_the_jackknifes_interval_and_resumes(model, processor, run, inception, monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "NUM_FEATURES", 64)  # an early layer of Inception, which takes less time
    monkeypatch.setattr(fid, "BATCH_SIZE", 4)
    pixels = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(image), "captions": f"noise {i}"} for i, image in enumerate(pixels)]
    task = FIDTask(data=rows, inception=inception)
    task.prepare(model, processor)
    result = task.run(run)
    for i, row in enumerate(rows):
        row["image"].save(tmp_path / f"{i:02d}.png")
    features = [extract(inception, files, "64") for files in (drawings_of(run), sorted(tmp_path.glob("*.png")))]
    kept = [np.arange(23) % 10 != group for group in (-1, *range(10))]
    value, *others = (of_the_features(*(rows[k] for rows in features)) for k in kept)
    assert result.scores["FID"].value == pytest.approx(value, rel=1e-4) and value > 0.01
    assert result.scores["FID"].interval == pytest.approx(jackknife_interval(value, others), rel=1e-3)

    folder = run.output_dir / "coco-fid"
    for name, num_left in (("drawings", 5), ("references", 6), ("distances", 3)):
        lines = folder.joinpath(f"{name}.jsonl").read_text().splitlines()
        cut_off = "\n".join(lines[:num_left]) + "\n" + lines[num_left][:5]
        folder.joinpath(f"{name}.0.jsonl").write_text(cut_off)
        folder.joinpath(f"{name}.jsonl").unlink()
    assert task.run(run) == result

    mu, sigma = statistics_of(features[1])
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    other = FIDTask(data=rows, inception=inception, statistics=tmp_path / "statistics.npz", name="fid-of-statistics")
    other.prepare(model, processor)
    given = other.run(run)
    assert given.scores["FID"].value == pytest.approx(value, rel=1e-4)
    assert not run.output_dir.joinpath("fid-of-statistics", "references").exists()
    assert given.settings["references"] == "the statistics statistics.npz"


def test_too_few_pictures_for_fid_are_counted(coco, model, processor, inception):
    with pytest.warns(UserWarning, match=r"FID of 4 pictures: the covariance of 2048 features needs at least 2049"):
        FIDTask(data=coco, inception=inception).prepare(model, processor)
    with pytest.raises(ValueError, match=r"needs two pictures or more for a covariance; `data` has 1"):
        FIDTask(data=coco, inception=inception, num_samples=1).prepare(model, processor)


class Harmful:
    def __reduce__(self):
        return (Path("harmed").touch, ())


def test_absent_and_foreign_weights_of_inception_are_named(coco, model, processor, inception, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1)}, "other.pth")
    torch.save(Harmful(), "harmful.pth")
    for file in ("absent.pth", "other.pth", "harmful.pth"):
        with pytest.raises(OSError, match=rf"`inception` '{file}' gave none .* fetch `weights-inception-2015-12-05"):
            FIDTask(data=coco, inception=file).prepare(model, processor)
    assert not Path("harmed").exists()
    np.savez("few.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"`statistics` 'few.npz' is no `.npz` with `mu` and `sigma`"):
        FIDTask(data=coco, inception=inception, statistics="few.npz").prepare(model, processor)


def test_statistics_that_are_none_are_refused(tmp_path):
    file, mu, sigma = tmp_path / "s.npz", np.zeros(2048), np.eye(2048, dtype=np.float32)
    (tmp_path / "empty.npz").touch()
    for other in ("absent.npz", "empty.npz"):
        with pytest.raises(ValueError, match=rf"`statistics` '.*{other}' is no `.npz`"):
            read_statistics(tmp_path / other)
    upper = np.triu(np.ones_like(sigma))
    for name, values, message in (
        ("shape", (mu, sigma[:3]), "must hold arrays of shapes"),
        ("nan", (mu * np.nan, sigma), "not finite"),
        ("upper", (mu, upper), "not symmetric"),
        ("negative", (mu, -sigma), "no covariance"),
    ):
        np.savez(file, mu=values[0], sigma=values[1])
        with pytest.raises(ValueError, match=message):
            read_statistics(file)
            pytest.fail(name)


def test_a_distance_of_nan_is_no_perfect_distance():
    eye = np.eye(4)
    assert np.isnan(frechet_distance(np.full(4, np.nan), eye, np.zeros(4), eye))


def test_pictures_of_the_same_name_are_told_apart_by_their_bytes(tmp_path):
    digests = []
    for colors in (("red", "blue"), ("green", "white"), ("red", "blue")):
        rows = [{"image": Image.new("RGB", (8, 8), color), "text": f"caption {i}"} for i, color in enumerate(colors)]
        features = Features({"image": HFImage(), "text": Value("string")})
        Dataset.from_list(rows, features).to_parquet(tmp_path / "p.parquet")
        digests.append(read_captioned(str(tmp_path / "p.parquet"), "").digest)
    assert digests[0] == digests[2] != digests[1]


def test_pictures_of_an_archive_are_read(tmp_path):
    with ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for i in range(2):
            Image.new("RGB", (8, 8), (0, 100 * i, 0)).save(tmp_path / f"{i}.png")
            archive.write(tmp_path / f"{i}.png", f"{i}.png")
        archive.writestr("metadata.jsonl", "".join(f'{{"file_name": "{i}.png", "text": "{i}"}}\n' for i in range(2)))
    found = read_captioned(str(tmp_path / "pictures.zip"), "")
    assert [picture.getpixel((0, 0)) for picture in found] == [(0, 0, 0), (0, 100, 0)]


def test_prompts_alone_need_no_pictures(coco, tmp_path):
    (folder := tmp_path / "coco").mkdir()
    (folder / KARPATHY).write_text((coco / KARPATHY).read_text())
    with pytest.raises(FileNotFoundError, match="val2014 is not there"):
        read_captioned(folder, "", coco_split="val2014")
    found = read_captioned(folder, "", coco_split="val2014", are_read=False)
    assert found.prompts() == read_captioned(coco, "", coco_split="val2014").prompts()
    (folder / KARPATHY).write_text('{"images": [{"split": "test"}]}')
    with pytest.raises(ValueError, match=r"is not Karpathy's .* \(KeyError: 'filepath'\)"):
        read_captioned(folder, "", are_read=False)


# CLIP score


def test_clip_score_is_that_of_clip_by_hand(coco, model, processor, run, clip):
    long = [{"image": coco / "val2014" / name, "captions": row} for name, _, row in ROWS[1:]]
    long[0] = {**long[0], "captions": "A very long sentence " * 9}
    task = CLIPScoreTask(data=long, clip=str(clip))
    task.prepare(model, processor)
    result = task.run(run)
    by_hand, texts = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip, backend="pil")
    values = []
    for file, prompt in zip(drawings_of(run), read_captioned(long, "").prompts(), strict=True):
        inputs = texts.tokenizer(prompt, return_tensors="pt", truncation=True, max_length=77)
        pixels = texts.image_processor(Image.open(file), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            text = by_hand.get_text_features(**inputs).pooler_output
            image = by_hand.get_image_features(pixel_values=pixels).pooler_output
        values.append(100 * torch.cosine_similarity(text, image).item())
    assert len(values) == 4 and inputs["input_ids"].shape[1] < 77
    assert [float(verdict.text.split("(")[-1][:-1]) for verdict in result.verdicts] == pytest.approx(values, abs=0.06)
    assert result.scores["CLIP score"].value == pytest.approx(np.mean(values), rel=1e-4)
    assert result.settings["clip"] == str(clip) and json.dumps(result.settings)


def test_an_absent_clip_is_named_before_anything_is_drawn(coco, model, processor, tmp_path):
    with pytest.raises(OSError, match=r"`clip`: CLIPModel and its processor cannot be loaded from"):
        CLIPScoreTask(data=coco, clip=str(tmp_path)).prepare(model, processor)


def test_a_model_without_images_is_refused(coco, model, processor, clip, inception):
    text_only = type("TextOnly", (), {"config": model.config.get_text_config()})
    for task in (CaptionTask(data=coco), FIDTask(data=coco), CLIPScoreTask(data=coco)):
        with pytest.raises(ValueError, match=rf"The task `{task.name}` needs images"):
            task.prepare(text_only, processor)
