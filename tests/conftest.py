import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    # FlexAttention for a second length in one process: torch 2.14 writes C++ for the CPU that does not build.
    torch.compiler.reset()
