"""
Hooks of `mkdocs build`. Some files outside docs/ become pages, so that README and docs can link to each other by the
same relative paths in the repository and on the site. Links to other files of the repository become plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PUBLISHED = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "conversion/README.md", "benchmarks/results/*",
    "experiments/results/*",
)  # fmt: skip
LINK = re.compile(r"\[([^]]*)\]\(([^)#:]+)(#[^)]*)?\)")
LONG_CODE = re.compile(r"<code>([^<\n]{20,})</code>")
BREAK = re.compile(r"(?<=\w[._/])(?=\w)")
CROSS_REFERENCE = re.compile(r"\[<code>~?(?:\w+\.)*(\w+)</code>\]")  # [`TransfusionConfig`] in docstrings


def on_files(files: Any, config: Any) -> Any:
    for path in sorted(path for pattern in PUBLISHED for path in ROOT.glob(pattern) if path.is_file()):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = page.file.src_uri
    is_published = page.file.generated_by is not None
    folder = posixpath.dirname(here if is_published else f"docs/{here}")

    def replace(match: re.Match) -> str:
        text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        uri = path.removeprefix("docs/")
        if files.get_file_from_path(uri) is not None:
            return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor or ''})"
        return text if (ROOT / path).exists() else match.group()

    return LINK.sub(replace, markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    html = CROSS_REFERENCE.sub(r"<code>\1</code>", html)
    # Long names in narrow columns break after a dot or an underscore.
    return LONG_CODE.sub(lambda match: f"<code>{BREAK.sub('<wbr>', match[1])}</code>", html)
