"""Single-file checkpoints of Stable Diffusion 1, 2 and XL, seen as the model folders that the rest of the program reads."""

SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
