"""What holds of the package as a whole: who imports whom, the supported range, the checkpoint of the tests."""

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

import transfusion_hf
from transfusion_hf import TransfusionForCausalLMAndDiffusion, TransfusionModel

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "transfusion_hf"
TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"

# Files ending in `_transfusion` travel with a checkpoint as remote code: flat, and each imports files before it only.
CORE = [
    [
        "configuration",
        "attention",
        "masking",
        "diffusion",
        "patching",
        "modality",
        "denoising",
        "generation",
        "modeling",
    ],
    ["image_processing", "processing", "pipelines"],
]
SIBLINGS = {"attention", "masking", "diffusion", "patching", "modality"}  # of one level; only the mask needs another
# Wings do not travel. They import the core, and these wings.
WINGS = {
    "data": set(),
    "training": {"data", "hub"},
    "vae": set(),
    "conversion": {"hub", "vae"},  # an autoencoder is attached during the conversion
    "hub": set(),
    "inference": set(),
    "evaluation": {"data"},
    "kernels": set(),
    "cli": {"data", "training", "vae", "conversion", "hub", "inference", "evaluation"},
}
SHARED_SCRIPTS = {"common", "emoji_data", "package_data", "ratios"}


def imports_of(file: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]


def modules_of(file: Path) -> list[tuple[int, str]]:
    """Level and module of each import; level 0 is absolute."""
    return [
        pair
        for node in imports_of(file)
        for pair in (
            [(node.level, node.module or "")]
            if isinstance(node, ast.ImportFrom)
            else [(0, alias.name) for alias in node.names]
        )
    ]


def may_import(name: str) -> set[str]:
    (tower,) = (tower for tower in CORE if name in tower)
    earlier = set(tower[: tower.index(name)])
    return earlier - set(SIBLINGS) if name in SIBLINGS and name != "masking" else earlier


@pytest.mark.parametrize("name", [name for tower in CORE for name in tower])
def test_the_core_imports_one_way(name):
    for level, module in modules_of(SOURCE / f"{name}_transfusion.py"):
        if level:
            assert level == 1 and module, "only `from .sibling import name`: nothing else is copied as remote code"
            assert module.removesuffix("_transfusion") in may_import(name), f"{name} must not import {module}"
        else:
            assert module.split(".")[0] != "transfusion_hf", "siblings are imported relatively"


@pytest.mark.parametrize("wing", WINGS)
def test_wings_import_the_core_and_few_other_wings(wing):
    core = {f"{name}_transfusion" for tower in CORE for name in tower}
    for file in (SOURCE / wing).glob("*.py"):
        for level, module in modules_of(file):
            assert module.split(".")[0] != "transfusion_hf", "siblings are imported relatively"
            if level == 2:
                assert module.split(".")[0] in core | WINGS[wing], f"{wing}/{file.name} must not import {module}"


def test_every_file_has_its_place():
    assert {file.stem for file in SOURCE.glob("*_transfusion.py")} == {f"{n}_transfusion" for t in CORE for n in t}
    assert {file.parent.name for file in SOURCE.glob("*/*.py")} == set(WINGS)
    assert {file.stem for file in SOURCE.glob("*.py") if not file.stem.endswith("_transfusion")} == {"__init__"}
    assert {file.name for file in SOURCE.parent.glob("*.py")} == {"transfusion_command.py"}


def test_the_console_script_and_the_typing_marker_are_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {ROOT / name for name in packages} == {SOURCE, SOURCE.parent / "transfusion_command.py"}
    module, function = project["project"]["scripts"]["transfusion"].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert (SOURCE / "py.typed").is_file()


def test_every_travelling_file_is_reached_from_the_model_or_the_pipelines():
    reached, todo = set(), ["modeling_transfusion", "pipelines_transfusion"]
    while todo:
        name = todo.pop()
        reached.add(name)
        todo += [module for level, module in modules_of(SOURCE / f"{name}.py") if level and module not in reached]
    assert reached == {file.stem for file in SOURCE.glob("*_transfusion.py")}


@pytest.mark.parametrize("folder", ["examples", "conversion", "benchmarks", "experiments", "model_cards"])
def test_scripts_import_the_package_and_not_each_other(folder):
    folders = ("examples", "conversion", "benchmarks", "experiments")
    scripts = {file.stem for name in folders for file in (ROOT / name).glob("*.py")} - SHARED_SCRIPTS
    if folder == "experiments":  # one program in several files
        scripts -= {file.stem for file in (ROOT / folder).glob("*.py")}
    for file in (ROOT / folder).glob("*.py"):
        for level, module in modules_of(file):
            assert not level and module.split(".")[0] not in scripts, f"{file.name} imports {module}"


def test_an_older_transformers_is_refused_with_the_version_to_install():
    requirements = [Requirement(text) for text in importlib.metadata.requires("transfusion-hf")]
    (supported,) = [r.specifier for r in requirements if r.name == "transformers"]
    assert supported.contains(importlib.metadata.version("transformers"))
    code = (
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '5.23.0' if name == 'transformers' else real(name)\n"
        "import transfusion_hf"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode and "ImportError" in run.stderr
    assert f"needs transformers {supported}; 5.23.0 is installed" in run.stderr
    assert f"Run `pip install 'transformers{supported}'`" in run.stderr


@pytest.mark.parametrize(
    ("installed", "warns"), [("5.24.0", False), ("5.24.7", False), ("5.25.0", True), ("6.0", True)]
)
def test_a_newer_transformers_than_the_tested_ones_is_a_warning(installed, warns, monkeypatch):
    monkeypatch.setattr(transfusion_hf, "version", lambda name: installed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transfusion_hf._check_transformers()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == warns
    assert all(f"tested with transformers >=5.24 up to 5.24; {installed} is installed" in m for m in messages)


# The private methods of transformers that we override, as 5.24 declares them.
OVERRIDDEN = {
    "TransfusionGenerationMixin._valid_auto_compile_criteria": "(self, model_kwargs, generation_config)",
    "TransfusionPreTrainedModel._init_weights": "(self, module)",
    "WholeCheckpointsTrainer._get_grad_norm": "(self, model, grad_norm=None)",
    "WholeCheckpointsTrainer._get_output_dir": "(self, trial)",
    "WholeCheckpointsTrainer._init_training_state":
        "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)",
    "WholeCheckpointsTrainer._push_from_checkpoint": "(self, checkpoint_folder)",
    "WholeCheckpointsTrainer._save_checkpoint": "(self, model, trial)",
}  # fmt: skip


@pytest.fixture(scope="module")
def overridden() -> dict[str, str]:
    """
    Private methods of transformers that a class of the package overrides, with their signatures without annotations.
    Those that a base class declares abstract are left out.
    """
    found = {}
    for info in pkgutil.walk_packages(transfusion_hf.__path__, "transfusion_hf."):
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            for name in vars(cls):
                if not name.startswith("_") or name.startswith("__"):
                    continue
                bases = [base for base in cls.__mro__[1:] if name in vars(base)]
                base = next((base for base in bases if base.__module__.split(".")[0] == "transformers"), None)
                method = base and vars(base)[name]
                is_method = callable(method) or isinstance(method, (classmethod, staticmethod, property))
                if is_method and not getattr(method, "__isabstractmethod__", False):
                    signature = inspect.signature(getattr(base, name))
                    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
                    found[f"{cls.__name__}.{name}"] = str(inspect.Signature(parameters))
    return found


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_of_transformers_has_the_signature_that_we_know(name, overridden):
    assert overridden[name] == OVERRIDDEN[name]


def test_few_private_methods_of_transformers_are_overridden_and_the_docs_list_them(overridden):
    page = (ROOT / "docs" / "transformers.md").read_text()
    assert set(overridden) == set(OVERRIDDEN) == set(re.findall(r"^\| `(\w+\.\w+)` \|", page, re.MULTILINE))
    assert len(overridden) <= 12


def test_everything_public_is_exported_and_documented():
    for name in transfusion_hf.__all__:
        value = getattr(transfusion_hf, name)
        assert not callable(value) or value.__doc__, name


def test_the_checkpoint_of_the_tests_is_small():
    files = list(TINY.iterdir())
    assert sum(file.stat().st_size for file in files) <= 300 * 1024
    assert [file.name for file in files if file.suffix == ".safetensors"] == ["model.safetensors"]


def test_the_auto_classes_load_the_checkpoint_and_it_reads_writes_and_draws():
    assert AutoConfig.from_pretrained(TINY).model_type == "transfusion"
    assert isinstance(AutoModel.from_pretrained(TINY), TransfusionModel)
    assert type(AutoImageProcessor.from_pretrained(TINY)).__name__ == "TransfusionImageProcessor"
    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForImageTextToText):
        assert isinstance(auto.from_pretrained(TINY), TransfusionForCausalLMAndDiffusion)
    model, processor = AutoModelForMultimodalLM.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    inputs = processor(text=["a <image> is red", "draw <BOI>"], images=[Image.new("RGB", (8, 8), "red")])
    output = model.generate(**inputs, max_new_tokens=24, generator=torch.Generator().manual_seed(0))
    assert [len(row) for row in output.images] == [0, 1]
    assert output.images[1][0].shape == (3, 8, 8)
    assert model.generation_config.num_inference_steps == 10  # our entry of generation_config.json
    assert len(processor.post_process_multimodal_output(output)) == 2
