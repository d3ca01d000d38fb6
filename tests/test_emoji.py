"""Emoji with their names: the data on a stand-in for the packages, and on the packages themselves."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import emoji
import emoji_data
import judge_emoji
import smollm2_emoji
from emoji_data import CATEGORIES, NPM, load_emoji, load_picture, split

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {0}">{1}</svg>'


def color(i: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(i).integers(0, 200, 3).tolist())


def make_packages(folder: Path, num_emoji: int = 20, **changes: str) -> Path:
    """Emoji whose pictures are squares on nothing, each of its color; the first OpenMoji is a circle."""
    for name, version, *_ in NPM.values():
        (folder / name).mkdir(parents=True)
        (folder / name / "package.json").write_text(json.dumps({"version": version}))
    entries = []
    for i in range(num_emoji):
        entry = {"name": f"THING {i}", "short_names": [f"thing_{i}", f"small-thing{i}"]}
        entry["category"] = CATEGORIES[i % len(CATEGORIES)]
        entries.append({**entry, "unified": f"{i:04X}-FE0F", "image": f"{i:04x}.png"})
        for name in ("noto", "twemoji"):
            picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
            picture.paste((*color(i), 255), (16, 16, 48, 48))
            file = folder / NPM[name][0] / NPM[name][-1] / f"{i:04x}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    entries.append({**entries[0], "name": "A FLAG", "category": "Flags"})
    entries[1] |= changes
    (folder / NPM["noto"][0] / "emoji.json").write_text(json.dumps(entries))
    svg = folder / "openmoji" / "color" / "svg"
    svg.mkdir(parents=True)
    (svg / "0000.svg").write_text(SVG.format(8, '<circle cx="4" cy="4" r="2" fill="red"/>'))
    (svg / "0001.svg").write_text("<svg")
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    return make_packages(tmp_path_factory.mktemp("packages"))


def test_every_emoji_has_its_wordings_and_each_name_is_on_one_side(packages):
    found = load_emoji(packages)
    assert len(found) == 20 and found[3].name == "thing 3"
    assert found[3].wordings == ("thing 3", "thing", "small thing")
    train, held_out = split(found)
    assert len(held_out) == 2 and sorted([*train, *held_out], key=found.index) == found
    assert split(found) == (train, held_out) != split(found, seed=1)
    assert len(load_emoji(packages, ("Flags",))) == 1


def test_a_picture_stands_on_white_in_three_hands(packages):
    first, second, third = load_emoji(packages)[:3]
    noto = np.asarray(load_picture(third, 32, packages=packages))
    assert noto.shape == (32, 32, 3)
    assert noto[0, 0].tolist() == [255] * 3 and noto[16, 16].tolist() == [*color(2)] == noto[8, 23].tolist()
    assert load_picture(third, 64, "twemoji", packages).size == (64, 64)
    circle = np.asarray(load_picture(first, 32, "openmoji", packages))
    assert circle[16, 16].tolist() == [255, 0, 0] and circle[2, 2].tolist() == [255] * 3
    with pytest.raises(ValueError, match=r"0001\.svg cannot be rendered"):
        load_picture(second, 32, "openmoji", packages)
    with pytest.raises(FileNotFoundError, match=r"has no picture of thing 2 \(0002-FE0F\)"):
        load_picture(third, 32, "openmoji", packages)


def test_a_name_twice_and_a_category_that_does_not_exist_are_named(packages, tmp_path):
    twice = make_packages(tmp_path, name="THING 2")
    with pytest.raises(ValueError, match="'thing 2' is the name of two emoji, 0001-FE0F and 0002-FE0F"):
        load_emoji(twice)
    with pytest.raises(ValueError, match=r"`categories` must be some of Activities, .*, Flags, .*; got Cars"):
        load_emoji(packages, ("Cars", "Objects"))


def test_the_folders_are_those_that_transfusion_train_reads(packages, tmp_path, capsys):
    emoji_data.main([str(tmp_path), "--packages", str(packages), "--image_size", "16"])
    assert "train: 18 emoji" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "train" / "metadata.jsonl").read_text().splitlines()]
    train, _ = split(load_emoji(packages))
    assert {row["text"] for row in rows} == {wording for one in train for wording in one.wordings}
    assert Image.open(tmp_path / "held_out" / "000000.png").size == (16, 16)


def test_documents_have_one_picture_or_some_and_are_always_the_same(packages):
    train, _ = split(load_emoji(packages))
    kwargs = {"size": 32, "length": 200, "packages": packages}
    documents, again = (emoji.EmojiDocuments(train, story_share=0.3, **kwargs) for _ in range(2))
    numbers = []
    for i in range(200):
        document = documents[i]
        assert document["text"] == again[i]["text"]
        images = document.get("images", [document.get("image")])
        numbers.append(len(images))
        assert document["text"].count("<image>") == (0 if len(images) == 1 else len(images))
    assert {*numbers} == {1, 2, 3} and 30 < sum(number > 1 for number in numbers) < 90
    assert len({documents[i]["text"] for i in range(200)}) > 100
    other = emoji.EmojiDocuments(train, story_share=0.3, seed=1, **kwargs)
    assert any(other[i]["text"] != documents[i]["text"] for i in range(5))


def test_the_example_trains_for_a_few_steps_on_real_emoji(tmp_path):
    folder = tmp_path / "model"
    words = ["--output_dir", str(folder), "--max_steps", "2", "--hidden_size", "64", "--num_hidden_layers", "1"]
    words += ["--per_device_train_batch_size", "4", "--categories", "Food & Drink", "--use_cpu", "true"]
    try:
        trainer = emoji.main(words)
    except ImportError as error:
        pytest.skip(str(error))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 2 and all(np.isfinite(losses))
    assert (folder / "model.safetensors").is_file()
    names = {one.name for one in load_emoji()}
    assert {"red apple", "dog face", "automobile"} <= names and len(names) == 1026
    assert load_emoji(categories=CATEGORIES)[0].category in CATEGORIES


class Network(torch.nn.Module):
    """In the place of EfficientNet: the color of what stands on white."""

    def extract_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.amin((2, 3), keepdim=True)


@pytest.fixture
def judge(tmp_path, monkeypatch) -> judge_emoji.EmojiJudge:
    packages = make_packages(tmp_path / "packages")
    svg = packages / "openmoji" / "color" / "svg"
    for i in range(20):
        square = f'<rect x="16" y="16" width="32" height="32" fill="rgb{color(i)}"/>'
        (svg / f"{i:04X}.svg").write_text(SVG.format(64, square))
    monkeypatch.setattr(judge_emoji, "fetch_python", lambda *args: None)
    monkeypatch.setattr(judge_emoji.EmojiJudge, "network", Network())
    return judge_emoji.EmojiJudge(load_emoji(packages), packages, tmp_path / "judge.joblib")


def test_the_judge_names_real_pictures_in_a_hand_it_has_not_seen(judge, tmp_path):
    pictures = judge.pictures("twemoji")
    features = judge.features(pictures)
    assert judge.name(features) == [one.name for one in judge.emoji]
    assert judge.ranks(features, judge.emoji).tolist() == [0] * 20
    ranks = judge.ranks(judge.features(pictures[1:] + pictures[:1]), judge.emoji)
    assert (ranks > 0).all() and judge_emoji.shares(ranks)["first"] == 0 < judge_emoji.shares(ranks)["among five"]
    again = judge_emoji.EmojiJudge(judge.emoji, Path("nowhere"), tmp_path / "judge.joblib")
    assert np.array_equal(again.ranks(features, judge.emoji), judge.ranks(features, judge.emoji))
    with pytest.raises(ValueError, match=r"joblib is a judge of 20 emoji, not 5; delete it"):
        judge_emoji.EmojiJudge(judge.emoji[:5], Path("nowhere"), tmp_path / "judge.joblib")


def test_a_caption_is_right_in_any_wording_and_phrase_of_the_training(judge):
    one = judge.emoji[3]
    for caption in ("thing 3", "a small thing", "an emoji of a thing", f"{one.category.lower()}: thing 3 "):
        assert judge_emoji.is_right(caption, one)
    for caption in ("thing 4", "3", "a thing 3 and a thing", "food & drinks: thing 3"):
        assert not judge_emoji.is_right(caption, one)


def test_a_model_of_some_categories_is_judged_among_all_names(judge, tmp_path, capsys):
    some = ["--packages", str(judge.packages), "--categories", *CATEGORIES[:3]]
    words = ["--output_dir", str(tmp_path / "model"), "--max_steps", "1", "--hidden_size", "64", "--num_hidden_layers"]
    words += ["1", "--per_device_train_batch_size", "2", "--use_cpu", "true", *some]
    model = emoji.main([*words, "--diffusion_loss_weight", "25", "--train_timestep_shift", "2"]).model
    assert (model.config.diffusion_loss_weight, model.config.train_timestep_shift) == (25, 2)
    assert shlex.join(some[2:]) in capsys.readouterr().out
    arguments = [str(tmp_path / "model"), "--num_drawings", "6", "--num_inference_steps", "2"]
    arguments += [*some, "--judge", str(tmp_path / "judge.joblib")]
    results = judge_emoji.main(arguments)
    assert json.loads((tmp_path / "model" / "results.json").read_text()) == results
    assert results["chance"] == 0.05 and results["num_drawings"] == 6 and results["num_held_out"] == 1
    assert results["real pictures, Twemoji"]["first"] == 1 and results["drawn"]["first"] < 0.5
    assert results["drawn"]["read right"] == 0 and (tmp_path / "model" / "held_out.png").stat().st_size > 5000


def test_a_language_model_is_shown_the_categories_of_this_call(packages, tmp_path, monkeypatch):
    for name in ("fetch_python", "train", "compare"):
        monkeypatch.setattr(smollm2_emoji, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(
        smollm2_emoji,
        "convert_causal_lm",
        lambda file, start, **kwargs: GenerationConfig(image_guidance_scale=3.0).save_pretrained(start),
    )
    for place, category in enumerate(CATEGORIES[:2]):
        words = ["--output_dir", str(tmp_path), "--packages", str(packages), "--categories", category]
        smollm2_emoji.main(words)
        lines = (tmp_path / "data" / "train" / "metadata.jsonl").read_text().splitlines()
        assert GenerationConfig.from_pretrained(tmp_path / "start").image_guidance_scale == 1
        texts = {json.loads(line)["text"] for line in lines}
        assert f"thing {place}" in texts and f"thing {1 - place}" not in texts
        assert len(list((tmp_path / "data" / "train").glob("*.png"))) == len(lines)
