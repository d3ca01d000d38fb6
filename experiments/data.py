"""
The data of the comparisons: English text, pictures of shapes with captions, and what two autoencoders make of the
pictures: latents for Transfusion and codes for Chameleon.

    OMP_NUM_THREADS=1 python experiments/data.py

fetches and computes everything once, in `outputs/experiments`, and prints how well the autoencoders reconstruct. The
packages with the text (`sources.py`) are downloaded by pip into that folder, not into the environment. File names
include a hash of the settings, so results computed with other settings are never reused by mistake.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chameleon import encode_images
from datasets import Dataset, Features, Image
from diffusers import AutoencoderKL, VQModel
from filelock import FileLock
from sources import PACKAGES, passages, plays, wikipedia
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from transfusion_hf import TransfusionImageProcessor
from transfusion_hf.data.shapes import COLORS, KINDS, Box, Scene, ShapeGroup, check_scene, draw_scene
from transfusion_hf.evaluation.shapes import judge_caption
from transfusion_hf.processing_transfusion import IMAGE_TOKENS, add_image_tokens

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))
from package_data import fetch_python  # noqa: E402

SPLITS = ("train", "held_out")
# By scale: the side of the pictures, and one architecture and training for both autoencoders. "paper" has those of the
# paper, which are the script's defaults. L1 alone: there is no LPIPS network here, and shapes need no texture.
AUTOENCODERS = {
    "small": (
        32,
        """--image_size 32 --latent_channels 4 --block_out_channels 16 32 64 --layers_per_block 1 --norm_num_groups 8
        --perceptual_weight 0 --identity_weight 0 --gan_weight 0 --train_batch_size 8 --learning_rate 2e-3
        --lr_scheduler cosine --lr_warmup_steps 50 --dataloader_num_workers 0""",
    ),
    "paper": (256, "--image_size 256 --perceptual_weight 0 --identity_weight 0 --gan_weight 0 --mixed_precision bf16"),
}
KEPT = """--report_to none --eval_steps 1000000 --checkpointing_steps 500 --checkpoints_total_limit 1
    --resume_from_checkpoint latest"""
AUTOENCODER_KINDS = {
    "kl": {"small": "", "paper": ""},
    "vq": {"small": "--vq --num_codes 512 --restart_codes_after 50", "paper": "--vq --restart_codes_after 50"},
}


def digest(settings: Any) -> str:
    """A short name for whatever JSON can write."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Pictures:
    """
    Two shapes that differ, one left of the other or above it, each near the middle of its half: 612 captions. Picture
    i, `{"text", "image"}`, depends only on `seed` and i.

    A caption leaves only sizes and a few pixels open. Where places are free, as in `ShapesDataset`, it says little
    about the pixels, and small models draw without regard to it for longer than these comparisons train.
    """

    num_pictures: int
    size: int
    seed: int

    def __len__(self) -> int:
        return self.num_pictures

    def scene(self, index: int) -> Scene:
        rng = np.random.default_rng([self.seed, index])
        looks = rng.choice([(color, kind) for color in COLORS for kind in KINDS], 2, replace=False)
        groups = tuple(ShapeGroup(1, str(color), str(kind)) for color, kind in looks)
        axis, half, boxes = int(rng.integers(2)), self.size // 2, []
        for i in range(2):
            side = int(rng.integers(5 * half // 8, 7 * half // 8, endpoint=True))
            along = i * half + rng.integers(half - side)  # a pixel remains between them
            across = (self.size - side) // 2 + rng.integers(-half // 8, half // 8, endpoint=True)
            left, top = (int(x) for x in ((along, across), (across, along))[axis])
            boxes.append((Box(left, top, left + side, top + side),))
        return Scene(self.size, self.size, groups, ("left of", "above")[axis], tuple(boxes))

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        return {"text": scene.caption, "image": draw_scene(scene)}


@dataclass(frozen=True)
class Data:
    """
    Location and size of the data. `split` is always `"train"` or `"held_out"` (`ValueError` otherwise).

    Args:
        folder (`Path`): Keeps everything that is computed.
        packages (`Path`, *optional*): Folder of `PACKAGES`; missing ones are installed there. By default in `folder`.
        num_pictures, num_held_out (`int`): Pictures of each split. Picture i depends only on `seed` and i.
        vocab_size (`int`, defaults to 1024): Size of the tokenizer, before the image tokens are added.
        vae_steps (`int`, defaults to 4000): Training steps of each autoencoder.
        seed (`int`, defaults to 0)
        scale (`str`, defaults to `"small"`): One of `AUTOENCODERS`.
    """

    folder: Path = Path("outputs/experiments")
    packages: Path | None = None
    num_pictures: int = 40_000
    num_held_out: int = 1_000
    vocab_size: int = 1024
    vae_steps: int = 4_000
    seed: int = 0
    scale: str = "small"

    def cached(self, name: str, settings: Any, write: Callable[[Path], None], suffix: str = "") -> Path:
        """The file that `write` makes once for `settings`; it is complete if it is there."""
        file = self.folder / f"{name}-{digest(settings)}{suffix}"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f"unfinished-{os.getpid()}-{file.name}")
            try:
                write(unfinished)
                os.replace(unfinished, file)
            finally:
                unfinished.unlink(missing_ok=True)
        return file

    def identity(self, kinds: Sequence[str]) -> dict[str, Any]:
        """All settings of the data of a model that needs these autoencoders, for JSON."""
        fields = {name: value for name, value in vars(self).items() if name in self.__dataclass_fields__}
        del fields["folder"], fields["packages"]
        return {**fields, "texts": PACKAGES, "autoencoders": [*map(self.autoencoder_flags, kinds)]}

    @cached_property
    def _documents(self) -> dict[str, list[str]]:
        def write(file: Path) -> None:
            packages = self.packages or self.folder / "packages"
            fetch_python(packages, PACKAGES)
            documents: dict[str, list[str]] = {split: [] for split in SPLITS}
            for source in ([*wikipedia(packages)], plays(packages)):
                # The same share of both sources is held out.
                order = np.random.default_rng(self.seed).permutation(len(source))
                num_held_out = max(1, len(source) // 10)
                documents["held_out"] += [source[i] for i in order[:num_held_out]]
                documents["train"] += [source[i] for i in order[num_held_out:]]
            file.write_text(json.dumps(documents))

        return json.loads(self.cached("texts", [PACKAGES, self.seed], write, ".json").read_text())

    def texts(self, split: str) -> list[str]:
        """Whole articles and plays; a tenth of both is held out."""
        return self._documents[_check(split)]

    def passages(self, split: str, max_tokens: int) -> list[str]:
        """The texts, cut at white space for rows of `max_tokens`."""
        texts, tokenizer = self.texts(split), self.tokenizer()

        def write(file: Path) -> None:
            file.write_text(json.dumps([part for text in texts for part in passages(text, tokenizer, max_tokens)]))

        settings = [texts, tokenizer.backend_tokenizer.to_str(), max_tokens]
        return json.loads(self.cached("passages", settings, write, ".json").read_text())

    def pictures(self, split: str) -> Pictures:
        is_train = _check(split) == "train"
        num_pictures = self.num_pictures if is_train else self.num_held_out
        return Pictures(num_pictures, AUTOENCODERS[self.scale][0], seed=2 * self.seed + (not is_train))

    def captions(self, split: str) -> list[str]:
        pictures = self.pictures(split)

        def write(file: Path) -> None:
            file.write_text(json.dumps([pictures.scene(i).caption for i in range(len(pictures))]))

        return json.loads(self.cached("captions", asdict(pictures), write, ".json").read_text())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A byte-level BPE of the training texts and captions, with the image tokens; a text begins with `<s>`."""

        def write(file: Path) -> None:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            special_tokens = ["<pad>", "<s>", "</s>"]
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(
                vocab_size=self.vocab_size,
                special_tokens=special_tokens,
                initial_alphabet=alphabet,
                show_progress=False,
            )
            tokenizer.train_from_iterator(self.texts("train") + self.captions("train"), trainer)
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
            tokenizer.save(str(file))

        settings = [self.texts("train"), self.captions("train"), self.vocab_size]
        file = self.cached("tokenizer", settings, write, ".json")
        special_tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        fast = PreTrainedTokenizerFast(tokenizer_file=str(file), padding_side="left", **special_tokens)
        add_image_tokens(fast, IMAGE_TOKENS)
        return fast

    def autoencoder(self, kind: str) -> AutoencoderKL | VQModel:
        """The `AutoencoderKL` (`"kl"`) or its discrete twin (`"vq"`), trained by `examples/train_vae.py`."""
        folder = self.autoencoder_folder(kind)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (folder / "results.json").is_file():  # written last; an interrupted training continues
                where = ["--dataset_name", str(self._written_pictures()), "--output_dir", str(folder)]
                command = [sys.executable, str(EXAMPLES / "train_vae.py"), *self.autoencoder_flags(kind), *where]
                # One thread, so that the weights do not depend on the number of cores.
                subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        return (AutoencoderKL if kind == "kl" else VQModel).from_pretrained(folder / "vae").eval()

    def autoencoder_flags(self, kind: str) -> list[str]:
        if kind not in AUTOENCODER_KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(AUTOENCODER_KINDS)}; got {kind!r}.")
        numbers = {
            "max_train_steps": self.vae_steps,
            "seed": self.seed,
            "num_eval_images": min(256, self.num_pictures // 8),
        }
        flags = " ".join([AUTOENCODERS[self.scale][1], KEPT, AUTOENCODER_KINDS[kind][self.scale]]).split()
        return [*flags, *(f"--{name}={number}" for name, number in numbers.items())]

    def autoencoder_folder(self, kind: str) -> Path:
        settings = [self.autoencoder_flags(kind), asdict(self.pictures("train"))]
        return self.folder / f"{kind}-{digest(settings)}"

    def _written_pictures(self) -> Path:
        pictures = self.pictures("train")

        def rows() -> Iterator[dict[str, Any]]:
            for i in tqdm(range(len(pictures)), desc="pictures"):
                pictures[i]["image"].save(png := io.BytesIO(), "PNG")
                yield {"image": {"bytes": png.getvalue(), "path": None}}

        def write(file: Path) -> None:
            Dataset.from_list([*rows()], features=Features({"image": Image()})).to_parquet(file)

        return self.cached("pictures", asdict(pictures), write, ".parquet")

    def latents(self, split: str) -> np.ndarray:
        """Latents, float32 `(num_pictures, channels, height, width)`, normalized to mean 0 and variance 1."""
        vae: Any = self.autoencoder("kl")

        def encode(pixel_values: torch.Tensor) -> torch.Tensor:
            latents = vae.encode(pixel_values).latent_dist.mode()
            return (latents - vae.config.shift_factor) * vae.config.scaling_factor

        return self._encoded("kl", split, encode)

    def codes(self, split: str) -> np.ndarray:
        """The codes of the pictures, int64 `(num_pictures, height, width)`."""
        return self._encoded("vq", split, partial(encode_images, self.autoencoder("vq")))

    @torch.no_grad()
    def _encoded(self, kind: str, split: str, encode: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        pictures = self.pictures(split)
        weights = (self.autoencoder_folder(kind) / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()

        def write(file: Path) -> None:
            with open(file, "wb") as opened:  # `np.save` would add a suffix to a name
                np.save(opened, np.concatenate([encode(batch).numpy() for batch in _batches(pictures)]))

        name = {"kl": "latents", "vq": "codes"}[kind]
        settings = [hashlib.sha256(weights).hexdigest(), asdict(pictures)]
        return np.load(self.cached(name, settings, write, ".npy"))

    @torch.no_grad()
    def ceiling(self, kind: str) -> dict[str, float]:
        """
        What is left of the held-out pictures after an autoencoder: PSNR in dB (mean over pictures), and the shares
        that the checker still reads right, by caption and with every shape in its place. No model that draws through
        it can be expected to draw better. For `"vq"` also the share of the codes in use.
        """
        vae: Any = self.autoencoder(kind)
        pictures, processor = self.pictures("held_out"), TransfusionImageProcessor()
        psnr, drawn = [], []
        for pixel_values in _batches(pictures):
            decoded = vae(pixel_values).sample.clamp(-1, 1)
            psnr += (10 * torch.log10(4 / (decoded - pixel_values).square().mean(dim=(1, 2, 3)))).tolist()
            drawn += processor.postprocess(decoded)
        scenes = [pictures.scene(i) for i in range(len(pictures))]
        pairs = [*zip(drawn, scenes, strict=True)]
        result = {
            "psnr": float(np.mean(psnr)),
            "caption_right": float(np.mean([judge_caption(picture, scene.caption) for picture, scene in pairs])),
            "scene_right": float(np.mean([check_scene(picture, scene).correct for picture, scene in pairs])),
        }
        if kind == "vq":
            result["codes_used"] = len(np.unique(self.codes("train"))) / vae.config.num_vq_embeddings
        return result


def _check(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}; got {split!r}.")
    return split


def _batches(pictures: Pictures, size: int = 100) -> Iterator[torch.Tensor]:
    """Pixels of shape `(batch, 3, height, width)` in [−1, 1]."""
    processor = TransfusionImageProcessor(do_resize=False, do_center_crop=False)
    for start in tqdm(range(0, len(pictures), size), desc="encode"):
        images = [pictures[i]["image"] for i in range(start, min(start + size, len(pictures)))]
        yield torch.stack([*processor(images)["pixel_values"]])


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Data.folder)
    data = Data(parser.parse_args(argv).folder)
    ceilings = {kind: data.ceiling(kind) for kind in AUTOENCODER_KINDS}
    for split in SPLITS:
        texts, tokenizer = data.texts(split), data.tokenizer()
        num_tokens = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
        shapes = data.latents(split).shape, data.codes(split).shape
        print(f"{split}: {len(texts)} texts of {num_tokens:,} tokens; latents {shapes[0]}, codes {shapes[1]}")
    (data.folder / "ceilings.json").write_text(json.dumps(ceilings, indent=2) + "\n")
    print(json.dumps(ceilings, indent=2))
    return ceilings


if __name__ == "__main__":
    main()
