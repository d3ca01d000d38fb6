"""Loads the models that judge pictures."""

import os
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CLIPModel, CLIPProcessor, PreTrainedConfig

CLIP = "openai/clip-vit-large-patch14"


def load_judge(
    argument: str, name: str | os.PathLike, published: str, model_class: Any, processor_class: Any, **kwargs: Any
) -> tuple[Any, Any]:
    """
    Model and processor, in float32 and on the CPU; `kwargs` are the processor's.

    Raises:
        FileNotFoundError: there are none, or the file of the weights is broken.
        ValueError: they are of another model, or not all of the model's weights are there.
    """
    wanted = f"pass a {model_class.__name__} of transformers, such as {published!r}"
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
        if not config:
            raise OSError("there is no `config.json`")
        if (model_type := config.get("model_type")) != model_class.config_class.model_type:
            raise ValueError(f"`{argument}` {str(name)!r} holds a model of type {model_type!r}; {wanted}.")
        options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = model_class.from_pretrained(name, **options)
        processor = processor_class.from_pretrained(name, **kwargs)
    except (OSError, SafetensorError) as error:
        raise FileNotFoundError(
            f"`{argument}`: {model_class.__name__} and its processor cannot be loaded from {str(name)!r} ({error}). "
            f"Fetch the weights (`hf download {published}`) and pass their folder: `--weights {argument}=PATH`."
        ) from error
    # transformers would fill them with random numbers, and a score would be one.
    if missing := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise ValueError(
            f"`{argument}` {str(name)!r} lacks {len(missing)} of the model's weights, such as {missing[0]}; {wanted}."
        )
    return model.eval(), processor


def load_clip(name: str | os.PathLike) -> tuple[CLIPModel, CLIPProcessor]:
    """Also raises a `ValueError` without tokenizer, where all words would be unknown."""
    # Pillow's resizer, as CLIP was published.
    model, processor = load_judge("clip", name, CLIP, CLIPModel, CLIPProcessor, backend="pil")
    if processor.tokenizer("red").input_ids == processor.tokenizer("tan").input_ids:
        raise ValueError(
            f"`clip` {str(name)!r} has no tokenizer: it reads 'red' and 'tan' as the same; add its files."
        )
    return model, processor
