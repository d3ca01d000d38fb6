"""`python -m transfusion_hf.latents`, the same as `transfusion latents`."""

from .data.latents import main, write_latents

__all__ = ["main", "write_latents"]

if __name__ == "__main__":
    main()
