"""Cards say what is known, in the form the Hub reads; those of the presets are what the presets are."""

import sys
from pathlib import Path

import huggingface_hub
import pytest
import tiny
from hub_server import running_hub
from huggingface_hub import ModelCard
from test_vae import representation_autoencoder

from transfusion_hf import TransfusionConfig, paper_vae_config
from transfusion_hf.configuration_transfusion import _PRESETS
from transfusion_hf.hub.card import make_model_card

CARDS = Path(__file__).parent.parent / "model_cards"
sys.path.append(str(CARDS))


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        yield hub


def test_the_cards_of_the_presets_are_those_of_their_configurations():
    from write_model_cards import PRESETS, preset_card

    assert {file.stem for file in CARDS.glob("*B.md")} == set(PRESETS) == set(_PRESETS)
    for preset in PRESETS:
        assert str(preset_card(preset)) == (CARDS / f"{preset}.md").read_text(), "run write_model_cards.py"


@pytest.mark.parametrize("file", sorted(CARDS.glob("*.md")), ids=lambda file: file.stem)
def test_the_cards_are_valid_and_claim_no_weights(file, hub):
    card = ModelCard.load(file)
    card.validate()
    assert ("POST", "/api/validate-yaml") in hub.log
    assert card.data.pipeline_tag == "any-to-any" and card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0" and card.data.eval_results is None
    if file.stem in _PRESETS:
        assert "no weights of this size are public" in card.text and "from_pretrained(name" not in card.text
    else:
        assert "Not on the Hub: `make " in card.text


def full_card() -> ModelCard:
    return make_model_card(
        tiny.config(prediction_type="flow_prediction", untied_modalities=["image"]),
        "someone/digits",
        num_parameters=1234567,
        license="mit",
        language="en",
        base_model="someone/language-model",
        datasets=["someone/digits-data"],
        tags=["digits"],
        training={"steps": 12},
        evaluation={"loss": 1.25, "lm_loss": 0.75, "lm_loss/part": 0.5},
        samples="samples/step-12.png",
    )


def test_a_card_holds_what_is_given(hub):
    card = full_card()
    card.validate()
    read = ModelCard(str(card)).data
    assert read.to_dict() == card.data.to_dict()
    assert (read.license, read.language, read.base_model) == ("mit", "en", ["someone/language-model"])
    assert read.datasets == ["someone/digits-data"] and read.metrics == ["loss", "lm_loss"]
    assert read.tags == ["transfusion", "text-to-image", "digits"]
    assert read.model_name == "someone/digits"
    assert {(r.task_type, r.dataset_type, r.metric_type, r.metric_value) for r in read.eval_results} == {
        ("any-to-any", "someone/digits-data", "loss", 1.25),
        ("any-to-any", "someone/digits-data", "lm_loss", 0.75),
    }
    for line in (
        "| parameters | 1,234,567 |",
        "| images | 4 × 4 pixels by default, 4 positions each |",
        "| diffusion | `flow_prediction`, 1000 steps, λ = 5 |",
        "| image weights | separate projections, MLPs and norms in each layer |",
        "| steps | 12 |",
        "| lm_loss/part | 0.5 |",
        "![Images drawn during training](samples/step-12.png)",
    ):
        assert line in card.text.splitlines()
    assert "[someone/language-model](https://huggingface.co/someone/language-model)" in card.text
    assert "written from the configuration alone" not in card.text and "no weights" not in card.text


def test_a_card_names_the_kind_of_autoencoder():
    config = representation_autoencoder().config.items()
    rae = {name: value for name, value in config if name not in ("latents_mean", "latents_std")}
    sizes = {"latent_channels": rae["encoder_hidden_size"], "sample_size": 2, "patch_size": 1}
    text = make_model_card(TransfusionConfig(vae_config=rae, **sizes), "digits").text
    assert f"| autoencoder | `AutoencoderRAE`, {rae['patch_size']} times smaller sides |" in text


def test_a_card_claims_nothing_that_is_not_given(hub):
    config = TransfusionConfig(vae_config=paper_vae_config(0.9))
    card = make_model_card(config, "digits", evaluation={"loss": 1.25})
    card.validate()
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}  # no results without a data set
    assert "| loss | 1.25 |" in card.text and "written from the configuration alone" in card.text
    assert "| autoencoder | `AutoencoderKL`, 8 times smaller sides, scale 0.9 |" in card.text
    assert "![Images" not in card.text and "image weights" not in card.text and "parameters" not in card.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"license": ["mit"]}, r'license\\" must be a string'),
        ({"datasets": ["not a repository"]}, "'not a repository', which is no name of a repository"),
        ({"tags": "digits"}, r'tags\\" must be an array of strings'),
    ],
)
def test_what_the_hub_refuses_is_refused(hub, change, message):
    """Or else the validation above would say nothing."""
    card = full_card()
    for name, value in change.items():
        setattr(card.data, name, value)
    with pytest.raises(ValueError, match=message):
        card.validate()
