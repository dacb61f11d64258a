"""Vision Transformers: CI2P-ViT and CI2P-ViTds on latents, and models to compare them with."""
