"""
Pipelines: the tasks `"text-to-image"` and `"interleaved-generation"`, the diffusers-like [`TransfusionPipeline`], and
what a Transfusion needs of the library's `"any-to-any"` and `"text-generation"`.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, Pipeline, PreTrainedModel
from transformers.image_utils import make_flat_list_of_images
from transformers.pipelines import AnyToAnyPipeline, TextGenerationPipeline

from .processing_transfusion import TransfusionProcessor


def _writing(generate_kwargs: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    # The library's pipelines name no mode when they want text. Without one `generate()` draws where the model says
    # <BOI>, and they would drop the images.
    given = getattr(generate_kwargs.get("generation_config"), "generation_mode", None)
    # The tokenizer is for `stop_strings` of the model's generation config.
    return {"generation_mode": given or "text", "tokenizer": tokenizer, **generate_kwargs}


class _OursOrTheLibrarys:
    def __new__(cls, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        is_ours = model.config.model_type == "transfusion"
        return super().__new__(cls) if is_ours else cls.__bases__[-1](model, *args, **kwargs)


class TransfusionTextGenerationPipeline(_OursOrTheLibrarys, TextGenerationPipeline):
    """The task `"text-generation"`; other models get the library's own pipeline."""

    def forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        return super().forward(model_inputs, **_writing(generate_kwargs, self.tokenizer))


class TransfusionAnyToAnyPipeline(_OursOrTheLibrarys, AnyToAnyPipeline):
    """The task `"any-to-any"`, also for batches of images; other models get the library's own pipeline."""

    def forward(self, model_inputs: dict[str, Any], generate_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        generate_kwargs = _writing(generate_kwargs or {}, self.processor.tokenizer)
        outputs = super().forward(model_inputs, generate_kwargs=generate_kwargs)
        images = getattr(outputs["generated_sequence"], "images", None)
        if images is not None:
            if len(images) != len(outputs["input_ids"]):
                raise ValueError(
                    f"`num_return_sequences` made {len(images)} images for {len(outputs['input_ids'])} prompts, but "
                    "this task returns one per prompt; use the task 'text-to-image'."
                )
            # A form that the library can split into rows again.
            outputs["generated_sequence"] = [image for row in images for image in row]
        return outputs


class _GeneratingPipeline(Pipeline):
    """Passes prompts through the processor and `generate()` together; keyword arguments go to `generate()`."""

    _load_processor = True
    _load_image_processor = _load_feature_extractor = _load_tokenizer = False
    _pipeline_calls_generate = True
    generation_mode: str

    def __call__(self, text: str | list[str], images: Any = None, **kwargs: Any) -> Any:
        """Processes prompts and the `images` that they mark, in order, as one batch: a result for each prompt."""
        results = super().__call__({"text": text, "images": images}, **kwargs)
        return results[0] if isinstance(text, str) and len(results) == 1 else results

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        return {}, kwargs, {}

    def preprocess(self, inputs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return dict(self.processor(**inputs))

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        generate_kwargs = self._prepare_generate_kwargs({"tokenizer": self.processor.tokenizer, **generate_kwargs})
        output = self.model.generate(**model_inputs, generation_mode=self.generation_mode, **generate_kwargs)
        output.sequences = output.sequences[:, model_inputs["input_ids"].shape[1] :]
        return {"generated_outputs": output}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[Any]:
        return self.processor.post_process_multimodal_output(**model_outputs, generation_mode=self.generation_mode)


class TextToImagePipeline(_GeneratingPipeline):
    """The task `"text-to-image"`: one `PIL.Image.Image` per prompt."""

    generation_mode = "image"


class InterleavedGenerationPipeline(_GeneratingPipeline):
    """The task `"interleaved-generation"`: per prompt a list of texts and `PIL.Image.Image`, in order."""

    generation_mode = "interleaved"


class TransfusionPipeline:
    """Draws images with a diffusers-style API, from a `TransfusionForCausalLMAndDiffusion` and its processor."""

    def __init__(self, model: PreTrainedModel, processor: TransfusionProcessor):
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "TransfusionPipeline":
        """Loads a checkpoint of transformers; `kwargs` are those of the model's `from_pretrained`."""
        model = AutoModelForMultimodalLM.from_pretrained(pretrained_model_name_or_path, **kwargs)
        names = ("revision", "token", "cache_dir", "trust_remote_code", "local_files_only")
        shared = {name: kwargs[name] for name in names if name in kwargs}
        return cls(model, AutoProcessor.from_pretrained(pretrained_model_name_or_path, **shared))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes model and processor into one folder; `kwargs` are those of the model's `save_pretrained`."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def to(self, *args: Any, **kwargs: Any) -> "TransfusionPipeline":
        self.model.to(*args, **kwargs)
        return self

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
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """
        Args:
            prompt (`str` or `list[str]`)
            height (`int`, *optional*), width (`int`, *optional*): Pixels; default to the model's size.
            num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*): By default the model's.
            negative_prompt (`str` or `list[str]`, *optional*): One for all or one per prompt.
            num_images_per_prompt (`int`, defaults to 1): The images of one prompt follow each other.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One for all, or one per image.
            image (*optional*): The images that the prompts mark, for editing.
            init_image (PIL image or list of them, *optional*):
                What to begin with, one per prompt, resized to the output: a variation with `strength` below 1,
                inpainting with `mask_image`.
            mask_image (PIL image or list of them, *optional*): White where to draw, black where `init_image` stays.
            output_type (`str`, defaults to `"pil"`): `"pt"`: `(num_images, channels, height, width)` in [0, 1].
            return_dict (`bool`, defaults to `True`): `False`: returns a tuple.
            callback_on_step_end (`Callable`, *optional*): Called with this pipeline, the step, t and the latents.
            progress_bar (`bool`, defaults to `True`)
            kwargs: Arguments of `generate()`.
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f"`output_type` must be 'pil' or 'pt'; got {output_type!r}.")
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be at least 1; got {num_images_per_prompt}.")
        config, per_row = self.model.config, {}
        default_height, default_width = (side * config.vae_scale_factor for side in config.latent_size)
        height, width = height or default_height, width or default_width
        if negative_prompt is not None:
            inputs = self.processor(text=negative_prompt)
            per_row["negative_prompt_ids"] = inputs["input_ids"]
            per_row["negative_prompt_attention_mask"] = inputs["attention_mask"]
        if init_image is not None:
            pictures = make_flat_list_of_images(self.processor.image_processor.fetch_images(init_image))
            pictures = [picture.resize((width, height), Image.Resampling.BICUBIC) for picture in pictures]
            inputs = self.processor.image_processor(pictures, do_resize=False, do_center_crop=False)
            per_row["init_image"] = inputs["pixel_values"]
        if mask_image is not None:
            black_or_white = {"do_normalize": False, "do_convert_grayscale": True, "do_binarize": True}
            mask_processor = VaeImageProcessor(vae_scale_factor=1, resample="nearest", **black_or_white)
            masks = self.processor.image_processor.fetch_images(mask_image)
            per_row["mask_image"] = mask_processor.preprocess(masks, height, width)
        for name, rows in per_row.items():  # one for all, or one for each image
            rows = rows if len(rows) == 1 else rows.repeat_interleave(num_images_per_prompt, dim=0)
            kwargs[name] = rows.to(self.model.device)
        if callback_on_step_end is not None:
            kwargs["callback_on_step_end"] = lambda _, *args: callback_on_step_end(self, *args)
        # The library returns several sequences only where it samples; in this mode there is no text to sample.
        output = self.model.generate(
            **self.processor(text=prompt, images=image).to(self.model.device),
            generation_mode="image", do_sample=True, num_return_sequences=num_images_per_prompt, height=height,
            width=width, num_inference_steps=num_inference_steps, image_guidance_scale=guidance_scale,
            generator=generator, progress_bar=progress_bar, **kwargs,
        )  # fmt: skip
        images: Any = [row[0] for row in output.images]
        if output_type == "pil":
            images = self.processor.image_processor.postprocess(images)
        else:
            images = torch.stack(images).add(1).div(2).clamp(0, 1)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
