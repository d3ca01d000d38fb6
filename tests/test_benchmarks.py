"""The pictures of the benchmarks, and how they count memory."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")


def test_the_picture_of_attention_has_a_panel_for_each_layout(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
    from attention import make_figure

    ratios = [
        ("layer, 1 × 64, forward", "dense", 1.0),
        ("layer, 1 × 64, forward", "transfusion_varlen", 2.5),
        ("layer, 1 × 64, forward + backward", "dense", 1.0),
        ("model, 1 × 64, forward + backward", "sdpa", 1.0),
        ("model, 1 × 64, forward + backward", "transfusion_varlen", 0.5),
    ]
    panels = {axis.get_title().replace("\n", ", "): axis for axis in make_figure(ratios).axes}
    assert set(panels) == {label for label, *_ in ratios}
    for label, axis in panels.items():
        names = [tick.get_text() for tick in axis.get_yticklabels()]
        lengths = [bar.get_width() for bar in axis.patches]
        assert list(zip(names, lengths, strict=True)) == [(name, value) for of, name, value in ratios if of == label]
        assert [text.get_text() for text in axis.texts] == [f"{length:.2f}" for length in lengths]
    colors = {bar.get_facecolor() for bar in panels["layer, 1 × 64, forward"].patches}
    assert len(colors) == 2, "ours stands out"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_of_memory_is_that_by_hand(monkeypatch, device):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
    from bagel_memory import peak

    inputs = torch.zeros(1000, 100, device=device)  # was there before
    weight = torch.zeros(100, 300, device=device, requires_grad=True)

    def run():
        for _ in range(3):  # what the first one leaves, its output, is gone before the second
            hidden = inputs @ weight  # 1000 × 300
            hidden.view(-1)[:10].add_(1)  # no memory
            (hidden * hidden).sum().backward()

    # `hidden` and its square; then, without the square, the gradients of both factors, their sum, and at last that of
    # the weight. The loss and gradients that are expanded numbers take a few bytes.
    unit = 4 * 1000 * 300
    assert 3 * unit <= peak(run) <= 4 * unit + 3 * 4 * 100 * 300
    assert peak(lambda: [inputs + 1 for _ in range(5)]) == 5 * 4 * 1000 * 100
    assert peak(lambda: [(inputs + 1).sum() for _ in range(5)]) == 4 * 1000 * 100 + 5 * 4


def test_the_report_of_a_gpu_has_each_figure_beside_what_is_demanded(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
    import gpu
    from waiting import small_model

    cpu, config = torch.device("cpu"), small_model().config
    ids = gpu.packed_batch(config, 3, 5, cpu)
    assert ids["input_ids"].shape == (1, 3 * (5 + 18)) and ids["position_ids"][0, 23] == 0
    lines = gpu.training_rows("tiny", config, cpu, 1, num_documents=2, num_words=5)
    assert [line.split(" | ")[0] for line in lines] == [
        "| tiny, 46 tokens: text and images, transfusion_varlen", "| tiny, 46 tokens: text alone",
        "| tiny, 46 tokens: LlamaForCausalLM", "| tiny: waits of a step on text and images",
    ]  # fmt: skip
    assert "of LlamaForCausalLM's | ≤ 1.03 |" in lines[1]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # inductor takes a minute
    _, compiled = gpu.training_rows("tiny", config, cpu, 1, num_documents=2, num_words=5, is_compiled=True)
    assert "tokens: the same, compiled |" in compiled and "of the same, not compiled | ≤ 1 |" in compiled
    lines = gpu.drawing_rows("tiny", config, cpu, 1, batches=(1, 2), num_inference_steps=2)
    assert len(lines) == 2 and "of one alone" in lines[1]
    assert "| 2.000 of it | ≤ 1.5 | FAILS |" in gpu.row("x", 2.0, ("it", 1.0), 1.5, 0.0, 0.0)
