"""What holds of the package as a whole: who imports whom, the supported range, the checkpoint of the tests."""

import ast
import importlib.metadata
import subprocess
import sys
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

# Imports run one way. Files ending in `_transfusion` travel with a checkpoint as remote code.
MAY_IMPORT = {
    "model_card_transfusion": set(),
    "hub_transfusion": {"model_card"},
    "configuration_transfusion": {"hub"},
    "attention_transfusion": set(),
    "masking_transfusion": {"configuration", "attention"},
    "diffusion_transfusion": {"configuration_transfusion"},
    "patching_transfusion": {"configuration_transfusion"},
    "autoencoder_transfusion": {"patching"},
    "denoising_transfusion": {"diffusion", "masking"},
    "generation_transfusion": {"configuration", "denoising", "diffusion", "masking", "patching"},
    "modeling_transfusion": {
        "configuration",
        "attention",
        "autoencoder",
        "diffusion",
        "masking",
        "conversion",
        "modality",
        "patching",
        "generation",
        "hub",
        "lm_loss",
        "pipelines",  # by name only, see there
    },
    "modality_transfusion": set(),
    "lm_loss_transfusion": set(),
    "conversion_transfusion": {"configuration", "modality", "patching"},
    "image_processing_transfusion": set(),
    "processing_transfusion": {"hub", "image_processing"},
    "pipelines_transfusion": {"hub", "processing"},
}
MAY_IMPORT = {
    name: {f"{n.removesuffix('_transfusion')}_transfusion" for n in names} for name, names in MAY_IMPORT.items()
}


def imports_of(file: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("file", sorted(SOURCE.glob("*.py")), ids=lambda file: file.stem)
def test_imports_run_one_way(file):
    for node in imports_of(file):
        if isinstance(node, ast.Import) or node.level == 0:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not any(name.startswith("transfusion_hf") for name in names), "siblings are imported relatively"
            continue
        assert node.level == 1 and node.module, (
            "only `from .sibling import name`: nothing else is copied as remote code"
        )
        if file.stem in MAY_IMPORT:
            assert node.module in MAY_IMPORT[file.stem], f"{file.stem} must not import {node.module}"


def test_every_travelling_file_is_reached_from_the_model_or_the_processor():
    reached, todo = set(), ["modeling_transfusion", "processing_transfusion", "pipelines_transfusion"]
    while todo:
        name = todo.pop()
        reached.add(name)
        todo += [
            n.module for n in imports_of(SOURCE / f"{name}.py") if getattr(n, "level", 0) and n.module not in reached
        ]
    assert reached == {file.stem for file in SOURCE.glob("*_transfusion.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", ["examples", "conversion", "benchmarks"])
def test_scripts_import_the_package_and_not_each_other(folder):
    siblings = {file.stem for file in (ROOT / folder).glob("*.py")} - {"ratios"}  # what benchmarks share
    for file in (ROOT / folder).glob("*.py"):
        for node in imports_of(file):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not siblings & {name.split(".")[0] for name in names} and not getattr(node, "level", 0)


def test_another_version_of_transformers_is_refused_with_the_range():
    """The range stands in pyproject.toml alone; private methods are overridden."""
    requirements = [Requirement(text) for text in importlib.metadata.requires("transfusion-hf")]
    (supported,) = [r.specifier for r in requirements if r.name == "transformers"]
    assert supported.contains(importlib.metadata.version("transformers"))
    code = (
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '4.57.0' if name == 'transformers' else real(name)\n"
        "import transfusion_hf"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode and f"needs transformers {supported}; 4.57.0 is installed" in run.stderr


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
