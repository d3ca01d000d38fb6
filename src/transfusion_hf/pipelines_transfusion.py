"""
Pipelines: the tasks `"text-to-image"` and `"interleaved-generation"`, and one with the manners of diffusers; and
transformers' own `"any-to-any"` and `"text-generation"`, which write where they are not told to draw.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torchvision.transforms.v2 import functional as F
from transformers import AutoModelForMultimodalLM, AutoProcessor, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY, AnyToAnyPipeline, TextGenerationPipeline

from .processing_transfusion import TransfusionProcessor


class _WritingMixin:
    """They tell a model of any mode but text's, and `generate()` would draw, and the picture be thrown away."""

    model: Any

    def _prepare_generate_kwargs(self, generate_kwargs: dict[str, Any], **overrides: Any) -> dict[str, Any]:
        kwargs = super()._prepare_generate_kwargs(generate_kwargs, **overrides)  # type: ignore[misc]
        given = getattr(kwargs.get("generation_config"), "generation_mode", None)
        if self.model.config.model_type == "transfusion" and given is None:
            kwargs.setdefault("generation_mode", "text")
        return kwargs


class TransfusionTextGenerationPipeline(_WritingMixin, TextGenerationPipeline):
    """The task `"text-generation"`; of other models what it was."""


class TransfusionAnyToAnyPipeline(_WritingMixin, AnyToAnyPipeline):
    """The task `"any-to-any"`, in batches too; of other models what it was."""

    def _forward(self, model_inputs: dict[str, Any], generate_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        outputs = super()._forward(model_inputs, generate_kwargs)
        images = getattr(outputs["generated_sequence"], "images", None)
        if images is not None:
            if len(images) != len(outputs["input_ids"]):
                raise ValueError(
                    f"`num_return_sequences` made {len(images)} images of {len(outputs['input_ids'])} prompts, and "
                    "this task gives one for each; use the task 'text-to-image'."
                )
            # In a form that the library can cut into rows again.
            outputs["generated_sequence"] = [image for row in images for image in row]
        return outputs


class _GeneratingPipeline(Pipeline):
    """Prompts go through the processor and `generate()` together; what it takes, a call takes."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True
    generation_mode: str

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        return {}, kwargs, {}

    def preprocess(self, inputs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return dict(self.processor(**inputs))

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs)
        output = self.model.generate(**model_inputs, generation_mode=self.generation_mode, **generate_kwargs)
        return {"output": output, "prompt_length": model_inputs["input_ids"].shape[1]}


class TextToImagePipeline(_GeneratingPipeline):
    r"""
    The task `"text-to-image"`: an image for each prompt.

    Example:

    ```python
    >>> draw = pipeline("text-to-image", model="outputs/quickstart/model")
    >>> draw("a handwritten seven", num_inference_steps=50)
    <PIL.Image.Image>
    ```"""

    generation_mode = "image"

    def __call__(self, text: str | list[str], images: Any = None, **kwargs: Any) -> Image.Image | list[Image.Image]:
        """
        Args:
            text (`str` or `list[str]`): Prompts, drawn together.
            images (*optional*): Those that the prompts mark, for editing.
            kwargs: As for `generate()`.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        drawn = super().__call__({"text": prompts, "images": images}, **kwargs)
        return drawn[0] if isinstance(text, str) and len(drawn) == 1 else drawn

    def postprocess(self, model_outputs: dict[str, Any]) -> list[Image.Image]:
        return self.processor.post_process_multimodal_output(model_outputs["output"], generation_mode="image")


class InterleavedGenerationPipeline(_GeneratingPipeline):
    r"""
    The task `"interleaved-generation"`: for each prompt what the model writes and draws, in order.

    Example:

    ```python
    >>> tell = pipeline("interleaved-generation", model="outputs/quickstart/model")
    >>> tell("a handwritten")
    [' seven', <PIL.Image.Image>]
    ```"""

    generation_mode = "interleaved"

    def __call__(self, text: str | list[str], images: Any = None, **kwargs: Any) -> list[Any]:
        """
        Args:
            text (`str` or `list[str]`): Prompts, continued together.
            images (*optional*): Those that the prompts mark, in order.
            kwargs: As for `generate()`.

        Returns:
            `list[str | PIL.Image.Image]` for one prompt, a list of those for several.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        documents = super().__call__({"text": prompts, "images": images}, **kwargs)
        return documents[0] if isinstance(text, str) and len(documents) == 1 else documents

    def postprocess(self, model_outputs: dict[str, Any]) -> list[list[str | Image.Image]]:
        output = model_outputs["output"]
        return self.processor.decode_interleaved(output.sequences[:, model_outputs["prompt_length"] :], output.images)


class TransfusionPipeline:
    r"""
    Draws as the pipelines of diffusers do.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`)
        processor (`TransfusionProcessor`)

    Example:

    ```python
    >>> pipe = TransfusionPipeline.from_pretrained("outputs/quickstart/model").to("cuda")
    >>> pipe("a handwritten seven", num_inference_steps=50, guidance_scale=3.0).images[0]
    ```"""

    def __init__(self, model: Any, processor: TransfusionProcessor):
        self.model = model
        self.processor = processor
        self._progress_bar = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "TransfusionPipeline":
        """Loads a checkpoint of transformers; `kwargs` are those of the model's `from_pretrained`."""
        model = AutoModelForMultimodalLM.from_pretrained(pretrained_model_name_or_path, **kwargs)
        names = ("revision", "token", "cache_dir", "trust_remote_code", "local_files_only")
        of_files = {name: kwargs[name] for name in names if name in kwargs}
        return cls(model, AutoProcessor.from_pretrained(pretrained_model_name_or_path, **of_files))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes model and processor into one folder; `kwargs` are those of the model's `save_pretrained`."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def to(self, *args: Any, **kwargs: Any) -> "TransfusionPipeline":
        self.model.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, disable: bool = False) -> None:
        self._progress_bar = not disable

    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image: Any = None,
        init_image: Any = None,
        mask_image: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        **kwargs: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """
        Args:
            prompt (`str` or `list[str]`)
            height (`int`, *optional*), width (`int`, *optional*): Pixels; default the model's size.
            num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*):
                Default those of the model's generation config.
            negative_prompt (`str` or `list[str]`, *optional*): One for all or one for each prompt.
            num_images_per_prompt (`int`, defaults to 1): Images of a prompt stand together.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One for all, or one for each image.
            image (*optional*): The images that the prompts mark, for editing.
            init_image (PIL image or list of them, *optional*):
                What to begin with, one for each prompt, resized to the drawing: a variation of it with `strength`
                below 1, inpainting with `mask_image`.
            mask_image (PIL image or list of them, *optional*): White where to draw, black where `init_image` stays.
            output_type (`str`, defaults to `"pil"`): `"pt"`: `(num_images, channels, height, width)` in [0, 1].
            return_dict (`bool`, defaults to `True`): Whether not to return a tuple.
            callback_on_step_end (`Callable`, *optional*): Called with this pipeline, the step, t and the latents.
            kwargs: As for `generate()`.

        Raises:
            ValueError: an unknown `output_type`, images that are not as many as the markers, and what `generate()`
                refuses.
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f"`output_type` must be 'pil' or 'pt'; got {output_type!r}.")
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be at least 1; got {num_images_per_prompt}.")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if negative_prompt is not None:
            negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
            negatives = [text for text in negatives for _ in range(num_images_per_prompt if len(negatives) > 1 else 1)]
            negative = self.processor(text=negatives).to(self.model.device)
            kwargs["negative_prompt_ids"] = negative["input_ids"]
            kwargs["negative_prompt_attention_mask"] = negative["attention_mask"]
        if init_image is not None:
            config = self.model.config
            sides = [side * config.vae_scale_factor for side in config.latent_size]
            size = (width or sides[1], height or sides[0])
            kwargs["init_image"] = self._pixels(init_image, size, num_images_per_prompt)
            if mask_image is not None:
                masks = mask_image if isinstance(mask_image, (list, tuple)) else [mask_image]
                masks = [F.pil_to_tensor(mask.convert("L").resize(size, Image.Resampling.NEAREST)) for mask in masks]
                repeats = num_images_per_prompt if len(masks) > 1 else 1
                kwargs["mask_image"] = (torch.stack(masks) > 127).repeat_interleave(repeats, dim=0)
        elif mask_image is not None:
            raise ValueError("`mask_image` needs an `init_image`, of which it says what to keep.")
        if callback_on_step_end is not None:
            kwargs["callback_on_step_end"] = lambda _, *args: callback_on_step_end(self, *args)
        if num_images_per_prompt > 1:
            pictures = None if image is None else self._by_prompt(prompts, image)
            image = (
                None
                if pictures is None
                else [p for row in pictures for _ in range(num_images_per_prompt) for p in row]
            )
            prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        output = self.model.generate(
            **self.processor(text=prompts, images=image).to(self.model.device),
            generation_mode="image",
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            image_guidance_scale=guidance_scale,
            generator=generator,
            progress_bar=self._progress_bar,
            **kwargs,
        )
        images: Any = [row[0] for row in output.images]
        if output_type == "pil":
            images = self.processor.image_processor.postprocess(images)
        else:
            images = torch.stack(images).add(1).div(2).clamp(0, 1)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _pixels(self, images: Any, size: tuple[int, int], repeats: int) -> torch.Tensor:
        pictures = images if isinstance(images, (list, tuple)) else [images]
        pictures = [picture.resize(size, Image.Resampling.BICUBIC) for picture in pictures]
        features = self.processor.image_processor(pictures, do_resize=False, do_center_crop=False, return_tensors="pt")
        return features["pixel_values"].repeat_interleave(repeats, dim=0)

    def _by_prompt(self, prompts: list[str], images: Any) -> list[list[Any]]:
        pictures = images if isinstance(images, (list, tuple)) else [images]
        num_marked = sum(text.count(self.processor.image_token) for text in prompts)
        if len(pictures) != num_marked:
            raise ValueError(
                f"`image` holds {len(pictures)} images but `prompt` marks {num_marked} by "
                f"{self.processor.image_token}; pass one image per marker."
            )
        remaining = iter(pictures)
        return [[next(remaining) for _ in range(text.count(self.processor.image_token))] for text in prompts]


for _task, _class in (
    ("text-to-image", TextToImagePipeline),
    ("interleaved-generation", InterleavedGenerationPipeline),
):
    PIPELINE_REGISTRY.register_pipeline(
        _task, pipeline_class=_class, pt_model=AutoModelForMultimodalLM, type="multimodal"
    )
for _task, _class in (
    ("any-to-any", TransfusionAnyToAnyPipeline),
    ("text-generation", TransfusionTextGenerationPipeline),
):
    PIPELINE_REGISTRY.supported_tasks[_task] = {**PIPELINE_REGISTRY.supported_tasks[_task], "impl": _class}


__all__ = [
    "InterleavedGenerationPipeline",
    "TextToImagePipeline",
    "TransfusionAnyToAnyPipeline",
    "TransfusionPipeline",
    "TransfusionTextGenerationPipeline",
]
