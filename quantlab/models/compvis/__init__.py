"""Latent-diffusion checkpoints of CompVis, converted to modules of diffusers."""
