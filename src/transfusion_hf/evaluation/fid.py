"""Text to image: FID (Table 1, arXiv 2408.11039; FID is arXiv 1706.08500)."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.backends import cudnn
from transformers import PreTrainedModel

from ..processing_transfusion import TransfusionProcessor
from .captioned import PROMPTS, as_the_model_sees, draw_prompts, read_captioned
from .run import Result, Run, Score, Task, TaskResult, Verdict, digest, open_picture, require_images

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
NUM_FEATURES = 2048
NUM_GROUPS = 10
STUDENT_T = 2.262157  # of a 95 % interval with NUM_GROUPS - 1 degrees of freedom
BATCH_SIZE = 32  # of pictures for Inception; a run's is for its model

Moments = tuple[np.ndarray, np.ndarray]  # mean (features,) and A (any, features) whose Aᵀ A is the covariance


@dataclass
class FIDTask(Task):
    """
    Zero-shot FID (Table 3: 16.8) between drawings and the pictures whose captions are their prompts, in the 2,048
    features of torch-fidelity's Inception.

    Args:
        data (`str`, path or `Sequence`): See [`read_captioned`]; one caption of each picture is a prompt. For the
            paper's number: a folder with Karpathy's `dataset_coco.json` and COCO's `val2014`.
        inception (`str` or path, *optional*): torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`. By default
            torch-fidelity downloads it.
        statistics (`str` or path, *optional*): An `.npz` with `mu` and `sigma` of other references, of shapes
            `(2048,)` and `(2048, 2048)`; the pictures of `data` are then not read.
        num_samples (`int`, defaults to 30,000): A seeded choice of so many pictures, or all if there are fewer.
        split (`str`, *optional*): Defaults to all of `val2014`, and to `"train"` where `datasets` reads.

    Raises (in `prepare`):
        ValueError, OSError, ImportError: no data, weights or statistics, fewer than two pictures, torch-fidelity is
            not installed.
    """

    data: Any = None
    inception: str | os.PathLike | None = None
    statistics: str | os.PathLike | None = None
    num_samples: int | None = 30_000
    split: str | None = None
    name: str = "coco-fid"

    modalities: ClassVar[str] = "text → image"

    def prepare(self, model: PreTrainedModel, processor: TransfusionProcessor) -> None:
        require_images(model, self.name)
        self._inception, self._weights = load_inception(self.inception)
        self._statistics = None if self.statistics is None else read_statistics(self.statistics)
        are_read = self.statistics is None
        pictures = read_captioned(self.data, self.name, self.split, "val2014", are_read)
        self._pictures = pictures.sample(self.num_samples)
        count = len(self._pictures)
        if count < 2:
            raise ValueError(
                f"The task `{self.name}` needs two pictures or more for a covariance; `data` has {count}."
            )
        if count <= NUM_FEATURES:
            warnings.warn(
                f"FID of {count} pictures: the covariance of {NUM_FEATURES} features needs at least "
                f"{NUM_FEATURES + 1}, and with fewer FID is far too high. Compare it only with that of as many.",
                stacklevel=2,
            )

    def run(self, run: Run) -> TaskResult:
        pictures, prompts = self._pictures, self._pictures.prompts()
        references = self._references(run.processor)  # before the drawings: one of them may be broken
        if self._statistics is None:
            made = {"references": references, "pictures": pictures.digest, "weights": self._weights}
            real = self._features(
                run, "references", pictures, made, lambda batch: as_the_model_sees(run.processor, batch)
            )
        files, drawn_with = draw_prompts(run, prompts)
        made_of: Result = {"drawings": digest(drawn_with), "weights": self._weights}
        drawn = self._features(run, "drawings", files, made_of, lambda batch: map(open_picture, batch))

        def distance(indices: list[int], left_out: list[int | None]) -> list[Result]:
            results = []
            for group in left_out:
                kept = np.arange(len(files)) % NUM_GROUPS != (-1 if group is None else group)
                results.append({"distance": _distance(moments(drawn[kept]), self._statistics or moments(real[kept]))})
            return results

        # All, and all but each group, if a group has two or more.
        groups = [None, *range(NUM_GROUPS if len(files) >= 2 * NUM_GROUPS else 0)]
        made_of |= {"references": references, "pictures": pictures.digest}
        value, *others = (line["distance"] for line in run.map(f"{self.name}/distances", groups, distance, made_of, 1))
        width, height = open_picture(files[0]).size
        settings = {
            **pictures.settings,
            "prompts": PROMPTS,
            "drawing": drawn_with,
            "drawing_size": f"{width} × {height}",
            **references,
            "inception": self._weights,
            "features": f"torch-fidelity {version('torch-fidelity')}, {NUM_FEATURES}, float32",
            "resizer": "to 299 × 299 by torch-fidelity's bilinear filter of TensorFlow 1 (no antialiasing)",
            "covariances": "divided by n - 1, float64",
            "interval": f"jackknife of {NUM_GROUPS} groups of prompts, Student's t",
        }
        score = Score(value, jackknife_interval(value, others), len(files))
        verdicts = [Verdict(file, prompt) for file, prompt in zip(files, prompts, strict=True)]
        return TaskResult({"FID": score}, settings, verdicts)

    def _references(self, processor: TransfusionProcessor) -> Result:
        if self._statistics is not None:
            file = Path(self.statistics or "")
            return {"references": f"the statistics {file.name}", "sha256_of_statistics": _sha256(file)}
        images = processor.image_processor
        cropping = {"size": dict(images.size), "crop_size": dict(images.crop_size), "resample": int(images.resample)}
        what = "the pictures of the prompts, resized and cropped by the model's image processor, in 8 bits"
        return {"references": what, "image_processor": cropping}

    def _features(
        self, run: Run, name: str, items: Sequence[Any], settings: Result, read: Callable[[Any], Iterable[Image.Image]]
    ) -> np.ndarray:
        """float32 `(num_items, 2048)`, on disk in a file for each batch."""
        folder = Path(run.output_dir, self.name, name)
        folder.mkdir(parents=True, exist_ok=True)
        inception = self._inception.to(run.model.device)

        def features(indices: list[int], batch: list[Any]) -> list[Result]:
            file = folder / f"{indices[0]:06d}-{indices[-1]:06d}.npy"
            part = file.with_suffix(f".{run.state.process_index}.part")
            with open(part, "wb") as opened:
                np.save(opened, inception_features(inception, [*read(batch)]))
            os.replace(part, file)
            return [{"file": file.name, "row": row} for row in range(len(batch))]

        lines = run.map(f"{self.name}/{name}", items, features, settings, BATCH_SIZE)
        inception.cpu()
        parts = {name: np.load(folder / name) for name in {line["file"] for line in lines}}
        return np.stack([parts[line["file"]][line["row"]] for line in lines])


def load_inception(weights: str | os.PathLike | None = None) -> tuple[torch.nn.Module, Result]:
    """torch-fidelity's extractor, on the CPU, and the file and hash of its weights."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-untyped]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise ImportError("FID needs torch-fidelity; run `pip install 'transfusion-hf[evaluate]'`.") from error
    file = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS) if weights is None else Path(weights)
    try:
        if weights is not None:
            torch.load(weights, weights_only=True)  # torch-fidelity would run any code in it
        model = FeatureExtractorInceptionV3("inception-v3-compat", [str(NUM_FEATURES)], weights, verbose=False)
        found = _sha256(file)
    except (OSError, EOFError, RuntimeError, TypeError, AttributeError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OSError(
            f"FID needs Inception's weights, and `inception` {str(file)!r} gave none ({reason}); fetch `{WEIGHTS}` of "
            "torch-fidelity's release 0.2.0, and pass its path."
        ) from error
    return model, {"file": file.name, "sha256": found, "published": found.startswith("6726825d")}


@torch.no_grad()
def inception_features(inception: torch.nn.Module, images: Sequence[Image.Image]) -> np.ndarray:
    """float32 `(num_images, 2048)`. Images of several sizes go one by one."""
    device = next(inception.parameters()).device
    pixels = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
    batches = [torch.stack(pixels)] if len({x.shape for x in pixels}) == 1 else [x[None] for x in pixels]
    with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        return torch.cat([inception(batch.to(device))[0].cpu() for batch in batches]).numpy()


def read_statistics(file: str | os.PathLike) -> Moments:
    """Raises a `ValueError` unless `file` is an `.npz` with mean `mu` and covariance `sigma` of 2,048 features."""
    wanted = {"mu": (NUM_FEATURES,), "sigma": (NUM_FEATURES, NUM_FEATURES)}
    try:
        with np.load(file) as arrays:
            mu, sigma = (arrays[name].astype(np.float64) for name in wanted)
    except (OSError, EOFError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"`statistics` {str(file)!r} is no `.npz` with `mu` and `sigma` ({error}).") from error
    found = {"mu": mu.shape, "sigma": sigma.shape}
    if found != wanted:
        raise ValueError(f"`statistics` {str(file)!r} must hold arrays of shapes {wanted}; it holds {found}.")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all() and np.allclose(sigma, sigma.T)):
        raise ValueError(f"`statistics` {str(file)!r}: `sigma` is not symmetric, or a number is not finite.")
    if (lowest := np.linalg.eigvalsh(sigma)[0]) < -1e-3 * np.trace(sigma):
        raise ValueError(f"`statistics` {str(file)!r}: `sigma` is no covariance, with the eigenvalue {lowest:.3g}.")
    return mu, _factor(sigma)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """
    |μ₁ - μ₂|² + Tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) of means `(features,)` and covariances `(features, features)`, in float64.

    With Σ = Aᵀ A, the last trace is the sum of the singular values of A₁ A₂ᵀ. The usual way, by the eigenvalues of
    Σ₁ Σ₂, takes roots of those that are zero but for rounding: of n pictures and 2,048 features, 2,049 - n are.
    """
    return _distance((mu1, _factor(sigma1)), (mu2, _factor(sigma2)))


def moments(features: np.ndarray) -> Moments:
    """Of `(num_items, num_features)`, without their covariance, which would lose half of the digits."""
    features = features.astype(np.float64)
    mean, root = features.mean(0), np.sqrt(len(features) - 1)
    centred = (features - mean) / root
    return mean, centred if len(centred) <= centred.shape[1] else np.asarray(np.linalg.qr(centred, mode="r"))


def _factor(sigma: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(np.asarray(sigma, dtype=np.float64))
    kept = values > len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def _distance(one: Moments, other: Moments) -> float:
    (mean1, factor1), (mean2, factor2) = one, other
    overlap = np.linalg.svd(factor1 @ factor2.T, compute_uv=False).sum()
    squares = (np.square(x).sum() for x in (mean1 - mean2, factor1, factor2))
    return float(np.maximum(0.0, sum(squares) - 2 * overlap))  # NaN stays NaN


def jackknife_interval(value: float, others: Sequence[float]) -> tuple[float, float] | None:
    """
    The 95 % interval from the values without each of the groups, or `None` without any. A bootstrap's resamples hold
    items twice, so their covariances are smaller and its FIDs all too high.
    """
    if not others:
        return None
    deviation = np.sqrt((len(others) - 1) * np.var(others))
    return max(0.0, float(value - STUDENT_T * deviation)), float(value + STUDENT_T * deviation)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
