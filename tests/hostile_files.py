"""Weight files and configs that claim too much or hold the wrong content: name -> what makes a good model folder into one."""

import json
import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hostile_folders import WEIGHTS, Change, change_json
from safetensors.torch import load_file, save
from safety_scenes import put
from torch import Tensor

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
NUMBER = bytes(4)


def file_of(header: object, tensors: bytes = b"", claimed: int | None = None) -> bytes:
    """A safetensors file; `claimed` is said of its header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + tensors


HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\x02" + bytes(6),
    "a length and no more": struct.pack("<Q", 2),
    **{f"a header of {claimed} bytes": file_of({"a": F32}, NUMBER, claimed) for claimed in (0, 1, 10**8, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)},
    "a header of 20 MB": file_of(b"{" + b" " * 20_000_000 + b"}"),
    "no JSON": file_of(b"not json!"),
    "JSON in UTF-16": file_of(json.dumps({"a": F32}).encode("utf-16"), NUMBER),
    "a list": file_of([1, 2]),
    "a number": file_of(b"12"),
    "null": file_of(b"null"),
    "100,000 brackets": file_of(b"[" * 100_000),
    "100,000 objects in each other": file_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "millions of lists": file_of(b'{"a": [' + b"[]," * 4_000_000 + b"[]]}"),
    "millions of objects": file_of(b'{"a": [' + b"{}," * 4_000_000 + b"{}]}"),
    "a number of a million digits": file_of(b'{"a": ' + b"9" * 1_000_000 + b"}"),
    "20,001 tensors": file_of({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)}),
    "a tensor twice": file_of(b'{"a": ' + json.dumps(F32).encode() + b', "a": ' + json.dumps(F32).encode() + b"}", NUMBER),
    "a name of 10 MB": file_of({"a" * 10_000_000: F32}, NUMBER),
    "metadata that is a list": file_of({"__metadata__": [1], "a": F32}, NUMBER),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}, "a": F32}, NUMBER),
    "a tensor that is a text": file_of({"a": "F32"}, NUMBER),
    "a tensor that is null": file_of({"a": None}, NUMBER),
    "no dtype": file_of({"a": {"shape": [1], "data_offsets": [0, 4]}}, NUMBER),
    "no shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, NUMBER),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [1]}}, NUMBER),
    **{f"dtype {dtype!r}": file_of({"a": F32 | {"dtype": dtype}}, NUMBER) for dtype in ("F31", "f32", "C64", "F4", "F8_E8M0", "", None, 7, ["F32"])},
    **{
        f"shape {json.dumps(shape)[:30]}": file_of({"a": F32 | {"shape": shape}}, NUMBER)
        for shape in ([2], [-1], [-1, -1], [2**32, 2**32], [2**63], [2**64, 0], [1.0], ["1"], [None], [True, True, 2], 1, None, {}, [1] * 5000)
    },
    **{
        f"offsets {json.dumps(offsets)}": file_of({"a": F32 | {"data_offsets": offsets}}, NUMBER)
        for offsets in ([0, 8], [4, 0], [-4, 0], [1, 5], [0], [], [0, 4, 8], [0.0, 4.0], ["0", "4"], [2**63, 2**63 + 4], None, 4, {"0": 4})
    },
    "tensors that overlap": file_of({"a": F32, "b": F32}, NUMBER),
    "tensors with a gap": file_of({"a": F32, "b": F32 | {"data_offsets": [8, 12]}}, bytes(12)),
    "bytes after the last tensor": file_of({"a": F32}, bytes(5)),
    "a terabyte": file_of({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}, NUMBER),
}
"""In place of the VAE's weights: refused by whatever reads them, before memory is taken."""

_UNET, _VAE, _CLIP, _T5 = "unet/config.json", "vae/config.json", "text_encoder/config.json", "text_encoder_2/config.json"
_JOIN, _NOISE = "conditioner/config.json", "scheduler/scheduler_config.json"
_CLIP_WORDS, _T5_WORDS = "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json"
_CLAIMS: list[tuple[str, dict[str, Any]]] = [
    *((_UNET, {"block_out_channels": widths}) for widths in ([10**9, 10**9], [16], [16] * 300, [-16, 32], [16.5, 32], "16", None, [], [[16], 32])),
    *((_UNET, {"layers_per_block": layers}) for layers in (10**9, -1, 0, 1.5, "1", [10**9, 1], [1] * 9, 33)),
    *((_UNET, {"transformer_layers_per_block": layers}) for layers in (10**9, [64, 64], -1, None, "2")),
    (_UNET, {"layers_per_block": 32, "transformer_layers_per_block": 64}),
    *((_UNET, {name: 10**9}) for name in ("in_channels", "out_channels", "cross_attention_dim", "norm_num_groups", "attention_head_dim")),
    *((_UNET, {name: math.nan}) for name in ("norm_eps", "freq_shift", "in_channels", "dropout")),
    (_UNET, {"projection_class_embeddings_input_dim": 10**12}),
    (_UNET, {"down_block_types": ["CrossAttnDownBlock2D"] * 10_000}),
    *((_VAE, {"encoder_block_out_channels": widths}) for widths in ([10**9] * 3, [8] * 30, [], None, [8, -16, 16], ["8"] * 3)),
    *((_VAE, {"decoder_layers_per_block": layers}) for layers in ([10**6] * 3, [0, 0, 0], None, [1.5] * 3, [10**9, 1, 1])),
    *((_VAE, {name: value}) for name, value in (("latent_channels", 10**9), ("latent_channels", 0), ("scaling_factor", math.nan))),
    *((_VAE, {"scaling_factor": value}) for value in (0, -1, math.inf, 10**30, "1")),
    *((_VAE, {"downsample_factor": value}) for value in (10**9, -1, 3, "8", [8])),
    *((_CLIP, {"num_hidden_layers": value}) for value in (10**9, -1, 0, 2.5, "2", 10**30)),
    *((_CLIP, {name: 10**15}) for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "projection_dim")),
    *((_CLIP, {name: value}) for name, value in (("num_attention_heads", 0), ("num_attention_heads", 7), ("layer_norm_eps", math.nan))),
    *((_CLIP, {name: value}) for name, value in (("model_type", "x"), ("hidden_act", "x" * 10**6), ("hidden_size", -16))),
    *((_T5, {name: 10**12}) for name in ("num_layers", "d_model", "d_kv", "d_ff", "num_heads", "vocab_size", "relative_attention_num_buckets")),
    *((_T5, {name: value}) for name, value in (("relative_attention_max_distance", 10**30), ("layer_norm_epsilon", math.inf), ("num_layers", -3))),
    *((_JOIN, {name: 10**12}) for name in ("clip_width", "t5_width", "width", "pooled_width", "refiner_layers", "refiner_heads")),
    *((_JOIN, {name: value}) for name, value in (("refiner_layers", -1), ("width", "24"), ("pooled", ["clip"]), ("t5_width", None))),
    *((_NOISE, {"num_train_timesteps": value}) for value in (10**12, -1, 0, 1, 1000.5, "1000", None, math.nan)),
    *((_NOISE, {"beta_start": value}) for value in (math.nan, math.inf, -1, 2, "0.1", [0.1], 10**30)),
    *((_NOISE, {"beta_end": value}) for value in (0, 1, 5, math.nan, None)),
    *((_NOISE, {"trained_betas": value}) for value in ([], [0.1], [2.0, 3.0], ["a", "b"], 5, {"a": 1}, [math.nan] * 5, [0.1] * 20_000, [[1]])),
    *((_NOISE, {name: [1]}) for name in ("beta_schedule", "prediction_type", "timestep_spacing", "steps_offset", "final_sigmas_type")),
    *((_NOISE, {"steps_offset": value}) for value in (10**12, -5, "1", 1.5)),
    *((_CLIP_WORDS, {"model_max_length": value}) for value in (0, -1, 10**9, 1e308, math.nan, "77", None, [77])),
    *((_CLIP_WORDS, {"pad_token": value}) for value in (5, [], {}, {"content": 5}, "not there")),
    *((_CLIP_WORDS, {"added_tokens_decoder": value}) for value in (5, [1], {"x": {"content": "a"}}, {"1": 5}, {"1": {}}, {"-1": {"content": 5}})),
    *((_T5_WORDS, {"model_max_length": value}) for value in (10**6, 4097, -1)),
    *(("experts.json", {"version": value}) for value in (0, 10**30, "1", None, [1])),
    *(("experts.json", {"experts": value}) for value in ([], {}, None, [1], [[]], [{}] * 2000, "low")),
    *(("defaults.json", values) for values in ({"steps": "4"}, {"steps": math.nan}, {"width": 1e9}, {"sampler": 5}, {"unknown": 1})),
]


def _one_expert(folder: Path, **values: Any) -> None:
    change_json(folder, "experts.json", lambda content: content["experts"][0].update(values))


_EXPERTS: list[dict[str, Any]] = [
    *({"sigma_min": value} for value in (-1, math.nan, math.inf, "0", None, 10**30, [0])),
    *({"sigma_max": value} for value in (0, -1, math.nan, "1", 10**30, {})),
    *({"name": value} for value in ("", "a" * 65, "a/b", "..", 5, None, "high\x1b[31m")),
    *({"guidance": value} for value in (math.nan, "3", [])),
    *({"sha256": value} for value in ("0" * 64, "x", 5)),
    *({"text": value} for value in (5, {}, {"family": "sd"}, {"family": "x", "parts": {}, "zero_negative": False})),
    {"unknown": 1},
]

CONFIGS: dict[str, Change] = {
    **{
        f"{name}: {json.dumps(values)[:60]}": lambda folder, name=name, values=values: change_json(folder, name, lambda old: old.update(values))
        for name, values in _CLAIMS
    },
    **{f"an expert: {json.dumps(values)[:60]}": partial(_one_expert, **values) for values in _EXPERTS},
}
"""Refused by `generate`, with exit code 3, 4, or 2 where a size is what cannot be drawn."""

_STATES = {
    "unet_low": WEIGHTS,
    "vae": WEIGHTS,
    "conditioner": WEIGHTS,
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
State = dict[str, Tensor]


def _largest(state: State) -> str:
    return max(state, key=lambda name: (state[name].ndim, state[name].numel()))


def _with(state: State, value: float) -> State:
    tensor = state[_largest(state)].clone()
    tensor.view(-1)[-1] = value
    return state | {_largest(state): tensor}


_CHANGES: dict[str, Callable[[State], State]] = {
    "a tensor missing": lambda state: {name: tensor for name, tensor in state.items() if name != _largest(state)},
    "a tensor too many": lambda state: state | {"not.in.the.network": torch.zeros(3)},
    "another shape": lambda state: state | {_largest(state): torch.zeros(3, 5)},
    "turned": lambda state: state | {_largest(state): state[_largest(state)].transpose(0, 1).contiguous()[:-1]},
    "whole numbers": lambda state: state | {_largest(state): state[_largest(state)].to(torch.int32)},
    "NaN": lambda state: _with(state, math.nan),
    "infinity": lambda state: _with(state, math.inf),
    "minus infinity in bfloat16": lambda state: {name: tensor.bfloat16() for name, tensor in _with(state, -math.inf).items()},
    "no tensors": lambda state: {},
}


def _change(folder: Path, part: str, change: Callable[[State], State]) -> None:
    path = folder / part / _STATES[part]
    put(path, save(change(load_file(path))))


def _delta(folder: Path, name: str, state: State) -> None:
    put(next(folder.glob("unet_t0[0-7]*")) / name, save(state))


_WEIGHT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
_DELTAS: dict[str, tuple[str, State]] = {
    "a delta: a tensor that its base has not": ("delta.safetensors", {"nowhere.weight": torch.zeros(2)}),
    "a delta: another shape": ("delta.safetensors", {"conv_in.bias": torch.zeros(2)}),
    "a delta: NaN": ("delta.safetensors", {"conv_in.bias": torch.full((16,), math.nan)}),
    "a LoRA: half a pair": ("pytorch_lora_weights.safetensors", {f"unet.{_WEIGHT}.lora.down.weight": torch.zeros(2, 16)}),
    "a LoRA: no product": (
        "pytorch_lora_weights.safetensors",
        {f"unet.{_WEIGHT}.lora.down.weight": torch.zeros(2, 16), f"unet.{_WEIGHT}.lora.up.weight": torch.zeros(16, 3)},
    ),
    "a LoRA: another model's": (
        "pytorch_lora_weights.safetensors",
        {"unet.nowhere.lora.down.weight": torch.zeros(2, 16), "unet.nowhere.lora.up.weight": torch.zeros(16, 2)},
    ),
    "a LoRA: another width": (
        "pytorch_lora_weights.safetensors",
        {f"unet.{_WEIGHT}.lora.down.weight": torch.zeros(2, 999), f"unet.{_WEIGHT}.lora.up.weight": torch.zeros(16, 2)},
    ),
    "a LoRA: NaN": (
        "pytorch_lora_weights.safetensors",
        {f"unet.{_WEIGHT}.lora.down.weight": torch.full((2, 16), math.nan), f"unet.{_WEIGHT}.lora.up.weight": torch.zeros(16, 2)},
    ),
    "a LoRA: something else": ("pytorch_lora_weights.safetensors", {"weight": torch.zeros(2)}),
}

CONTENTS: dict[str, Change] = {
    **{f"{part}: {what}": partial(_change, part=part, change=change) for part in _STATES for what, change in _CHANGES.items()},
    **{what: lambda folder, name=name, state=state: _delta(folder, name, state) for what, (name, state) in _DELTAS.items()},
}
"""Refused by `generate` with exit code 4; the message names the tensors."""
