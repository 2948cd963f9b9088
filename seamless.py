"""Pictures that meet themselves when they are laid side by side: convolutions that look around the edge instead of at zeros.

A network is not changed for that. `wrapped` gives a second network over the same weights, which lives as long as the request that asked for it, so
nothing is left behind for the next one. Attention and group norms see all positions alike and need no change.
"""

import copy
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class WrappedConv2d(nn.Conv2d):
    """A convolution whose padding comes from the opposite edge, along `axes` ("x", "y" or "xy"), and is zero along the others."""

    axes: str

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `nn.Conv2d.forward` calls; that itself may be wrapped in a hook (`offload.py`)."""
        beside, below = self.padding[1], self.padding[0]
        assert isinstance(beside, int)
        assert isinstance(below, int)
        padded = pad(input, (beside, beside, below, below), self.axes)
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


def pad(x: Tensor, padding: tuple[int, int, int, int], axes: str | None) -> Tensor:
    """Pad (batch, channels, h, w) by (left, right, top, bottom): along `axes` from the opposite edge, else with zeros."""
    left, right, top, bottom = padding
    x = F.pad(x, (left, right, 0, 0), mode="circular") if axes is not None and "x" in axes else F.pad(x, (left, right))
    return F.pad(x, (0, 0, top, bottom), mode="circular") if axes is not None and "y" in axes else F.pad(x, (0, 0, top, bottom))


def axes_of(conv: nn.Conv2d) -> str | None:
    """Along which axes a convolution looks around the edge; None for an ordinary one."""
    return conv.axes if isinstance(conv, WrappedConv2d) else None


def wrapped(network: Module, axes: str) -> Module:
    """A network over the same weights whose convolutions look around the edge.

    Args:
        network: its convolutions pad with zeros; it stays as it is.
        axes: "x" where left meets right, "y" where top meets bottom, or "xy".
    """
    around = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    for module in around.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = WrappedConv2d
            vars(module)["axes"] = axes
    return around
