"""LoRA files: the oracle is diffusers with peft; what is not covered is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tu_diffuse.errors import ModelError
from tu_diffuse.unet.lora import METADATA, read_lora, with_lora
from unet_configs import FAMILIES, random_unet

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
STATE = random_unet("embedded", 3).state_dict()


def pair(rank: int = 3, module: str = MODULE) -> dict[str, torch.Tensor]:
    out, *into = STATE[f"{module}.weight"].shape
    generator = torch.Generator().manual_seed(rank)
    up = torch.randn((out, rank, *[1] * (len(into) - 1)), generator=generator)
    return {f"unet.{module}.lora.down.weight": torch.randn((rank, *into), generator=generator), f"unet.{module}.lora.up.weight": up}


def saved(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any] | None = None) -> Path:
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, metadata={"format": "pt"} | ({} if settings is None else {METADATA: json.dumps(settings)}))
    return path


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_the_merged_weights_are_those_of_diffusers(tmp_path: Path, alpha: float | None):
    """A LoRA of linear and convolution layers, saved by diffusers' pipeline with its settings, then fused by peft."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig, get_peft_model_state_dict

    theirs = UNet2DConditionModel(**FAMILIES["embedded"])
    theirs.load_state_dict(STATE)
    rank = 4
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, init_lora_weights=False, target_modules=["to_q", "to_out.0", "conv1"])
    theirs.add_adapter(config)
    settings: dict[str, Any] = {} if alpha is None else {"unet_lora_adapter_metadata": config.to_dict()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(theirs), **settings)
    theirs.fuse_lora()
    theirs.unload_lora()
    wanted = theirs.state_dict()
    path = tmp_path / "pytorch_lora_weights.safetensors"
    changed = with_lora(STATE, read_lora(path), path)
    assert len(changed) > 20
    assert any(tensor.ndim == 4 for tensor in changed.values())
    for name, tensor in changed.items():
        assert (tensor - STATE[name]).abs().max() > 1e-3
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-5)
    assert [name for name in STATE if name not in changed and not torch.equal(STATE[name], wanted[name])] == []


def test_alpha_of_a_module_comes_before_that_of_the_header(tmp_path: Path):
    path = saved(tmp_path, pair() | {f"unet.{MODULE}.alpha": torch.tensor(1.5)}, {"unet.lora_alpha": 9})
    assert read_lora(path)[MODULE].scale == 0.5
    assert read_lora(saved(tmp_path, pair(), {"unet.lora_alpha": 9}))[MODULE].scale == 3.0
    assert read_lora(saved(tmp_path, pair()))[MODULE].scale == 1.0


def test_half_precision_weights_keep_small_changes(tmp_path: Path):
    path = saved(tmp_path, {name: 1e-3 * tensor for name, tensor in pair().items()})
    half = {name: tensor.half() for name, tensor in STATE.items()}
    changed = with_lora(half, read_lora(path), path)[f"{MODULE}.weight"]
    assert changed.dtype == torch.float32
    assert 1e-7 < (changed - half[f"{MODULE}.weight"].float()).abs().max() < 1e-4


DOWN, UP = pair()
BAD = [
    ({"conv_in.weight": torch.zeros(1)}, None, "holds a tensor 'conv_in.weight'"),
    (pair() | {"text_encoder.x.lora_linear_layer.down.weight": torch.zeros(2, 2)}, None, "text_encoder"),
    (pair() | {f"unet.{MODULE}.lora_magnitude_vector": torch.zeros(2)}, None, "magnitude"),
    ({DOWN: pair()[DOWN]}, None, "holds only down"),
    ({DOWN: pair(2)[DOWN], UP: pair(3)[UP]}, None, "make no product"),
    ({DOWN: torch.zeros(3), UP: pair()[UP]}, None, "make no product"),
    (pair() | {f"unet.{MODULE}.alpha": torch.tensor(float("nan"))}, None, "not one finite number"),
    (pair() | {f"unet.{MODULE}.alpha": torch.ones(2)}, None, "not one finite number"),
    (pair(), {"unet.use_dora": True}, "use_dora"),
    (pair(), {"unet.use_rslora": True}, "use_rslora"),
    (pair(), {"unet.alpha_pattern": {"to_q": 3}}, "alpha_pattern"),
    (pair(), {"unet.lora_alpha": "many"}, "lora_alpha"),
    (pair(), [], "cannot be read"),
    ({name.replace("mid_block", "middle"): tensor for name, tensor in pair().items()}, None, "does not have"),
    ({DOWN: pair()[DOWN][:, :-1].contiguous(), UP: pair()[UP]}, None, "but its weight is"),
    ({DOWN: pair()[DOWN], UP: pair()[UP][:-1].contiguous()}, None, "but its weight is"),
]


@pytest.mark.parametrize(("tensors", "settings", "said"), BAD, ids=[said for *_, said in BAD])
def test_a_bad_file_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], settings: Any, said: str):
    path = saved(tmp_path, tensors, settings)
    with pytest.raises(ModelError, match=said) as raised:
        with_lora(STATE, read_lora(path), path)
    assert "\n" not in str(raised.value)
