"""Emoji with their names: the data on a stand-in for the packages, and on the packages themselves."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import emoji
import emoji_data
from emoji_data import CATEGORIES, NPM, load_emoji, load_picture, split

CIRCLE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><circle cx="36" cy="36" r="18" fill="red"/></svg>'
)


def make_packages(folder: Path, num_emoji: int = 20, **changes: str) -> Path:
    """Emoji whose pictures are gray squares on nothing; the first OpenMoji is a circle."""
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
            picture.paste((10 * i, 0, 0, 255), (16, 16, 48, 48))
            file = folder / NPM[name][0] / NPM[name][-1] / f"{i:04x}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    entries.append({**entries[0], "name": "A FLAG", "category": "Flags"})
    entries[1] |= changes
    (folder / NPM["noto"][0] / "emoji.json").write_text(json.dumps(entries))
    svg = folder / "openmoji" / "color" / "svg"
    svg.mkdir(parents=True)
    (svg / "0000.svg").write_text(CIRCLE)
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
    assert noto[0, 0].tolist() == [255] * 3 and noto[16, 16].tolist() == [20, 0, 0] == noto[8, 23].tolist()
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
