"""ControlNets and depth models that are hostile: name -> what makes a good scene into one. Every name begins with the network that is changed."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from control_networks import control_network, depth_network
from hostile_files import _CHANGES, HEADERS, State
from hostile_folders import NAMES, WEIGHTS, canary_code, change_json
from PIL import Image
from safetensors.torch import load_file, save
from safety_scenes import put

FILES = {"ControlNet": WEIGHTS, "depth model": "model.safetensors"}
Put = Callable[["Steered"], object]


@dataclass(frozen=True)
class Steered:
    """A model, a picture, a ControlNet and a depth model, each under its own name in one folder."""

    root: Path

    def of(self, network: str) -> Path:
        """The folder of a network."""
        return self.root / network.replace(" ", "-")

    def weights(self, network: str) -> Path:
        return self.of(network) / FILES[network]

    @property
    def options(self) -> list[str]:
        """What `generate`, and as long options of a line `batch`, take."""
        control = ["--control", "depth", "--control-image", str(self.root / "photo.png"), "--control-model", str(self.of("ControlNet"))]
        return [*control, "--control-depth-model", str(self.of("depth model"))]

    @property
    def generate(self) -> list[str]:
        drawn = ["--steps", "1", "--seed", "1", "--device", "cpu", "--out", str(self.root / "out" / "a.png")]
        return ["generate", "a", "--model", str(self.root / "model"), *drawn, *self.options]

    @property
    def batch(self) -> list[str]:
        put(self.root / "prompts.txt", "a\nb\n")
        drawn = ["--steps", "1", "--device", "cpu", "--out", str(self.root / "pictures")]
        return ["batch", str(self.root / "prompts.txt"), "--model", str(self.root / "model"), *drawn, *self.options]

    @property
    def replay(self) -> list[str]:
        """Of `a.png`."""
        networks = ["--control-model", str(self.of("ControlNet")), "--control-depth-model", str(self.of("depth model"))]
        return ["replay", str(self.root / "a.png"), "--model", str(self.root / "model"), "--input", str(self.root / "photo.png"), *networks]

    def copy(self, root: Path) -> "Steered":
        """The same under another root, by links: to be replaced, not written into."""
        shutil.copytree(self.root, root, copy_function=os.link)
        return Steered(root)


def make_steered(root: Path, model: Path) -> Steered:
    steered = Steered(root)
    shutil.copytree(model, root / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(root / "photo.png")
    control_network(model, steered.of("ControlNet"))
    depth_network(steered.of("depth model"))
    return steered


def _code(steered: Steered, network: str, name: str) -> None:
    put(steered.of(network) / name, canary_code(steered.of(network)))


def _link(steered: Steered, network: str, name: str, target: str) -> None:
    path = steered.of(network) / name
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _set(steered: Steered, network: str, name: str, **values: Any) -> None:
    change_json(steered.of(network), name, lambda content: content.update(values))


_ASKED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "ControlNet": [
        ("config.json", {"_class_name": "Evil"}),
        ("config.json", {"_class_name": ["modeling", "Evil"]}),
        ("config.json", {"_class_name": "FluxControlNetModel"}),
        ("config.json", {"_class_name": "UNet2DConditionModel"}),
        ("config.json", {"auto_map": {"AutoModel": "modeling.Evil"}}),
        ("config.json", {"deep": [{"custom_pipeline": "evil"}]}),
        ("config.json", {"trust_remote_code": True}),
    ],
    "depth model": [
        ("config.json", {"model_type": "evil"}),
        ("config.json", {"model_type": "clip"}),
        ("config.json", {"model_type": None}),
        ("config.json", {"auto_map": {"AutoModelForDepthEstimation": "modeling.Evil"}}),
        ("config.json", {"backbone": "someone/model"}),
        ("config.json", {"backbone": "microsoft/resnet-50", "use_pretrained_backbone": True, "use_timm_backbone": True}),
        ("config.json", {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:someone/model"}}),
        ("config.json", {"backbone_config": {"model_type": "dinov2", "auto_map": {"AutoBackbone": "modeling.Evil"}}}),
        ("config.json", {"backbone_config": "someone/model"}),
        ("preprocessor_config.json", {"image_processor_type": "EvilProcessor"}),
        ("preprocessor_config.json", {"feature_extractor_type": "EvilExtractor"}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "modeling.Evil"}}),
    ],
}

CODE: dict[str, Put] = {
    **{
        f"{network}: file {name}": partial(_code, network=network, name=name)
        for network in FILES
        for name in ("modeling.py", "deep/er/hook.py", "fast.so", "tok.pyc", "a.dll", "__init__.py")
    },
    **{
        f"{network}: link {name} to {target}": partial(_link, network=network, name=name, target=target)
        for network in FILES
        for name, target in (
            ("config.json", "/etc/passwd"),
            ("LICENSE", "/etc/hostname"),
            ("vocab.json", "/dev/zero"),
            (FILES[network], "../photo.png"),
        )
    },
    **{
        f"{network}: {name} {json.dumps(values)}": partial(_set, network=network, name=name, **values)
        for network, asked in _ASKED.items()
        for name, values in asked
    },
}
"""Refused with exit code 3 before a library is imported for it."""


def _indexed(steered: Steered, network: str, name: Any) -> None:
    steered.weights(network).unlink()
    put(steered.of(network) / f"{FILES[network]}.index.json", {"weight_map": {"weight": name}})


NAMED: dict[str, Put] = {f"{network}: {name!r}": partial(_indexed, network=network, name=name) for network in FILES for name in NAMES}
"""Names in the index of weights; refused with exit code 3 or 4."""

HEAD: dict[str, Put] = {
    f"{network}: {name}": lambda steered, network=network, data=data: put(steered.weights(network), data)
    for network in FILES
    for name, data in HEADERS.items()
}
"""Headers; refused with exit code 3 or 4 before weights are loaded."""

_CLAIMED: list[tuple[str, str, dict[str, Any]]] = [
    *(("ControlNet", "config.json", {"block_out_channels": value}) for value in ([10**9, 10**9], [8], [8] * 300, [-8, 16], "8", None, [[8], 16])),
    *(("ControlNet", "config.json", {"layers_per_block": value}) for value in (10**9, -1, 0, 1.5, "1", [10**9, 1])),
    *(("ControlNet", "config.json", {"transformer_layers_per_block": value}) for value in (10**9, [64, 64], -1, None)),
    *(
        ("ControlNet", "config.json", {"conditioning_embedding_out_channels": value})
        for value in ([10**9, 8], [4] * 50, "48", 7, [], [None, 8], {"a": 1})
    ),
    *(("ControlNet", "config.json", {name: 10**9}) for name in ("in_channels", "cross_attention_dim", "norm_num_groups", "attention_head_dim")),
    *(("ControlNet", "config.json", {name: math.nan}) for name in ("norm_eps", "in_channels", "freq_shift")),
    ("ControlNet", "config.json", {"down_block_types": ["CrossAttnDownBlock2D"] * 10_000}),
    ("ControlNet", "config.json", {"down_block_types": ["Evil", "Evil"]}),
    ("ControlNet", "config.json", {"class_embed_type": "timestep"}),
    ("ControlNet", "config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    *(("depth model", "config.json", {name: 10**9}) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    *(("depth model", "config.json", {name: 131_072}) for name in ("hidden_size", "fusion_hidden_size", "intermediate_size", "image_size")),
    *(("depth model", "config.json", {name: value}) for name, value in (("num_hidden_layers", 0), ("num_hidden_layers", -1), ("patch_size", 0))),
    *(("depth model", "config.json", {name: value}) for name, value in (("patch_size", [16, -16]), ("image_size", None), ("hidden_size", "16"))),
    *(("depth model", "config.json", {"neck_hidden_sizes": value}) for value in ([], [10**9] * 4, [4, 8], None, "4", [4.5] * 4)),
    *(("depth model", "config.json", {"backbone_out_indices": value}) for value in ([9, 9, 9, 9], [], [0, 1], ["a"] * 4)),
    *(("depth model", "config.json", {"reassemble_factors": value}) for value in ([0, 0, 0, 0], [10**9] * 4, ["x"] * 4, [4])),
    *(("depth model", "config.json", {name: value}) for name, value in (("hidden_act", "evil"), ("readout_type", "evil"), ("layer_norm_eps", "x"))),
    ("depth model", "config.json", {"backbone_config": {"model_type": "swinv2", "depths": [10**6] * 4}}),
    ("depth model", "config.json", {"quantization_config": {"quant_method": "bitsandbytes"}, "hidden_size": 32}),
    *(
        ("depth model", "preprocessor_config.json", {"size": value})
        for value in (10**9, 0, -1, "64", {"height": 64}, {"shortest_edge": 64}, None, [64, 64])
    ),
    *(("depth model", "preprocessor_config.json", {"image_std": value}) for value in ([0, 0, 0], [math.nan] * 3, "x", [1], None)),
    *(("depth model", "preprocessor_config.json", {"ensure_multiple_of": value}) for value in (0, -1, 10**9, "14", None)),
    *(("depth model", "preprocessor_config.json", {name: value}) for name, value in (("do_resize", False), ("resample", 99), ("resample", "x"))),
    *(("depth model", "preprocessor_config.json", {"rescale_factor": value}) for value in (0, math.nan, math.inf, "x", 10**9)),
]

CLAIMS: dict[str, Put] = {
    f"{network}: {name} {json.dumps(values)[:70]}": partial(_set, network=network, name=name, **values) for network, name, values in _CLAIMED
}
"""Values in configs that cannot be; refused with exit code 3 or 4 in bounded time and memory."""


def _change(steered: Steered, network: str, change: Callable[[State], State]) -> None:
    put(steered.weights(network), save(change(load_file(steered.weights(network))), {"format": "pt"}))


CONTENTS: dict[str, Put] = {
    f"{network}: {what}": partial(_change, network=network, change=change) for network in FILES for what, change in _CHANGES.items()
}
"""Weights that do not fit, NaN, infinity; refused with exit code 4."""


def _pickled(steered: Steered, data: bytes, network: str, name: str) -> None:
    steered.weights(network).unlink()
    put(steered.of(network) / name, data)


def _by_index(steered: Steered, data: bytes, network: str, name: str) -> None:
    _pickled(steered, data, network, name)
    put(steered.of(network) / f"{FILES[network]}.index.json", {"weight_map": {"weight": name}})


def _as(steered: Steered, data: bytes, network: str, name: str) -> None:
    put(steered.of(network) / name, data)


def _instead(steered: Steered, data: bytes, network: str) -> None:
    steered.of(network).rename(steered.root / "elsewhere")
    put(steered.of(network), data)


PICKLES: dict[str, Callable[[Steered, bytes], object]] = {
    **{
        f"{network}: only {stem}.{suffix}": partial(_pickled, network=network, name=f"{stem}.{suffix}")
        for network, stem in (("ControlNet", "diffusion_pytorch_model"), ("depth model", "pytorch_model"))
        for suffix in ("bin", "ckpt", "pt", "pth", "pkl", "npz", "BIN")
    },
    **{f"{network}: renamed .safetensors": partial(_as, network=network, name=FILES[network]) for network in FILES},
    **{f"{network}: named by an index": partial(_by_index, network=network, name="pytorch_model.bin") for network in FILES},
    **{f"{network}: named by an index, renamed": partial(_by_index, network=network, name="part-1.safetensors") for network in FILES},
    **{f"{network}: the index itself": partial(_pickled, network=network, name=f"{FILES[network]}.index.json") for network in FILES},
    **{f"{network}: as config.json": partial(_as, network=network, name="config.json") for network in FILES},
    "depth model: as preprocessor_config.json": partial(_as, network="depth model", name="preprocessor_config.json"),
    **{f"{network}: in place of the folder": partial(_instead, network=network) for network in FILES},
}
"""Where a pickle can lie in them; each must be refused (exit code 2 where there is no folder any more)."""
