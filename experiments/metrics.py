"""
The metrics of the comparisons, the same for all families: perplexity of held-out text, drawings by the exact checker
and by a Fréchet distance, captions of held-out pictures.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chameleon import ChameleonTwinForConditionalGeneration, decode_images, draw_codes, write_captions
from data import Data
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from transfusion_hf import TransfusionForCausalLMAndDiffusion, TransfusionImageProcessor
from transfusion_hf.data.shapes import COLORS, KINDS, Scene, check_caption
from transfusion_hf.evaluation import perplexity
from transfusion_hf.evaluation.cider import cider, tokenize
from transfusion_hf.evaluation.fid import frechet_distance
from transfusion_hf.evaluation.shapes import judge_caption

ASPECTS = ("color", "kind", "count", "position")
BATCH_SIZE = 100
NUM_INFERENCE_STEPS = 25  # 250 in the paper (§4.1)
NUM_SHOWN = 8


class ShapesFeatures(nn.Module):
    """
    A classifier of real pictures: how many shapes of each color and kind there are. Its last hidden layer gives the
    features of the Fréchet distance, which is not FID. Trained once for all runs, in seconds.
    """

    num_features = 32

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GELU(), nn.Conv2d(64, 64, 3, 2, 1),
            nn.GELU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, self.num_features), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, len(COLORS) * len(KINDS))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(num_images, num_features)` of pictures, `(num_images, 3, height, width)` in [−1, 1]."""
        return self.body(pixel_values)

    @classmethod
    def trained(cls, data: Data, num_pictures: int = 8000, num_epochs: int = 4) -> "ShapesFeatures":
        pictures, model = data.pictures("train"), cls()
        num_pictures = min(num_pictures, len(pictures))

        def write(file: Path) -> None:
            pixel_values = _pixels([pictures[i]["image"] for i in range(num_pictures)])
            counts = torch.tensor([_counts(pictures.scene(i)) for i in range(num_pictures)])
            with torch.random.fork_rng(), torch.enable_grad():
                torch.manual_seed(0)
                model = cls()
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
                for _ in range(num_epochs):
                    for batch in torch.randperm(num_pictures).split(64):
                        optimizer.zero_grad()
                        predicted = model.head(model(pixel_values[batch]))
                        nn.functional.mse_loss(predicted, counts[batch]).backward()
                        optimizer.step()
            save_file(model.state_dict(), file)

        settings = [asdict(pictures), num_pictures, num_epochs]
        model.load_state_dict(load_file(data.cached("features", settings, write, ".safetensors")))
        return model.eval().requires_grad_(False)


def _counts(scene: Scene) -> list[float]:
    looks = [(shape.color, shape.kind) for shape in scene.shapes]
    return [float(looks.count((color, kind))) for color in COLORS for kind in KINDS]


def _pixels(pictures: list[Image.Image]) -> torch.Tensor:
    processor = TransfusionImageProcessor(do_resize=False, do_center_crop=False)
    return torch.stack([*processor(pictures)["pixel_values"]])


@dataclass
class Judge:
    """
    Measures models on held-out data.

    Args:
        data (`Data`)
        max_length (`int`): Tokens of a passage of text.
        num_texts (`int`): Passages of text.
        num_pictures (`int`): Held-out pictures, to be captioned and to be drawn from their captions.
        num_inference_steps (`int`): Of drawings.
        guidance_scale (`float`, defaults to 3): The paper's, in its ablations.
        guidance_scales (`tuple[float, ...]`): All are tried at the end of a run: a scale that suits one family may
            spoil another's drawings. The paper has 5 in the comparison with Chameleon.
    """

    data: Data
    max_length: int
    num_texts: int = 100
    num_pictures: int = 200
    num_inference_steps: int = NUM_INFERENCE_STEPS
    guidance_scale: float = 3.0
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)

    def identity(self) -> dict[str, Any]:
        """All settings of the measurements, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "data"}

    @cached_property
    def features(self) -> ShapesFeatures:
        return ShapesFeatures.trained(self.data)

    @cached_property
    def _texts(self) -> list[str]:
        passages = self.data.passages("held_out", self.max_length)
        order = np.random.default_rng(0).permutation(len(passages))
        return [passages[i] for i in order[: self.num_texts]]

    @cached_property
    def _captions(self) -> list[str]:
        return self.data.captions("held_out")[: self.num_pictures]

    @cached_property
    def _pictures(self) -> list[Image.Image]:
        held_out = self.data.pictures("held_out")
        return [held_out[i]["image"] for i in range(len(self._captions))]

    @cached_property
    def _real_moments(self) -> tuple[np.ndarray, np.ndarray]:
        held_out = self.data.pictures("held_out")
        return self._moments([held_out[i]["image"] for i in range(len(held_out))])

    def shown(self) -> list[tuple[str, Image.Image]]:
        """Caption and real picture of the drawings that `__call__` keeps."""
        return [*zip(self._captions[:NUM_SHOWN], self._pictures, strict=False)]

    @torch.no_grad()
    def __call__(self, model: Any, processor: Any, kept: Path | None = None) -> dict[str, float]:
        """
        Args:
            model: Of any family, in evaluation mode.
            processor (`TransfusionProcessor`, or the tokenizer of the others)
            kept (`Path`, *optional*): At the end of a run: file for the first drawings side by side. Then all
                `guidance_scales` are tried.

        Returns `perplexity`, and for models of images `drawn`, the share of drawings that are right in each of
        `ASPECTS`, and the share for each aspect; `frechet_distance` to all held-out pictures; `captioned`, the share
        of true and complete captions; `cider`.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        metrics = {"perplexity": perplexity(model, tokenizer, self._texts, self.max_length).perplexity}
        if isinstance(model, TransfusionForCausalLMAndDiffusion):
            draw, captions = self._draw_transfusion, self._caption_transfusion
        elif isinstance(model, ChameleonTwinForConditionalGeneration) and model.config.num_image_codes:
            draw, captions = self._draw_chameleon, self._caption_chameleon
        else:
            return metrics
        drawn = draw(model, processor, self.guidance_scale)
        metrics |= self._judged(drawn)
        metrics |= self._judged_captions(captions(model, processor))
        if kept is None:
            return metrics
        make_image_grid(drawn[:NUM_SHOWN], 1, len(drawn[:NUM_SHOWN])).save(kept)
        for scale in self.guidance_scales:
            judged = metrics if scale == self.guidance_scale else self._judged(draw(model, processor, scale))
            metrics |= {f"{name}@{scale:g}": judged[name] for name in ("drawn", "frechet_distance")}
        return metrics

    def _draw_transfusion(self, model: Any, processor: Any, guidance_scale: float) -> list[Image.Image]:
        drawn = []
        for start, prompts in self._batches(self._captions):
            output = model.generate(
                **processor(text=prompts).to(model.device),
                generation_mode="image",
                num_inference_steps=self.num_inference_steps,
                image_guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(prompts))],
            )
            drawn += processor.post_process_multimodal_output(output, generation_mode="image")
        return drawn

    def _caption_transfusion(self, model: Any, processor: Any) -> list[str]:
        captions = []
        for _, pictures in self._batches(self._pictures):
            inputs = processor(text=[processor.image_token] * len(pictures), images=pictures).to(model.device)
            ids = model.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens=24)
            captions += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return captions

    def _draw_chameleon(self, model: Any, tokenizer: Any, guidance_scale: float) -> list[Image.Image]:
        drawn = []
        vq, images = self.data.autoencoder("vq"), TransfusionImageProcessor()
        for start, prompts in self._batches(self._captions):
            inputs = tokenizer([prompt + "<BOI>" for prompt in prompts], padding=True, return_tensors="pt").to(
                model.device
            )
            ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            codes = draw_codes(model, **ids, guidance_scale=guidance_scale, seed=start)
            drawn += images.postprocess(decode_images(vq, codes.cpu()))
        return drawn

    def _caption_chameleon(self, model: Any, tokenizer: Any) -> list[str]:
        codes = torch.from_numpy(self.data.codes("held_out")[: len(self._pictures)])
        captions = []
        for batch in codes.split(BATCH_SIZE):
            captions += tokenizer.batch_decode(
                write_captions(model, batch.to(model.device), max_new_tokens=24), skip_special_tokens=True
            )
        return captions

    def _batches(self, items: list[Any]) -> Iterator[tuple[int, list[Any]]]:
        for start in range(0, len(items), BATCH_SIZE):
            yield start, items[start : start + BATCH_SIZE]

    def _judged(self, drawn: list[Image.Image]) -> dict[str, float]:
        checks = [check_caption(*pair) for pair in zip(drawn, self._captions, strict=True)]
        return {
            "drawn": float(np.mean([check.correct for check in checks])),
            **{name: float(np.mean([getattr(check, name) for check in checks])) for name in ASPECTS},
            "frechet_distance": frechet_distance(*self._moments(drawn), *self._real_moments),
        }

    def _moments(self, pictures: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        features = self.features(_pixels(pictures)).double().numpy()
        return features.mean(0), np.cov(features, rowvar=False)

    def _judged_captions(self, captions: list[str]) -> dict[str, float]:
        captions = [caption.strip() for caption in captions]
        pairs = zip(self._pictures, captions, strict=True)
        texts = [row[0] for row in tokenize([[caption] for caption in captions], "words")]
        references = tokenize([[caption] for caption in self._captions], "words")
        return {
            "captioned": float(np.mean([judge_caption(*pair) for pair in pairs])),
            "cider": float(100 * cider(texts, references).mean()),
        }
