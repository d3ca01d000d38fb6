"""`python -m transfusion_hf.doctor`, an older form of `transfusion doctor`."""

import sys

from transfusion_command import main as run

from .training.doctor import diagnose, main

__all__ = ["diagnose", "main"]

if __name__ == "__main__":
    sys.exit(run(["doctor", *sys.argv[1:]]))
