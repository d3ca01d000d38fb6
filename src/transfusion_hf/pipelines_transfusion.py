"""
Pipelines: the tasks `"text-to-image"` and `"interleaved-generation"`, and what a Transfusion needs of the library's
`"any-to-any"` and `"text-generation"`. [`drawing_kwargs`] is their one vocabulary, and [`TransfusionPipeline`]'s.
"""

import inspect
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import Pipeline, PreTrainedModel
from transformers.image_utils import make_flat_list_of_images
from transformers.pipelines import AnyToAnyPipeline, TextGenerationPipeline

from .processing_transfusion import TransfusionProcessor


def _writing(generate_kwargs: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    # The library's pipelines name no mode when they want text. Without one `generate()` draws where the model says
    # <BOI>, and they would drop the images.
    given = getattr(generate_kwargs.get("generation_config"), "generation_mode", None)
    # The tokenizer is for `stop_strings` of the model's generation config.
    return {"generation_mode": given or "text", "tokenizer": tokenizer, **generate_kwargs}


class TransfusionTextGenerationPipeline(TextGenerationPipeline):
    """The task `"text-generation"`."""

    def forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        return super().forward(model_inputs, **_writing(generate_kwargs, self.tokenizer))


class TransfusionAnyToAnyPipeline(AnyToAnyPipeline):
    """The task `"any-to-any"`, also for batches of images."""

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


def drawing_kwargs(
    model: PreTrainedModel, processor: TransfusionProcessor, guidance_scale=None, negative_prompt=None,
    num_images_per_prompt=None, height=None, width=None, init_image=None, mask_image=None, latents=None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments in the words of diffusers, which [`TransfusionPipeline`] explains, as those of `generate()`."""
    given = {"image_guidance_scale": guidance_scale, "init_noise": latents, "height": height, "width": width}
    if num_images_per_prompt is not None:
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be at least 1; got {num_images_per_prompt}.")
        if num_images_per_prompt > 1:  # the library returns several sequences only where it samples
            given |= {"num_return_sequences": num_images_per_prompt, "do_sample": True}
    per_row, image_processor = {"init_image": init_image, "mask_image": mask_image}, processor.image_processor
    sides = zip(("height", "width"), model.config.latent_size, strict=True)
    height, width = (
        given[name] or getattr(model.generation_config, name, None) or side * model.config.vae_scale_factor
        for name, side in sides
    )
    if negative_prompt is not None:
        inputs = processor(text=negative_prompt)
        per_row["negative_prompt_ids"] = inputs["input_ids"]
        per_row["negative_prompt_attention_mask"] = inputs["attention_mask"]
    if not isinstance(init_image, torch.Tensor | None):
        if not isinstance(height, int) or not isinstance(width, int):
            raise ValueError("`init_image` as a picture needs one `height` and `width` for all rows; pass a tensor.")
        pictures = make_flat_list_of_images(image_processor.fetch_images(init_image))
        pictures = [picture.resize((width, height), Image.Resampling.BICUBIC) for picture in pictures]
        inputs = image_processor(pictures, do_resize=False, do_center_crop=False)
        per_row["init_image"] = inputs["pixel_values"]
    if not isinstance(mask_image, torch.Tensor | None):
        black_or_white = {"do_normalize": False, "do_convert_grayscale": True, "do_binarize": True}
        mask_processor = VaeImageProcessor(vae_scale_factor=1, resample="nearest", **black_or_white)
        per_row["mask_image"] = mask_processor.preprocess(image_processor.fetch_images(mask_image), height, width)
    for name, rows in per_row.items():  # one for all, or one for each image
        if rows is not None:
            rows = rows if len(rows) == 1 else rows.repeat_interleave(num_images_per_prompt or 1, dim=0)
            given[name] = rows.to(model.device)
    return {name: value for name, value in given.items() if value is not None}


def refuse_arguments(kwargs: dict[str, Any], **instead: str) -> None:
    for name in instead.keys() & kwargs.keys():
        raise ValueError(f"`{name}` is decided by the pipeline; use {instead[name]}.")


class _GeneratingPipeline(Pipeline):
    """Passes prompts through the processor and `generate()` together, which take the keyword arguments."""

    _load_processor = True
    _load_image_processor = _load_feature_extractor = _load_tokenizer = False
    _pipeline_calls_generate = True
    generation_mode: str

    def __call__(self, text: str | list[str], images: Any = None, **kwargs: Any) -> Any:
        """Processes prompts and the `images` that they mark, in order, as one batch: a result for each prompt."""
        results = super().__call__({"text": text, "images": images}, **kwargs)
        return results[0] if isinstance(text, str) and len(results) == 1 else results

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        names = list(inspect.signature(drawing_kwargs).parameters)[2:]
        return {name: kwargs.pop(name) for name in names if name in kwargs}, kwargs, {}

    def preprocess(self, inputs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {**self.processor(**inputs), **drawing_kwargs(self.model, self.processor, **kwargs)}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        generate_kwargs = self._prepare_generate_kwargs({"tokenizer": self.processor.tokenizer, **generate_kwargs})
        refuse_arguments(
            generate_kwargs, num_return_sequences="`num_images_per_prompt`", generation_mode="another pipeline"
        )
        options = {"generation_mode": self.generation_mode, **model_inputs, **generate_kwargs}
        output = self.model.generate(**options)
        output.sequences = output.sequences[:, model_inputs["input_ids"].shape[1] :]
        return {"generated_outputs": output}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[Any]:
        return self.processor.post_process_multimodal_output(**model_outputs, generation_mode=self.generation_mode)


class TextToImagePipeline(_GeneratingPipeline):
    """The task `"text-to-image"`: `PIL.Image.Image`s, with `num_images_per_prompt` those of one prompt in a row."""

    generation_mode = "image"


class InterleavedGenerationPipeline(_GeneratingPipeline):
    """The task `"interleaved-generation"`: per prompt a list of texts and `PIL.Image.Image`, in order."""

    generation_mode = "interleaved"
