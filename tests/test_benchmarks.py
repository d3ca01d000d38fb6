"""The pictures of the benchmarks."""

import sys
from pathlib import Path

import pytest

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
