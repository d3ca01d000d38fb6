"""A griffe extension: docstrings in the style of transformers (`Args:`, `Returns:`, `Raises:`) as Markdown lists."""

import re
import textwrap
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example|Examples):\n((?:    .*\n|\n)*)", re.MULTILINE)
TITLES = {"Args": "Arguments"}


def to_markdown(docstring: str) -> str:
    def replace(match: re.Match) -> str:
        name, body = match.groups()
        lines = textwrap.dedent(body).strip("\n").splitlines()
        if name in ("Args", "Raises"):
            # An entry begins at the margin; what is indented below it belongs to it.
            lines = [f"- {_mark(line)}" if line and not line[0].isspace() else f"    {line.strip()}" for line in lines]
        return "\n".join([f"**{TITLES.get(name, name)}**", "", *lines, "", ""])

    return SECTION.sub(replace, docstring + "\n")


def _mark(entry: str) -> str:
    """`name (type): text` with its names in bold, `ValueError: text` with the error in bold."""
    if re.match(r"\w+ \(", entry):
        return re.sub(r"(^|\), )(\w+)(?= \()", r"\1**`\2`**", entry)
    return re.sub(r"^(\w+)", r"**`\1`**", entry)


class TransformersDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
