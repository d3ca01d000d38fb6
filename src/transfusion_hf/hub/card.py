"""Model cards: what the configuration and the training say about a model, with the Hub's metadata."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_transfusion import is_rae

_TASKS = {"text → text": "text-generation", "image → text": "image-to-text", "text → image": "text-to-image"}


def evaluation_results(results: dict[str, Any]) -> list[EvalResult]:
    """What `results.json` of `transfusion_hf.evaluation` holds, as the Hub's metadata: each task's first score."""
    entries = []
    for name, task in results["tasks"].items():
        metric, score = next(iter(task["scores"].items()))
        kind, metric_type = _TASKS.get(task["modalities"], "any-to-any"), metric.lower().replace(" ", "_")
        entries.append(EvalResult(kind, name, name, metric_type, score["value"], metric_name=metric))
    return entries


def make_model_card(
    config: Any,
    model_name: str,
    *,
    preset: str | None = None,
    num_parameters: int | None = None,
    base_model: str | list[str] | None = None,
    datasets: str | list[str] | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
    training: dict[str, Any] | None = None,
    evaluation: dict[str, float] | None = None,
    results: dict[str, Any] | None = None,
    samples: str | None = None,
    **metadata: Any,
) -> ModelCard:
    r"""
    A card with the Hub's metadata. It claims only what is passed.

    Args:
        config (`TransfusionConfig`)
        model_name (`str`): The repository, or any other name.
        preset (`str`, *optional*): For the card of one of the paper's sizes, without weights.
        base_model, datasets (`str` or `list[str]`, *optional*): Repositories of the first model and the training data.
        dataset_name (`str`, *optional*):
            What the model was evaluated on; defaults to the first of `datasets`. Without either, the metadata has no
            results, for the Hub needs a data set there.
        training (`dict[str, Any]`, *optional*), evaluation (`dict[str, float]`, *optional*): Shown as tables.
        results (`dict[str, Any]`, *optional*): Of `transfusion_hf.evaluation.evaluate`; a table, and metadata.
        samples (`str`, *optional*): The path of a picture in the repository.
        metadata: Further fields of `ModelCardData`, such as `license="apache-2.0"` and `language="en"`.
    """
    scores = evaluation_results(results) if results else []
    base_model, datasets = ([x] if isinstance(x, str) else list(x or []) for x in (base_model, datasets))
    dataset_name = dataset_name or next(iter(datasets), None)
    scores += [
        EvalResult("any-to-any", next(iter(datasets), dataset_name), dataset_name, name, value)
        for name, value in (evaluation or {}).items()
        if dataset_name and "/" not in name  # the parts of a metric stay in the table
    ]
    data = ModelCardData(
        model_name=model_name if scores else None,
        pipeline_tag="any-to-any",
        library_name="transformers",
        base_model=base_model or None,
        datasets=datasets or None,
        metrics=[result.metric_type for result in scores] or None,
        tags=["transfusion", "text-to-image", *tags],
        eval_results=scores or None,
        **metadata,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card_template.md")),
        model_name=model_name,
        preset=preset,
        config=config,
        autoencoder="AutoencoderRAE" if is_rae(config.vae_config) else "AutoencoderKL",
        num_parameters=num_parameters,
        training=training,
        evaluation=evaluation,
        results=results,
        dataset_name=dataset_name,
        samples=samples,
    )
