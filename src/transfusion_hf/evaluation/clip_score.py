"""Text to image: CLIP score (Table 1, arXiv 2408.11039)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, PreTrainedModel

from ..processing_transfusion import TransfusionProcessor
from .captioned import PROMPTS, draw_prompts, read_captioned
from .judges import CLIP, load_clip
from .run import Result, Run, Score, Task, TaskResult, Verdict, digest, fingerprint, open_picture, require_images


@dataclass
class CLIPScoreTask(Task):
    """
    100 × the cosine of a drawing and its prompt in CLIP's space (Table 3: 25.5). The paper does not say which CLIP.

    Args:
        data (`str`, path or `Sequence`): See [`read_captioned`]; one caption of each picture is its prompt. For the
            paper's number: a folder with Karpathy's `dataset_coco.json` and COCO's `val2014`.
        clip (`str`, defaults to `"openai/clip-vit-large-patch14"`): A CLIP of transformers, in a folder or on the Hub.
        num_samples (`int`, defaults to 30,000): A seeded choice of so many pictures' captions, or all if there are
            fewer.
        split (`str`, *optional*): Defaults to all of `val2014`, and to `"train"` where `datasets` reads.

    Raises (in `prepare`):
        ValueError, OSError: no data, no CLIP.
    """

    data: Any = None
    clip: str | os.PathLike = CLIP
    num_samples: int | None = 30_000
    split: str | None = None
    name: str = "clip-score"

    modalities: ClassVar[str] = "text → image"

    def prepare(self, model: PreTrainedModel, processor: TransfusionProcessor) -> None:
        require_images(model, self.name)
        self._model, self._processor = load_clip(self.clip)
        pictures = read_captioned(self.data, self.name, self.split, "val2014", are_read=False)
        self._pictures = pictures.sample(self.num_samples)

    def run(self, run: Run) -> TaskResult:
        prompts = self._pictures.prompts()
        files, drawn_with = draw_prompts(run, prompts)
        model = self._model.to(run.model.device)

        def score(indices: list[int], rows: list[tuple[Path, str]]) -> list[Result]:
            images = [open_picture(file) for file, _ in rows]
            cosines = clip_cosines(model, self._processor, images, [prompt for _, prompt in rows])
            return [{"score": 100 * cosine} for cosine in cosines.tolist()]

        settings: Result = {"clip": fingerprint(model), "drawings": digest(drawn_with)}
        lines = run.map(f"{self.name}/scores", list(zip(files, prompts, strict=True)), score, settings)
        model.cpu()
        values = [line["score"] for line in lines]
        shown = zip(files, prompts, values, strict=True)
        settings = {
            **self._pictures.settings,
            "prompts": PROMPTS,
            "drawing": drawn_with,
            "clip": str(self.clip),
            "clip_revision": getattr(model.config, "_commit_hash", None),
            "clip_fingerprint": settings["clip"],
            "score": f"100 × cosine, float32; prompts cut to {_max_length(model)} tokens",
            "clip_images": _describe(self._processor.image_processor),
            "interval": "bootstrap over drawings",
        }
        verdicts = [Verdict(file, f"{prompt} ({value:.1f})") for file, prompt, value in shown]
        return TaskResult({"CLIP score": Score.of(np.mean, values)}, settings, verdicts)


@torch.no_grad()
def clip_cosines(
    model: CLIPModel, processor: CLIPProcessor, images: list[Image.Image], texts: list[str]
) -> torch.Tensor:
    """The cosine of each image and its text, float32 `(num_images,)`. Texts are truncated to CLIP's maximum length."""
    options = {"padding": True, "truncation": True, "max_length": _max_length(model)}
    inputs = processor(text=texts, images=images, return_tensors="pt", **options).to(model.device)
    output = model(**inputs)
    return (output.image_embeds * output.text_embeds).sum(-1).cpu()  # both of length 1


def _max_length(model: CLIPModel) -> int:
    return model.config.text_config.max_position_embeddings


def _describe(images: Any) -> str:
    return f"size {dict(images.size)}, crop {dict(images.crop_size)}, resample {int(images.resample)}"
