"""Pictures of a cache, decoded from its latents, and the drawn ones of the demo."""
