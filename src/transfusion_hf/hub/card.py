"""The card of a model: what its configuration and its training say of it, with the metadata that the Hub reads."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

PIPELINE_TAG = "any-to-any"
TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

{% if not has_weights -%}
**A configuration, not a model: no weights of this size are public.** It is for training your own.

{% endif -%}
A Transfusion (Zhou et al., [arXiv 2408.11039](https://arxiv.org/abs/2408.11039)): one transformer that predicts the
next token and diffuses images, and so reads and writes text and images in any order.
{%- if base_models %} It was made from {{ base_models }}.{% endif %}
The code is that of `transfusion_hf`{% if has_weights %}, and lies beside the weights{% endif %}.

## Use

```python
{% if has_weights -%}
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

name = "{{ model_name }}"  # or the folder
draw = pipeline("text-to-image", model=name, trust_remote_code=True)
draw("a prompt").save("drawn.png")

model = AutoModelForMultimodalLM.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
output = model.generate(**processor(text=["<image> what is this?"], images=[image]))
print(processor.post_process_multimodal_output(output))
{%- else -%}
from transformers import AutoTokenizer
from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion, TransfusionProcessor, attach_vae

model = TransfusionForCausalLMAndDiffusion(TransfusionConfig.from_preset("{{ preset }}"))  # random weights
attach_vae(model, "...")  # an autoencoder with {{ config.latent_channels }} channels
processor = TransfusionProcessor.for_model(model, AutoTokenizer.from_pretrained("..."))
{%- endif %}
```
{% if has_weights %}
With `transfusion_hf` installed and imported, `trust_remote_code` is not needed. Without it the code needs torch,
torchvision, diffusers and transformers; the checkpoint was saved with transformers {{ transformers_version }}.
{% endif %}
## Model

| | |
|---|---|
{% for name, value in facts -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Training
{% if training %}
| | |
|---|---|
{% for name, value in training.items() -%}
| {{ name }} | {{ value }} |
{% endfor -%}
{%- elif has_weights %}
This card was written from the configuration alone. What the model was trained on, and how, is for its author to say.
{% else %}
None. `examples/train.py` follows the paper's recipe (§4.1).
{% endif -%}
{%- if evaluation %}
## Evaluation
{% if dataset_name %}
On {{ dataset_name }}.
{% endif %}
| | |
|---|---|
{% for name, value in evaluation.items() -%}
| {{ name }} | {{ "%.4g" | format(value) }} |
{% endfor -%}
{%- endif %}
{%- if samples %}
## Samples

![Drawn by the model during its training]({{ samples }})
{% endif %}
## Limits

{% if has_weights -%}
Nothing here was measured but what stands above: neither the quality of its pictures nor what they show of people and
their prejudices. Look at it before you use it.
{%- else -%}
Without weights there is nothing to evaluate; no figure of the paper is claimed for what you train.
{%- endif %}

## Citation

```bibtex
@article{zhou2024transfusion,
  title   = {Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model},
  author  = {Zhou, Chunting and Yu, Lili and Babu, Arun and Tirumala, Kushal and Yasunaga, Michihiro and
             Shamis, Leonid and Kahn, Jacob and Ma, Xuezhe and Zettlemoyer, Luke and Levy, Omer},
  journal = {arXiv preprint arXiv:2408.11039},
  year    = {2024}
}
```
"""


def _facts(config: Any, num_parameters: int | None, has_weights: bool) -> list[tuple[str, Any]]:
    text, (height, width) = config.text_config, config.latent_size
    factor, vae = config.vae_scale_factor, config.vae_config
    autoencoder: str = "none: the image itself is the latent"
    if vae is not None:
        autoencoder = f"`AutoencoderKL`, {factor} times smaller sides, scale {vae['scaling_factor']:.5g}"
    elif not has_weights:
        autoencoder = "none yet: bring one; the paper's makes the sides 8 times smaller"
    unit = "pixels" if has_weights or vae is not None else "latent pixels"
    facts = [
        ("decoder", f"`{text.model_type}`, {text.num_hidden_layers} layers, {text.hidden_size} wide, "
                    f"{text.num_attention_heads} heads"),
        ("vocabulary", f"{text.vocab_size:,} tokens"),
        ("images", f"{width * factor} × {height * factor} {unit} where no size is asked for, "
                   f"{config.num_patches(height, width)} positions each"),
        ("patches", f"{config.patch_size} × {config.patch_size} of {config.latent_channels} channels, "
                    f"{'a U-Net' if config.patch_encoder == 'unet' else 'a linear layer'} in and out"),
        ("autoencoder", autoencoder),
        ("diffusion", f"`{config.prediction_type}`"
                      + ("" if config.first_timestep else f" on `{config.beta_schedule}`")
                      + f", {config.num_train_timesteps} steps, λ = {config.diffusion_loss_weight:g}"),
    ]  # fmt: skip
    if config.untied_modalities:
        facts.append(("image weights", "projections, MLPs and norms of their own in each layer"))
    return facts if num_parameters is None else [("parameters", f"{num_parameters:,}"), *facts]


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
    A card with the Hub's metadata. What is not given is not claimed.

    Args:
        config (`TransfusionConfig`)
        model_name (`str`): The repository, as far as it is known.
        preset (`str`, *optional*): For a card of one of the paper's sizes, of which there are no weights.
        num_parameters (`int`, *optional*)
        license (`str`, *optional*): Of the weights, by the Hub's name for it, as `"apache-2.0"`.
        language (`str` or `list[str]`, *optional*): By ISO 639-1.
        base_model (`str` or `list[str]`, *optional*): The repositories of what it was made from.
        datasets (`str` or `list[str]`, *optional*): The repositories of what it was trained on.
        dataset_name (`str`, *optional*):
            What it was evaluated on, in words; defaults to the first of `datasets`. Without either the Hub takes no
            results, and they stand in the text alone.
        tags (`list[str]`, *optional*)
        training (`dict[str, Any]`, *optional*), evaluation (`dict[str, float]`, *optional*): Shown as tables.
        samples (`str`, *optional*): The path, in the repository, of a picture with samples.

    Returns:
        `huggingface_hub.ModelCard`
    """
    base_model, datasets = ([x] if isinstance(x, str) else list(x or []) for x in (base_model, datasets))
    dataset_name = dataset_name or next(iter(datasets), None)
    results = [
        EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=next(iter(datasets), dataset_name),
            dataset_name=dataset_name,
            metric_type=name,
            metric_value=value,
        )
        for name, value in (evaluation or {}).items()
        if dataset_name and "/" not in name  # not the parts that a metric is shown in
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
        tags=list(dict.fromkeys(["transfusion", "text-to-image", *tags])),
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        model_name=model_name,
        preset=preset,
        has_weights=preset is None,
        config=config,
        base_models=", ".join(f"[{name}](https://huggingface.co/{name})" for name in base_model),
        transformers_version=config.to_dict().get("transformers_version"),
        facts=_facts(config, num_parameters, has_weights=preset is None),
        training=training,
        evaluation=evaluation,
        dataset_name=dataset_name,
        samples=samples,
    )


__all__ = ["make_model_card"]
