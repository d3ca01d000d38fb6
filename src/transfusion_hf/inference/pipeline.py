"""[`TransfusionPipeline`], the images of a Transfusion as a pipeline of diffusers."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from transformers import AutoModelForMultimodalLM, PreTrainedModel
from transformers.utils import has_file

from ..diffusion_transfusion import make_sampling_scheduler
from ..pipelines_transfusion import drawing_kwargs, refuse_arguments
from ..processing_transfusion import TransfusionProcessor


def for_transfusions_only(ours: Any) -> type:
    """A pipeline class for Transfusions that gives other models the library's, from which it is derived."""

    class OursOrTheLibrarys(ours):
        def __new__(cls, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            is_ours = model.config.model_type == "transfusion"
            return (ours if is_ours else ours.__base__)(model, *args, **kwargs)

    return OursOrTheLibrarys


def _default_scheduler(model: PreTrainedModel) -> SchedulerMixin:
    """What `generate()` samples with by default, in T steps."""
    name, num_steps = getattr(model.generation_config, "scheduler", None), model.config.num_train_timesteps
    return make_sampling_scheduler(model.noise_scheduler, name, num_steps, device=None)


class TransfusionPipeline(DiffusionPipeline):
    """
    Draws images as a pipeline of diffusers, from a `TransfusionForCausalLMAndDiffusion` and its processor; all drawing
    is that of `generate()`.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`), processor (`TransfusionProcessor`)
        scheduler (`SchedulerMixin`, *optional*): By default that of `generate()`; may be assigned later.
    """

    model_cpu_offload_seq = "model"
    _optional_components = ["scheduler"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self, model: PreTrainedModel, processor: TransfusionProcessor, scheduler: SchedulerMixin | None = None
    ):
        super().__init__()
        self.register_modules(model=model, processor=processor, scheduler=scheduler or _default_scheduler(model))
        self._interrupt = False

    def _assigned_scheduler(self) -> SchedulerMixin | None:
        """`None` for the model's own, which `generate()` fits to the number of steps."""
        pair = (self.scheduler, _default_scheduler(self.model))
        first, second = ((type(s), {name: x for name, x in s.config.items() if name[0] != "_"}) for s in pair)
        return None if first == second else self.scheduler

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "TransfusionPipeline":
        """
        Loads a checkpoint of transformers; `kwargs` are `scheduler` and those of the model's `from_pretrained`.
        """
        path, scheduler = pretrained_model_name_or_path, kwargs.pop("scheduler", None)
        model = AutoModelForMultimodalLM.from_pretrained(path, **kwargs)
        names = ("revision", "token", "cache_dir", "trust_remote_code", "local_files_only")
        shared = {name: kwargs[name] for name in names if name in kwargs}
        subfolder = kwargs.get("subfolder", "")
        folder = f"{subfolder}/scheduler".lstrip("/")
        if scheduler is None and has_file(path, f"{folder}/scheduler_config.json", **shared):
            config = type(model.noise_scheduler).load_config(path, subfolder=folder, **shared)
            scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        return cls(model, TransfusionProcessor.from_pretrained(path, subfolder=subfolder, **shared), scheduler)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Writes model and processor into one folder, as transformers does, plus the files that
        `DiffusionPipeline.from_pretrained` needs; `kwargs` are those of the model's `save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        self.scheduler.save_pretrained(os.path.join(save_directory, "scheduler"))
        self.save_config(save_directory)

    def enable_vae_tiling(self) -> None:
        """Encodes and decodes large images in tiles, in less memory."""
        if self.model.vae is None:
            raise ValueError("`enable_vae_tiling` needs a VAE, and this model draws pixels; drop the call.")
        self.model.vae.enable_tiling()

    def load_lora_weights(self, folder: str, adapter_name: str = "default", **kwargs: Any) -> None:
        """Loads an adapter of PEFT, from a folder or the Hub; `kwargs` are those of the model's `load_adapter`."""
        self.model.load_adapter(folder, adapter_name=adapter_name, **kwargs)

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "`enable_sequential_cpu_offload`, `enable_group_offload`, attention slicing and xFormers do not work for "
            "a Transfusion; use `enable_model_cpu_offload()`, or load with a `device_map` or `attn_implementation`."
        )

    enable_sequential_cpu_offload = enable_group_offload = set_attention_slice = _refuse
    set_use_memory_efficient_attention_xformers = _refuse

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
        progress_bar: bool | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        latents: torch.Tensor | None = None,
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
                inpainting with `mask_image`. A tensor goes to `generate()` as it is.
            mask_image (PIL image or list of them, *optional*): White where to draw, black where `init_image` stays.
            output_type (`str`, defaults to `"pil"`):
                `"pt"`: `(num_images, channels, height, width)` in [0, 1]; `"np"`: `(num_images, height, width,
                channels)`; `"latent"`: what `model.decode_latents` takes.
            return_dict (`bool`, defaults to `True`): `False`: returns a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called with this pipeline, the step, t and a dict of tensors, of which it may return others. After
                `pipe._interrupt = True` the drawing ends with this step.
            progress_bar (`bool`, *optional*): By default as in `set_progress_bar_config`: shown.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): The tensors for the callback.
            latents (`torch.FloatTensor` of shape `(num_images, channels, height, width)` or `(1, …)`, *optional*):
                The noise to begin with, in the size of the latents; by default drawn with `generator`.
            kwargs: Arguments of `generate()`.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent'; got {output_type!r}.")
        if output_type != "pil" and not all(isinstance(side, int | None) for side in (height, width)):
            raise ValueError(f"`output_type={output_type!r}` is one tensor; pass one `height` and `width` for all.")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` may hold 'latents' alone; got {sorted(unknown)}.")
        if getattr(self, "_all_hooks", None):  # of `enable_model_cpu_offload`
            self.model.to(self._execution_device)
        if progress_bar is None:
            progress_bar = not getattr(self, "_progress_bar_config", {}).get("disable", False)
        self._interrupt, last = False, {}

        def on_step_end(model: Any, step: int, t: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            if callback_on_step_end is not None:
                shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                tensors = {**tensors, **(callback_on_step_end(self, step, t, shown) or {})}
            last.update(tensors)
            return {**tensors, "interrupt": self._interrupt}

        words = drawing_kwargs(
            self.model, self.processor, guidance_scale, negative_prompt, num_images_per_prompt, height, width,
            init_image, mask_image, latents,
        )  # fmt: skip
        refuse_arguments(kwargs, num_return_sequences="`num_images_per_prompt`", generation_mode="`generate()`")
        options = {
            "do_sample": True, "generation_mode": "image", "num_inference_steps": num_inference_steps,
            "generator": generator, "progress_bar": progress_bar, "callback_on_step_end": on_step_end,
            "scheduler": self._assigned_scheduler(), **words, **kwargs,
        }  # fmt: skip
        inputs = self.processor(text=prompt, images=image).to(self.model.device)
        output = self.model.generate(**inputs, **options)
        images: Any = [row[0] for row in output.images]
        if output_type == "latent":
            images = last["latents"]
        elif output_type == "pil":
            images = self.processor.image_processor.postprocess(images)
        else:
            images = VaeImageProcessor().postprocess(torch.stack(images), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
