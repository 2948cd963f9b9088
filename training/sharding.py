"""One model shared by several processes: each keeps a part of every weight, and a layer is whole only while it computes.

Fully sharded data parallelism (Zhao et al. 2023, arXiv 2304.11277) by PyTorch's `fully_shard`: gradients, the optimizer's state and the averages are
parts too, of the same rows. Where all processes are needed, a function says so.
"""

import os
import warnings
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UsageError
from ..unet.layers import CrossAttention, ResnetBlock, TransformerLayer
from ..unet.unet import UNet

# What `accelerate launch --use_fsdp` may say of sharding: variable -> the values that are done, and what to do with another.
_DONE = {
    "FSDP_SHARDING_STRATEGY": ("FULL_SHARD 1", "give --fsdp_sharding_strategy FULL_SHARD"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true FULL_SHARD full_shard", "give --fsdp_reshard_after_forward true"),
    "FSDP_OFFLOAD_PARAMS": ("false", "leave --fsdp_offload_params out"),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "leave --fsdp_auto_wrap_policy out; the layers are known"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("", "leave --fsdp_transformer_layer_cls_to_wrap out; the layers are known"),
    "FSDP_IGNORED_MODULES": ("", "leave --fsdp_ignored_modules out"),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "give --fsdp_state_dict_type FULL_STATE_DICT; checkpoints are whole"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "give finetune --gradient-checkpointing instead"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false", "leave --fsdp_activation_checkpointing_offload out"),
}
_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
_MESSAGE = 1 << 24  # numbers that are sent at once
_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def asked_by_launcher(precision: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` was told to shard (--use_fsdp).

    Args:
        precision: of the run, which that of the launcher must not contradict.
        environment: in which accelerate hands on what it was told.

    Raises:
        UsageError: it was told something that is not done.
    """
    for name, way in _OTHER_WAYS.items():
        if environment.get(name, "false").lower() == "true":
            raise UsageError(f"accelerate launch asks for {way}, which finetune does not use; give --use_fsdp to share the model among processes.")
    told = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if told != "no" and _PRECISIONS.get(told) != precision:
        raise UsageError(f"accelerate launch asks for --mixed_precision {told}, the run for {precision}; give finetune's --precision alone.")
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for name, (done, advice) in _DONE.items():
        if environment.get(name, "") not in ("", *done.split()):
            raise UsageError(f"accelerate launch sets {name}={environment[name]}, which finetune does not do; {advice}.")
    return True


def shard(networks: nn.ModuleDict, device: torch.device) -> None:
    """Leave each process its part of every weight of `subject.trained_networks`, in place; all must call it.

    A residual block, a layer of a transformer, and what makes a cross-attention's keys and values is put together for its turn, what is left of a
    U-Net and a text encoder for the whole of a step.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # keys and values; nobody writes into them
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    units, texts = networks["unets"], networks["text"]
    assert isinstance(units, nn.ModuleDict)
    assert isinstance(texts, nn.ModuleDict)
    for unet in units.values():
        assert isinstance(unet, UNet)
        modules = list(unet.modules())
        for module in modules:
            if isinstance(module, CrossAttention):
                fully_shard([module.to_k, module.to_v], mesh=mesh)
        for module in modules:
            if isinstance(module, ResnetBlock | TransformerLayer):
                fully_shard(module, mesh=mesh)
        fully_shard(unet, mesh=mesh)
        register_fsdp_forward_method(unet, "text_keys_values")
    for text in texts.values():
        fully_shard(text, mesh=mesh)


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors without gradient, put together on the CPU where they are shared.

    All processes must call it; the first, and it alone, must `keep` them, and the others get none.
    """
    put_together = {name: tensor.detach() for name, tensor in tensors.items() if keep and not is_shared(tensor)}
    for message in _messages({name: tensor for name, tensor in tensors.items() if is_shared(tensor)}):
        mine = torch.cat([_padded(tensor).flatten() for tensor in message.values()])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if keep else None
        dist.gather(mine, parts)
        if parts is not None:
            sizes = [_padded_rows(tensor) * tensor.shape[1:].numel() for tensor in message.values()]
            for (name, tensor), *pieces in zip(message.items(), *(part.cpu().split(sizes) for part in parts), strict=True):
                put_together[name] = torch.cat(pieces).view(-1, *tensor.shape[1:])[: len(tensor)]
    return put_together


def _messages(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups that are sent together."""
    message: dict[str, Tensor] = {}
    count = 0
    for name, tensor in tensors.items():
        message[name] = tensor
        count += tensor.numel()
        if count > _MESSAGE:
            yield message
            message, count = {}, 0
    if message:
        yield message


def _padded_rows(tensor: Tensor) -> int:
    """How many rows each part has but the last ones, which may have fewer or none."""
    return -(-len(tensor) // dist.get_world_size())


def _padded(tensor: Tensor) -> Tensor:
    mine = part(tensor)
    return torch.cat([mine, mine.new_zeros(_padded_rows(tensor) - len(mine), *tensor.shape[1:])])


def number(tensor: Tensor) -> float:
    """The value of a tensor of one, of which each process may have a part; all processes must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).item()


def like(tensor: Tensor, kept: Tensor) -> Tensor:
    """A whole tensor as `kept` is: this process's part of it when that is one of the same shape, on its device."""
    if isinstance(kept, DTensor) and tensor.shape == kept.shape:
        return distribute_tensor(tensor.to(kept.device), kept.device_mesh, kept.placements, src_data_rank=None).clone()
    return tensor.to(kept.device)


def all_like(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`like` for each tensor of a name in `kept`."""
    return {name: like(tensors[name], tensor) for name, tensor in kept.items()}


def optimizer_like(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `optimizers.optimizer_state`, those of shared parameters as these are."""
    owners = {name: parameters.get(name.rpartition(".")[0]) for name in tensors}
    return {name: tensor if (owner := owners[name]) is None or not is_shared(owner) else like(tensor, owner) for name, tensor in tensors.items()}


def is_shared(tensor: Tensor) -> bool:
    """Whether this process has a part of it only."""
    return isinstance(tensor, DTensor)


def part(tensor: Tensor) -> Tensor:
    """This process's part of it, in the same memory, without gradient."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
