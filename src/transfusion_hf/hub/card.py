"""Model cards: what the configuration and the training say about a model, with the Hub's metadata."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData


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
        samples (`str`, *optional*): The path of a picture in the repository.
        metadata: Further fields of `ModelCardData`, such as `license="apache-2.0"` and `language="en"`.
    """
    base_model, datasets = ([x] if isinstance(x, str) else list(x or []) for x in (base_model, datasets))
    dataset_name = dataset_name or next(iter(datasets), None)
    results = [
        EvalResult("any-to-any", next(iter(datasets), dataset_name), dataset_name, name, value)
        for name, value in (evaluation or {}).items()
        if dataset_name and "/" not in name  # the parts of a metric stay in the table
    ]
    data = ModelCardData(
        model_name=model_name if results else None,
        pipeline_tag="any-to-any",
        library_name="transformers",
        base_model=base_model or None,
        datasets=datasets or None,
        metrics=[result.metric_type for result in results] or None,
        tags=["transfusion", "text-to-image", *tags],
        eval_results=results or None,
        **metadata,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card_template.md")),
        model_name=model_name,
        preset=preset,
        config=config,
        num_parameters=num_parameters,
        training=training,
        evaluation=evaluation,
        dataset_name=dataset_name,
        samples=samples,
    )
