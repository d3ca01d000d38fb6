"""Latents computed once: they train as the images do, resume with equal bytes, and know what they were made with."""

import io
import json
from itertools import count, islice

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from diffusers import AutoencoderKL
from make_tiny_transfusion import byte_tokenizer
from PIL import Image as PILImage

from transfusion_hf import TransfusionDataCollator, TransfusionProcessor, attach_vae
from transfusion_hf.data.dataset import TransfusionDataset
from transfusion_hf.data.latents import MANIFEST, main, write_latents


def model_and_processor(seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=8,
    )
    model = tiny.model(std=0.1)
    attach_vae(model, vae.eval(), scaling_factor=0.7, shift_factor=0.2)
    return model, TransfusionProcessor.for_model(model, byte_tokenizer(), **kwargs)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def captions(broken: tuple[int, ...] = (), num_rows: int = 11) -> Dataset:
    files = [{"bytes": b"" if i in broken else png(i), "path": None} for i in range(num_rows)]
    columns = {"image": files, "text": [f"caption {i}" for i in range(num_rows)]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "text": Value("string")}))


def edits() -> list[dict]:
    pictures = [PILImage.open(io.BytesIO(png(i))) for i in range(2)]
    return [
        {"text": "<image>edit<image>", "images": pictures, "image_loss_mask": [False, True]},
        {"text": "none"},
        {"text": "limited<image>", "image": pictures[0], "max_timesteps": 500},
    ]


def shards(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.startswith(".")}


def read(folder, cache_dir, streaming: bool = False):
    return load_dataset("parquet", data_dir=str(folder), split="train", streaming=streaming, cache_dir=str(cache_dir))


@pytest.mark.parametrize("streaming", [False, True])
def test_training_on_latents_is_training_on_images(tmp_path, streaming):
    model, processor = model_and_processor()
    samples = edits() + list(TransfusionDataset.from_captions(captions()))
    write_latents(model, processor, samples, tmp_path / "latents", batch_size=len(samples))
    latents = TransfusionDataset.from_latents(read(tmp_path / "latents", tmp_path / "cache", streaming))
    losses, gradients = [], []
    for source in (samples, list(latents)):
        torch.manual_seed(1)
        batch = TransfusionDataCollator(processor)(source)
        output = model(**batch)  # in evaluation, where t and noise are the image's own
        losses.append(torch.stack([output.lm_loss, output.diffusion_loss]).detach())
        parameter = model.get_input_embeddings().weight
        gradients.append(torch.autograd.grad(output.loss, parameter)[0])
    assert ("latents" in batch) and torch.equal(batch["image_loss_mask"][:3], torch.tensor([False, True, True]))
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=tiny.ROUNDING)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-5)


def test_latents_are_read_back_bit_by_bit(tmp_path):
    model, processor = model_and_processor()
    write_latents(model, processor, edits(), tmp_path / "latents", batch_size=3)
    rows = list(TransfusionDataset.from_latents(read(tmp_path / "latents", tmp_path / "cache")))
    pictures = [picture for sample in edits() for picture in sample.get("images", [sample.get("image")]) if picture]
    pixel_values = processor.image_processor(pictures)["pixel_values"]
    (expected,) = model.encode_images(pixel_values)
    assert torch.equal(torch.stack([latent for row in rows for latent in row["latents"]]), expected)
    assert [row["text"] for row in rows] == [sample["text"] for sample in edits()]
    assert rows[2]["max_timesteps"] == [500] and "max_timesteps" not in rows[0] and rows[1]["latents"] == []


@pytest.mark.parametrize("kind", ["map", "stream", "samples"])
def test_a_run_that_was_broken_off_gives_the_same_bytes(tmp_path, kind):
    model, processor = model_and_processor()

    def source(broken: tuple[int, ...] = ()):
        rows = captions((1, *broken))
        if kind == "samples":
            return list(TransfusionDataset.from_captions(rows))
        rows = rows.to_iterable_dataset(num_shards=2) if kind == "stream" else rows
        return TransfusionDataset.from_captions(rows, shuffle=True, buffer_size=4)

    def killed(samples, count: int):
        yield from islice(samples, count)
        raise KeyboardInterrupt

    sizes = {"batch_size": 2, "shard_size": 3}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    write_latents(model, processor, source(), whole, **sizes)
    assert len(shards(whole)) == 4
    dataset = source()
    if kind == "samples":
        dataset = killed(dataset, 8)
    else:
        rows, to_sample = count(), dataset.to_sample

        def killed_sample(row: dict) -> dict:
            if next(rows) == 8:
                raise KeyboardInterrupt
            return to_sample(row)

        dataset.to_sample = killed_sample
    with pytest.raises(KeyboardInterrupt):
        write_latents(model, processor, dataset, resumed, **sizes)
    assert list(shards(resumed)) == ["shard-00000.parquet", "shard-00001.parquet"]
    (resumed / "shard-00002.parquet.tmp").write_bytes(b"half a shard")
    write_latents(model, processor, source(), resumed, **sizes)
    assert shards(resumed) == shards(whole)
    write_latents(model, processor, source(), resumed, **sizes)
    assert shards(resumed) == shards(whole)


def test_resuming_reads_on_from_where_it_was_and_decodes_nothing_twice(tmp_path):
    model, processor = model_and_processor()
    rows = captions((0, 1))
    with pytest.warns(UserWarning, match="Skipped"):
        write_latents(
            model, processor, TransfusionDataset.from_captions(rows.select(range(5))), tmp_path, shard_size=3
        )
    # Would raise at the first row.
    write_latents(model, processor, TransfusionDataset.from_captions(rows, on_error="raise"), tmp_path, shard_size=3)
    texts = [row["text"] for row in read(tmp_path, tmp_path / "cache")]
    assert texts == [f"caption {i}" for i in range(2, 11)]


def test_another_model_or_processing_is_refused(tmp_path):
    model, processor = model_and_processor()
    write_latents(model, processor, edits(), tmp_path)
    written = shards(tmp_path)
    other, _ = model_and_processor(seed=1)
    rescaled, _ = model_and_processor()
    rescaled.config.vae_config["scaling_factor"] = 0.8
    for changed in (other, rescaled):
        with pytest.raises(ValueError, match=r"holds latents made with another vae\. Continue with the same"):
            write_latents(changed, processor, edits(), tmp_path)
    with pytest.raises(ValueError, match="made with another batch_size, shard_size"):
        write_latents(model, processor, edits(), tmp_path, batch_size=1, shard_size=1)
    processor.image_processor.size = {"shortest_edge": 9}
    with pytest.raises(ValueError, match="made with another image_processor"):
        write_latents(model, processor, edits(), tmp_path)
    with pytest.raises(ValueError, match="`batch_size` and `shard_size` must be at least 1; got 0 and 1000"):
        write_latents(model, processor, edits(), tmp_path, batch_size=0)
    assert shards(tmp_path) == written


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "A sample has `messages`, which is not stored with latents",
        ),
        ({"text": "a<image>", "latents": torch.zeros(1, 2, 4, 4)}, "A sample has `latents`, which is not stored"),
        ({"texts": "a"}, "A sample has no `text`"),
        (
            {"text": "a", "image": None, "image_loss_mask": [True]},
            "`image_loss_mask` must hold one value for each of 0",
        ),
    ],
)
def test_what_latents_would_lose_is_refused(tmp_path, sample, message):
    with pytest.raises(ValueError, match=message):
        write_latents(*model_and_processor(), [sample], tmp_path)


def test_images_of_several_sizes_and_no_vae_work_too(tmp_path):
    model = tiny.model(latent_channels=3)
    processor = TransfusionProcessor.for_model(model, byte_tokenizer())
    processor.image_processor.do_resize = processor.image_processor.do_center_crop = False
    sizes = [(4, 4), (8, 4), (4, 4)]
    samples = [{"text": str(size), "image": PILImage.new("RGB", size, "red")} for size in sizes]
    write_latents(model, processor, samples, tmp_path)
    latents = TransfusionDataset.from_latents(read(tmp_path, tmp_path / "cache"))
    assert [row["latents"][0].shape for row in latents] == [(3, height, width) for width, height in sizes]
    assert all(torch.equal(row["latents"][0][:, 0, 0], torch.tensor([1.0, -1.0, -1.0])) for row in latents)


def test_the_command_writes_what_the_function_does(tmp_path, capsys):
    model, processor = model_and_processor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    captions((2,)).rename_columns({"image": "picture", "text": "words"}).to_parquet(tmp_path / "data" / "a.parquet")
    arguments = [str(tmp_path / name) for name in ("model", "data", "by_command")]
    with pytest.warns(UserWarning, match="Skipped"):
        main([*arguments, "--image_column=picture", "--caption_column=words", "--streaming", "--shard_size=4"])
        write_latents(
            model, processor, TransfusionDataset.from_captions(captions((2,))), tmp_path / "by_hand", shard_size=4
        )
    assert shards(tmp_path / "by_command") == shards(tmp_path / "by_hand")
    assert "1 broken rows skipped" in capsys.readouterr().out
    assert json.loads((tmp_path / "by_hand" / MANIFEST).read_text())["num_samples"] == 10
