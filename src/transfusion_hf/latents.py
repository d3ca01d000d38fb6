"""`python -m transfusion_hf.latents`, the same as `transfusion latents`."""

from .data.latents import main

if __name__ == "__main__":
    main()
