"""Vision Transformers on latents: CI2P-ViT and CI2P-ViTds."""
