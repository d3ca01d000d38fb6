"""`python -m transfusion_hf.latents`, an older form of `transfusion latents`."""

from .data.latents import main, write_latents

__all__ = ["main", "write_latents"]

if __name__ == "__main__":
    main()
