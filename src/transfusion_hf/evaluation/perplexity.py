"""Text to text: perplexity per token and per word, and bits per byte (Table 1, arXiv 2408.11039)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.dataset import load_rows
from .run import Run, Score, Task, TaskResult, digest, tokenizer_digest


@dataclass
class TextScore:
    """
    The negative log-likelihood of texts, in nats, and what it is shared among. `num_tokens` leaves out the token that
    precedes a text.
    """

    nll: float = 0.0
    num_tokens: int = 0
    num_words: int = 0
    num_bytes: int = 0
    num_texts: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.num_tokens)

    @property
    def word_perplexity(self) -> float:
        """Per word between blanks, which models with different tokenizers share."""
        return math.exp(self.nll / self.num_words)

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.num_bytes


def rolling_windows(
    ids: Sequence[int], prefix_token_id: int, max_length: int, stride: int
) -> Iterator[tuple[list[int], list[int]]]:
    """
    The inputs and targets of each window. Windows advance by `stride` targets and see up to `max_length` tokens; each
    id is the target of exactly one, the last `stride` of its inputs' successors.
    """
    inputs = [prefix_token_id, *ids]
    for start in range(0, len(ids), stride):
        end = min(start + stride, len(ids))
        yield inputs[max(0, end - max_length) : end], list(ids[start:end])


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
) -> TextScore:
    """
    Scores each text on its own, after the beginning-of-sequence token (or that of the end, where there is none).
    Special tokens that a text spells count as plain text.

    Args:
        model (`PreTrainedModel`): A Transfusion, or any causal language model.
        tokenizer (`PreTrainedTokenizerBase`)
        texts (`Iterable[str]`): Also a stream. Empty ones count for nothing.
        max_length (`int`, *optional*): Tokens of a window; defaults to the paper's 4,096, or to as many positions as
            the model has.
        stride (`int`, *optional*): Tokens that each window scores. Defaults to `max_length`, which is the rolling
            log-likelihood of lm-eval; with less, each token sees at least `max_length - stride` before it.
        max_tokens (`int`, *optional*): Stops after the text in which this many are reached (§4.2 takes 20M).
        batch_size (`int`, defaults to 1): Windows in a pass.

    Raises:
        ValueError: a longer window than the model has positions, a stride outside of 1 to `max_length`, no text, a
            tokenizer that begins texts with nothing.
    """
    max_length, stride = _window(model, max_length, stride)
    prefix = _prefix(tokenizer)
    score = TextScore()
    windows = chain.from_iterable(
        rolling_windows(ids, prefix, max_length, stride) for ids in _tokenized(tokenizer, texts, max_tokens, score)
    )
    progress = logging.tqdm(desc="perplexity", unit=" tokens", total=max_tokens)
    while batch := list(islice(windows, batch_size)):
        score.nll += _score(model, batch)
        progress.update(sum(len(targets) for _, targets in batch))
    progress.close()
    if not score.num_tokens:
        raise ValueError("`texts` holds no text.")
    return score


def _window(model: PreTrainedModel, max_length: int | None, stride: int | None) -> tuple[int, int]:
    num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    max_length = int(min(4096, num_positions)) if max_length is None else max_length
    if not 0 < max_length <= num_positions:
        raise ValueError(f"`max_length` must be 1 to {num_positions}, the model's positions; got {max_length}.")
    stride = max_length if stride is None else stride
    if not 0 < stride <= max_length:
        raise ValueError(f"`stride` must be 1 to `max_length`, {max_length}; got {stride}.")
    return max_length, stride


def _prefix(tokenizer: PreTrainedTokenizerBase) -> int:
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise ValueError(
            "`tokenizer` has neither a beginning- nor an end-of-sequence token; the first needs a context."
        )
    return prefix


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # A text that spells a special token, such as `<image>`, is text all the same.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_tokens: int | None, score: TextScore
) -> Iterator[list[int]]:
    for text in texts:
        if max_tokens is not None and score.num_tokens >= max_tokens:
            return
        ids = _encode(tokenizer, text)
        if not ids:
            continue
        score.num_tokens += len(ids)
        score.num_words += len(text.split())
        score.num_bytes += len(text.encode())
        score.num_texts += 1
        yield ids


@torch.no_grad()
def _score(model: PreTrainedModel, windows: Sequence[tuple[list[int], list[int]]]) -> float:
    """The summed negative log-likelihood of the windows' targets, in float64."""
    inputs = [torch.tensor(ids, device=model.device) for ids, _ in windows]
    input_ids, mask = (pad_sequence(rows, batch_first=True) for rows in (inputs, [*map(torch.ones_like, inputs)]))
    logits: Any = model(input_ids=input_ids, attention_mask=mask).logits
    total = 0.0
    for row, ids, (_, targets) in zip(logits, inputs, windows, strict=True):
        own = row[len(ids) - len(targets) : len(ids)].float().log_softmax(-1)
        total -= own.gather(-1, torch.tensor(targets, device=own.device)[:, None]).double().sum().item()
    if not math.isfinite(total):
        raise ValueError(f"The model gives a text the log-likelihood {-total}; look for NaN in its weights.")
    return total


@dataclass
class PerplexityTask(Task):
    """
    Perplexity of held-out text: per token, per word, and bits per byte (§4.2). The model may be any causal language
    model, and the processor its tokenizer.

    Args:
        data (`str` or `list[str]`): Files (a pattern), a folder or a repository of the Hub, which is streamed; or the
            texts.
        name (`str`, defaults to `"text"`): For example `"wikipedia"` or `"c4"`.
        text_column (`str`, defaults to `"text"`)
        split (`str`, defaults to `"validation"`), config (`str`, *optional*): Of a folder or repository, such as
            `config="en"` for `allenai/c4`.
        max_tokens (`int`, *optional*, defaults to 20,000,000): Stops after the text in which this many are reached.
        num_samples (`int`, *optional*): Stops after so many texts.
        max_length (`int`, *optional*), stride (`int`, *optional*): As in [`perplexity`].
    """

    data: str | list[str] | None = None
    name: str = "text"
    text_column: str = "text"
    split: str = "validation"
    config: str | None = None
    max_tokens: int | None = 20_000_000
    num_samples: int | None = None
    max_length: int | None = None
    stride: int | None = None

    modalities: ClassVar[str] = "text → text"

    def prepare(self, model: PreTrainedModel, processor: Any) -> None:
        """
        Reads the texts.

        Raises:
            ValueError: no text, an unknown column or split, a window that does not fit the model.
            FileNotFoundError, ConnectionError: no such data.
        """
        if self.data is None:
            raise ValueError(
                f"The task `{self.name}` needs `data`: held-out texts, or files, a folder or a repository of the Hub "
                f"with a column {self.text_column!r}; on the command line `--data {self.name}=PATH`."
            )
        _window(model, self.max_length, self.stride)
        tokenizer = getattr(processor, "tokenizer", processor)
        _prefix(tokenizer)
        self._texts: list[str] = []
        num_tokens, progress = 0, logging.tqdm(desc=f"{self.name}: read", unit=" tokens", total=self.max_tokens)
        for text in self._read():
            if not (count := len(_encode(tokenizer, text))):
                continue
            self._texts.append(text)
            num_tokens += count
            progress.update(count)
            if num_tokens >= (self.max_tokens or math.inf) or len(self._texts) == self.num_samples:
                break
        progress.close()
        if not self._texts:
            raise ValueError(f"`data` of the task `{self.name}` holds no text; got {self._source!r}.")

    def run(self, run: Run) -> TaskResult:
        tokenizer = getattr(run.processor, "tokenizer", run.processor)
        max_length, stride = _window(run.model, self.max_length, self.stride)
        settings = {
            "data": self._source, "config": self.config, "split": self.split, "text_column": self.text_column,
            "max_tokens": self.max_tokens, "num_samples": self.num_samples, "max_length": max_length, "stride": stride,
        }  # fmt: skip
        inputs = {"model": run.fingerprint, "tokenizer": tokenizer_digest(tokenizer), "texts": digest(*self._texts)}

        def score(indices: list[int], texts: list[str]) -> list[dict[str, Any]]:
            # A window fills a pass, and so no number depends on what else is scored with it.
            return [asdict(_score_text(run.model, tokenizer, text, max_length, stride)) for text in texts]

        lines = run.map(f"{self.name}/texts", self._texts, score, settings | inputs, batch_size=1)
        names = ("nll", "num_tokens", "num_words", "num_bytes")
        nll, tokens, words, num_bytes = ([line[name] for line in lines] for name in names)
        scores = {
            "perplexity": Score.of(_perplexity, nll, tokens),
            "bits per byte": Score.of(_bits, nll, num_bytes),
        }
        # Not of languages without blanks: their "words" are whole sentences.
        if all(n and x / n < 100 for x, n in zip(nll, words, strict=True)):
            scores["word perplexity"] = Score.of(_perplexity, nll, words)
        counts = {"num_texts": len(lines), **{name: sum(line[name] for line in lines) for name in names[1:]}}
        return TaskResult(scores, {**settings, **counts, "texts": inputs["texts"]})

    @property
    def _source(self) -> str:
        return self.data if isinstance(self.data, str) else "texts that were passed"

    def _read(self) -> Iterator[str]:
        if not isinstance(self.data, str):
            yield from (self._checked(text, "`data`") for text in self.data or [])
            return
        try:
            rows = load_rows(self.data, streaming=True, split=self.split, config=self.config)
        except (OSError, ValueError) as error:
            raise ValueError(f"The task `{self.name}` cannot read `data` {self.data!r}: {error}") from error
        for row in rows:
            if self.text_column not in row:
                raise ValueError(
                    f"`text_column` is {self.text_column!r}, but the columns of {self.data} are {list(row)}; name one."
                )
            yield self._checked(row[self.text_column] or "", f"the column {self.text_column!r} of {self.data}")

    def _checked(self, text: Any, place: str) -> str:
        if not isinstance(text, str):
            raise ValueError(
                f"The task `{self.name}` needs strings; {place} holds {type(text).__name__}: {text!r:.60}."
            )
        return text


def _score_text(model: PreTrainedModel, tokenizer: Any, text: str, max_length: int, stride: int) -> TextScore:
    ids = _encode(tokenizer, text)
    windows = rolling_windows(ids, _prefix(tokenizer), max_length, stride)
    nll = sum(_score(model, [window]) for window in windows)
    return TextScore(nll, len(ids), len(text.split()), len(text.encode()), 1)


def _perplexity(nll: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return np.exp(nll.sum(axis) / counts.sum(axis))


def _bits(nll: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return nll.sum(axis) / counts.sum(axis) / math.log(2)
