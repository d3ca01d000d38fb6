"""Model cards: what the configuration and the training say about a model, with the Hub's metadata."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

PIPELINE_TAG = "any-to-any"
TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

{% if not has_weights -%}
**A configuration without weights: no weights of this size are public.** Use it to train a model.

{% endif -%}
Transfusion ([arXiv 2408.11039](https://arxiv.org/abs/2408.11039)) is one transformer that predicts the next token and
denoises images, so it reads and writes text and images in any order.
{%- if base_models %} This model was made from {{ base_models }}.{% endif %}

```python
{% if has_weights -%}
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

name = "{{ model_name }}"  # or a local folder
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
The remote code needs torch, torchvision, diffusers and transformers; the checkpoint was saved with transformers
{{ transformers_version }}. With `transfusion_hf` imported, `trust_remote_code` is not needed.
{% endif %}
{%- for title, table in tables %}
## {{ title }}

| | |
|---|---|
{% for name, value in table.items() -%}
| {{ name }} | {{ value }} |
{% endfor -%}
{%- endfor %}
{%- if samples %}
![Images drawn during training]({{ samples }})
{% endif %}
{%- if not training %}
{% if has_weights %}This card was written from the configuration alone; its author has not described the training data.
{%- else %}`examples/train.py` follows the paper's recipe (§4.1).{% endif %}
{% endif %}
{%- if has_weights %}
Only what the tables show was measured. Image quality and social biases were not; check both before you use the model.
{% endif %}
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


def _facts(config: Any, num_parameters: int | None, has_weights: bool) -> dict[str, Any]:
    text, vae, factor = config.text_config, config.vae_config, config.vae_scale_factor
    height, width = config.latent_size
    autoencoder = "none: the image itself is the latent"
    if vae is not None:
        autoencoder = f"`AutoencoderKL`, {factor} times smaller sides, scale {vae['scaling_factor']:.5g}"
    elif not has_weights:
        autoencoder = "not included; the paper's makes the sides 8 times smaller"
    unit = "pixels" if has_weights or vae is not None else "latent pixels"
    encoder = "a U-Net" if config.patch_encoder == "unet" else "a linear layer"
    schedule = "" if config.first_timestep else f" on `{config.beta_schedule}`"
    facts = {} if num_parameters is None else {"parameters": f"{num_parameters:,}"}
    facts |= {
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
    }
    if config.untied_modalities:
        facts["image weights"] = "separate projections, MLPs and norms in each layer"
    return facts


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
        tags=list(dict.fromkeys(["transfusion", "text-to-image", *tags])),
        eval_results=results or None,
    )
    title = f"Evaluation on {dataset_name}" if dataset_name else "Evaluation"
    tables = {
        "Model": _facts(config, num_parameters, has_weights=preset is None),
        "Training": training,
        title: {name: f"{value:.4g}" for name, value in (evaluation or {}).items()},
    }
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        model_name=model_name,
        preset=preset,
        has_weights=preset is None,
        config=config,
        base_models=", ".join(f"[{name}](https://huggingface.co/{name})" for name in base_model),
        transformers_version=config.to_dict().get("transformers_version"),
        tables=[(title, table) for title, table in tables.items() if table],
        training=training,
        samples=samples,
    )
