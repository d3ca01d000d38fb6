"""What README and docs say of the code: names, links, commands and quoted lines exist. test_docs_blocks.py runs it."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import transfusion_hf
from transfusion_command import main
from transfusion_hf.denoising_transfusion import DrawingArguments

ROOT = Path(__file__).parents[1]
FILES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "conversion/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("model_cards/*.md")),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(params=FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def document(request):
    return request.param


def prose(file: Path) -> str:
    return BLOCK.sub("", file.read_text())


def resolve(dotted: str) -> object:
    """The module, class or function of a dotted name."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            value = getattr(value, name)
        return value
    raise AttributeError(dotted)


def test_names_of_the_package_exist(document):
    if document.name == "CHANGELOG.md":
        pytest.skip("names what was, too")
    for name in re.findall(r"(?<![\w/])transfusion_hf(?:\.\w+)+", document.read_text()):
        resolve(name)


def test_relative_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose(document)):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_subcommands_of_the_command_line_exist(document, capsys):
    for command in set(re.findall(r"`transfusion ([a-z]+)[ `]", prose(document))):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0, f"{document.name}: transfusion {command}"


def test_lines_that_compute_the_equations_are_quoted_as_they_stand():
    rows = re.findall(r"^\|.*\| `([\w.]+)`(?:: `(.+)`)? \|$", (ROOT / "docs/equations.md").read_text(), re.MULTILINE)
    assert len(rows) > 10 and sum(bool(quoted) for _, quoted in rows) > 5
    for symbol, quoted in rows:
        name = symbol if symbol.startswith("diffusers.") else f"transfusion_hf.{symbol}"
        source = inspect.getsource(inspect.unwrap(resolve(name)))
        assert "".join(quoted.split()) in "".join(source.split()), f"{symbol} has no `{quoted}`"


def test_every_argument_of_generate_has_its_place_in_the_table():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/generation.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {field.name for field in dataclasses.fields(DrawingArguments)} <= named


def private_overrides() -> set[str]:
    """Private methods of transformers that our classes override, without those that a base class leaves abstract."""
    found = set()
    for info in pkgutil.walk_packages(transfusion_hf.__path__, "transfusion_hf."):
        if info.name == "transfusion_hf.cli.app":  # Gradio takes seconds to import, and the page overrides nothing
            continue
        module = importlib.import_module(info.name)
        for owner in vars(module).values():
            if not inspect.isclass(owner) or owner.__module__ != module.__name__:
                continue
            above = [base for base in owner.__mro__[1:] if base.__module__.startswith("transformers.")]
            for name, value in vars(owner).items():
                is_method = callable(value) or isinstance(value, (staticmethod, classmethod))
                if not is_method or not re.match("_[^_]", name):
                    continue
                overridden = next((vars(base)[name] for base in above if name in vars(base)), None)
                if overridden is not None and not getattr(overridden, "__isabstractmethod__", False):
                    found.add(f"{owner.__name__}.{name}")
    return found


def test_the_page_on_transformers_lists_exactly_what_is_overridden():
    rows = re.findall(r"^\| `(\w+\._\w+)` \|", (ROOT / "docs/transformers.md").read_text(), re.MULTILINE)
    assert set(rows) == private_overrides()
