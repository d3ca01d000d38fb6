"""Fashion-MNIST: read from its package, learned by a classifier that judges, drawn and read by a model."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import fashion_mnist
from fashion_mnist import CLASSES, PACKAGE, Arguments, Classifier, FashionMNIST, main


def make_package(folder: Path) -> Path:
    """Pictures of bars, at a height for each class."""
    name, version = PACKAGE
    (folder / name / "DEBIAN").mkdir(parents=True)
    (folder / name / "DEBIAN" / "control").write_text(f"Package: {name}\nVersion: {version}-1\n")
    files = folder / name / "usr" / "share" / "datasets" / "fashion-mnist"
    files.mkdir(parents=True)
    for split, number in (("train", 500), ("t10k", 100)):
        labels = np.random.default_rng(number).integers(0, 10, number, dtype=np.uint8)
        pixels = np.random.default_rng(0).integers(0, 60, (number, 28, 28), dtype=np.uint8)
        for picture, label in zip(pixels, labels, strict=True):
            picture[4 + 2 * label : 6 + 2 * label] = 250
        (files / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
        (files / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    return make_package(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def classifier(packages, tmp_path_factory) -> Path:
    """The file of a classifier of the bars."""
    file = tmp_path_factory.mktemp("classifier") / "classifier.pt"
    Classifier.trained(FashionMNIST(packages, "train"), file, num_epochs=6)
    return file


def test_pictures_have_the_captions_of_their_classes(packages):
    data = FashionMNIST(packages, "train")
    assert len(data) == 500
    for i in range(20):
        sample = data[i]
        assert sample["text"] == CLASSES[sample["label"]]
        assert np.asarray(sample["image"])[4 + 2 * sample["label"], 0] == 250


def test_the_classifier_learns_and_is_kept(packages, classifier):
    test = FashionMNIST(packages, "t10k")
    features, classes = Classifier.trained(None, classifier).judged(test.pixels)
    assert features.shape == (100, 64) and features.dtype == np.float64
    assert (classes == test.labels).mean() > 0.9


def test_the_example_draws_reads_and_judges(packages, classifier, tmp_path):
    shutil.copy(classifier, tmp_path)
    words = ["--packages", str(packages), "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    words += ["--per_device_train_batch_size", "2", "--num_drawings", "60", "--num_read", "20", "--use_cpu", "true"]
    results = main([*words, "--num_inference_steps", "2"])
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert results["steps"] == 2 and results["parameters"] == pytest.approx(1e6, rel=0.2)
    assert 0 <= results["drawn_right"] < 0.6 and results["read_right"] < 0.6
    assert results["frechet_distance"] > results["frechet_distance_of_as_many_training_pictures"] >= 0
    assert (tmp_path / "run" / "grid.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="`size` must be one of 1M, 3M, 10M; got '2M'"):
        main(["--size", "2M"])


def test_the_real_package_has_60_000_pictures():
    try:
        train, test = (FashionMNIST(Path("outputs/packages"), split) for split in ("train", "t10k"))
    except ImportError as error:
        pytest.skip(str(error))
    assert (len(train), len(test)) == (60_000, 10_000)
    assert torch.from_numpy(train.labels).bincount().tolist() == [6000] * 10
    assert 70 < train.pixels.mean() < 75 and train[0]["text"] == "a boot"


def test_real_pictures_are_judged_right(packages, classifier, tmp_path, monkeypatch):
    train, test = FashionMNIST(packages, "train"), FashionMNIST(packages, "t10k")
    shutil.copy(classifier, tmp_path)
    by_caption = {sample["text"]: sample["image"] for sample in map(train.__getitem__, range(100))}
    monkeypatch.setattr(fashion_mnist, "draw", lambda _, __, captions, **___: [by_caption[c] for c in captions])
    monkeypatch.setattr(fashion_mnist, "read", lambda _, __, samples, **___: [s["text"] for s in samples])
    arguments = Arguments(output_dir=str(tmp_path / "run"), num_drawings=80, num_read=20, use_cpu=True)
    assert arguments.learning_rate == 4 * Arguments(patch_encoder="unet", use_cpu=True).learning_rate
    (tmp_path / "run").mkdir()
    results = fashion_mnist.judge(None, None, arguments, train, test)
    assert results["drawn_right"] > 0.9 < results["classifier_accuracy"] and results["read_right"] == 1
    monkeypatch.setattr(fashion_mnist, "draw", lambda *_, **__: [train[0]["image"]] * 80)
    same = fashion_mnist.judge(None, None, arguments, train, test)
    assert same["drawn_right"] < 0.2 and same["frechet_distance"] > 2 * results["frechet_distance"] > 0
