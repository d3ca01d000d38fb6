"""Model cards: what the configuration and the training say about a model, with the Hub's metadata."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

PIPELINE_TAG = "any-to-any"


def _facts(config: Any, num_parameters: int | None, has_weights: bool) -> dict[str, Any]:
    text, vae, factor = config.text_config, config.vae_config, config.vae_scale_factor
    height, width = config.latent_size
    autoencoder, unit = "none: the image itself is the latent", "pixels"
    if vae is not None:
        autoencoder = f"`AutoencoderKL`, {factor} times smaller sides, scale {vae['scaling_factor']:.5g}"
    elif not has_weights:
        autoencoder, unit = "not included; the paper's makes the sides 8 times smaller", "latent pixels"
    encoder = "a U-Net" if config.patch_encoder == "unet" else "a linear layer"
    schedule = "" if config.first_timestep else f" on `{config.beta_schedule}`"
    facts = {
        "parameters": num_parameters and f"{num_parameters:,}",
        "decoder": f"`{text.model_type}`, {text.num_hidden_layers} layers, hidden size {text.hidden_size}, "
        f"{text.num_attention_heads} heads",
        "vocabulary": f"{text.vocab_size:,} tokens",
        "images": f"{width * factor} × {height * factor} {unit} by default, {config.num_patches(height, width)} "
        "positions each",
        "patches": f"{config.patch_size} × {config.patch_size} of {config.latent_channels} channels, {encoder} in and "
        "out",
        "autoencoder": autoencoder,
        "diffusion": f"`{config.prediction_type}`{schedule}, {config.num_train_timesteps} steps, "
        f"λ = {config.diffusion_loss_weight:g}",
        "image weights": config.untied_modalities and "separate projections, MLPs and norms in each layer",
    }
    return {name: value for name, value in facts.items() if value}


def make_model_card(
    config: Any,
    model_name: str,
    *,
    preset: str | None = None,
    num_parameters: int | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    base_model: str | list[str] | None = None,
    datasets: str | list[str] | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
    training: dict[str, Any] | None = None,
    evaluation: dict[str, float] | None = None,
    samples: str | None = None,
) -> ModelCard:
    r"""
    A card with the Hub's metadata. It claims only what is passed.

    Args:
        config (`TransfusionConfig`)
        model_name (`str`): The repository, or any other name.
        preset (`str`, *optional*): For the card of one of the paper's sizes, without weights.
        license (`str`, *optional*): By the Hub's name, such as `"apache-2.0"`; `language` by ISO 639-1 codes.
        base_model, datasets (`str` or `list[str]`, *optional*): Repositories of the first model and the training data.
        dataset_name (`str`, *optional*):
            What the model was evaluated on; defaults to the first of `datasets`. Without either, the metadata has no
            results, for the Hub needs a data set there.
        training (`dict[str, Any]`, *optional*), evaluation (`dict[str, float]`, *optional*): Shown as tables.
        samples (`str`, *optional*): The path of a picture in the repository.
    """
    base_model, datasets = ([x] if isinstance(x, str) else list(x or []) for x in (base_model, datasets))
    dataset_name = dataset_name or next(iter(datasets), None)
    results = [
        EvalResult(PIPELINE_TAG, next(iter(datasets), dataset_name), dataset_name, name, value)
        for name, value in (evaluation or {}).items()
        if dataset_name and "/" not in name  # the parts of a metric stay in the table
    ]
    data = ModelCardData(
        model_name=model_name if results else None,
        pipeline_tag=PIPELINE_TAG,
        library_name="transformers",
        license=license,
        language=language,
        base_model=base_model or None,
        datasets=datasets or None,
        metrics=[result.metric_type for result in results] or None,
        tags=["transfusion", "text-to-image", *tags],
        eval_results=results or None,
    )
    tables = {
        "Model": _facts(config, num_parameters, has_weights=preset is None),
        "Training": training,
        f"Evaluation on {dataset_name}" if dataset_name else "Evaluation": {
            name: f"{value:.4g}" for name, value in (evaluation or {}).items()
        },
    }
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card_template.md")),
        model_name=model_name,
        preset=preset,
        config=config.to_dict(),
        tables=tables,
        samples=samples,
    )
