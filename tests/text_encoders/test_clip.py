"""Parity of the CLIP text tower with transformers at the true widths, heads and activations, two layers deep."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig as TheirConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from tu_diffuse.attention import AttentionBackend
from tu_diffuse.errors import ModelError
from tu_diffuse.text_encoders.clip import CLIPText, CLIPTextConfig, clip_state_dict, initialise_clip

SHAPES = {
    "CLIP-L": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu"},
    "OpenCLIP-H": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "projection_dim": 512, "hidden_act": "gelu"},
    "OpenCLIP-bigG": {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"},
}
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "projection_dim": 24, "hidden_act": "quick_gelu",
}  # fmt: skip
VOCAB, EOS = 199, 198


def their_model(shape: dict[str, object], projection: bool, eos: int = EOS) -> torch.nn.Module:
    torch.manual_seed(0)
    config = TheirConfig(vocab_size=VOCAB, num_hidden_layers=2, eos_token_id=eos, bos_token_id=197, attn_implementation="eager", **shape)
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    for parameter in model.parameters():  # biases and norms away from their trivial start
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def ours_from(model: torch.nn.Module, projection: bool) -> CLIPText:
    """The same weights in our tower, built without memory."""
    with torch.device("meta"):
        ours = CLIPText(CLIPTextConfig.from_dict(model.config.to_dict()), projection)
    ours.load_state_dict(clip_state_dict(model.state_dict()), strict=True, assign=True)
    return ours.eval()


def some_ids(eos: int = EOS) -> Tensor:
    ids = torch.randint(3, 197, (3, 77))
    ids[:, 0] = 197
    ids[0, 5:] = eos
    ids[1, 76] = eos
    ids[2, 30], ids[2, 31:] = eos, 0
    return ids


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_parity_with_transformers(shape: str) -> None:
    model = their_model(SHAPES[shape], projection=True)
    ids = some_ids()
    theirs = model(ids, output_hidden_states=True)
    pooled = model.text_model(ids).pooler_output
    worst = 0.0
    for projection, source in ((True, model), (False, model.text_model)):
        out = ours_from(source, projection)(ids)
        assert len(out.hidden_states) == len(theirs.hidden_states) == 3
        pairs = [*zip(out.hidden_states, theirs.hidden_states, strict=True), (out.last_hidden_state, theirs.last_hidden_state), (out.pooled, pooled)]
        if projection:
            pairs.append((out.projected, theirs.text_embeds))
        else:
            assert out.projected is None
        worst = max(worst, *(largest_difference(*pair) for pair in pairs))
    print(f"{shape}: {worst:.1e}")
    assert worst <= 1e-5


@torch.no_grad()
def test_pad_mask_parity() -> None:
    model = their_model(SMALL, projection=True)
    ours = ours_from(model, True)
    ids = some_ids()
    mask = torch.arange(77) < torch.tensor([[6], [77], [31]])
    mask[1, 40:45] = False
    theirs = model(ids, attention_mask=mask.long())
    out = ours(ids, mask)
    assert largest_difference(out.last_hidden_state, theirs.last_hidden_state) <= 1e-5
    assert largest_difference(out.projected, theirs.text_embeds) <= 1e-5
    assert not torch.allclose(out.last_hidden_state, ours(ids).last_hidden_state)


@torch.no_grad()
def test_legacy_end_id_pools_at_the_largest_id() -> None:
    model = their_model(SMALL, projection=False, eos=2)
    ours = ours_from(model, False)
    ids = some_ids(eos=198)
    ids[:, 1] = 2
    assert largest_difference(ours(ids).pooled, model(ids).pooler_output) <= 1e-5
    assert torch.equal(ours(ids).pooled[2], ours(ids).last_hidden_state[2, 30])


@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_both_file_layouts_load(projection: bool, tmp_path: Path) -> None:
    """What transformers saves today, the layout with the `text_model.` level, and older files with the position_ids buffer."""
    model = their_model(SMALL, projection)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    ours = ours_from(model, projection)
    own_names = ours.state_dict()
    assert all(key.startswith(("text_model.", "text_projection.")) for key in own_names)
    assert any(key.startswith("text_model.") for key in saved) == projection
    ids = some_ids()
    for file in (saved, own_names, own_names | {"text_model.embeddings.position_ids": torch.arange(77)[None]}):
        other = CLIPText(ours.config, projection)
        other.load_state_dict(clip_state_dict(file), strict=True)
        assert torch.equal(ours(ids).last_hidden_state, other(ids).last_hidden_state)
    with pytest.raises(RuntimeError, match="Missing key"):
        CLIPText(ours.config, projection).load_state_dict(
            clip_state_dict({key: value for key, value in saved.items() if "fc1" not in key}), strict=True
        )


@torch.no_grad()
def test_later_tokens_do_not_reach_earlier_ones() -> None:
    torch.manual_seed(0)
    ours = CLIPText(CLIPTextConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_attention_heads=4), False)
    ids = some_ids(198)
    changed = ids.clone()
    changed[:, 50] = 4
    before, after = ours(ids).last_hidden_state, ours(changed).last_hidden_state
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.allclose(before[:, 50:], after[:, 50:])


@torch.no_grad()
def test_backend_is_used() -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2)
    plain, math = CLIPText(config, False), CLIPText(config, False, AttentionBackend.MATH)
    math.load_state_dict(plain.state_dict())
    ids = some_ids(198)
    assert torch.allclose(plain(ids).last_hidden_state, math(ids).last_hidden_state, atol=1e-5)
    with pytest.raises(RuntimeError):
        CLIPText(config, False, AttentionBackend.CUDNN)(ids)


@torch.no_grad()
def test_initialisation_scales() -> None:
    torch.manual_seed(0)
    model = CLIPText(CLIPTextConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=256, num_attention_heads=4, num_hidden_layers=2), True)
    initialise_clip(model)
    layer = model.text_model.encoder.layers[0]
    for weight, std in [
        (layer.self_attn.q_proj.weight, 64**-0.5),
        (layer.self_attn.out_proj.weight, 64**-0.5 / 2),
        (layer.mlp.fc1.weight, 128**-0.5),
        (layer.mlp.fc2.weight, 64**-0.5 / 2),
        (model.text_model.embeddings.token_embedding.weight, 0.02),
        (model.text_projection.weight, 64**-0.5),
    ]:
        assert float(weight.std()) == pytest.approx(std, rel=0.05)
    assert float(layer.mlp.fc1.bias.abs().sum()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip_text_model"}, "clip_text_model was wanted"),
        ({"hidden_act": "relu"}, "quick_gelu, gelu"),
        ({"num_attention_heads": 5}, "divisor"),
        ({"hidden_size": "768"}, "int was wanted"),
        ({"num_hidden_layers": True}, "int was wanted"),
        ({"vocab_size": 0}, "above 0"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
    ],
)
def test_configs_that_are_refused(change: dict[str, object], message: str) -> None:
    good = {"model_type": "clip_text_model", "layer_norm_eps": 1e-5, "architectures": ["CLIPTextModel"], "projection_dim": None}
    assert CLIPTextConfig.from_dict(good) == CLIPTextConfig()
    with pytest.raises(ModelError, match=message):
        CLIPTextConfig.from_dict(good | change)
