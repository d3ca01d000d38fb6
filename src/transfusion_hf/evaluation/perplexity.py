"""Text to text: perplexity per token and per word, and bits per byte (Table 1, arXiv 2408.11039)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


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


@torch.no_grad()
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
    num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    max_length = int(min(4096, num_positions)) if max_length is None else max_length
    if not 0 < max_length <= num_positions:
        raise ValueError(f"`max_length` must be 1 to {num_positions}, the model's positions; got {max_length}.")
    stride = max_length if stride is None else stride
    if not 0 < stride <= max_length:
        raise ValueError(f"`stride` must be 1 to `max_length`, {max_length}; got {stride}.")
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise ValueError(
            "`tokenizer` has neither a beginning- nor an end-of-sequence token; the first needs a context."
        )
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


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_tokens: int | None, score: TextScore
) -> Iterator[list[int]]:
    for text in texts:
        if max_tokens is not None and score.num_tokens >= max_tokens:
            return
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            continue
        score.num_tokens += len(ids)
        score.num_words += len(text.split())
        score.num_bytes += len(text.encode())
        score.num_texts += 1
        yield ids


def _score(model: PreTrainedModel, windows: Sequence[tuple[list[int], list[int]]]) -> float:
    """The summed negative log-likelihood of the windows' targets, in float64."""
    inputs = [torch.tensor(ids, device=model.device) for ids, _ in windows]
    input_ids, mask = (pad_sequence(rows, batch_first=True) for rows in (inputs, [*map(torch.ones_like, inputs)]))
    logits: Any = model(input_ids=input_ids, attention_mask=mask).logits
    total = 0.0
    for row, ids, (_, targets) in zip(logits, inputs, windows, strict=True):
        own = row[len(ids) - len(targets) : len(ids)].float().log_softmax(-1)
        total -= own.gather(-1, torch.tensor(targets, device=own.device)[:, None]).double().sum().item()
    return total
