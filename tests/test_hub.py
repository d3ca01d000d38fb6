"""A saved repository is whole: it loads, elsewhere and without this package, and gives the same."""

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import running_hub
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import LocalEntryNotFoundError
from make_tiny_transfusion import byte_tokenizer
from safetensors.torch import load, load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor, LlamaConfig, pipeline
from what_a_model_does import results

import transfusion_hf
from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion, TransfusionProcessor
from transfusion_hf.configuration_transfusion import AUTO_MAP, CUSTOM_PIPELINES
from transfusion_hf.conversion.causal_lm import transfusion_key
from transfusion_hf.hub import push_to_hub

SOURCE = Path(transfusion_hf.__file__).parent
TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
FIXTURES = Path(__file__).parent / "fixtures"
SOURCES = ["folder", "exported", "pushed whole", "pushed in parts", "saved again"]
CODE = {file.name for file in SOURCE.glob("*_transfusion.py")}
DATA = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def run(script: str, *arguments: str | Path, **environment: str) -> None:
    """In a process of its own, with as many threads as here (sums depend on it), and a cache of its own."""
    environment = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_none",
        **environment,
    }
    command = [sys.executable, FIXTURES / script, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with every part that there is: a VAE, a U-Net, image weights; its own weights are random."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = TransfusionConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
        ),
        vae_config={
            "block_out_channels": [4, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "latent_channels": 2,
            "norm_num_groups": 2,
            "scaling_factor": 0.7,
        },
        latent_channels=2,
        sample_size=4,
        patch_encoder="unet",
        untied_modalities=["image"],
        pos_embed_type="sincos",
        timestep_embedding_dim=16,
        image_start_token_id=0,  # for_model replaces these three
        image_token_id=1,
        image_end_token_id=2,
    )
    model = TransfusionForCausalLMAndDiffusion(config)
    processor = TransfusionProcessor.for_model(model, tokenizer)
    model.generation_config.num_inference_steps = 7
    saved = tmp_path_factory.mktemp("saved") / "a model-0.1"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint without code, after `export_remote_code.py`."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    shutil.copytree(TINY, folder)
    run("../../conversion/export_remote_code.py", folder)
    return folder


@pytest.fixture(scope="module")
def hub(folder, tmp_path_factory):
    with running_hub() as hub:
        home = tmp_path_factory.mktemp("home-of-the-push")
        run("push_everything.py", folder, home / "saved", HF_ENDPOINT=hub.url, HF_HOME=str(home))
        hub.trained, hub.converted = home / "saved-trained", home / "saved-converted"
        yield hub


@pytest.fixture(scope="module")
def elsewhere(folder, exported, hub, tmp_path_factory):
    """What the folder, the pushed repositories and the folder saved again give without the package."""
    home = tmp_path_factory.mktemp("elsewhere")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "home")}
    run("what_a_model_does.py", home, folder, exported, "someone/whole", "someone/parts", **environment)
    return home


def check_repository(files: dict[str, bytes]) -> None:
    """Complete, and neither bound to the package nor pickled."""
    assert CODE <= set(files)
    for name in CODE:
        assert files[name] == (SOURCE / name).read_bytes()
        for node in ast.walk(ast.parse(files[name])):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 or f"{node.module}.py" in CODE
                names = [node.module]
            assert not any(name.split(".")[0] == "transfusion_hf" for name in names)
    weights = {name for name in files if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt"))}
    assert weights and all(name.endswith(".safetensors") for name in weights)
    # What a pickle, or the zip that torch makes of one, begins with.
    assert not [name for name, data in files.items() if data[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04")]
    config = json.loads(files["config.json"])
    assert config["auto_map"] == AUTO_MAP and config["custom_pipelines"] == json.loads(json.dumps(CUSTOM_PIPELINES))
    for reference in (*AUTO_MAP.values(), *(task["impl"] for task in CUSTOM_PIPELINES.values())):
        module, name = reference.split(".")
        assert hasattr(sys.modules[f"transfusion_hf.{module}"], name)


def test_a_saved_folder_holds_data_and_code(folder):
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(files) == CODE | DATA
    check_repository(files)
    processor = json.loads(files["processor_config.json"])
    assert processor["auto_map"]["AutoProcessor"] == AUTO_MAP["AutoProcessor"]
    assert processor["image_processor"]["auto_map"]["AutoImageProcessor"] == AUTO_MAP["AutoImageProcessor"]


@pytest.mark.parametrize("source", SOURCES)
def test_without_the_package_everything_is_the_same(elsewhere, folder, exported, source):
    found = load_file(elsewhere / f"{SOURCES.index(source)}.safetensors")
    assert found.pop("is_remote")
    expected = results(str(TINY if source == "exported" else folder), with_pipelines=source == SOURCES[0])
    assert not expected.pop("is_remote") and expected["num_inference_steps"] in (7, 10)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_remote_code_that_is_saved_again_is_whole(elsewhere, folder):
    again = {file.name: file.read_bytes() for file in (elsewhere / "again").iterdir()}
    check_repository(again)
    assert again["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_an_exported_checkpoint_keeps_its_values(exported):
    files = {file.name: file.read_bytes() for file in exported.iterdir()}
    check_repository(files)
    assert set(files) == CODE | DATA
    for name in ("model.safetensors", "generation_config.json"):
        assert files[name] == (TINY / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (TINY, exported))
    for name in before.keys() - {"text_config", "transformers_version"}:
        assert after[name] == before[name]
    assert after["text_config"].items() >= before["text_config"].items()


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path):
    export = runpy.run_path(str(FIXTURES / "../../conversion/export_remote_code.py"))["main"]
    with pytest.raises(SystemExit, match=r"holds no config\.json; pass the folder of a checkpoint"):
        export([str(tmp_path)])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit, match="holds a 'llama', not a Transfusion"):
        export([str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_an_exported_folder_may_hold_named_chat_templates(tmp_path):
    model, processor = AutoModelForMultimodalLM.from_pretrained(TINY), TransfusionProcessor.from_pretrained(TINY)
    processor.chat_template = {"default": processor.chat_template, "short": "{{ messages }}"}
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    before = TransfusionProcessor.from_pretrained(tmp_path).chat_template
    runpy.run_path(str(FIXTURES / "../../conversion/export_remote_code.py"))["main"]([str(tmp_path)])
    assert TransfusionProcessor.from_pretrained(tmp_path).chat_template == before != processor.chat_template["default"]


def test_a_push_without_an_answer_replaces_no_card(monkeypatch):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: RepoUrl("https://huggingface.co/someone/whole"))
    monkeypatch.setattr(HfApi, "hf_hub_download", fail)
    with pytest.raises(LocalEntryNotFoundError):
        push_to_hub(AutoModelForMultimodalLM.from_pretrained(TINY), repo_id="someone/whole")


def test_a_push_is_one_commit_of_safetensors(hub, folder):
    assert hub.commits("someone/whole") == 1
    files = hub.files("someone/whole")
    check_repository(files)
    assert len([name for name in files if name.endswith(".safetensors")]) > 1  # `max_shard_size`
    assert set(files) >= {"README.md", *DATA} - {"model.safetensors"}
    for repo in ("someone/parts", "someone/saved"):
        assert hub.commits(repo) == 2  # of the model, and of the processor
        files = hub.files(repo)
        check_repository(files)
        assert set(files) >= DATA
        for name in ("model.safetensors", "generation_config.json"):
            assert files[name] == (folder / name).read_bytes()


def test_new_weights_take_the_place_of_the_old(hub, folder):
    files = hub.files("someone/again")
    check_repository(files)
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "processor_config.json" in files and hub.commits("someone/again") == 2


def test_with_the_package_its_own_code_is_used(folder):
    """No trust is asked for: the copies stand for what is installed."""
    assert type(pipeline("text-to-image", model=str(folder))).__module__ == "transfusion_hf.pipelines_transfusion"
    model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model) is TransfusionForCausalLMAndDiffusion and not hasattr(model.config, "custom_pipelines")
    assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)) is TransfusionProcessor


def test_a_push_brings_a_card_and_keeps_the_one_that_is_there(hub):
    card = ModelCard(hub.files("someone/whole")["README.md"].decode())
    assert card.data.tags == ["transfusion", "text-to-image", "digits"]
    assert 'name = "someone/whole"' in card.text
    draft = ModelCard(hub.files("someone/whole@draft")["README.md"].decode())
    assert draft.data.tags == [*card.data.tags, "draft"] and draft.text == card.text
    assert hub.commits("someone/whole", "draft") == 1


def test_an_evaluation_is_pushed_as_model_index_and_replaces_its_earlier_scores(hub):
    card = ModelCard(hub.files("someone/again")["README.md"].decode())
    assert card.data.model_name == "someone/again"
    found = {(r.task_type, r.dataset_name, r.metric_name, r.metric_value) for r in card.data.eval_results}
    assert found == {("text-to-image", "c4", "score", 0.25), ("text-to-image", "shapes", "score", 0.5)}
    assert "| text → image | c4 | score | 0.25 | 0.1 to 0.9 |" in card.text


def test_a_training_is_pushed_with_a_card_of_its_own(hub):
    first, second, last = hub.repos["someone/trained"][1:]  # each checkpoint once it is whole, and the end
    for files in (first, second, last):
        check_repository(files)
        assert CODE | {"config.json", "model.safetensors", "processor_config.json"} <= set(files)
    assert not [name for name in last if "checkpoint" in name or "incomplete" in name]
    card = ModelCard(last["README.md"].decode())
    assert (card.data.license, card.data.datasets, card.data.model_name) == (
        "mit",
        ["someone/squares"],
        "someone/trained",
    )
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert set(results) == {"loss", "lm_loss", "diffusion_loss"}
    assert results["loss"] == pytest.approx(results["lm_loss"] + 5 * results["diffusion_loss"])
    assert "## Evaluation on four red squares" in card.text and "| steps | 2 |" in card.text
    assert "(samples/step-2.png)" in card.text and last["samples/step-2.png"][:4] == b"\x89PNG"
    assert json.loads(last["training_args.json"])["max_steps"] == 2
    assert not list(hub.trained.rglob("*.bin"))


def test_a_language_model_of_the_hub_is_converted_and_named_in_every_card_after_it(hub):
    converted = TransfusionForCausalLMAndDiffusion.from_pretrained(hub.converted).state_dict()
    for name, value in load(hub.files("someone/lm")["model.safetensors"]).items():
        assert torch.equal(converted[transfusion_key(name)][: len(value)], value)
    for folder in (hub.converted, Path(f"{hub.converted}-trained")):
        assert ModelCard.load(folder / "README.md").data.base_model == ["someone/lm"]
