"""
One order of documents for all models of a comparison, and the batch that each model gets of them.

A step is a list of documents with a given number of tokens, text and captioned pictures 1 : 1 (§4.1, arXiv
2408.11039). `TransfusionRows` and `TokenRows` collate the same step for Transfusion, Chameleon and Llama: the same
texts and pictures, with captions first or pictures first alike, packed into rows in which documents do not see each
other. Their numbers of rows differ: 8×8 codes take more places than patches, and Llama's rows hold text alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import pad
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from transfusion_hf import TransfusionDataCollator, TransfusionProcessor
from transfusion_hf.data.collator import first_fit
from transfusion_hf.data.dataset import TransfusionDataset
from transfusion_hf.data.mixing import mix_by_tokens


@dataclass(frozen=True)
class Document:
    """A text; or, with the number of a `picture`, its caption, which may come first or be dropped for guidance."""

    text: str
    picture: int | None = None
    caption_first: bool = True
    is_dropped: bool = False


@dataclass(eq=False)
class MixedSteps(IterableDataset):
    """
    Endless steps, each a list of [`Document`] in the same order whenever it is read, wherever the arguments are equal.
    For a `Trainer` with a batch size of 1: the collators take one step.

    Args:
        texts (`list[str]`): Passages that fit into a row.
        captions (`list[str]`): Of picture 0, 1, …
        tokenizer (`PreTrainedTokenizerBase`)
        tokens_per_step (`int`): A step ends with the document that reaches it.
        image_tokens (`int`, defaults to 16): Places of a picture in the count, without `<BOI>` and `<EOI>`. Like the
            paper's "tokens (patches)" those of Transfusion with patches of 2×2, for every model.
        seed (`int`, defaults to 0): Of the order of documents, of captions and pictures, and of dropped captions.
        caption_first_probability (`float`, defaults to 0.8), caption_dropout (`float`, defaults to 0.1): As in
            `TransfusionDataCollator`.
    """

    texts: list[str]
    captions: list[str]
    tokenizer: PreTrainedTokenizerBase
    tokens_per_step: int
    image_tokens: int = 16
    seed: int = 0
    caption_first_probability: float = 0.8
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        self._rows: list[Dataset] = []
        for texts, extra in ((self.texts, 2), (self.captions, 4 + self.image_tokens)):
            ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            numbers = [*range(len(texts))] if texts is self.captions else [None] * len(texts)
            columns = {"text": texts, "picture": numbers, "num_tokens": [len(i) + extra for i in ids]}
            self._rows.append(Dataset.from_dict(columns))

    def documents(self) -> Iterator[tuple[Document, int]]:
        """Each with the number of tokens that it counts."""
        sources = [
            TransfusionDataset(rows, dict, shuffle=True, seed=self.seed + i) for i, rows in enumerate(self._rows)
        ]
        mixture = mix_by_tokens(sources, length_fn=lambda row: row["num_tokens"], stopping_strategy="never")
        for position, row in enumerate(mixture):
            if row["picture"] is None:
                yield Document(row["text"]), row["num_tokens"]
                continue
            order, dropout = np.random.default_rng([self.seed, position]).random(2)
            caption_first = bool(order < self.caption_first_probability)
            is_dropped = caption_first and bool(dropout < self.caption_dropout)
            yield Document(row["text"], row["picture"], caption_first, is_dropped), row["num_tokens"]

    def __iter__(self) -> Iterator[list[Document]]:
        step, num_tokens = [], 0
        for document, length in self.documents():
            step.append(document)
            num_tokens += length
            if num_tokens >= self.tokens_per_step:
                yield step
                step, num_tokens = [], 0


@dataclass
class TransfusionRows:
    """
    Collates steps of [`MixedSteps`] for Transfusion, by `TransfusionDataCollator`.

    Args:
        processor (`TransfusionProcessor`), max_length (`int`): Of the rows.
        latents (`np.ndarray` of shape `(num_pictures, channels, height, width)`)
        num_train_timesteps (`int`, defaults to 1000), image_first_max_timesteps (`int`, defaults to 500): Limits of t;
            the second is for pictures before their caption (§4.3.4).
    """

    processor: TransfusionProcessor
    max_length: int
    latents: np.ndarray
    num_train_timesteps: int = 1000
    image_first_max_timesteps: int = 500

    def __post_init__(self) -> None:
        self.collator = TransfusionDataCollator(self.processor, max_length=self.max_length)

    def sample(self, document: Document) -> dict[str, Any]:
        """For `TransfusionDataCollator`, with the place of the picture marked."""
        if document.picture is None:
            return {"text": document.text}
        marker, caption = self.processor.image_token, "" if document.is_dropped else document.text
        return {
            "text": caption + marker if document.caption_first else marker + caption,
            "latents": torch.as_tensor(self.latents[document.picture]),
            "max_timesteps": self.num_train_timesteps if document.caption_first else self.image_first_max_timesteps,
        }

    def __call__(self, steps: Sequence[Sequence[Document]]) -> dict[str, Any]:
        return self.collator([self.sample(document) for document in chain(*steps)])


@dataclass
class TokenRows:
    """
    Collates steps of [`MixedSteps`] for Chameleon or, without `codes`, the texts alone for Llama.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With the image tokens. Code k is the token `len(tokenizer)` + k.
        max_length (`int`): Of the rows.
        codes (`np.ndarray` of shape `(num_pictures, height, width)`, *optional*)

    Returns, when called, `input_ids`, `labels` and `position_ids` of shape `(rows, max_length)`. All tokens but the
    first of each document and the padding have a loss; `position_ids` restart at 0 with each document.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    codes: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.boi, self.eoi = self.tokenizer.convert_tokens_to_ids(["<BOI>", "<EOI>"])

    def ids(self, document: Document) -> list[int]:
        """`<s>`, caption, `<BOI>`, codes row by row, `<EOI>`, `</s>`, or with the picture before the caption."""
        text = [] if document.is_dropped else self.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        picture: list[int] = []
        if document.picture is not None:
            assert self.codes is not None
            codes = len(self.tokenizer) + self.codes[document.picture].ravel().astype(int)
            picture = [self.boi, *codes.tolist(), self.eoi]
        parts = text + picture if document.caption_first else picture + text
        return [self.tokenizer.bos_token_id, *parts, self.tokenizer.eos_token_id]

    def __call__(self, steps: Sequence[Sequence[Document]]) -> dict[str, torch.Tensor]:
        """`ValueError` if a document is longer than `max_length`, or if there is none."""
        documents = [d for d in chain(*steps) if d.picture is None or self.codes is not None]
        ids = [torch.tensor(self.ids(document)) for document in documents]
        longest = max(map(len, ids), default=0)
        if not 0 < longest <= self.max_length:
            what = (
                f"a document has {longest} tokens; cut it by `passages`" if ids else "a step has no text; enlarge it"
            )
            raise ValueError(f"`max_length` is {self.max_length}, but {what}.")
        rows: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in first_fit([*map(len, ids)], self.max_length):
            own = [ids[i] for i in row]
            padding = self.max_length - sum(map(len, own))
            labels = torch.cat([pad(document[1:], (1, 0), value=-100) for document in own])
            rows["input_ids"].append(pad(torch.cat(own), (0, padding), value=self.tokenizer.pad_token_id))
            rows["labels"].append(pad(labels, (0, padding), value=-100))
            rows["position_ids"].append(torch.cat([torch.arange(n) for n in (*map(len, own), padding)]))
        return {name: torch.stack(tensors) for name, tensors in rows.items()}
