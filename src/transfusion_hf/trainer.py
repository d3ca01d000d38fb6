"""What the stock `Trainer` needs beside it."""

from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback


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
        ValueError: with `load_best_model_at_end`, with several evaluation sets, or when resuming from a checkpoint
            without average.

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

    def on_train_begin(self, args, state, control, model=None, **kwargs: Any) -> None:
        if args.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end` and an average at the end exclude each other; drop one of them."
            )
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._is_training = True
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
            self._ema.shadow_params = [stored[str(i)].to(p.device) for i, p in enumerate(self._parameters)]

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self._ema.step(self._parameters)
        self._swap_for_evaluation(control)

    def on_epoch_end(self, args, state, control, **kwargs: Any) -> None:
        self._swap_for_evaluation(control)

    def _swap_for_evaluation(self, control) -> None:
        # The Trainer announces an evaluation here and has no other event before it.
        if control.should_evaluate:
            self._ema.store(self._parameters)
            self._ema.copy_to(self._parameters)

    def on_evaluate(self, args, state, control, **kwargs: Any) -> None:
        if not self._is_training:
            return
        if self._ema.temp_stored_params is None:
            raise ValueError(
                "`eval_dataset` holds several sets, of which only the first was evaluated with the averaged weights: "
                "the Trainer announces no second one. Concatenate them, or evaluate the others afterwards."
            )
        # Now, for a checkpoint may be saved next.
        self._ema.restore(self._parameters)

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            average = {str(i): parameter.contiguous() for i, parameter in enumerate(self._ema.shadow_params)}
            save_file(average, self._file(args, state))

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self._is_training = False
        self._ema.copy_to(self._parameters)

    def _file(self, args, state) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", self.FILE_NAME)


__all__ = ["TransfusionEMACallback"]
