"""The training loop: exact resume, torn checkpoints, the order of samples, the learning rate, the moving average."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from tu_diffuse.training.checkpoints import load_newest
from tu_diffuse.training.loop import TrainConfig, batch_indices, generator_for, train, update_average

CONFIG = TrainConfig(steps=12, lr=0.05, warmup=3, cooldown=4, save_every=4, log_every=2, seed=5)
DATA = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))


def run(folder: Path, config: TrainConfig = CONFIG, stop_at: int | None = None) -> tuple[nn.Module, nn.Module]:
    """Train a small network to predict a noisy function of its input; `stop_at` kills the run at the start of that step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss_at(step: int) -> dict[str, Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        generator = generator_for(config.seed, step)
        rows = DATA[batch_indices(len(DATA), 8, config.seed, step)]
        target = rows.sum(1, keepdim=True).sin() + 0.1 * torch.randn(8, 1, generator=generator)
        return {"loss": (model(rows) - target).square().mean()}

    return model, train(model, loss_at, config, folder, lambda line: None)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    run(tmp_path, TrainConfig(steps=400, lr=0.02, warmup=3, log_every=20))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize("stop_at", [1, 5, 9, 11])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    whole_model, whole_average = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=stop_at)
    model, average = run(tmp_path / "killed")
    for ours, theirs in ((model, whole_model), (average, whole_average)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert not torch.equal(model[0].weight, average[0].weight)  # type: ignore[union-attr]
    one, other = (load_newest(tmp_path / name) for name in ("whole", "killed"))
    assert one is not None
    assert other is not None
    assert all(torch.equal(tensor, other.optimizer[name]) for name, tensor in one.optimizer.items())
    assert (tmp_path / "whole" / "losses.jsonl").read_text() == (tmp_path / "killed" / "losses.jsonl").read_text()


def test_torn_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    run(tmp_path)
    newest = tmp_path / "checkpoint-00000012" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 8


def test_only_whole_checkpoints_are_left(tmp_path: Path) -> None:
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000008", "checkpoint-00000012", "losses.jsonl"]


def test_lengthened_run_equals_the_longer_one(tmp_path: Path) -> None:
    long = TrainConfig(steps=12, lr=0.05, warmup=3, cooldown=0, save_every=4)
    run(tmp_path / "two", TrainConfig(steps=8, lr=0.05, warmup=3, cooldown=0, save_every=4))
    two, _ = run(tmp_path / "two", long)
    one, _ = run(tmp_path / "one", long)
    assert torch.equal(one[0].weight, two[0].weight)  # type: ignore[union-attr]


def test_step_with_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    before = model.weight.clone()
    train(model, lambda step: {"loss": model(torch.tensor([[1.0, float("inf")]])).mean()}, TrainConfig(steps=1, lr=1.0), tmp_path, lambda line: None)
    assert torch.equal(model.weight, before)


def test_each_sample_once_an_epoch_and_another_order_in_the_next() -> None:
    epochs = [torch.cat([batch_indices(40, 8, 3, step) for step in range(5 * epoch, 5 * epoch + 5)]) for epoch in range(2)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(40))
    assert not torch.equal(*epochs)


def test_learning_rate_rises_stays_and_falls() -> None:
    config = TrainConfig(steps=100, lr=2.0, warmup=10, cooldown=40)
    rates = [config.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:60] == pytest.approx([2.0] * 51)
    assert rates[80] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.01


def test_moving_average_of_a_constant_gradient() -> None:
    average = {"w": torch.zeros(1)}
    for _ in range(3):
        update_average(average, {"w": torch.ones(1)}, 0.5)
    assert average["w"].item() == pytest.approx(1 - 0.5**3)
