"""The latents of a cache in another container, without the encoder and without the images."""
