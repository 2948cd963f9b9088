"""What a single-file checkpoint holds, told from the names and shapes in its header: the family, each component's tensors and its config.

    Stable Diffusion 1      cond_stage_model.transformer.        CLIP ViT-L/14, transformers' names
    Stable Diffusion 2      cond_stage_model.model.              OpenCLIP ViT-H, whose last layer is not used
    SDXL base               conditioner.embedders.0.transformer. CLIP ViT-L/14, and conditioner.embedders.1.model. OpenCLIP bigG
    SDXL refiner            conditioner.embedders.0.model.       OpenCLIP bigG

with the U-Net at `model.diffusion_model.` and the autoencoder at `first_stage_model.`. Widths and depths are read from the shapes. What they cannot
say is what all published checkpoints of a family have in common: 8 attention heads (SD 1) or heads of 64 channels (SD 2, SDXL, all text towers), 32
groups, the latents' scale, the noise schedule. What the network predicts is named by the file's metadata (`modelspec.prediction_type`, Stability AI's
Model Metadata Standard 1.0.1; or the empty tensors `v_pred` and `ztsnr` that v-prediction SDXL checkpoints carry), else by the user.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import ModelError
from .names import JOINT, PARAMETERS, Level, open_clip_modules, renamed, unet_modules, vae_modules

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
TEXT_PREFIXES: Mapping[str, Mapping[str, str]] = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
    "sdxl-refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
"""Family -> text encoder -> what its tensors' names begin with in the file."""
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""What a user or `modelspec.prediction_type` may say -> what a scheduler config says."""
OPEN_CLIP_LAYERS = 23  # of the 24 of ViT-H that Stable Diffusion 2 uses
HEAD, GROUPS = 64, 32
MAX_BLOCKS = 64  # of one kind in a network; SDXL has 32 layers of text
_DECOYS = {
    "a LoRA file": r"lora_(unet|te\d?)_|.*\.lora_(A|B|up|down)\b|.*\.lora\.(up|down)\b",
    "a ControlNet": r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.",
    "a diffusion transformer (SD 3, Flux), which has no U-Net": r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|single_blocks)\.",
    "a component in diffusers' layout, which belongs into a model folder": r"(down_blocks|up_blocks|mid_block|encoder\.down_blocks)\.",
}


class Piece(NamedTuple):
    """Where a component's tensor lies in a single file, and what becomes of it: rows taken, transposed, then given another shape.

    Attributes:
        name: in the file.
        shape: that the component wants.
        rows: first and end, or None for all.
        transposed: its two axes are exchanged.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """A single file as a model folder.

    Attributes:
        family: "sd1", "sd2", "sdxl" or "sdxl-refiner".
        prediction: "epsilon" or "v_prediction", or None where the file does not say.
        components: component -> tensor's name in a model folder -> where it lies.
        configs: component -> its config.json; the U-Net's without `sample_size`.
        side: of the training pictures in pixels where the metadata say it, else None.
        zero_terminal_snr: the noise schedule ends in pure noise.
    """

    family: str
    prediction: str | None
    components: Mapping[str, Mapping[str, Piece]]
    configs: Mapping[str, Mapping[str, Any]]
    side: int | None
    zero_terminal_snr: bool


def layout_of(file: str, header: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, Any]) -> Layout:
    """Tell what a file holds.

    Args:
        file: its name, for messages.
        header: tensor name -> {dtype, shape}.
        metadata: the header's `__metadata__`.

    Raises:
        ModelError: no checkpoint of one of the families, or one of another architecture.
    """
    try:
        shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in header.items()}
    except (TypeError, KeyError, ValueError):
        raise ModelError(f"{file!r} has a damaged safetensors header: not every tensor has a shape; fetch it again.") from None
    family = _family(file, shapes)
    if any(name.startswith(("edm_mean", "edm_vpred.")) for name in shapes):
        raise ModelError(f"{file!r} was trained with EDM's preconditioning, which is not covered; use another checkpoint.")
    try:
        components: dict[str, dict[str, Piece]] = {}
        configs: dict[str, dict[str, Any]] = {}
        for part, prefix in {"unet": UNET, "vae": VAE, **TEXT_PREFIXES[family]}.items():
            read = {"unet": _unet, "vae": _vae}.get(part, _open_clip if prefix.endswith(".model.") else _clip)
            pieces, configs[part] = read(_below(shapes, prefix), family)
            components[part] = {name: piece._replace(name=prefix + piece.name) for name, piece in pieces.items()}
        if family.startswith("sdxl"):
            configs["unet"] |= _sizes(shapes, family, configs["text_encoder_2"]["projection_dim"])
    except KeyError as error:
        raise ModelError(f"{file!r} looks like {family} but lacks the tensor {error}; fetch it again, or use the model's folder.") from None
    except (IndexError, ValueError, TypeError):
        raise ModelError(f"{file!r} looks like {family} but has tensors of other shapes; its architecture is not covered.") from None
    widths, read = sum(configs[part]["hidden_size"] for part in TEXT_PREFIXES[family]), configs["unet"]["cross_attention_dim"]
    if widths != read:
        raise ModelError(f"{file!r} has text encoders of width {widths} and a U-Net that reads {read}; the file mixes two models.")
    return Layout(family, _prediction(file, shapes, metadata), components, configs, _side(metadata), "v_pred" in shapes and "ztsnr" in shapes)


def _family(file: str, shapes: Mapping[str, Any]) -> str:
    """The only family whose text encoders, and no others, are there."""
    there = {prefix for prefixes in TEXT_PREFIXES.values() for prefix in prefixes.values() if any(name.startswith(prefix) for name in shapes)}
    family = next((family for family, prefixes in TEXT_PREFIXES.items() if set(prefixes.values()) == there), None)
    if family is not None and f"{UNET}input_blocks.0.0.weight" in shapes:
        if not any(name.startswith(VAE) for name in shapes):
            raise ModelError(f"{file!r} holds no autoencoder (tensors {VAE}…); use a file with its VAE baked in, or the model's folder.")
        return family
    kinds = [kind for kind, pattern in _DECOYS.items() if any(re.match(pattern, name) for name in shapes)]
    first = ", ".join(f"{name:.60}" for name in sorted(shapes)[:3])
    looks = f"; it looks like {kinds[0]}" if kinds else f"; it holds {first}, …" if shapes else "; it is empty"
    raise ModelError(f"{file!r} is no checkpoint of Stable Diffusion 1, 2, SDXL or its refiner with U-Net, autoencoder and text encoder{looks}.")


def _prediction(file: str, shapes: Mapping[str, Any], metadata: Mapping[str, Any]) -> str | None:
    said = metadata.get("modelspec.prediction_type")
    if said is not None and said not in PREDICTIONS:
        raise ModelError(f"{file!r} predicts {said!r:.100} as its metadata say; epsilon or v was wanted.")
    if said is None and str(metadata.get("modelspec.architecture", "")).endswith("-v"):
        return "v_prediction"  # stable-diffusion-v2-768-v
    return PREDICTIONS[said] if said is not None else "v_prediction" if "v_pred" in shapes else None


def _side(metadata: Mapping[str, Any]) -> int | None:
    found = re.fullmatch(r"(\d{2,4})x(\d{2,4})", str(metadata.get("modelspec.resolution", "")))
    return None if found is None else max(int(found[1]), int(found[2]))


def _unet(shapes: Mapping[str, tuple[int, ...]], family: str) -> tuple[dict[str, Piece], dict[str, Any]]:
    blocks = _count(shapes, r"input_blocks\.(\d+)\.")
    levels: list[Level] = []
    widths: list[int] = []
    depths: list[int] = []
    resnets = attentions = depth = width = 0
    for block in range(1, blocks + 1):
        if block == blocks or f"input_blocks.{block}.0.op.weight" in shapes:
            if attentions not in (0, resnets) or not resnets:
                raise KeyError(f"input_blocks.{block - 1}.1.norm.weight")
            levels.append(Level(resnets, attentions > 0))
            widths.append(width)
            depths.append(depth)
            resnets = attentions = depth = 0
            continue
        width, resnets = shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0], resnets + 1
        layers = _count(shapes, rf"input_blocks\.{block}\.1\.transformer_blocks\.(\d+)\.")
        attentions, depth = attentions + (layers > 0), max(depth, layers)
    middle = _count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    context = shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if level.attention else "DownBlock2D" for level in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if level.attention else "UpBlock2D" for level in reversed(levels)],
        "layers_per_block": levels[0].resnets,
        "norm_num_groups": GROUPS,
        "cross_attention_dim": context,
        # A level without attention has no depth of its own; the middle block takes the last level's.
        "transformer_layers_per_block": [depth or middle for depth in depths],
        "attention_head_dim": [max(1, width // HEAD) for width in widths] if linear else 8,
        "use_linear_projection": linear,
        "upcast_attention": family == "sd2",
    }
    if len({level.resnets for level in levels}) > 1:
        config["layers_per_block"] = [level.resnets for level in levels]
    return _pieces(shapes, unet_modules(levels)), config


def _sizes(shapes: Mapping[str, tuple[int, ...]], family: str, pooled: int) -> dict[str, Any]:
    """How an SDXL network is told the pooled vector and its 6 size ids (the refiner: 5)."""
    vector = shapes[f"{UNET}label_emb.0.0.weight"][1]
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (vector - pooled) // (5 if family == "sdxl-refiner" else 6),
        "projection_class_embeddings_input_dim": vector,
    }


def _vae(shapes: Mapping[str, tuple[int, ...]], family: str) -> tuple[dict[str, Piece], dict[str, Any]]:
    levels, resnets = _count(shapes, r"encoder\.down\.(\d+)\."), _count(shapes, r"encoder\.down\.0\.block\.(\d+)\.")
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": resnets,
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "norm_num_groups": GROUPS,
        "scaling_factor": 0.13025 if family.startswith("sdxl") else 0.18215,
        "force_upcast": True,
    }
    kept = {name: shape for name, shape in shapes.items() if not name.startswith("loss.")}  # the discriminator that it was trained with
    pieces = _pieces(kept, vae_modules(levels, resnets))
    flat = {name: piece._replace(shape=piece.shape[:2]) for name, piece in pieces.items() if ".attentions." in name and len(piece.shape) == 4}
    return pieces | flat, config


def _clip(shapes: Mapping[str, tuple[int, ...]], family: str) -> tuple[dict[str, Piece], dict[str, Any]]:
    """CLIP ViT-L/14 as transformers names it; `text_model.` may lack, and what the tower of a diffusion model has no use for may be there."""
    del family
    pieces = {
        f"text_model.{name.removeprefix('text_model.')}": Piece(name, shape)
        for name, shape in shapes.items()
        if not name.endswith(("position_ids", "text_projection.weight", "logit_scale"))
    }
    of = {name: piece.shape for name, piece in pieces.items()}
    return pieces, _text_config(
        of, _count(of, r"text_model\.encoder\.layers\.(\d+)\."), of["text_model.encoder.layers.0.mlp.fc1.weight"][0], "quick_gelu", None
    )


def _open_clip(shapes: Mapping[str, tuple[int, ...]], family: str) -> tuple[dict[str, Piece], dict[str, Any]]:
    """An OpenCLIP tower; that of Stable Diffusion 2 without its last layer and projection, which are not used."""
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    if family == "sd2":
        layers = min(layers, OPEN_CLIP_LAYERS)
    elsewhere = re.compile(rf".*in_proj_|(positional_embedding|text_projection|logit_scale|attn_mask)$|transformer\.resblocks\.{OPEN_CLIP_LAYERS}\.")
    pieces = _pieces({name: shape for name, shape in shapes.items() if not elsewhere.match(name)}, open_clip_modules(layers))
    for ours, theirs in PARAMETERS.items():
        if ours != "text_projection.weight":
            pieces[ours] = Piece(theirs, shapes[theirs])
        elif family != "sd2":
            pieces[ours] = Piece(theirs, shapes[theirs][::-1], transposed=True)
    for layer in range(layers):
        for ours, (theirs, third) in JOINT.items():
            name = f"transformer.resblocks.{layer}.{theirs}"
            rows = shapes[name][0] // 3
            pieces[f"text_model.encoder.layers.{layer}.{ours}"] = Piece(name, (rows, *shapes[name][1:]), (third * rows, (third + 1) * rows))
    projection = None if family == "sd2" else shapes["text_projection"][1]
    return pieces, _text_config(
        {name: piece.shape for name, piece in pieces.items()}, layers, shapes["transformer.resblocks.0.mlp.c_fc.weight"][0], "gelu", projection
    )


def _text_config(shapes: Mapping[str, tuple[int, ...]], layers: int, inner: int, act: str, projection: int | None) -> dict[str, Any]:
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
        "projection_dim": width if projection is None else projection,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as the published configs have it: the position of the largest id is pooled
    }


def _pieces(shapes: Mapping[str, tuple[int, ...]], modules: Mapping[str, str]) -> dict[str, Piece]:
    """Each tensor of a component under its name in a model folder.

    Raises:
        ModelError: one that the architecture does not have.
    """
    back = {theirs: ours for ours, theirs in modules.items()}
    pieces: dict[str, Piece] = {}
    strange: list[str] = []
    for name, shape in shapes.items():
        ours = renamed(name, back)
        if ours is None:
            strange.append(name)
        else:
            pieces[ours] = Piece(name, shape)
    if strange:
        named = ", ".join(f"{name:.60}" for name in sorted(strange)[:5])
        raise ModelError(f"The file has {len(strange)} tensors that no Stable Diffusion checkpoint has ({named}); its architecture is not covered.")
    return pieces


def _below(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the pattern's group has at the beginnings of names.

    Raises:
        ValueError: more than any checkpoint has.
    """
    numbers = {found[1] for name in names if (found := re.match(pattern, name))}
    if len(numbers) > MAX_BLOCKS:
        raise ValueError(f"{len(numbers)} blocks")
    return len(numbers)
