"""
Latents computed once, for training without the autoencoder:

    python -m transfusion_hf.data.latents MODEL DATASET OUTPUT --image_column image --caption_column text
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.utils import logging

from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from ..processing_transfusion import TransfusionProcessor
from .dataset import TransfusionDataset, hf_datasets, images_of

# Hidden, so that `datasets` does not take it for data.
MANIFEST = ".manifest.json"


def write_latents(
    model: TransfusionForCausalLMAndDiffusion,
    processor: TransfusionProcessor,
    dataset: Iterable[dict[str, Any]],
    output_dir: str | os.PathLike,
    batch_size: int = 32,
    shard_size: int = 1000,
) -> None:
    r"""
    Writes samples with latents in place of images (§4.1), in files `shard-00000.parquet` and so on. Training on them
    is training on the images, as cropped and resized by the processor: the VAE's posterior enters by its mode in
    either case. Values are float32. Texts stay as they are, for the collator to arrange.

    A run that was broken off continues after its last whole shard, and writes what it would have written.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`): Its VAE computes, on its device. Without one, images are latents.
        processor (`TransfusionProcessor`): The model's.
        dataset (`TransfusionDataset`, or any iterable of samples): The same, in the same order, when continuing.
        output_dir (`str` or `os.PathLike`): Of its own for each process, where several share the work.
        batch_size (`int`, defaults to 32): Samples to encode at once.
        shard_size (`int`, defaults to 1000): Samples of a file.

    Raises:
        ValueError: `output_dir` holds latents of another VAE, image processor or of other sizes; sizes below 1.

    Example:

    ```python
    >>> write_latents(model, processor, TransfusionDataset.from_captions(captions), "latents")
    >>> latents = load_dataset("parquet", data_dir="latents", split="train", streaming=True)
    >>> pairs = TransfusionDataset.from_latents(latents, shuffle=True)
    ```"""
    import pyarrow.parquet  # comes with `datasets`, whose absence is told by the import of `.data`

    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"`batch_size` and `shard_size` must be at least 1; got {batch_size} and {shard_size}.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    made_with = {
        "vae": _digest(model),
        "image_processor": json.loads(processor.image_processor.to_json_string()),
        "batch_size": batch_size,  # the last digits may depend on it
        "shard_size": shard_size,
    }
    manifest: dict[str, Any] = {"made_with": made_with, "num_shards": 0, "num_samples": 0, "dataset": None}
    if (folder / MANIFEST).exists():
        manifest = json.loads((folder / MANIFEST).read_text())
        if others := [name for name, value in made_with.items() if manifest["made_with"][name] != value]:
            raise ValueError(
                f"`output_dir` {folder} holds latents made with another {', '.join(others)}. Continue with the same, "
                "or choose another folder."
            )
    if isinstance(dataset, TransfusionDataset):
        if manifest["dataset"] is not None:
            dataset.load_state_dict(manifest["dataset"])
        samples = iter(dataset)
    else:
        samples = islice(dataset, manifest["num_samples"], None)
    with logging.tqdm(
        desc="latents", unit=" samples", initial=manifest["num_samples"], total=length_hint(dataset) or None
    ) as progress:
        while shard := list(islice(samples, shard_size)):
            rows: list[dict[str, Any]] = []
            for start in range(0, len(shard), batch_size):
                rows += _encode(model, processor, shard[start : start + batch_size])
                progress.update(len(rows) - start)
            file = folder / f"shard-{manifest['num_shards']:05}.parquet"
            table = hf_datasets.Dataset.from_list(rows, features=_features()).data.table
            pyarrow.parquet.write_table(table, f"{file}.tmp")  # without a progress bar for each
            os.replace(f"{file}.tmp", file)
            manifest["num_shards"] += 1
            manifest["num_samples"] += len(rows)
            manifest["dataset"] = dataset.state_dict() if isinstance(dataset, TransfusionDataset) else None
            (folder / f"{MANIFEST}.tmp").write_text(json.dumps(manifest, indent=2))
            os.replace(folder / f"{MANIFEST}.tmp", folder / MANIFEST)


def _encode(
    model: TransfusionForCausalLMAndDiffusion, processor: TransfusionProcessor, samples: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of samples, latents as arrays."""
    images = [images_of(sample) for sample in samples]
    latents: list[torch.Tensor] = []
    if any(images):
        pixel_values = processor.image_processor([image for some in images for image in some])["pixel_values"]
        stacks = model.encode_images([pixels.to(model.device) for pixels in pixel_values])
        latents = [latent for stack in stacks for latent in stack.float().cpu()]
    remaining = iter(latents)
    return [
        {
            "text": sample["text"],
            "latents": [next(remaining).numpy() for _ in some],
            "image_loss_mask": sample.get("image_loss_mask"),
            "max_timesteps": sample.get("max_timesteps"),
        }
        for sample, some in zip(samples, images, strict=True)
    ]


def _features() -> "hf_datasets.Features":
    latent: Any = hf_datasets.Value("float32")
    for _ in ("width", "height", "channels"):
        latent = hf_datasets.List(latent)
    return hf_datasets.Features(
        {
            "text": hf_datasets.Value("string"),
            "latents": hf_datasets.List(latent),
            "image_loss_mask": hf_datasets.List(hf_datasets.Value("bool")),
            "max_timesteps": hf_datasets.List(hf_datasets.Value("int64")),
        }
    )


def _digest(model: TransfusionForCausalLMAndDiffusion) -> str | None:
    """Of the VAE's configuration and weights."""
    if model.vae is None:
        return None
    digest = hashlib.sha256(json.dumps(model.config.vae_config, sort_keys=True).encode())
    for name, weight in sorted(model.vae.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a repository of the Hub")
    parser.add_argument("dataset", help="what `datasets.load_dataset` takes; images with captions")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--streaming", action="store_true", help="do not download first")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--shard_size", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    model = AutoModelForMultimodalLM.from_pretrained(args.model).to(args.device)
    processor = AutoProcessor.from_pretrained(args.model)
    rows = hf_datasets.load_dataset(args.dataset, split=args.split, streaming=args.streaming)
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    dataset = TransfusionDataset.from_captions(rows, **columns, image_token=processor.image_token)
    write_latents(model, processor, dataset, args.output_dir, args.batch_size, args.shard_size)
    print(f"{args.output_dir}: done, {dataset.num_skipped} broken rows skipped")


__all__ = ["write_latents"]

if __name__ == "__main__":
    main()
