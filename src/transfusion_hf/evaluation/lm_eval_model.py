"""
A Transfusion as a model of lm-eval. lm-eval finds no models outside of itself, so this file is also its command:

    python -m transfusion_hf.evaluation.lm_eval_model --model transfusion --model_args pretrained=MODEL --tasks boolq
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np

from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from .run import Run, digest, tokenizer_digest

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        "lm-eval's tasks need it with transformers; run `pip install 'transfusion-hf[evaluate]'`."
    ) from error


@register_model("transfusion")
class TransfusionLM(HFLM):
    """Takes the arguments of `HFLM` (`--model hf`), also for other causal language models. Writes text only."""

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        if isinstance(self.model, TransfusionForCausalLMAndDiffusion):
            generation_kwargs["generation_mode"] = "text"
        return super()._model_generate(context, max_length, stop, **generation_kwargs)


class RecordedLM(TransfusionLM):
    """
    Keeps each answer in `<run.output_dir>/<name>/`, and shares the requests among the processes. lm-eval runs in each
    of them, as if alone, so that batches and answers do not depend on their number.
    """

    def __init__(self, run: Run, name: str):
        # `HFLM` may give the tokenizer a padding token.
        tokenizer = deepcopy(getattr(run.processor, "tokenizer", run.processor))
        super().__init__(pretrained=run.model, tokenizer=tokenizer, batch_size=run.batch_size)
        self._run, self._name = run, name

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [tuple(answer) for answer in self._record("loglikelihood", requests)]  # type: ignore[misc]  # of JSON

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return self._record("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        if any(request.args[1].get("do_sample") for request in requests):
            raise ValueError(
                "A task of lm-eval samples (`do_sample`), which cannot be repeated; only greedy ones can."
            )
        return self._record("generate_until", requests)

    def _record(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        # The longest first, which wastes the least on padding.
        order = sorted(range(len(requests)), key=lambda i: -sum(len(str(part)) for part in requests[i].args))
        settings = {
            "model": self._run.fingerprint,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "requests": digest(*(request.args for request in requests)),
        }

        def answer(indices: list[int], batch: list[Any]) -> list[dict[str, Any]]:
            return [{"answer": each} for each in getattr(super(RecordedLM, self), kind)(batch, disable_tqdm=True)]

        lines = self._run.map(f"{self._name}/{kind}", [requests[i] for i in order], answer, settings)
        if kind != "generate_until" and not np.isfinite([np.ravel(line["answer"])[0] for line in lines]).all():
            raise ValueError(
                "The model gives a text a log-likelihood that is not finite; look for NaN in its weights."
            )
        answers: list[Any] = [None] * len(requests)
        for i, line in zip(order, lines, strict=True):
            answers[i] = line["answer"]
        return answers


if __name__ == "__main__":
    cli_evaluate()
