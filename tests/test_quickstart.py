"""The quickstart, as `make demo` runs it: real digits, learned, drawn and read through the public API."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_quickstart_draws_and_reads_digits(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py", "--output_dir", tmp_path], check=True, cwd=tmp_path
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["draw_accuracy"] >= 0.97
    assert results["caption_accuracy"] >= 0.95
    assert results["judge_accuracy"] >= 0.98
    assert results["train_steps"] <= 2000
    assert 0.8e6 <= results["parameters"] <= 1.2e6
    for name in ("grid.png", "losses.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
