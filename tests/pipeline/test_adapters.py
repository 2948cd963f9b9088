"""LoRA files against diffusers and peft: every layout, the weights that they make, and what is refused."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import LINEAR, TEXT, kohya_names, pipeline_of, text_name, weights_of, write_diffusers, write_kohya, write_peft
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tu_diffuse.errors import ModelError, UnsafeError, UsageError
from tu_diffuse.pipeline.adapters.adapters import Shelf, lora_spec
from tu_diffuse.pipeline.adapters.adapters import baked as added_for_good
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.single_file.names import ldm_names

FOLDERS = ("sd1_folder", "sd2_folder", "sdxl_folder")


def baked(model: Path, *texts: str) -> dict[str, dict[str, Tensor]]:
    """Our weights with LoRAs, by component."""
    folder = open_folder(model)
    shelf = Shelf(folder)
    adapters = shelf.adapters(tuple(map(shelf.lora, texts)))
    pipeline = pipeline_of(model)
    parts = {name: getattr(pipeline, name).state_dict() for name in ("text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None}
    return {"unet": added_for_good(adapters, "unet", pipeline.unet.state_dict(), ["unet"])} | {
        name: added_for_good(adapters, name, state, ["unet"]) for name, state in parts.items()
    }


def fused(model: Path, files: dict[Path, float]) -> dict[str, dict[str, Tensor]]:
    """diffusers' weights with LoRAs, by component."""
    pipeline = pipeline_of(model)
    for i, path in enumerate(files):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"a{i}")
    pipeline.set_adapters([f"a{i}" for i in range(len(files))], list(files.values()))
    parts = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None]
    pipeline.fuse_lora(components=parts)
    pipeline.unload_lora_weights()
    return {name: getattr(pipeline, name).state_dict() for name in parts}


def assert_equal_weights(ours: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]], model: Path) -> None:
    plain = pipeline_of(model)
    for part, state in theirs.items():
        before = getattr(plain, part).state_dict()
        assert ours[part].keys() == state.keys()
        assert sum(not torch.equal(state[name], before[name]) for name in state) > 4, part
        for name, tensor in state.items():
            torch.testing.assert_close(ours[part][name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fixture", FOLDERS)
def test_a_diffusers_file_makes_the_weights_of_diffusers(request: pytest.FixtureRequest, fixture: str, tmp_path: Path):
    model = request.getfixturevalue(fixture)
    path = write_diffusers(tmp_path / "style.safetensors", model)
    assert_equal_weights(baked(model, f"{path}:0.7"), fused(model, {path: 0.7}), model)


@pytest.mark.parametrize("fixture", ["sd1_folder", "sd2_folder"])
def test_a_kohya_file_makes_the_weights_of_diffusers(request: pytest.FixtureRequest, fixture: str, tmp_path: Path):
    """The rank is not alpha, convolutions are in it, and a second file without alpha is taken away again in part."""
    model = request.getfixturevalue(fixture)
    names = kohya_names(model)
    first, second = write_kohya(tmp_path / "a.safetensors", names), write_kohya(tmp_path / "b.safetensors", names, 2, rank=2, alpha=None)
    assert_equal_weights(baked(model, f"{first}:0.7", f"{second}:-0.4"), fused(model, {first: 0.7, second: -0.4}), model)


SGM = {  # SDXL's names in sd-scripts' files, for `tiny_models.sdxl_folder`
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks_1_0_out_layers_3": "down_blocks.0.resnets.0.conv2",
    "input_blocks_1_1_proj_in": "down_blocks.0.attentions.0.proj_in",
    "input_blocks_1_1_transformer_blocks_0_attn2_to_k": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "input_blocks_1_1_transformer_blocks_0_ff_net_0_proj": "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_3_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
    "middle_block_1_transformer_blocks_0_attn1_to_out_0": "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_0_skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
    "output_blocks_1_0_in_layers_2": "up_blocks.0.resnets.1.conv1",
    "output_blocks_2_1_transformer_blocks_0_attn1_to_q": "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "output_blocks_3_1_proj_out": "up_blocks.1.attentions.1.proj_out",
    "out_2": "conv_out",
}


def test_an_sdxl_file_of_kohya_makes_the_weights_of_diffusers(sdxl_folder: Path, tmp_path: Path):
    pipeline = pipeline_of(sdxl_folder)
    names = {f"lora_unet_{name}": pipeline.unet.get_submodule(module).weight.shape for name, module in SGM.items()}
    for prefix, tower in (("lora_te1", pipeline.text_encoder), ("lora_te2", pipeline.text_encoder_2)):
        names |= {f"{prefix}_{text_name(name)}": shape for name, shape in weights_of(tower, TEXT).items()}
    path = write_kohya(tmp_path / "sdxl.safetensors", names)
    assert_equal_weights(baked(sdxl_folder, f"{path}:0.7"), fused(sdxl_folder, {path: 0.7}), sdxl_folder)


def test_levels_may_have_layers_of_their_own():
    modules = [f"{way}_blocks.{level}.resnets.0.conv1" for way in ("down", "up") for level in range(3)]
    config: dict[str, Any] = {"down_block_types": ["DownBlock2D"] * 3}
    assert list(ldm_names(modules, config | {"layers_per_block": [1, 3, 2]})) == [
        f"{name}.0.in_layers.2" for name in ("input_blocks.1", "input_blocks.3", "input_blocks.7")
    ] + [f"{name}.0.in_layers.2" for name in ("output_blocks.0", "output_blocks.3", "output_blocks.7")]
    assert ldm_names(modules, config | {"layers_per_block": [2, 2, 2]}) == ldm_names(modules, config)


def test_a_change_of_resolution_on_the_way_up_comes_after_the_transformer_if_there_is_one():
    """SDXL has its two at output_blocks.2.2 and 5.2, SD at 2.1, 5.2 and 8.2 (their published configurations)."""
    convs = [f"up_blocks.{level}.upsamplers.0.conv" for level in range(3)]
    attentions = [f"up_blocks.{level}.attentions.0.proj_in" for level in range(3)]
    attending = "CrossAttnDownBlock2D"
    sdxl = ldm_names([*convs[:2], *attentions[:2]], {"down_block_types": ["DownBlock2D", attending, attending]})
    assert {name for name in sdxl if name.endswith(".conv")} == {"output_blocks.2.2.conv", "output_blocks.5.2.conv"}
    assert {name for name in ldm_names([*convs, *attentions[1:]], {}) if name.endswith(".conv")} == {
        "output_blocks.2.1.conv",
        "output_blocks.5.2.conv",
        "output_blocks.8.2.conv",
    }


PEFT: list[tuple[str, list[str], dict[str, Any]]] = [
    ("unet", LINEAR, {"alpha_pattern": {"attn2.to_q": 1.5, "to_k": 9}, "rank_pattern": {"attn1.to_v": 2}}),
    ("unet", LINEAR, {"use_rslora": True}),
    ("text_encoder", TEXT, {}),
]


@pytest.mark.parametrize(("part", "targets", "settings"), PEFT, ids=["patterns", "rslora", "text encoder"])
def test_a_folder_of_peft_makes_the_weights_of_peft(sd1_folder: Path, tmp_path: Path, part: str, targets: list[str], settings: dict[str, Any]):
    """Its keys do not say which network they are for."""
    plain = {name: getattr(pipeline_of(sd1_folder), name).state_dict() for name in ("unet", "text_encoder")}
    folder = write_peft(tmp_path / part, getattr(pipeline_of(sd1_folder), part), targets, **settings)
    wanted = PeftModel.from_pretrained(getattr(pipeline_of(sd1_folder), part), folder).merge_and_unload().state_dict()
    got = baked(sd1_folder, str(folder))
    assert sum(not torch.equal(tensor, plain[part][name]) for name, tensor in wanted.items()) > 4
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[part][name], tensor, atol=1e-5, rtol=1e-5)
    other = "text_encoder" if part == "unet" else "unet"
    assert all(torch.equal(tensor, plain[other][name]) for name, tensor in got[other].items())


def test_the_attention_processors_of_2023_are_read(sd1_folder: Path, tmp_path: Path):
    """`unet.….attn1.processor.to_q_lora.down.weight`, and without the prefix; the same values as in today's names."""
    now = load_file(write_diffusers(tmp_path / "now.safetensors", sd1_folder, targets=LINEAR, text=False, alpha=4))
    for prefix in ("unet.", ""):
        old = {
            re.sub(r"\.(to_[qkv]|to_out\.0)\.(lora_A|lora\.down|lora_B|lora\.up)\.weight", _processor, name).replace("unet.", prefix): tensor
            for name, tensor in now.items()
        }
        assert all("processor" in name for name in old)
        save_file(old, tmp_path / "old.safetensors")
        ours, theirs = baked(sd1_folder, str(tmp_path / "old.safetensors")), baked(sd1_folder, str(tmp_path / "now.safetensors"))
        assert all(torch.equal(ours["unet"][name], tensor) for name, tensor in theirs["unet"].items())


def _processor(match: re.Match[str]) -> str:
    return f".processor.{match[1].removesuffix('.0')}_lora.{'down' if match[2] in ('lora_A', 'lora.down') else 'up'}.weight"


def test_what_the_command_line_names(tmp_path: Path):
    assert lora_spec("a/style.safetensors") == (Path("a/style.safetensors"), 1.0, None)
    assert lora_spec("style.safetensors:-0.8@high") == (Path("style.safetensors"), -0.8, "high")
    assert lora_spec("style.safetensors@low") == (Path("style.safetensors"), 1.0, "low")
    assert lora_spec(r"C:\loras\style.safetensors:.5") == (Path(r"C:\loras\style.safetensors"), 0.5, None)
    assert lora_spec(r"C:\loras\style.safetensors") == (Path(r"C:\loras\style.safetensors"), 1.0, None)
    assert lora_spec("v1:2.safetensors:0.8") == (Path("v1:2.safetensors"), 0.8, None)
    (tmp_path / "odd:2@x").write_bytes(b"")
    assert lora_spec(str(tmp_path / "odd:2@x")) == (tmp_path / "odd:2@x", 1.0, None)
    with pytest.raises(UsageError, match=r"weight 1000; give a number from -100 to 100"):
        lora_spec("style.safetensors:1000")


MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN, UP = f"unet.{MODULE}.lora_A.weight", f"unet.{MODULE}.lora_B.weight"
GOOD = {DOWN: torch.ones(2, 16), UP: torch.ones(16, 2)}
KOHYA = f"lora_unet_{MODULE.replace('.', '_')}"
Bad = tuple[dict[str, Tensor], str]
BAD: dict[str, Bad] = {
    "dora": (GOOD | {f"unet.{MODULE}.lora_magnitude_vector": torch.ones(16)}, "is DoRA"),
    "dora of kohya": ({f"{KOHYA}.dora_scale": torch.ones(16, 1)}, "is DoRA"),
    "loha": ({f"{KOHYA}.hada_w1_a": torch.ones(16, 2)}, "is LoHa"),
    "lokr": ({f"{KOHYA}.lokr_w1": torch.ones(4, 4)}, "is LoKr"),
    "tucker": ({f"{KOHYA}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "Tucker"),
    "oft": ({f"{KOHYA}.oft_blocks": torch.ones(2, 2)}, "is OFT"),
    "full": ({f"{KOHYA}.diff": torch.ones(16, 16)}, "whole differences"),
    "bias": (GOOD | {f"unet.{MODULE}.lora_B.bias": torch.ones(16)}, "with biases"),
    "embeddings": (GOOD | {"bundle_emb.x.clip_l": torch.ones(1, 16)}, "with embeddings"),
    "checkpoint": ({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, "no part of a LoRA"),
    "nothing": ({}, "holds no tensors"),
    "half": ({DOWN: GOOD[DOWN]}, "holds only down"),
    "ranks": ({DOWN: torch.ones(3, 16), UP: torch.ones(16, 2)}, "make no product"),
    "flat": ({DOWN: torch.ones(16), UP: torch.ones(16, 2)}, "make no product"),
    "rank 0": ({DOWN: torch.ones(0, 16), UP: torch.ones(16, 0)}, r"\(0, 16\)"),
    "nan": ({DOWN: GOOD[DOWN] * torch.nan, UP: GOOD[UP]}, "NaN"),
    "infinite": ({DOWN: GOOD[DOWN], UP: GOOD[UP] * torch.inf}, "NaN or infinity"),
    "nan alpha": (GOOD | {f"unet.{MODULE}.alpha": torch.tensor(torch.nan)}, "NaN"),
    "alphas": (GOOD | {f"unet.{MODULE}.alpha": torch.ones(2)}, "of 2 numbers"),
    "integers": ({DOWN: GOOD[DOWN].long(), UP: GOOD[UP]}, "torch.int64"),
    "untrained": ({DOWN: GOOD[DOWN], UP: GOOD[UP] * 0}, "changes nothing"),
    "zero alpha": (GOOD | {f"unet.{MODULE}.alpha": torch.tensor(0.0)}, "changes nothing"),
    "shape": ({DOWN: torch.ones(2, 20), UP: GOOD[UP]}, r"1 keys of it have another shape \(down_blocks.* \(16, 20\) for \(16, 16\)\)"),
    "flux": (
        {"transformer.single_blocks.0.lora_A.weight": torch.ones(2, 4), "transformer.single_blocks.0.lora_B.weight": torch.ones(4, 2)},
        "0 of 1",
    ),
    "other tower": (
        {"text_encoder_2.layers.0.q_proj.lora_A.weight": torch.ones(2, 4), "text_encoder_2.layers.0.q_proj.lora_B.weight": torch.ones(4, 2)},
        "0 of 1 keys are known",
    ),
    "peft without its settings": ({f"base_model.model.{name.removeprefix('unet.')}": tensor for name, tensor in GOOD.items()}, "adapter_config.json"),
}


@pytest.mark.parametrize(("tensors", "said"), BAD.values(), ids=list(BAD))
def test_a_bad_file_is_one_sentence(sd1_folder: Path, tmp_path: Path, tensors: dict[str, Tensor], said: str):
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match=said) as raised:
        Shelf(open_folder(sd1_folder)).lora(str(tmp_path / "bad.safetensors"))
    assert "\n" not in str(raised.value)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"lora_bias": True}, "lora_bias"),
    "kind": ({"peft_type": "LOHA"}, "of the type 'LOHA'"),
    "alpha": ({"lora_alpha": "many"}, "alpha 'many'"),
    "patterns": ({"alpha_pattern": [1]}, "alpha_pattern"),
}


@pytest.mark.parametrize(("settings", "said"), SETTINGS.values(), ids=list(SETTINGS))
def test_bad_settings_of_peft_are_one_sentence(sd1_folder: Path, tmp_path: Path, settings: dict[str, Any], said: str):
    save_file(BAD["peft without its settings"][0], tmp_path / "adapter_model.safetensors")
    shelf = Shelf(open_folder(sd1_folder))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    assert shelf.lora(str(tmp_path)).matched == 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=said):
        Shelf(open_folder(sd1_folder)).lora(str(tmp_path))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".pkl"])
def test_pickles_are_refused_unread(sd1_folder: Path, tmp_path: Path, suffix: str):
    class Fires:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "canary",))

    path = tmp_path / f"style{suffix}"
    path.write_bytes(pickle.dumps(Fires()))
    with pytest.raises(UnsafeError, match="pickle"):
        Shelf(open_folder(sd1_folder)).lora(f"{path}:0.5")
    path.rename(tmp_path / "style.safetensors")
    with pytest.raises(UnsafeError, match="looks like a pickle"):
        Shelf(open_folder(sd1_folder)).lora(str(tmp_path / "style.safetensors"))
    assert not (tmp_path / "canary").exists()
    pickle.loads((tmp_path / "style.safetensors").read_bytes())
    assert (tmp_path / "canary").exists()
