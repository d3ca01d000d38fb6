"""Latents computed once, for training without the autoencoder: `transfusion latents MODEL DATASET OUTPUT`."""

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM
from transformers.utils import logging

from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from ..processing_transfusion import TransfusionProcessor
from .collator import images_of, per_image, text_of
from .dataset import TransfusionDataset, hf_datasets, load_rows

MANIFEST = ".manifest.json"  # hidden, so that `datasets` does not take it for data
_list = hf_datasets.List
_FEATURES = {
    "text": hf_datasets.Value("string"),
    "latents": _list(_list(_list(_list(hf_datasets.Value("float32"))))),  # image, channel, row, column
    "image_loss_mask": _list(hf_datasets.Value("bool")),
    "max_timesteps": _list(hf_datasets.Value("int64")),
}


def write_latents(
    model: TransfusionForCausalLMAndDiffusion,
    processor: TransfusionProcessor,
    dataset: Iterable[dict[str, Any]],
    output_dir: str | os.PathLike,
    batch_size: int = 32,
    shard_size: int = 1000,
) -> None:
    """
    Writes samples with float32 latents in place of images (§4.1), in files `shard-00000.parquet` and so on. Training
    on them equals training on the images, cropped and resized, since both use the mode of the VAE's posterior. A run
    that was interrupted continues after its last complete shard, and writes the same bytes.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`): Its VAE encodes; without one, pixels are latents.
        processor (`TransfusionProcessor`): The model's.
        dataset (`TransfusionDataset`, or any iterable of samples): To continue, the same in the same order.
        output_dir (`str` or `os.PathLike`): A separate folder for each process, if several share the work.
        batch_size (`int`, defaults to 32): Samples to encode at once.
        shard_size (`int`, defaults to 1000): Samples per file.

    Raises:
        ValueError: `output_dir` holds latents from another VAE, image processor or sizes; a size below 1; a sample
            without `text`, or one with more than text, images and their `image_loss_mask` and `max_timesteps`.
    """
    import pyarrow.parquet  # comes with `datasets`

    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"`batch_size` and `shard_size` must be at least 1; got {batch_size} and {shard_size}.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    made_with = {"vae": _digest(model), "image_processor": json.loads(processor.image_processor.to_json_string())}
    made_with |= {"batch_size": batch_size, "shard_size": shard_size}  # a batch's size changes the last digits
    manifest: dict[str, Any] = {"made_with": made_with, "num_shards": 0, "num_samples": 0, "dataset": None}
    if (folder / MANIFEST).exists():
        manifest = json.loads((folder / MANIFEST).read_text())
        if others := [name for name, value in made_with.items() if manifest["made_with"][name] != value]:
            what = f"`output_dir` {folder} holds latents made with another {', '.join(others)}"
            raise ValueError(f"{what}. Continue with the same, or choose another folder.")
    num_done, resumable = manifest["num_samples"], dataset if isinstance(dataset, TransfusionDataset) else None
    if resumable is not None and manifest["dataset"] is not None:
        resumable.load_state_dict(manifest["dataset"])
    samples = islice(dataset, num_done, None) if resumable is None else iter(resumable)
    total = length_hint(dataset) or None
    samples = iter(logging.tqdm(samples, desc="latents", unit=" samples", initial=num_done, total=total))
    while shard := list(islice(samples, shard_size)):
        batches = (shard[start : start + batch_size] for start in range(0, len(shard), batch_size))
        rows = [row for batch in batches for row in _encode(model, processor, batch)]
        table = hf_datasets.Dataset.from_list(rows, features=hf_datasets.Features(_FEATURES)).data.table
        file = folder / f"shard-{manifest['num_shards']:05}.parquet"
        pyarrow.parquet.write_table(table, f"{file}.tmp")  # `to_parquet` shows a progress bar for each file
        os.replace(f"{file}.tmp", file)
        manifest["num_shards"] += 1
        manifest["num_samples"] += len(rows)
        manifest["dataset"] = None if resumable is None else resumable.state_dict()
        (folder / f"{MANIFEST}.tmp").write_text(json.dumps(manifest, indent=2))
        os.replace(folder / f"{MANIFEST}.tmp", folder / MANIFEST)


def _encode(
    model: TransfusionForCausalLMAndDiffusion, processor: TransfusionProcessor, samples: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    for sample in samples:
        if lost := [name for name in ("messages", "latents", "read_images_as") if sample.get(name) is not None]:
            raise ValueError(
                f"A sample has `{lost[0]}`, which is not stored with latents; expected `text`, images, and their "
                "`image_loss_mask` and `max_timesteps`. Write a chat as `text`, for example by "
                "`processor.apply_chat_template`; train on other samples without `write_latents`."
            )
    images = [images_of(sample) for sample in samples]
    stacks: Iterable[torch.Tensor] = ()
    if any(images):
        pixel_values = processor.image_processor([*chain(*images)])["pixel_values"]
        stacks = model.encode_images([pixels.to(model.device) for pixels in pixel_values])
    latents = (latent for stack in stacks for latent in stack.float().cpu().numpy())
    rows = []
    for sample, own in zip(samples, images, strict=True):
        row: dict[str, Any] = {"text": text_of(sample), "latents": [*islice(latents, len(own))]}
        for name in ("image_loss_mask", "max_timesteps"):
            row[name] = None if sample.get(name) is None else per_image(sample, name, own)
        rows.append(row)
    return rows


def _digest(model: TransfusionForCausalLMAndDiffusion) -> str | None:
    """Hash of the VAE's configuration and weights."""
    if model.vae is None:
        return None
    digest = hashlib.sha256(json.dumps(model.config.vae_config, sort_keys=True).encode())
    for name, weight in sorted(model.vae.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """`transfusion latents`: writes the latents of a dataset of images with captions."""
    parser = argparse.ArgumentParser("transfusion latents", description=__doc__)
    parser.add_argument("model", help="a folder or a repository of the Hub")
    parser.add_argument("dataset", help="a folder of pictures, files (a pattern) or a repository of the Hub")
    parser.add_argument("output_dir", type=Path)
    for name, default in (("split", "train"), ("image_column", "image"), ("caption_column", "text")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--streaming", action="store_true", help="do not download first")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--shard_size", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    model = AutoModelForMultimodalLM.from_pretrained(args.model).to(args.device)
    processor = TransfusionProcessor.from_pretrained(args.model)
    rows = load_rows(args.dataset, args.streaming, args.split)
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    dataset = TransfusionDataset.from_captions(rows, **columns, image_token=processor.image_token)
    write_latents(model, processor, dataset, args.output_dir, args.batch_size, args.shard_size)
    print(f"{args.output_dir}: done, {dataset.num_skipped} broken rows skipped")
