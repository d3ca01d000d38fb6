"""What a `Trainer` calls at its steps: the average of the weights, samples, noise of each process's own."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import Trainer, TrainerCallback, TrainerState


class TransfusionNoiseCallback(TrainerCallback):
    """
    Else all processes would draw the same t and ε, for the `Trainer` seeds them alike. Not before the training begins:
    the order of the samples must be one. Ranks that hold the same batch keep the same noise.
    """

    def __init__(self, num_replicas: int):
        self.num_replicas = num_replicas

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        if args.world_size > self.num_replicas:
            torch.manual_seed(args.seed + args.process_index // self.num_replicas)


class TransfusionEMACallback(TrainerCallback):
    r"""
    Exponential moving average of the weights, for the stock `Trainer`. The averaged weights take the place of the
    trained ones during each evaluation of the training and for good at its end. Checkpoints hold both, so that a
    resumed run goes on with its average.

    Args:
        decay (`float`, defaults to 0.9999): Largest weight of the past; smaller in the first steps.
        power (`float`, defaults to 2/3): Exponent of that warm-up, 1 − (1 + step)^−power.
        resume_from_checkpoint (`str`, *optional*):
            The checkpoint that a run resumes from, where it is not in `args.output_dir`: the Trainer does not tell.

    Raises:
        ValueError: with `load_best_model_at_end`, under DeepSpeed ZeRO-3, with several evaluation sets, or when
            resuming from a checkpoint without average.

    Example:

    ```python
    >>> Trainer(model=model, args=args, callbacks=[TransfusionEMACallback(decay=0.999)])
    ```"""

    FILE_NAME = "ema.safetensors"

    def __init__(self, decay: float = 0.9999, power: float = 2 / 3, resume_from_checkpoint: str | None = None):
        self.decay = decay
        self.power = power
        self.resume_from_checkpoint = resume_from_checkpoint
        self._is_training = False
        self._saved_step: int | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs: Any) -> None:
        if args.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end` and an average at the end exclude each other; drop one of them."
            )
        if any(hasattr(parameter, "ds_numel") for parameter in model.parameters()):
            raise ValueError(
                "`TransfusionEMACallback` finds empty parameters under DeepSpeed ZeRO-3; take ZeRO-2 or FSDP2, or "
                "drop the callback."
            )
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._is_training, self._saved_step = True, None
        self._ema = EMAModel(self._parameters, decay=self.decay, use_ema_warmup=True, power=self.power)
        if state.global_step > 0:
            folder = self.resume_from_checkpoint
            file = self._file(args, state) if folder is None else Path(folder, self.FILE_NAME)
            if not file.exists():
                raise ValueError(
                    f"No average to resume with: {file} does not exist. Pass the checkpoint's folder to "
                    "`TransfusionEMACallback(resume_from_checkpoint=...)`; or its run had no such callback: drop it, "
                    "or begin anew."
                )
            stored = load_file(file)
            self._ema.optimization_step = state.global_step
            self._ema.shadow_params = [_like(stored[str(i)], p) for i, p in enumerate(self._parameters)]
        if args.eval_on_start:
            self._swap()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self._ema.step(self._parameters)
        self._swap_for_evaluation(control)

    def on_epoch_end(self, args, state, control, **kwargs: Any) -> None:
        self._swap_for_evaluation(control)

    def _swap_for_evaluation(self, control) -> None:
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
                "An evaluation in the training that the Trainer did not announce was without the averaged weights: of "
                "the second of several sets in `eval_dataset`, or by another callback. Concatenate the sets, or "
                "evaluate after the training."
            )
        # Now, for a checkpoint may be saved next.
        self._ema.restore(self._parameters)

    def save(self, folder: Path, state: TrainerState) -> None:
        """Writes the average into a checkpoint's folder; for every process to call, where parameters are sharded."""
        self._saved_step = state.global_step
        average = {str(i): _whole(parameter).contiguous() for i, parameter in enumerate(self._ema.shadow_params)}
        if state.is_world_process_zero:
            save_file(average, folder / self.FILE_NAME)

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        if self._saved_step != state.global_step:  # `TransfusionTrainer` writes it with the rest
            self.save(self._file(args, state).parent, state)

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self._is_training = False
        self._ema.copy_to(self._parameters)

    def _file(self, args, state) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", self.FILE_NAME)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Sharded as a parameter is, on its device."""
    whole = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


class TransfusionSamplesCallback(TrainerCallback):
    r"""
    Shows every so many steps what the model draws and reads: prompts as pictures, the same noise each time, and images
    with their captions. Into `samples/step-N.png` of the output folder, and to the trackers of `report_to` that take
    pictures. The training itself goes on as if nothing had been drawn.

    Args:
        trainer (`Trainer`): The one it is added to.
        processor (`TransfusionProcessor`)
        prompts (`list[str]`): To draw.
        images (`list[PIL.Image.Image]`, *optional*): To caption.
        interval (`int`, defaults to 1000): Steps between samples.
        seed (`int`, defaults to 0): Of the noise.
        max_new_tokens (`int`, defaults to 32): Of a caption.
        generate_kwargs: For drawing, as `num_inference_steps`.

    Example:

    ```python
    >>> trainer.add_callback(TransfusionSamplesCallback(trainer, processor, ["a handwritten seven"], interval=500))
    ```"""

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
        self.trainer = trainer
        self.processor = processor
        self.prompts = list(prompts)
        self.images = list(images or [])
        self.interval = interval
        self.seed = seed
        self.max_new_tokens = max_new_tokens
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
        if state.is_world_process_zero:
            self._report(Path(args.output_dir, "samples"), state.global_step, drawn, captions)

    def _draw(self, model: Any) -> list[Image.Image]:
        if not self.prompts:
            return []
        generators = [torch.Generator(model.device).manual_seed(self.seed + i) for i in range(len(self.prompts))]
        inputs = self.processor(text=self.prompts).to(model.device)
        # Where parameters are sharded, the library lets processes wait for the longest of them, which drawing does not
        # take: all draw the same, in as many steps. Captions, whose words decide when they end, do wait.
        kwargs = {"generator": generators, "synced_gpus": False, **self.generate_kwargs}
        output = model.generate(**inputs, generation_mode="image", **kwargs)
        return self.processor.post_process_multimodal_output(output, generation_mode="image")

    def _caption(self, model: Any) -> list[str]:
        if not self.images:
            return []
        inputs = self.processor(text=[self.processor.image_token] * len(self.images), images=self.images)
        ids = model.generate(
            **inputs.to(model.device), generation_mode="text", do_sample=False, max_new_tokens=self.max_new_tokens
        )
        texts = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _report(self, folder: Path, step: int, drawn: list[Image.Image], captions: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if drawn:
            sides = [max(getattr(image, side) for image in drawn) for side in ("width", "height")]
            grid = Image.new("RGB", (sides[0] * len(drawn), sides[1]))
            for i, image in enumerate(drawn):
                grid.paste(image, (i * sides[0], 0))
            grid.save(folder / f"step-{step}.png")
        if captions:
            (folder / f"step-{step}.txt").write_text("\n".join(captions) + "\n")
        pictures = {prompt: (image, prompt) for prompt, image in zip(self.prompts, drawn, strict=True)}
        pictures |= {f"read {i}": pair for i, pair in enumerate(zip(self.images, captions, strict=False))}
        for callback in self.trainer.callback_handler.callbacks:
            log_pictures(callback, {f"samples/{name}": pair for name, pair in pictures.items()}, step)


def log_pictures(callback: TrainerCallback, pictures: dict[str, tuple[Image.Image, str]], step: int) -> None:
    """
    To the tracker that a callback of transformers holds: TensorBoard, Weights & Biases, Trackio, SwanLab, MLflow (and
    DagsHub), Comet, ClearML, DVCLive. Nothing, where it holds none, or one without pictures; Neptune is left out.

    Args:
        callback (`TrainerCallback`)
        pictures (`dict[str, tuple[PIL.Image.Image, str]]`): By name, each with a caption.
        step (`int`)
    """

    def tracker(name: str) -> Any:
        return getattr(callback, name, None)

    for name in ("_wandb", "_trackio", "_swanlab"):  # one interface
        if (module := tracker(name)) is not None and getattr(callback, "_initialized", True):
            images = {key: module.Image(image, caption=text) for key, (image, text) in pictures.items()}
            kwargs = {"step": step} if name == "_swanlab" else {}  # which else counts steps of its own
            module.log({**images, "train/global_step": step}, **kwargs)
    for key, (image, text) in pictures.items():
        if (writer := tracker("tb_writer")) is not None:
            writer.add_image(key, pil_to_tensor(image), step)
            writer.add_text(f"{key}/text", text, step)
        if (mlflow := tracker("_ml_flow")) is not None:
            mlflow.log_image(image, f"{key}/{step}.png")
        if (experiment := tracker("_experiment")) is not None:
            experiment.log_image(image, name=f"{key}: {text}", step=step)
        if (task := tracker("_clearml_task")) is not None:
            task.get_logger().report_image(key, text, iteration=step, image=np.asarray(image))
        if (live := tracker("live")) is not None:
            live.log_image(f"{key}.png", image)


__all__ = ["TransfusionEMACallback", "TransfusionNoiseCallback", "TransfusionSamplesCallback"]
