"""tu-diffuse: text to pictures with CLIP and T5 text encoders, expert denoisers, and a latent codec."""

__version__ = "0.1.0"
