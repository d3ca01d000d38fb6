"""The autoencoder: attaching and measuring a trained one; `losses`, what one is trained with."""

from .attach import attach_vae, measure_latent_scale, paper_vae_config

__all__ = ["attach_vae", "measure_latent_scale", "paper_vae_config"]
