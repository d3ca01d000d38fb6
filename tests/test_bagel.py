"""BAGEL: the naive twin reproduces what the released code computed from the same tiny weights."""

import json
from pathlib import Path

import pytest
import torch
from reference_bagel import Bagel, Latents, Seen, Text, latents_of, windows_of
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures" / "bagel"
IDS = (300, 301, 302, 303)
PROMPT = Text([300, 5, 17, 99, 250, 3, 42, 7, 301])


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    cases = load_file(FIXTURES / "cases.safetensors")
    return {name: value.double() if value.is_floating_point() else value for name, value in cases.items()}


def make_twin(requires_grad: bool = False) -> Bagel:
    state = {name: value.double() for name, value in load_file(FIXTURES / "ema.safetensors").items()}
    for value in state.values():
        value.requires_grad_(requires_grad)
    configs = (json.loads((FIXTURES / f"{name}_config.json").read_text()) for name in ("llm", "vit"))
    return Bagel(state, *configs, IDS)


@pytest.fixture(scope="module")
def twin() -> Bagel:
    return make_twin()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_twin_writes_as_the_released_code(twin, cases):
    assert cases["text.ids"].tolist() == PROMPT.ids
    close(twin.logits([PROMPT]), cases["text.logits"])


GUIDED = {
    "plain": {},
    "text4_global": {"text_scale": 4.0, "interval": (0.4, 1.0)},
    "text4_channel": {"text_scale": 4.0, "renorm": "channel", "renorm_min": 0.5},
}


@pytest.mark.parametrize("name", GUIDED)
def test_the_twin_draws_as_the_released_code(twin, cases, name):
    noise = cases[f"draw.{name}.noise"].view(4, 6, 64)
    drawn = twin.draw([PROMPT], noise, num_points=8, **GUIDED[name])
    close(drawn.flatten(0, 1), cases[f"draw.{name}.latent_windows"])
    close(latents_of(drawn), cases[f"draw.{name}.latents"])


@pytest.mark.parametrize("renorm", ["global", "text_channel"])
def test_the_twin_edits_as_the_released_code(twin, cases, renorm):
    images = [Latents(windows_of(cases["vae.latents_mode"][0])), Seen(cases["vit.image"])]
    kwargs = {"text_scale": 4.0, "image_scale": 1.5, "interval": (0.4, 1.0), "renorm": renorm}
    contexts = {"without_text": images, "without_images": [PROMPT]}
    noise = cases[f"edit.{renorm}.noise"].view(4, 6, 64)
    close(
        twin.draw([*images, PROMPT], noise, num_points=6, **kwargs, **contexts).flatten(0, 1),
        cases[f"edit.{renorm}.latent_windows"],
    )


def test_the_twin_answers_as_the_released_code(twin, cases):
    assert twin.answer([Seen(cases["vit.image"]), PROMPT], 12) == cases["answer.ids"].tolist()


def test_the_twin_trains_as_the_released_code(cases):
    twin = make_twin(requires_grad=True)
    first, second = (windows_of(latents) for latents in cases["train.latents"])
    noise = windows_of(cases["train.noise"])
    close(noise.flatten(0, 1), cases["train.noise_windows"])
    squared, entropies = twin.losses([PROMPT, Latents(first, float(cases["train.t"]), is_hidden=True)], noise)
    _, others = twin.losses([Latents(second), Seen(cases["vit.image"]), PROMPT], noise)
    entropies = torch.stack(entropies + others)
    close(squared.mean().detach(), cases["train.mse"])
    close(entropies.detach(), cases["train.ce_each"])
    (squared.mean() + entropies.mean()).backward()
    names = [name for name in cases if name.startswith("train.grad.")]
    assert len(names) == 9
    for name in names:
        close(twin.w[name.removeprefix("train.grad.")].grad, cases[name])


def test_windows_and_latents_are_inverse():
    latents = torch.randn(3, 4, 6)
    assert torch.equal(latents_of(windows_of(latents)), latents)
    assert windows_of(latents)[1, 2].tolist() == latents[:, 2:4, 4:6].permute(1, 2, 0).flatten().tolist()
