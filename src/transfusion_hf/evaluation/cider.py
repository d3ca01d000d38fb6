"""Image to text: CIDEr of greedy captions (Table 1, arXiv 2408.11039; CIDEr is arXiv 1411.5726)."""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel

from ..processing_transfusion import TransfusionProcessor
from .captioned import as_the_model_sees, read_captioned
from .run import Result, Run, Score, Task, TaskResult, Verdict, require_images

TOKENIZERS = {
    "ptb": "PTBTokenizer of Stanford CoreNLP 3.4.1, as pycocoevalcap calls it (Java)",
    "words": "lower case, split at all but letters, digits and apostrophes inside of words",
}
NUM_VERDICTS = 64  # each with a copy of its picture


@dataclass
class CaptionTask(Task):
    """
    100 × CIDEr, the scale of papers (Table 3: 27.2), and the share of captions that equal a reference.

    Args:
        data (`str`, path or `Sequence`): See [`read_captioned`]. For the paper's number: a folder with Karpathy's
            `dataset_coco.json` and COCO's `val2014`.
        num_samples (`int`, *optional*): A seeded choice of so many pictures. Defaults to all; the document
            frequencies are those of the chosen ones, so only numbers of the same pictures compare.
        split (`str`, *optional*): Defaults to Karpathy's test split, and to `"train"` where `datasets` reads.
        prompt (`str`, defaults to `""`): Between picture and caption.
        max_new_tokens (`int`, defaults to 64)
        tokenizer (`str`, defaults to `"ptb"`): Or `"words"`, which needs no Java. Its score has another name,
            `"CIDEr (words)"`, since it is another number.

    Raises (in `prepare`):
        ValueError, OSError, ImportError: no data, fewer than two pictures, no Java, pycocoevalcap is not installed.
    """

    data: Any = None
    num_samples: int | None = None
    split: str | None = None
    prompt: str = ""
    max_new_tokens: int = 64
    tokenizer: str = "ptb"
    name: str = "coco-captions"

    modalities: ClassVar[str] = "image → text"

    def prepare(self, model: PreTrainedModel, processor: TransfusionProcessor) -> None:
        require_images(model, self.name)
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"`tokenizer` must be one of {', '.join(TOKENIZERS)}; got {self.tokenizer!r}.")
        tokenize([["A cat."]], self.tokenizer)
        self._pictures = read_captioned(self.data, self.name, self.split).sample(self.num_samples)
        if len(self._pictures) < 2:
            raise ValueError("CIDEr weighs words by the pictures that they occur with, so `data` needs two or more.")

    def run(self, run: Run) -> TaskResult:
        pictures = self._pictures
        settings: Result = {"pictures": pictures.digest}
        captions = run.caption(self.name, pictures, settings, self.prompt, self.max_new_tokens)
        # In two calls, like pycocoevalcap: the tokenizer looks beyond the ends of lines.
        texts = [row[0] for row in tokenize([[caption] for caption in captions], self.tokenizer)]
        references = tokenize(pictures.captions, self.tokenizer)
        values = 100 * cider(texts, references)
        equal = [float(text in row) for text, row in zip(texts, references, strict=True)]
        scores = {
            "CIDEr" if self.tokenizer == "ptb" else f"CIDEr ({self.tokenizer})": Score.of(np.mean, values.tolist()),
            "equal to a reference": Score.of(np.mean, equal),
        }
        settings = {
            **pictures.settings,
            "num_references": sum(map(len, pictures.captions)),
            "prompt": self.prompt,
            "decoding": f"greedy, at most {self.max_new_tokens} tokens",
            "tokenizer": TOKENIZERS[self.tokenizer],
            "score": f"100 × mean of pycocoevalcap {version('pycocoevalcap')}'s Cider (CIDEr-D, n = 4, σ = 6)",
            "interval": "bootstrap over pictures, document frequencies fixed",
        }
        return TaskResult(scores, settings, self._verdicts(run, captions, values))

    def _verdicts(self, run: Run, captions: Sequence[str], values: np.ndarray) -> list[Verdict]:
        folder = Path(run.output_dir, self.name, "pictures")
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(zip(captions, values.tolist(), strict=True))[:NUM_VERDICTS]
        verdicts = [Verdict(folder / f"{i:06d}.png", f"{text} (CIDEr {x:.1f})") for i, (text, x) in enumerate(rows)]
        if run.state.is_main_process:
            for verdict, image in zip(verdicts, as_the_model_sees(run.processor, self._pictures), strict=False):
                image.save(part := verdict.picture.with_suffix(".part"), format="PNG")
                os.replace(part, verdict.picture)
        run.state.wait_for_everyone()
        return verdicts


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """
    pycocoevalcap's `Cider` of tokenized captions: float64 `(num_captions,)`, 0 to 10. The document frequencies are
    those of `references`.
    """
    Cider = _pycocoevalcap()[0]
    texts = {i: [*texts] for i, texts in enumerate(references)}
    return Cider().compute_score(texts, {i: [text] for i, text in enumerate(captions)})[1]


def tokenize(texts: Sequence[Sequence[str]], tokenizer: str = "ptb") -> list[list[str]]:
    """
    Tokens joined by blanks, without punctuation, in the same nesting.

    Raises:
        FileNotFoundError: `"ptb"` without Java.
        OSError: Java does not run, or the folder of pycocoevalcap, where it puts a file, cannot be written.
    """
    PTBTokenizer = _pycocoevalcap()[1]
    if tokenizer == "words":
        return [[" ".join(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())) for text in row] for row in texts]
    if shutil.which("java") is None:
        raise FileNotFoundError(
            "CIDEr's tokenizer needs Java, and there is no `java` on the path; install it (Debian, Ubuntu: `apt "
            "install default-jre-headless`), or take `tokenizer='words'`, whose score is called 'CIDEr (words)'."
        )
    # It reads a text a line, and takes more than "\n" for the end of one: each text after that would be off by one.
    lines = {i: [{"caption": " ".join(text.split())} for text in row] for i, row in enumerate(texts)}
    found = PTBTokenizer().tokenize(lines)
    tokenized = [found.get(i, []) for i in lines]
    if [*map(len, tokenized)] != [*map(len, texts)]:
        raise OSError("Java's PTBTokenizer did not return every text; its errors are above. Does `java -version` run?")
    return tokenized


def _pycocoevalcap() -> tuple[Any, Any]:
    try:
        from pycocoevalcap.cider.cider import Cider  # type: ignore[import-untyped]
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("CIDEr needs pycocoevalcap; run `pip install 'transfusion-hf[evaluate]'`.") from error
    return Cider, PTBTokenizer
