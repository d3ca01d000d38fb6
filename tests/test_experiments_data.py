"""The data of the comparisons, on tiny stand-ins for the packages and with autoencoders that have learned nothing."""

import json
import sys
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from tiny import text_config
from tiny_experiments import make_packages, save_untrained
from transformers import LlamaForCausalLM

from transfusion_hf import new_transfusion
from transfusion_hf.data.shapes import check_caption, check_scene

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
sys.path.append(str(Path(__file__).parents[1] / "examples"))
from data import AUTOENCODER_KINDS, Data, Pictures
from sources import passages
from streams import Document, MixedSteps, TokenRows, TransfusionRows


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    return make_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture
def data(packages, tmp_path, monkeypatch) -> Data:
    for name in [name for name in sys.modules if name.split(".")[0] == "gensim"]:
        monkeypatch.delitem(sys.modules, name)
    return Data(tmp_path / "data", packages, num_pictures=30, num_held_out=10, vocab_size=400)


def test_whole_articles_and_plays_are_held_out_always_the_same(data, packages, tmp_path):
    train, held_out = data.texts("train"), data.texts("held_out")
    assert len(train) == 18 + 9 and len(held_out) == 2 + 1
    assert len({*train, *held_out}) == 30, "no document is in both"
    assert sum("PLAY" in text for text in held_out) == 1
    assert not any(word in text for text in train + held_out for word in ("'''", "REDIRECT", "Talk", "Folio"))
    again = Data(tmp_path / "again", packages)
    assert (again.texts("train"), again.texts("held_out")) == (train, held_out)
    assert Data(tmp_path / "again", packages, seed=1).texts("held_out") != held_out
    with pytest.raises(ValueError, match="`split` must be one of train, held_out; got 'test'"):
        data.texts("test")


def test_passages_fit_and_lose_no_word(data):
    tokenizer = data.tokenizer()
    for text in data.texts("train"):
        parts = passages(text, tokenizer, 24)
        assert " ".join(parts).split() == text.split()
        assert all(len(tokenizer(part)["input_ids"]) + 1 <= 24 for part in parts)
    assert passages("Enter the king.", tokenizer, 24) == ["Enter the king."]
    assert data.passages("held_out", 24) == [
        p for text in data.texts("held_out") for p in passages(text, tokenizer, 24)
    ]
    with pytest.raises(ValueError, match="`max_tokens` is 8, too few for a word"):
        passages("ab0" * 40, tokenizer, 8)


def test_a_picture_depends_on_its_seed_and_number_alone(data, packages, tmp_path):
    longer = Data(tmp_path, packages, num_pictures=60).pictures("train")
    assert [longer.scene(i) for i in range(30)] == [data.pictures("train").scene(i) for i in range(30)]
    assert data.captions("train") == [data.pictures("train")[i]["text"] for i in range(30)]
    held_out = [data.pictures("held_out").scene(i) for i in range(10)]
    assert not any(scene in held_out for scene in map(longer.scene, range(60)))


@pytest.mark.parametrize("size", [32, 64, 256])
def test_pictures_show_what_their_captions_say(size):
    pictures = Pictures(60, size, seed=3)
    scenes = [pictures.scene(i) for i in range(60)]
    assert {scene.relation for scene in scenes} == {"left of", "above"}
    assert len({scene.caption for scene in scenes}) > 50
    for i, scene in enumerate(scenes):
        assert check_scene(pictures[i]["image"], scene).correct and pictures[i]["text"] == scene.caption
        assert check_caption(pictures[i]["image"], scene.caption).correct
    sides = {(box.right - box.left) / size for scene in scenes for boxes in scene.boxes for box in boxes}
    assert 0.3 < min(sides) < 0.34 and 0.4 < max(sides) < 0.45


def test_both_autoencoders_have_one_architecture_but_for_the_bottleneck(data):
    save_untrained(data)
    kl, vq = (dict(data.autoencoder(kind).named_parameters()) for kind in AUTOENCODER_KINDS)
    different = {name for name in {*kl, *vq} if name not in kl or name not in vq or kl[name].shape != vq[name].shape}
    assert {name.split(".")[0] for name in different - {"encoder.conv_out.weight", "encoder.conv_out.bias"}} <= {
        "quantize",
        "quant_conv",
    }
    with pytest.raises(ValueError, match="`kind` must be one of kl, vq; got 'gan'"):
        data.autoencoder("gan")


def test_latents_and_codes_are_those_of_the_pictures_and_are_computed_once(data, monkeypatch):
    save_untrained(data)
    latents, codes = data.latents("train"), data.codes("train")
    assert (latents.shape, latents.dtype) == ((30, 4, 8, 8), np.float32)
    assert (codes.shape, codes.dtype) == ((30, 8, 8), np.int64)
    pixels = torch.from_numpy(np.array(data.pictures("train")[7]["image"])).permute(2, 0, 1)[None] / 127.5 - 1
    kl, vq = data.autoencoder("kl"), data.autoencoder("vq")
    assert isinstance(kl, AutoencoderKL) and isinstance(vq, VQModel)
    with torch.no_grad():
        expected = (kl.encode(pixels).latent_dist.mode() - 0.25) * 2.0
        decoded = vq.decode(vq.quantize.get_codebook_entry(torch.from_numpy(codes[7]).flatten(), (1, 8, 8, 4)))
        torch.testing.assert_close(torch.from_numpy(latents[7:8]), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decoded.sample, vq(pixels).sample, atol=1e-4, rtol=1e-4)
    assert len(data.latents("held_out")) == 10

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", None)
        assert np.array_equal(data.latents("train"), latents), "from the file"
    for parameter in kl.parameters():
        parameter.data *= 1.5
    kl.save_pretrained(data.autoencoder_folder("kl") / "vae")
    assert not np.allclose(data.latents("train"), latents), "another autoencoder has another file"


def test_the_ceiling_is_what_the_checker_reads_of_reconstructions(data, monkeypatch):
    save_untrained(data)
    assert data.ceiling("kl")["caption_right"] == 0
    result = data.ceiling("vq")
    assert 0 < result["codes_used"] <= 1 and result["scene_right"] == 0

    def copy(self, pixel_values):
        return type("Output", (), {"sample": pixel_values + 1e-3})

    monkeypatch.setattr(AutoencoderKL, "forward", copy)
    perfect = data.ceiling("kl")
    assert perfect["caption_right"] == perfect["scene_right"] == 1 and perfect["psnr"] > 60


def test_nothing_is_left_of_a_computation_that_was_interrupted(data):
    def write(file):
        file.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.cached("thing", 1, write, ".json")
    assert not [*data.folder.iterdir()]
    file = data.cached("thing", 1, lambda file: file.write_text("whole") and None, ".json")
    assert file.read_text() == "whole"
    assert data.cached("thing", 2, lambda file: file.write_text("other") and None, ".json") != file


@pytest.fixture
def steps(data) -> MixedSteps:
    return MixedSteps(data.passages("train", 32), data.captions("train"), data.tokenizer(), tokens_per_step=400)


def documents_of(batch: dict, start: int) -> list[tuple[list[int], list[int]]]:
    """The words of each document of packed rows, and its tokens from `start` on, which are of a picture."""
    found = []
    for row, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(row)]
        for a, b in pairwise(starts):
            ids = [token for token in row[a:b] if token]  # 0 is padding
            words, picture = ([t for t in ids if (t >= start) == which] for which in (False, True))
            if ids:
                found.append((words, picture))
    return found


def test_all_models_get_the_same_documents_at_the_same_steps(data, steps):
    number = np.arange(30)
    codes, latents = number[:, None, None] * np.ones((8, 8), int), np.ones((1, 4, 8, 8)) * number[:, None, None, None]
    _, processor = new_transfusion(data.tokenizer(), text_config(), latent_channels=4, sample_size=8, patch_size=2)
    transfusion = TransfusionRows(processor, 96, latents.astype(np.float32))
    tokenizer, image = data.tokenizer(), processor.image_token_id
    chameleon, llama = TokenRows(tokenizer, 96, codes), TokenRows(tokenizer, 96)
    for step in islice(steps, 6):
        batches = [rows([step]) for rows in (transfusion, chameleon, llama)]
        found = documents_of(batches[1], len(tokenizer))
        pictures = [{t - len(tokenizer) for t in picture} for _, picture in found]
        assert [len(picture) for _, picture in found] == [64 * len(numbers) for numbers in pictures]
        chameleon_has = sorted((words, [*numbers]) for (words, _), numbers in zip(found, pictures, strict=True))

        drawn = iter(batches[0]["latents"][:, 0, 0, 0].int().tolist())
        pairs = documents_of({**batches[0], "input_ids": batches[0]["input_ids"].where(
            batches[0]["input_ids"] != image, torch.tensor(10**6))}, 10**6)  # fmt: skip
        assert {len(picture) for _, picture in pairs} == {0, 16}
        assert sorted((words, [next(drawn)] if picture else []) for words, picture in pairs) == chameleon_has
        texts = sorted(words for words, numbers in chameleon_has if not numbers)
        assert sorted(words for words, _ in documents_of(batches[2], 10**6)) == texts and texts
        eos = tokenizer.eos_token
        assert texts == sorted(tokenizer(d.text + eos)["input_ids"] for d in step if d.picture is None)


def test_a_stream_has_one_order_half_its_tokens_are_text_and_captions_come_first_in_80_percent(data, steps):
    first = [*islice(steps, 60)]
    assert first == [*islice(steps, 60)]
    arguments = (data.passages("train", 32), data.captions("train"), data.tokenizer(), 400)
    assert [*islice(MixedSteps(*arguments, seed=1), 60)] != first
    counted = [*islice(steps.documents(), 4000)]
    text, images = (sum(n for d, n in counted if (d.picture is None) == which) for which in (True, False))
    assert abs(text - images) < 50
    captioned = [d for d, _ in counted if d.picture is not None]
    assert {d.picture for d in captioned} == {*range(30)}
    assert np.mean([d.caption_first for d in captioned]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([d.is_dropped for d in captioned if d.caption_first]) == pytest.approx(0.1, abs=0.03)
    assert not any(d.is_dropped for d in captioned if not d.caption_first)
    tokenizer = data.tokenizer()
    rows = TokenRows(tokenizer, 96, np.zeros((30, 8, 8), int))
    picture_length = {True: 16 - 64, False: 0}
    assert all(
        len(rows.ids(d)) + picture_length[d.picture is not None] == n for d, n in counted[:200] if not d.is_dropped
    )
    flat, start = [d for d, _ in counted], 0
    for step in first:
        assert flat[start : start + len(step)] == step
        lengths = [n for _, n in counted[start : start + len(step)]]
        assert sum(lengths) >= 400 > sum(lengths[:-1])
        start += len(step)


def test_order_dropped_captions_and_noise_limits_reach_the_batches(data):
    tokenizer, codes = data.tokenizer(), np.full((1, 8, 8), 5)
    _, processor = new_transfusion(data.tokenizer(), text_config(), latent_channels=4, sample_size=8, patch_size=4)
    transfusion = TransfusionRows(processor, 96, np.zeros((1, 4, 8, 8), np.float32), 900, 300)
    s, e, boi, eoi, image = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<BOI>", "<EOI>", "<image>"])
    caption = tokenizer("a red circle", add_special_tokens=False)["input_ids"]
    for document, before, behind, limit in (
        (Document("a red circle", 0), caption, [], 900),
        (Document("a red circle", 0, caption_first=False), [], caption, 300),
        (Document("a red circle", 0, is_dropped=True), [], [], 900),
    ):
        batch = transfusion([[document]])
        ids = [s, *before, boi, *[image] * 4, eoi, *behind, e]
        assert batch["input_ids"][0, : len(ids)].tolist() == ids and batch["max_timesteps"].tolist() == [limit]
        ids = [s, *before, boi, *[len(tokenizer) + 5] * 64, eoi, *behind, e]
        assert TokenRows(tokenizer, 96, codes).ids(document) == ids


def test_packed_rows_train_llama_as_single_documents_do(data, steps):
    tokenizer = data.tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(text_config(vocab_size=len(tokenizer))).eval()
    documents = [d for d in next(iter(steps)) if d.picture is None]
    batch, total, number = TokenRows(tokenizer, 96)([documents]), 0.0, 0
    assert len(batch["input_ids"]) < len(documents)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss
        for document in documents:
            ids = torch.tensor([TokenRows(tokenizer, 96).ids(document)])
            total += model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
            number += ids.shape[1] - 1
    torch.testing.assert_close(packed, total / number)
    assert (batch["labels"] != -100).sum() == number


def test_a_row_that_is_too_short_and_a_step_without_text_are_refused(data):
    tokenizer = data.tokenizer()
    with pytest.raises(ValueError, match=r"`max_length` is 4, but a document has \d+ tokens; cut it by `passages`"):
        TokenRows(tokenizer, 4)([[Document("seven seven")]])
    with pytest.raises(ValueError, match="`max_length` is 4, but a step has no text; enlarge it"):
        TokenRows(tokenizer, 4)([[Document("a red circle", 0)]])


@pytest.mark.slow
def test_autoencoders_are_trained_by_the_example_and_an_interrupted_training_continues(packages, tmp_path):
    data = Data(tmp_path, packages, num_pictures=64, num_held_out=8, vae_steps=2)
    for kind in AUTOENCODER_KINDS:
        assert data.autoencoder(kind).config.sample_size == 32
        results = data.autoencoder_folder(kind) / "results.json"
        trained = results.read_text()
        results.unlink()
        data.autoencoder(kind)
        assert "checkpoint-2" in {path.name for path in data.autoencoder_folder(kind).iterdir()}
        assert json.loads(results.read_text())["psnr"] == json.loads(trained)["psnr"]
    assert data.latents("held_out").std() > 0 and data.codes("held_out").shape == (8, 8, 8)
