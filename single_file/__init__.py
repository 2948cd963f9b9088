"""Single-file checkpoints of Stable Diffusion 1, 2 and XL, seen as the model folders that the rest of the program reads."""
