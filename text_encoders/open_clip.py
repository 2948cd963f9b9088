"""Text towers in open_clip's layout (a folder with `open_clip_config.json` and `open_clip_model.safetensors`), as our `CLIPText`.

The tower is the same network; its attention projections are stored as one matrix, its text projection transposed.
"""

from collections.abc import Mapping
from typing import Any, cast

from tokenizers import Tokenizer as Backend
from torch import Tensor

from ..errors import ModelError
from .clip import CLIPTextConfig
from .clip_vocabulary import clip_merges, clip_words
from .tokenizer import Tokenizer, clip_pipeline

_READ = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_NEUTRAL: dict[str, object] = {"pool_type": "argmax", "proj_type": "linear", "block_type": "default"}  # every other option must be off
_UNREAD = {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pad_id", "eos_id"}  # about tokens
_NO_EFFECT = _UNREAD | {"hf_proj_type", "hf_pooler_type", "hf_model_pretrained", "output_tokens"}
_TOWER = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_BLOCK = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_RESBLOCKS = "transformer.resblocks."


def open_clip_text_config(data: Mapping[str, object]) -> CLIPTextConfig:
    """Read a parsed `open_clip_config.json`.

    Returns:
        The tower's shape, with a projection to the joint embedding width; the vector at the largest id is pooled.

    Raises:
        ModelError: a tower that is not a plain CLIP one (a transformers model, another pooling, extra norms or scales).
    """
    model = _table(data.get("model_cfg", data), "model_cfg")
    text = _table(model.get("text_cfg"), "text_cfg")
    for name, value in text.items():
        if name not in _READ | _NO_EFFECT and value not in (None, False, _NEUTRAL.get(name)):
            raise ModelError(
                f"the open_clip text tower has {name!r:.100} = {value!r:.100}; a plain CLIP tower was wanted; use the library's own loader for it"
            )
    width, ratio = text.get("width", 512), text.get("mlp_ratio", 4.0)
    if type(width) is not int or not isinstance(ratio, int | float) or not 0 < ratio <= 64:
        raise ModelError(
            f"the open_clip text tower has width = {width!r:.100} and mlp_ratio = {ratio!r:.100}; numbers were wanted; repair its config"
        )
    return CLIPTextConfig.from_dict(
        {
            "model_type": "clip_text_model",
            "vocab_size": text.get("vocab_size", 49408),
            "hidden_size": width,
            "intermediate_size": int(width * ratio),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text.get("context_length", 77),
            "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "projection_dim": model.get("embed_dim"),
            "eos_token_id": 2,
        }
    )


def _table(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelError(f"the open_clip config has {name} = {value!r:.100}; an object was wanted; repair its open_clip_config.json")
    return cast("dict[str, Any]", value)


def open_clip_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the text tower's tensors of an open_clip file to those of `CLIPText(config, projection=True)`.

    Keys may have the prefix `text.` (open_clip's CustomTextCLIP); the image tower and the temperature are left out.

    Raises:
        ModelError: a file without a text tower.
    """
    tower = {name.removeprefix("text."): tensor for name, tensor in weights.items()}
    if not tower.keys() >= {*_TOWER, "text_projection"}:
        missing = sorted({*_TOWER, "text_projection"} - tower.keys())
        raise ModelError(f"the open_clip file has no {missing[0]!r}; a text tower with a linear projection was wanted; use another file")
    renamed = {ours: tower[name] for name, ours in _TOWER.items()}
    renamed["text_projection.weight"] = tower["text_projection"].T.contiguous()
    for name, tensor in tower.items():
        if name.startswith(_RESBLOCKS):
            layer, _, rest = name.removeprefix(_RESBLOCKS).partition(".")
            renamed.update(_block_tensors(f"text_model.encoder.layers.{layer}.", rest, tensor))
    return renamed


def _block_tensors(prefix: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a residual block under its names in `CLIPText`: the joint projection becomes three."""
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.rpartition("_")[2]
        return {f"{prefix}self_attn.{part}_proj.{kind}": rows.clone() for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
    module, _, kind = name.rpartition(".")
    if module not in _BLOCK:
        raise ModelError(f"the open_clip file has a residual block with {name!r}; a plain CLIP tower was wanted; use the library's own loader for it")
    return {f"{prefix}{_BLOCK[module]}.{kind}": tensor}


def open_clip_tokenizer(length: int = 77) -> Tokenizer:
    """The tokenizer of open_clip's own models, from the vocabulary that comes with the open_clip package (which is not imported); pads with 0.

    Equal to open_clip's on clean text: its repair of broken encodings, control characters (both ftfy's) and HTML entities is not done.
    """
    merges = clip_merges()
    words = clip_words(merges, "<start_of_text>", "<end_of_text>")
    backend: Backend = clip_pipeline(words, merges, unknown="<end_of_text>")
    return Tokenizer(backend, length, prefix=(len(words) - 2,), suffix=(len(words) - 1,), pad_id=0)
