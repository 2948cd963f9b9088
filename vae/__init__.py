"""Autoencoders between pixels and latents, and the codec over them."""
