"""The CLIP/T5 join: pads, dropped encoders, order, scale, and a refiner that starts as the identity."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from tu_diffuse.contracts import Conditioning
from tu_diffuse.errors import ModelError
from tu_diffuse.text_encoders.conditioner import Conditioner, ConditionerConfig

CONFIG = ConditionerConfig(clip_width=24, clip_pooled_width=20, t5_width=40, width=32, pooled_width=48, refiner_layers=2)
CLIP, T5 = 7, 9


def conditioner(config: ConditionerConfig = CONFIG, trained: bool = True) -> Conditioner:
    """With weights away from the trivial start when `trained`, so that the refiner does something."""
    torch.manual_seed(1)
    model = Conditioner(config)
    if trained:
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def inputs(batch: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "clip_tokens": torch.randn(batch, CLIP, 24, generator=generator),
        "clip_mask": torch.arange(CLIP) < torch.tensor([[3], [7], [5]])[:batch],
        "clip_pooled": torch.randn(batch, 20, generator=generator),
        "t5_tokens": torch.randn(batch, T5, 40, generator=generator),
        "t5_mask": torch.arange(T5) < torch.tensor([[9], [2], [6]])[:batch],
    }


def counted(out: Conditioning, row: int) -> Tensor:
    """The tokens of a row that its mask counts."""
    return out.tokens[row][out.mask[row]]


@pytest.mark.parametrize("pooled", ["clip", "clip+t5"])
@torch.no_grad()
def test_pads_have_no_effect(pooled: str) -> None:
    model = conditioner(replace(CONFIG, pooled=pooled))
    data = inputs()
    other = data | {name: torch.where(data[name[: -len("tokens")] + "mask"][..., None], data[name], 50.0) for name in ("clip_tokens", "t5_tokens")}
    before, after = model(**data), model(**other)
    for row in range(3):
        assert torch.allclose(counted(before, row), counted(after, row), atol=1e-6)
    assert torch.allclose(before.pooled, after.pooled, atol=1e-6)
    assert torch.equal(before.mask, torch.cat([data["clip_mask"], data["t5_mask"], torch.ones(3, 1, dtype=torch.bool)], dim=1))
    unmasked = model(**data | {"t5_mask": torch.ones(3, T5, dtype=torch.bool)})
    assert not torch.allclose(counted(before, 1)[0], counted(unmasked, 1)[0], atol=1e-3)


@torch.no_grad()
def test_dropping_an_encoder_equals_removing_its_tokens() -> None:
    model = conditioner()
    data = inputs()
    gone, here = torch.tensor([False, False, False]), torch.tensor([True, True, True])
    no_t5 = data | {"t5_tokens": data["t5_tokens"][:, :0], "t5_mask": data["t5_mask"][:, :0]}
    no_clip = data | {"clip_tokens": data["clip_tokens"][:, :0], "clip_mask": data["clip_mask"][:, :0]}
    dropped, removed = model(**data, keep_t5=gone), model(**no_t5)
    assert torch.allclose(dropped.pooled, removed.pooled, atol=1e-5)
    for row in range(3):
        assert torch.allclose(counted(dropped, row), counted(removed, row), atol=1e-5)
    dropped, removed = model(**data, keep_clip=gone), model(**no_clip, keep_clip=gone)
    assert torch.allclose(dropped.pooled, removed.pooled, atol=1e-5)
    for row in range(3):
        assert torch.allclose(counted(dropped, row), counted(removed, row), atol=1e-5)
    kept = model(**data, keep_clip=here, keep_t5=here)
    assert torch.equal(kept.tokens, model(**data).tokens)
    assert torch.equal(kept.pooled, model(**data).pooled)
    assert not torch.allclose(kept.pooled, dropped.pooled, atol=1e-2)


@torch.no_grad()
def test_dropped_rows_know_nothing_of_the_encoder() -> None:
    """Row by row: what a dropped encoder says has no effect on that row, and still has on the others."""
    model = conditioner()
    data = inputs()
    keep = torch.tensor([True, False, True])
    for names, flag in ((("clip_tokens", "clip_pooled"), "keep_clip"), (("t5_tokens",), "keep_t5")):
        other = data | {name: data[name] + torch.randn_like(data[name]) for name in names}
        before, after = model(**data, **{flag: keep}), model(**other, **{flag: keep})
        assert torch.allclose(counted(before, 1), counted(after, 1), atol=1e-6)
        assert torch.allclose(before.pooled[1], after.pooled[1], atol=1e-6)
        for row in (0, 2):
            assert not torch.allclose(counted(before, row), counted(after, row), atol=1e-3)
            assert not torch.allclose(before.pooled[row], after.pooled[row], atol=1e-3)


@torch.no_grad()
def test_both_dropped_leaves_the_null_token() -> None:
    model = conditioner()
    gone = torch.zeros(3, dtype=torch.bool)
    out = model(**inputs(), keep_clip=gone, keep_t5=gone)
    assert out.mask.sum(dim=1).tolist() == [1, 1, 1]
    assert out.mask[:, -1].all()
    assert out.tokens.isfinite().all()
    assert out.pooled.isfinite().all()
    assert torch.allclose(out.tokens[0, -1], out.tokens[2, -1], atol=1e-6)
    assert torch.allclose(out.pooled[0], out.pooled[2], atol=1e-6)
    assert out.pooled.std() > 0.1


@torch.no_grad()
def test_order_is_clip_then_t5_then_null() -> None:
    model = conditioner(replace(CONFIG, refiner_layers=0))
    data = inputs()
    out = model(**data)
    assert out.tokens.shape == (3, CLIP + T5 + 1, 32)
    assert out.pooled.shape == (3, 48)
    for name, places in (("clip_tokens", range(CLIP)), ("t5_tokens", range(CLIP, CLIP + T5))):
        changed = model(**data | {name: data[name] + torch.randn_like(data[name])}).tokens
        moved = (changed - out.tokens).abs().amax(dim=(0, 2)) > 1e-3
        assert moved.tolist() == [place in places for place in range(CLIP + T5 + 1)]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@torch.no_grad()
def test_leaves_with_standard_deviation_one(scale: float) -> None:
    model = conditioner(trained=False)
    data = inputs()
    out = model(**{name: value * scale if value.is_floating_point() else value for name, value in data.items()})
    assert 0.9 < float(out.tokens.std()) < 1.1
    assert 0.9 < float(out.pooled.std()) < 1.1


@torch.no_grad()
def test_types_tell_the_encoders_apart() -> None:
    config = replace(CONFIG, t5_width=24, refiner_layers=0)
    model = conditioner(config, trained=False)
    model.t5.linear.load_state_dict(model.clip.linear.state_dict())
    same = torch.randn(1, 4, 24)
    mask = torch.ones(1, 4, dtype=torch.bool)
    out = model(same, mask, torch.randn(1, 20), same, mask).tokens[0]
    assert (out[:4] - out[4:8]).abs().mean() > 0.1


def test_refiner_starts_as_the_identity_and_learns() -> None:
    data: dict[str, Any] = inputs()
    plain, refined = conditioner(replace(CONFIG, refiner_layers=0), trained=False), conditioner(trained=False)
    missing, extra = refined.load_state_dict(plain.state_dict(), strict=False)
    assert not extra
    assert all(name.startswith("refiner.") for name in missing)
    out = refined(**data)
    assert torch.equal(out.tokens, plain(**data).tokens)
    (out.tokens * torch.randn_like(out.tokens)).sum().backward()
    for layer in refined.refiner:
        assert layer.to_out.weight.grad.abs().sum() > 0
        assert layer.fc2.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_refiner_binds_words_across_encoders() -> None:
    model = conditioner()
    data = inputs()
    changed = model(**data | {"t5_tokens": data["t5_tokens"] + torch.randn_like(data["t5_tokens"])})
    assert (changed.tokens - model(**data).tokens)[:, :CLIP].abs().max() > 1e-3


def test_config_round_trip_and_refusals() -> None:
    assert ConditionerConfig.from_dict(CONFIG.to_dict()) == CONFIG
    for change, message in (
        ({"_class_name": "Other"}, "Conditioner was wanted"),
        ({"pooled": "t5"}, r"clip, clip\+t5"),
        ({"width": None}, "no `width`"),
        ({"t5_width": -1}, "above 0"),
        ({"refiner_layers": -1}, "0 to 256 layers"),
        ({"refiner_heads": 5}, "divisor"),
    ):
        with pytest.raises(ModelError, match=message):
            ConditionerConfig.from_dict(CONFIG.to_dict() | change)


@torch.no_grad()
def test_loads_into_the_meta_device() -> None:
    model = conditioner()
    with torch.device("meta"):
        other = Conditioner(CONFIG)
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(other(**inputs()).tokens, model(**inputs()).tokens)
