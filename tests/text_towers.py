"""Small text encoders with random weights, theirs and ours."""

import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig as TheirConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from tu_diffuse.text_encoders.clip import CLIPText, CLIPTextConfig, clip_state_dict
from tu_diffuse.text_encoders.conditioner import Conditioner, ConditionerConfig
from tu_diffuse.text_encoders.parts import ClipPart, ClipT5Part, T5Part
from tu_diffuse.text_encoders.t5 import T5Config, T5Encoder
from tu_diffuse.text_encoders.tokenizer import load_tokenizer

BASE_IDS = (1024.0, 1024.0, 0.0, 0.0, 512.0, 768.0)


def towers(folder: Path, width: int, projection: int | None, layers: int = 4) -> tuple[torch.nn.Module, ClipPart]:
    """Theirs and ours with the same weights."""
    torch.manual_seed(width)
    vocab = json.loads((folder / "vocab.json").read_text())
    config = TheirConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=projection if projection is not None else 16,
        eos_token_id=vocab["<|endoftext|>"],
    )
    model = (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).eval()
    ours = CLIPText(CLIPTextConfig.from_dict(config.to_dict()), projection is not None).eval()
    ours.load_state_dict(clip_state_dict(model.state_dict()))
    return model, ClipPart(load_tokenizer(folder), ours)


def clip_t5(folder: Path, t5_folder: Path) -> ClipT5Part:
    """CLIP and T5 with a join that has a refiner."""
    _, clip = towers(folder, 32, 24)
    torch.manual_seed(5)
    t5 = T5Encoder(T5Config(vocab_size=200, d_model=40, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).eval()
    config = ConditionerConfig(clip_width=32, clip_pooled_width=24, t5_width=40, width=48, pooled_width=20, refiner_layers=1)
    return ClipT5Part(clip, lambda: T5Part(load_tokenizer(t5_folder, 30), t5), Conditioner(config).eval())
