"""`python -m transfusion_hf.doctor`, an older form of `transfusion doctor`."""

import sys

from .training.doctor import diagnose, main

__all__ = ["diagnose", "main"]

if __name__ == "__main__":
    sys.exit(main())
