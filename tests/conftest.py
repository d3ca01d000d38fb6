import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def pytest_collection_finish() -> None:
    # Each `Trainer.train()` collects garbage, which takes 0.3 s among all the objects of the imported modules.
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    # FlexAttention for a second length in one process: torch 2.14 writes C++ for the CPU that does not build.
    torch.compiler.reset()


@pytest.fixture(scope="session")
def quickstart_folder(tmp_path_factory) -> Path:
    """What `make demo` leaves, in TRANSFUSION_DEMO if it has just run; else trained for all slow tests at once."""
    if "TRANSFUSION_DEMO" in os.environ:
        return Path(os.environ["TRANSFUSION_DEMO"])
    folder = tmp_path_factory.mktemp("quickstart")
    script = Path(__file__).parents[1] / "examples" / "quickstart.py"
    subprocess.run([sys.executable, script, "--output_dir", folder], check=True)
    return folder
