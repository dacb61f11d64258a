"""Vision Transformers: CI2P-ViT and CI2P-ViTds on latents, and what they are held against."""
