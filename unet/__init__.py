"""The denoiser: the cross-attention U-Net, its contract, the expert table and where experts live."""
