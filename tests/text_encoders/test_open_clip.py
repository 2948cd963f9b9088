"""Parity of open_clip text towers, loaded from open_clip's own layout, and of its tokenizer on the true vocabulary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import CLIP, CustomTextCLIP, tokenize
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from tu_diffuse.errors import ModelError
from tu_diffuse.text_encoders.clip import CLIPText
from tu_diffuse.text_encoders.open_clip import open_clip_state_dict, open_clip_text_config, open_clip_tokenizer

VISION = {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 8}
TOWERS: dict[str, dict[str, Any]] = {
    "ViT-H style": {"embed_dim": 48, "text_cfg": {"context_length": 77, "vocab_size": 300, "width": 64, "heads": 4, "layers": 3}},
    "bigG style": {"embed_dim": 80, "text_cfg": {"context_length": 77, "vocab_size": 300, "width": 80, "heads": 5, "layers": 2, "mlp_ratio": 3.5}},
    "openai style": {
        "embed_dim": 32,
        "quick_gelu": True,
        "text_cfg": {"context_length": 20, "vocab_size": 300, "width": 32, "heads": 4, "layers": 2},
    },
}


def saved(folder: Path, name: str, kind: type[torch.nn.Module]) -> torch.nn.Module:
    """A random open_clip model, written as open_clip lays it out."""
    torch.manual_seed(0)
    model_cfg = TOWERS[name] | {"vision_cfg": VISION}
    model = kind(**model_cfg).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return model


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@torch.no_grad()
def test_parity_with_open_clip(name: str, kind: type[torch.nn.Module], tmp_path: Path) -> None:
    model = saved(tmp_path, name, kind)
    config = open_clip_text_config(json.loads((tmp_path / "open_clip_config.json").read_text()))
    with torch.device("meta"):
        ours = CLIPText(config, projection=True)
    ours.load_state_dict(open_clip_state_dict(load_file(tmp_path / "open_clip_model.safetensors")), strict=True, assign=True)
    length = config.max_position_embeddings
    ids = torch.randint(1, 298, (3, length))
    ids[:, 0], ids[0, 4], ids[0, 5:], ids[1, 9], ids[1, 10:], ids[2, -1] = 298, 299, 0, 299, 0, 299
    theirs = model.encode_text(ids)
    out = ours.eval()(ids)
    tower = model.text if kind is CustomTextCLIP else model
    x = tower.token_embedding(ids) + tower.positional_embedding
    states = [x := block(x, attn_mask=tower.attn_mask) for block in tower.transformer.resblocks]
    tokens = tower.ln_final(states[-1])
    worst = max(
        float((a - b).abs().max()) for a, b in [(out.projected, theirs), (out.last_hidden_state, tokens), (out.hidden_states[-2], states[-2])]
    )
    print(f"{name} {kind.__name__}: {worst:.1e}")
    assert theirs.std() > 0.05
    assert worst <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hf_model_name": "roberta-base"}, "hf_model_name"),
        ({"pool_type": "last"}, "pool_type"),
        ({"no_causal_mask": True}, "no_causal_mask"),
        ({"ls_init_value": 0.1}, "ls_init_value"),
        ({"proj_bias": True}, "proj_bias"),
        ({"heads": 5}, "divisor"),
    ],
)
def test_towers_that_are_refused(change: dict[str, object], message: str) -> None:
    good = TOWERS["ViT-H style"]
    open_clip_text_config(good | {"text_cfg": good["text_cfg"] | {"pool_type": "argmax", "embed_cls": False, "hf_tokenizer_name": None}})
    with pytest.raises(ModelError, match=message):
        open_clip_text_config(good | {"text_cfg": good["text_cfg"] | change})
    with pytest.raises(ModelError, match="text_cfg = None"):
        open_clip_text_config({"model_cfg": {"embed_dim": 4}})


def test_files_that_are_refused(tmp_path: Path) -> None:
    weights = saved(tmp_path, "openai style", CLIP).state_dict()
    with pytest.raises(ModelError, match="no 'text_projection'"):
        open_clip_state_dict({key: tensor for key, tensor in weights.items() if key != "text_projection"})
    with pytest.raises(ModelError, match=r"ls_1\.gamma"):
        open_clip_state_dict(weights | {"transformer.resblocks.0.ls_1.gamma": torch.ones(32)})


def test_tokenizer_equals_open_clip_on_the_true_vocabulary() -> None:
    ours, theirs = open_clip_tokenizer(), SimpleTokenizer()
    pieces = st.sampled_from(
        ["a", "Red", "apples", "isn't", "12", "café", "🍎", "日本語", "!", "unbelievably", "antidisestablishmentarianism", "\n", "--"]
    )

    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(
            st.one_of(pieces, st.text(st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters="&<>"), max_size=8)), max_size=50
        ).map(" ".join)
    )
    def check(text: str) -> None:
        tokens = ours.encode([text])
        assert tokens.ids[0].tolist() == theirs([text])[0].tolist()
        assert (tokens.overflow[0] != "") == (len(theirs.encode(text)) > 75)

    check()
    tokens = ours.encode(["a red apple!"])
    assert torch.equal(tokens.ids, tokenize(["a red apple!"]))
    assert tokens.ids[0, :7].tolist() == [49406, 320, 736, 3055, 256, 49407, 0]
    assert tokens.mask[0].sum() == 6
