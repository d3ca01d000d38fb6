"""Callbacks for any `Trainer`: an average of the weights, and samples of what the model draws and reads."""

from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import Trainer, TrainerCallback, TrainerState


class TransfusionEMACallback(TrainerCallback):
    """
    Exponential moving average of the weights. The averaged weights replace the trained ones during each evaluation
    of the training, and for good at its end. Checkpoints hold both, so a resumed run continues its average.

    Args:
        decay (`float`, defaults to 0.9999): Largest weight of the past; smaller in the first steps.
        power (`float`, defaults to 2/3): Exponent of that warm-up, 1 − (1 + step)^−power.
        resume_from_checkpoint (`str`, *optional*): The checkpoint to resume from, if not in `args.output_dir`.

    Raises:
        ValueError: with `load_best_model_at_end`, under DeepSpeed ZeRO-3, with several evaluation sets, or resuming
            where no average was saved.
    """

    FILE_NAME = "ema.safetensors"

    def __init__(self, decay: float = 0.9999, power: float = 2 / 3, resume_from_checkpoint: str | None = None):
        self.decay, self.power, self.resume_from_checkpoint = decay, power, resume_from_checkpoint
        self._is_training = False

    def on_train_begin(self, args, state, control, model=None, **kwargs: Any) -> None:
        if args.load_best_model_at_end:
            raise ValueError("An average at the end and `load_best_model_at_end` exclude each other; drop one.")
        if any(hasattr(parameter, "ds_numel") for parameter in model.parameters()):
            raise ValueError("DeepSpeed ZeRO-3 leaves parameters empty; take ZeRO-2 or FSDP2, or drop the callback.")
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._is_training, self._saved_step = True, -1
        self._ema = EMAModel(self._parameters, decay=self.decay, use_ema_warmup=True, power=self.power)
        if state.global_step > 0:
            folder = self.resume_from_checkpoint or Path(args.output_dir, f"checkpoint-{state.global_step}")
            file = Path(folder, self.FILE_NAME)
            if not file.exists():
                raise ValueError(f"{file} does not exist; pass `resume_from_checkpoint` to the callback, or drop it.")
            stored = load_file(file)
            self._ema.optimization_step = state.global_step
            self._ema.shadow_params = [_like(stored[str(i)], p) for i, p in enumerate(self._parameters)]
        if args.eval_on_start:
            self._swap()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self._ema.step(self._parameters)
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs: Any) -> None:
        # The Trainer announces an evaluation here and has no other event before it.
        if control.should_evaluate:
            self._swap()

    def _swap(self) -> None:
        self._ema.store(self._parameters)
        self._ema.copy_to(self._parameters)

    def on_evaluate(self, args, state, control, **kwargs: Any) -> None:
        if not self._is_training:
            return
        if self._ema.temp_stored_params is None:
            raise ValueError(
                "An evaluation ran without the averaged weights, because the Trainer did not announce it: the second "
                "set in `eval_dataset`, or one by another callback. Concatenate the sets, or evaluate after training."
            )
        self._ema.restore(self._parameters)  # now, because a checkpoint may be saved next

    def save(self, folder: Path, state: TrainerState) -> None:
        """Writes the average into a checkpoint's folder. Every process must call it: parameters may be sharded."""
        self._saved_step = state.global_step
        whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in self._ema.shadow_params)
        average = {str(i): parameter.contiguous() for i, parameter in enumerate(whole)}
        if state.is_world_process_zero:
            save_file(average, folder / self.FILE_NAME)

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        if self._saved_step != state.global_step:  # `TransfusionTrainer` writes it with the rest
            self.save(Path(args.output_dir, f"checkpoint-{state.global_step}"), state)

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self._ema.copy_to(self._parameters)
        self.stop()

    def stop(self) -> None:
        """Also after an interruption, which may have come during an evaluation; evaluations are then the model's."""
        if self._is_training and self._ema.temp_stored_params is not None:
            self._ema.restore(self._parameters)
        self._is_training = False


def _like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Sharded like a parameter, on its device."""
    whole, is_sharded = whole.to(parameter.device), isinstance(parameter, DTensor)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements) if is_sharded else whole


class TransfusionSamplesCallback(TrainerCallback):
    """
    Draws the prompts, with the same noise each time, and captions the images every `interval` steps. The results go
    to `samples/step-N.png` and `.txt` of the output folder and, where `report_to` names them, to TensorBoard and
    Weights & Biases. The training continues as if nothing had been drawn.

    Args:
        trainer (`Trainer`): The trainer that the callback is added to.
        processor (`TransfusionProcessor`)
        prompts (`list[str]`): What to draw.
        images (`list[PIL.Image.Image]`, *optional*): What to caption.
        interval (`int`, defaults to 1000): Steps between samples.
        seed (`int`, defaults to 0): Seed of the noise.
        max_new_tokens (`int`, defaults to 32): Length limit of a caption.
        generate_kwargs: Passed to `generate()` when drawing, such as `num_inference_steps`.
    """

    def __init__(
        self,
        trainer: Trainer,
        processor: Any,
        prompts: list[str],
        images: list[Image.Image] | None = None,
        interval: int = 1000,
        seed: int = 0,
        max_new_tokens: int = 32,
        **generate_kwargs: Any,
    ):
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1 step; got {interval}.")
        self.trainer, self.processor = trainer, processor
        self.prompts, self.images = list(prompts), list(images or [])
        self.interval, self.seed, self.max_new_tokens = interval, seed, max_new_tokens
        self.generate_kwargs = generate_kwargs

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if state.global_step % self.interval:
            return
        # In every process: the parameters may be sharded.
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        was_training = model.training
        model.eval()
        try:
            drawn, captions = self._draw(model), self._caption(model)
        finally:
            model.train(was_training)
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir, "samples")
        folder.mkdir(parents=True, exist_ok=True)
        if drawn:
            make_image_grid(drawn, rows=1, cols=len(drawn)).save(folder / f"step-{state.global_step}.png")
        if captions:
            (folder / f"step-{state.global_step}.txt").write_text("\n".join(captions) + "\n")
        pictures = {f"samples/{prompt}": (image, prompt) for image, prompt in zip(drawn, self.prompts, strict=True)}
        pictures |= {f"samples/read {i}": pair for i, pair in enumerate(zip(self.images, captions, strict=True))}
        self.log_pictures(pictures, state.global_step)

    def _draw(self, model: Any) -> list[Image.Image]:
        if not self.prompts:
            return []
        generators = [torch.Generator(model.device).manual_seed(self.seed + i) for i in range(len(self.prompts))]
        inputs = self.processor(text=self.prompts).to(model.device)
        # For sharded parameters the library lets processes wait for the longest text (`synced_gpus`). Drawing needs
        # no waiting, because all processes draw the same images in the same number of steps. Captions do wait.
        kwargs = {"generator": generators, "synced_gpus": False, **self.generate_kwargs}
        output = model.generate(**inputs, generation_mode="image", **kwargs)
        return self.processor.post_process_multimodal_output(output, generation_mode="image")

    def _caption(self, model: Any) -> list[str]:
        if not self.images:
            return []
        inputs = self.processor(text=[self.processor.image_token] * len(self.images), images=self.images)
        kwargs = {"generation_mode": "text", "do_sample": False, "max_new_tokens": self.max_new_tokens}
        ids = model.generate(**inputs.to(model.device), **kwargs)
        texts = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def log_pictures(self, pictures: dict[str, tuple[Image.Image, str]], step: int) -> None:
        """Sends pictures, with captions and by name, to TensorBoard and Weights & Biases. Override it for others."""
        for callback in self.trainer.callback_handler.callbacks:
            # The names under which transformers' own callbacks keep their trackers.
            writer, wandb = getattr(callback, "tb_writer", None), getattr(callback, "_wandb", None)
            if writer is not None:
                for name, (image, text) in pictures.items():
                    writer.add_image(name, pil_to_tensor(image), step)
                    writer.add_text(f"{name}/text", text, step)
            if wandb is not None:
                images = {name: wandb.Image(image, caption=text) for name, (image, text) in pictures.items()}
                wandb.log({**images, "train/global_step": step})
