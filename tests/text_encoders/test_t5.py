"""Parity of the T5 encoder with transformers (v1.0 and v1.1), and its numbers in half precision."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config as TheirConfig
from transformers import T5EncoderModel, T5ForConditionalGeneration
from tu_diffuse.errors import ModelError
from tu_diffuse.text_encoders.t5 import T5Config, T5Encoder, initialise_t5, position_buckets, t5_state_dict

VERSIONS = {
    "v1.0 small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "feed_forward_proj": "relu"},
    "v1.1 small": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 6, "feed_forward_proj": "gated-gelu"},
    "v1.1 odd": {"d_model": 48, "d_kv": 8, "d_ff": 96, "num_heads": 3, "feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 20},
}


def their_model(version: str, kind: type[torch.nn.Module] = T5EncoderModel, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind(TheirConfig(vocab_size=101, num_layers=3, dropout_rate=0.0, decoder_start_token_id=0, **VERSIONS[version], **more)).eval()
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return model


def ours_from(model: torch.nn.Module, folder: Path) -> T5Encoder:
    model.save_pretrained(folder)
    with torch.device("meta"):
        ours = T5Encoder(T5Config.from_dict(model.config.to_dict()))
    ours.load_state_dict(t5_state_dict(load_file(folder / "model.safetensors")), strict=True, assign=True)
    return ours.eval()


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_parity_with_transformers(version: str, tmp_path: Path) -> None:
    model = their_model(version)
    ours = ours_from(model, tmp_path)
    ids = torch.randint(3, 101, (2, 150))
    mask = torch.arange(150) < torch.tensor([[150], [33]])
    for one in (None, mask):
        theirs = model(ids, attention_mask=None if one is None else one.long()).last_hidden_state
        difference = float((ours(ids, one) - theirs).abs().max() / theirs.abs().max())
        print(f"{version} mask={one is not None}: {difference:.1e}")
        assert theirs.std() > 0.1
        assert difference <= 1e-5


@torch.no_grad()
def test_whole_file_and_both_names_of_the_embedding(tmp_path: Path) -> None:
    model = their_model("v1.1 odd", T5ForConditionalGeneration)
    ours = ours_from(model, tmp_path)
    ids = torch.randint(3, 101, (1, 9))
    assert torch.allclose(ours(ids), model.encoder(ids).last_hidden_state, atol=1e-5)
    state = ours.state_dict()
    renamed = {"encoder.embed_tokens.weight" if key == "shared.weight" else key: value for key, value in state.items()}
    for file in (renamed, state | renamed):
        other = T5Encoder(ours.config)
        other.load_state_dict(t5_state_dict(file), strict=True)
        assert torch.equal(other(ids), ours(ids))


@torch.no_grad()
def test_pads_have_no_effect() -> None:
    torch.manual_seed(0)
    ours = T5Encoder(T5Config(vocab_size=101, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    ids = torch.randint(3, 101, (1, 10))
    mask = torch.arange(10)[None] < 6
    changed = ids.clone()
    changed[:, 6:] = 0
    assert torch.equal(ours(ids, mask)[:, :6], ours(changed, mask)[:, :6])
    assert torch.allclose(ours(ids, mask)[:, :6], ours(ids[:, :6]), atol=1e-6)
    assert not torch.allclose(ours(ids, mask)[:, :6], ours(ids)[:, :6], atol=1e-3)
    assert ours(ids, torch.zeros(1, 10, dtype=torch.bool)).isfinite().all()


def test_position_buckets_equal_transformers() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(-300, 300)
    for buckets, distance in ((32, 128), (16, 20), (4, 3)):
        assert torch.equal(position_buckets(offset, buckets, distance), T5Attention._relative_position_bucket(offset, True, buckets, distance))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    """A residual stream beyond float16's 65504, as T5 v1.1 has, still gives the float32 answer."""
    torch.manual_seed(0)
    ours = T5Encoder(T5Config(vocab_size=101, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"))
    initialise_t5(ours)
    for block in ours.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.mul_(2e5)
        block.layer[1].DenseReluDense.wo.weight.clamp_(-6e4, 6e4)
    ids = torch.randint(3, 101, (2, 12))
    hidden: list[torch.Tensor] = []
    hook = ours.encoder.final_layer_norm.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    full = ours(ids)
    hook.remove()
    assert hidden[0].abs().max() > 65504
    half = ours.to(dtype)(ids)
    assert half.dtype == dtype
    assert half.isfinite().all()
    error = (half.float() - full).square().mean().sqrt()
    assert error < (0.01 if dtype is torch.float16 else 0.08) * full.square().mean().sqrt()


@torch.no_grad()
def test_initialisation_scales() -> None:
    torch.manual_seed(0)
    model = T5Encoder(T5Config(vocab_size=101, d_model=64, d_kv=32, d_ff=256, num_layers=2, num_heads=4))
    initialise_t5(model)
    attention, feed_forward = model.encoder.block[0].layer[0].SelfAttention, model.encoder.block[0].layer[1].DenseReluDense
    for weight, std in [
        (attention.q.weight, (64 * 32) ** -0.5),
        (attention.k.weight, 64**-0.5),
        (attention.o.weight, 128**-0.5),
        (feed_forward.wi.weight, 64**-0.5),
        (feed_forward.wo.weight, 256**-0.5),
        (model.shared.weight, 1.0),
    ]:
        assert float(weight.std()) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "umt5"}, "t5 was wanted"),
        ({"feed_forward_proj": "gated-silu"}, "relu, gated-gelu"),
        ({"d_kv": 0}, "above 0"),
        ({"num_heads": 2.5}, "int was wanted"),
        ({"relative_attention_num_buckets": 2}, "at least 4"),
        ({"relative_attention_max_distance": 8}, "above a quarter"),
    ],
)
def test_configs_that_are_refused(change: dict[str, object], message: str) -> None:
    good = {"model_type": "t5", "layer_norm_epsilon": 1, "dense_act_fn": "relu"}
    assert T5Config.from_dict(good) == T5Config(layer_norm_epsilon=1)
    with pytest.raises(ModelError, match=message):
        T5Config.from_dict(good | change)
