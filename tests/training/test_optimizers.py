"""Optimizers by name: they lower the loss, and their state comes back from a checkpoint bit for bit."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from tu_diffuse.errors import UsageError
from tu_diffuse.training.checkpoints import load_newest
from tu_diffuse.training.loop import train
from tu_diffuse.training.optimizers import make_optimizer, optimizer_state, restore_optimizer
from tu_diffuse.training.train_config import OptimizerName, TrainConfig

RATES: dict[OptimizerName, float] = {"adamw": 1e-2, "adamw8bit": 1e-2, "adafactor": 1e-1, "lion": 2e-3, "prodigy": 1.0}
LIBRARIES = {"adamw8bit": "bitsandbytes", "lion": "pytorch_optimizer", "prodigy": "pytorch_optimizer"}
CONFIG = TrainConfig(steps=12, lr=1.0, warmup=0, save_every=5, log_every=1, ema_decay=None)
each_optimizer = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.skipif(name in LIBRARIES and find_spec(LIBRARIES[name]) is None, reason="extra")) for name in RATES]
)


def config_of(name: OptimizerName, **changes: int) -> TrainConfig:
    return replace(CONFIG, optimizer=name, lr=RATES[name], **changes)


def trained(folder: Path, config: TrainConfig, stop_at: int | None = None) -> nn.Module:
    """Fit a linear map; its 5,120 weights are enough for 8-bit moments, which bitsandbytes leaves to matrices of 4,096 and more."""
    model = nn.Linear(64, 80)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def loss_at(step: int) -> dict[str, Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        rows = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(rows) - rows.roll(1, 1).repeat(1, 2)[:, :80]).square().mean()}

    return train(model, loss_at, config, folder, lambda line: None)


@each_optimizer
def test_the_loss_falls(tmp_path: Path, name: OptimizerName) -> None:
    trained(tmp_path, config_of(name, steps=150))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]


@each_optimizer
@pytest.mark.parametrize("stop_at", [6, 11])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, name: OptimizerName, stop_at: int) -> None:
    whole = trained(tmp_path / "whole", config_of(name))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", config_of(name), stop_at)
    cut = trained(tmp_path / "cut", config_of(name))
    assert all(torch.equal(tensor, cut.state_dict()[key]) for key, tensor in whole.state_dict().items())
    one, other = (load_newest(tmp_path / run) for run in ("whole", "cut"))
    assert one is not None
    assert other is not None
    assert one.optimizer.keys() == other.optimizer.keys()
    assert len(one.optimizer) >= 2
    assert all(torch.equal(tensor, other.optimizer[key]) for key, tensor in one.optimizer.items())
    assert one.numbers == other.numbers


@each_optimizer
def test_state_comes_back_whole(name: OptimizerName) -> None:
    """The library's own `state_dict` of the restored optimizer is that of the first one."""
    model = nn.Linear(64, 80)
    names = [key for key, _ in model.named_parameters()]
    first, second = (make_optimizer(model.parameters(), config_of(name)) for _ in range(2))
    for _ in range(3):
        model(torch.randn(4, 64)).square().sum().backward()
        first.step()
    restore_optimizer(second, names, *optimizer_state(first, names))

    def compare(a: object, b: object) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            assert a.keys() == b.keys()
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b

    compare(first.state_dict()["state"], second.state_dict()["state"])
    compare(first.state_dict()["param_groups"][0], second.state_dict()["param_groups"][0])
    assert len(second.state_dict()["state"]) == 2


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tu_diffuse.training.optimizers.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs bitsandbytes.*tu-diffuse\[optimizers\]"):
        make_optimizer(nn.Linear(2, 2).parameters(), config_of("adamw8bit"))
    assert "tu_diffuse" in sys.modules
    make_optimizer(nn.Linear(2, 2).parameters(), config_of("adamw"))


def test_scale_of_the_loss_is_lowered_on_overflow_and_resumes_exactly(tmp_path: Path) -> None:
    """A loss of 1e6 overflows float32 only at scales above 1e32, so the network itself computes in float16."""
    model, lines = nn.Linear(8, 1), list[str]()
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = replace(CONFIG, optimizer="adamw", lr=1e-2, loss_scaling=True, save_every=1)

    def run(folder: Path, stop_at: int | None = None) -> tuple[dict[str, Tensor], dict[str, float]]:
        model.load_state_dict(start)

        def loss_at(step: int) -> dict[str, Tensor]:
            if step == stop_at:
                raise KeyboardInterrupt
            rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            half = (rows.half() * 40) @ model.weight.half().T  # its gradient is computed in float16
            return {"loss": (half.float() / 40 - rows.sum(1, keepdim=True)).square().mean()}

        train(model, loss_at, config, folder, lambda line: lines.append(str(line)))
        found = load_newest(folder)
        assert found is not None
        return {key: tensor.clone() for key, tensor in model.state_dict().items()}, found.scaler

    whole, scale = run(tmp_path / "whole")
    assert any("overflowed" in line for line in lines)
    assert 1 < scale["scale"] < 65536
    assert not torch.equal(whole["weight"], start["weight"])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=4)
    cut, scale_again = run(tmp_path / "cut")
    assert torch.equal(cut["weight"], whole["weight"])
    assert scale == scale_again
