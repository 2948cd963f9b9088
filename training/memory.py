"""Memory of training traded for time."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..unet.layers import ResnetBlock, Transformer


def recompute_activations(model: nn.Module) -> None:
    """Keep only the inputs of the residual blocks and transformers of U-Nets, and compute what is inside again on the way back.

    Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174). The gradients are the same; without gradients nothing changes.
    """
    for module in model.modules():
        if isinstance(module, ResnetBlock | Transformer):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
